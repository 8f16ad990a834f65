"""``fastlora search``: what it takes and refuses, pruning, resuming, files, and a whole search in processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is missing (extra: search)")
pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: search)")
sys.path.insert(0, str(Path(__file__).parent / "training"))
import tiny
import yaml

from fastlora.cli import main
from fastlora.search import results, space, study
from fastlora.training.config import load as load_training
from fastlora.training.errors import Interrupted, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "tiny", hidden=32)


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    """A training configuration with a search in a small space."""
    rows = tiny.write_rows(tmp_path / "text.jsonl", tiny.text_rows(40))
    return write(
        tmp_path / "run.yaml",
        model=str(model),
        data=str(rows),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        max_length=32,
        max_steps=4,
        batch_size=2,
        r=2,
        lr=1e-4,
        eval_fraction=0.2,
        search={
            "trials": 3,
            "evaluations": 2,
            "space": {"r": {"choices": [2, 4]}, "lr": {"low": 1e-4, "high": 3e-2, "log": True}},
        },
    )


def write(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def changed(file: Path, **search: Any) -> Path:
    values = yaml.safe_load(file.read_text())
    values["search"] |= search
    return write(file, **values)


class Process:
    """In the place of a worker process: what it says is computed from the settings."""

    exitcode = -9

    def kill(self) -> None:
        pass

    def join(self, timeout: float | None = None) -> None:
        pass


class Pipe:
    """A connection to nobody: each job is answered at once by ``script``, a list of what is said."""

    def __init__(self, script: Any) -> None:
        self.script, self.said, self.answers = script, [], []

    def send(self, message: Any) -> None:
        if isinstance(message, tuple):
            self.said = list(self.script(message[0]))
            self.stop = False
        elif message:
            self.said = [("pruned", None)]

    def recv(self) -> Any:
        said = self.said.pop(0)
        if isinstance(said, BaseException):
            raise said
        return said

    def close(self) -> None:
        pass


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Searches without processes: ``pretend(function)``, which is given a trial's values and yields messages."""

    def install(script: Any) -> None:
        monkeypatch.setattr(study, "wait", lambda connections: connections[:1])
        monkeypatch.setattr(study._Runner, "_new_worker", lambda self: study._Worker(Process(), Pipe(script)))

    return install


def losses(values: dict[str, Any]) -> list[Any]:
    """Best at a rate of 1e-2 and rank 4."""
    import math

    loss = 1 + (math.log10(values["lr"]) + 2) ** 2 + (0.0 if values["r"] == 4 else 0.5)
    return [("evaluated", 1, {"loss": loss + 1}), ("done", {"loss": loss, "step_ms": 1.0, "steps": 4})]


def run(file: Path, **options: Any) -> study.Outcome:
    config, settings = space.load(file, options.pop("trials", None))
    return study.search(config, settings, config.output_dir / "search", **options)


def test_a_search_beats_what_it_began_with(file: Path, pretend: Any) -> None:
    pretend(losses)
    lines: list[str] = []
    seen: list[tuple[int, int]] = []
    found = run(
        changed(file, trials=25), say=lines.append, progress=lambda done, total, text: seen.append((done, total))
    )
    assert len(found.rows) == 25
    assert {"lr": found.rows[0]["lr"], "r": found.rows[0]["r"]} == {"lr": 1e-4, "r": 2}  # the file's own settings
    assert found.best["loss"] < 1.2 < found.rows[0]["loss"]
    assert found.held_out["best"]["loss"] < found.held_out["default"]["loss"]
    assert seen[0] == (0, 25)
    assert seen[-1] == (25, 25)
    assert lines[0].startswith("trial 0  5.5  r 2  lr 0.0001")
    chosen = load_training(found.config)
    before = load_training(file)
    assert chosen.r == found.best["r"] == 4
    assert chosen.lr == pytest.approx(found.best["lr"])
    assert (chosen.data, chosen.output_dir, chosen.max_steps) == (before.data, before.output_dir, before.max_steps)


def test_tables_and_plots(file: Path, pretend: Any) -> None:
    pretend(losses)
    found = run(changed(file, trials=8))
    folder = found.folder
    with (folder / "trials.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["trial"]) for row in rows] == list(range(8))
    kept = json.loads((folder / "trials.json").read_text())
    assert [row["trial"] for row in kept["trials"]] == list(range(8))
    assert kept["held_out"] == found.held_out
    page = (folder / "trials.md").read_text().splitlines()
    assert page[0].startswith("| trial | state | loss | seconds |")
    assert page[2].startswith(f"| {found.best['trial']} | finished |")
    for name in results.PLOTS:
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert "<svg" in (folder / f"{name}.svg").read_text()
    assert set(found.files) >= {folder / "trials.csv", folder / "history.png", found.config}


def test_one_setting_has_no_parallel_coordinates(file: Path, pretend: Any) -> None:
    pretend(losses)
    found = run(changed(file, trials=3, space={"lr": {"low": 1e-4, "high": 3e-2, "log": True}}), final=False)
    assert {path.stem for path in found.files if path.suffix == ".png"} == {"history", "importance", "slices"}


def test_what_is_worse_than_the_median_is_stopped(file: Path, pretend: Any) -> None:
    count = 0

    def script(values: dict[str, Any]) -> list[Any]:
        nonlocal count
        count += 1
        loss = 9.0 if count == 4 else float(count)
        return [("evaluated", 1, {"loss": loss}), ("done", {"loss": loss, "step_ms": 1.0, "steps": 4})]

    pretend(script)
    found = run(changed(file, trials=4, startup=3), final=False)
    assert [row["state"] for row in found.rows] == ["finished"] * 3 + ["stopped"]
    assert found.rows[3]["loss"] == 9.0
    assert found.best["trial"] == 0
    assert found.held_out == {}


def test_no_pruning(file: Path, pretend: Any) -> None:
    pretend(lambda values: [("evaluated", 1, {"loss": 1 / values["lr"]}), ("done", {"loss": 1 / values["lr"]})])
    found = run(changed(file, trials=8, startup=1, prune=False), final=False)
    assert {row["state"] for row in found.rows} == {"finished"}


def test_a_second_call_goes_on(file: Path, pretend: Any) -> None:
    calls = []
    pretend(lambda values: calls.append(values["output_dir"]) or losses(values))
    run(changed(file, trials=3), final=False)
    found = run(changed(file, trials=5), final=False)
    assert [Path(call).name for call in calls] == ["0000", "0001", "0002", "0003", "0004"]
    assert len(found.rows) == 5
    assert len({row["lr"] for row in found.rows}) == 5  # nothing is drawn again
    again = run(file, final=False)
    assert len(calls) == 5
    assert again.rows == found.rows


def test_an_interrupted_search_repeats_what_was_running(file: Path, pretend: Any) -> None:
    count = 0

    def script(values: dict[str, Any]) -> list[Any]:
        nonlocal count
        count += 1
        return [KeyboardInterrupt()] if count == 2 else losses(values)

    pretend(script)
    with pytest.raises(Interrupted, match="1 of 3 trials are kept"):
        run(file, final=False)
    folder = load_training(file).output_dir / "search"
    assert json.loads((folder / "trials.json").read_text())["trials"][0]["trial"] == 0
    found = run(file, final=False)
    assert [row["trial"] for row in found.rows] == [0, 2, 3]
    import optuna

    kept = optuna.load_study(study_name=study.NAME, storage=f"sqlite:///{folder / 'study.db'}").trials
    assert kept[1].params == kept[2].params  # once more, and not counted the first time
    assert kept[1].user_attrs == {results.LOST: True}


def test_failures_are_rows_with_reasons(file: Path, pretend: Any) -> None:
    count = 0

    def script(values: dict[str, Any]) -> list[Any]:
        nonlocal count
        count += 1
        return {2: [("failed", "out of memory")], 3: [EOFError()], 4: [("done", {"loss": float("nan")})]}.get(
            count, losses(values)
        )

    pretend(script)
    found = run(changed(file, trials=5), final=False)
    assert [row["state"] for row in found.rows] == ["finished", "failed", "failed", "failed", "finished"]
    assert [row["message"] for row in found.rows[1:4]] == [
        "out of memory",
        "its process ended with exit code -9",
        "its loss is nan",
    ]


def test_a_search_in_which_all_fails_ends(file: Path, pretend: Any) -> None:
    pretend(lambda values: [("failed", "no such layer")])
    with pytest.raises(UserError, match="the first 3 trials failed: no such layer"):
        run(changed(file, trials=50))


def test_a_short_search_in_which_all_fails_names_the_reason(file: Path, pretend: Any) -> None:
    pretend(lambda values: [("failed", "no such layer")])
    with pytest.raises(UserError, match=r"no trial of .* was finished, and 2 failed: no such layer"):
        run(changed(file, trials=2))
    assert "no such layer" in (file.parent / "run" / "search" / "trials.csv").read_text()


@pytest.mark.parametrize("says", [("failed", "the loss is nan"), EOFError()])
def test_a_comparison_that_fails_leaves_what_was_found(file: Path, pretend: Any, says: Any) -> None:
    lines: list[str] = []
    pretend(lambda values: [says] if values["output_dir"].endswith("default") else losses(values))
    found = run(file, say=lines.append)
    assert list(found.held_out) == ["best"]
    assert found.config.is_file()
    assert any(line.startswith("default settings failed: ") for line in lines)


def test_another_search_in_the_folder(file: Path, pretend: Any) -> None:
    pretend(losses)
    run(file, final=False)
    values = yaml.safe_load(file.read_text())
    write(file, **(values | {"max_length": 16}))
    with pytest.raises(UserError, match="another search, in which max_length was different"):
        run(file, final=False)


def test_two_searches_in_one_folder(file: Path, pretend: Any) -> None:
    folder = load_training(file).output_dir / "search"

    def script(values: dict[str, Any]) -> list[Any]:
        with pytest.raises(UserError, match="another search runs"):
            run(file)
        return losses(values)

    pretend(script)
    assert run(file, final=False).folder == folder


def test_a_damaged_study(file: Path, pretend: Any) -> None:
    pretend(losses)
    folder = run(file, final=False).folder
    (folder / "study.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"cannot read .*study\.db"):
        run(file)


def test_the_three_parts_of_the_data(file: Path, pretend: Any) -> None:
    pretend(losses)
    folder = run(file, final=False).folder
    config, settings = space.load(file)
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("train", "validation", "test")}
    rows = {name: path.read_text().splitlines() for name, path in files.items()}
    assert {name: len(lines) for name, lines in rows.items()} == {"test": 8, "validation": 3, "train": 29}
    parts = {"train": "a", "validation": "b", "test": "c"}
    runner = study._Runner(
        study._open(folder, settings, 1), config, settings, settings.space or {}, parts, folder, 1, print, print
    )
    values = runner._values({"r": 4}, "x", "validation")
    assert (values["data"], values["eval_data"], values["r"]) == ("a", "b", 4)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"trails": 3}, "unknown key search.trails; did you mean trials?"),
        ({"trials": 0}, "search.trials: should be greater than or equal to 1|greater than or equal to 1"),
        ({"metric": "f1"}, "causal-lm has no f1"),
        ({"space": {"rank": {"choices": [1, 2]}}}, "unknown setting 'rank'"),
        ({"space": {"data": {"choices": ["a", "b"]}}}, "data must be the same in all trials"),
        ({"space": {"r": {"choices": [4]}}}, r"search.space.r.choices: List should have at least 2 items[^;]*$"),
        ({"space": {"r": [4, 8]}}, r"search.space.r: give choices, or low and high, not \[4, 8\]$"),
        ({"space": {"r": {"choices": [0, 4]}}}, "r cannot be 0"),
        ({"space": {"lr": {"low": 1.0, "high": 0.1}}}, r"search.space.lr: low must be less than high[^;]*$"),
        ({"space": {"lr": {"low": 0.0, "high": 0.1, "log": True}}}, "log needs a low above 0"),
        ({"space": {"lr": {"low": 1e-4, "high": 5.0}}}, "lr cannot be 5.0"),
        ({"space": {"lr": {"low": 1e-4}}}, "search.space.lr.high is missing: give choices, or low and high$"),
        ({"space": {"lr": {"low": 1e-4, "hihg": 1e-3}}}, "hihg; did you mean high"),
    ],
)
def test_bad_searches(file: Path, search: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        space.load(changed(file, **search))
    assert "\n" not in str(caught.value)


def test_the_section_is_optional_and_not_for_train(file: Path) -> None:
    assert load_training(file).r == 2
    values = yaml.safe_load(file.read_text())
    del values["search"]
    config, settings = space.load(write(file, **values), 7)
    assert settings.trials == 7
    from fastlora.training import model as models

    found = space.default_space(config, models.skeleton(models.find(config.model)))
    assert set(found) == {"r", "lora_alpha", "lr", "lora_dropout", "method", "target_modules"}
    assert found["target_modules"].samples() == ["all-linear", "q_proj,k_proj,v_proj,o_proj"]
    assert space.start(config, found) == {
        "r": 2,
        "lora_alpha": 32,
        "lr": 1e-4,
        "lora_dropout": 0.0,
        "method": "lora",
        "target_modules": "all-linear",
    }
    for name, dimension in found.items():
        space.check_dimension(config, name, dimension)


def test_without_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", str(file)]) == 2
    assert "optuna is not installed: pip install 'fastlora-kernels[search]'" in capsys.readouterr().err


def test_command_in_processes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real training in two processes, then nothing more to do."""
    assert main(["search", str(file), "--trials", "3", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    folder = load_training(file).output_dir / "search"
    for number in range(3):
        assert f"trial {number}  " in out
        assert (folder / "trials" / f"{number:04d}" / "log.txt").is_file()
    assert "held out, best" in out
    assert not list(folder.glob("**/checkpoint-*"))
    held_out = json.loads((folder / "held_out.json").read_text())
    assert held_out["default"]["loss"] > 0
    assert main(["search", str(file), "--trials", "3"]) == 0
    assert "trial 0" not in capsys.readouterr().out.split("best settings")[0].split("held out")[0].split("┏")[0]
    assert main(["train", str(folder / "best.yaml"), "--max-steps", "1", "--no-tensorboard"]) == 0


@pytest.fixture
def listens() -> Iterator[None]:
    """This process hears Ctrl-C, and those that it starts do: a shell's background jobs would not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listens")
def test_ctrl_c_while_a_process_starts_is_not_lost() -> None:
    from fastlora.search.study import _no_interrupt

    def start() -> None:
        with _no_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        start()
    with _no_interrupt():
        command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "alive\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.mark.usefixtures("listens")
def test_the_first_process_does_not_hear_ctrl_c_either(tmp_path: Path) -> None:
    script = tmp_path / "first.py"
    script.write_text("""\
import multiprocessing, signal
from fastlora.search.study import _no_interrupt

def main():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set()))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=main)
    with _no_interrupt():
        process.start()
    process.join()
""")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "True\n"


@pytest.mark.usefixtures("listens")
def test_ctrl_c_keeps_what_was_done(file: Path) -> None:
    changed(file, trials=40)
    command = [sys.executable, "-m", "fastlora.cli", "search", str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial 1 "):
            break
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the search and its processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "of 40 trials are kept" in errors
    assert "Traceback" not in errors
    folder = load_training(file).output_dir / "search"
    assert len(json.loads((folder / "trials.json").read_text())["trials"]) >= 2
