"""The demo: its parts, and the whole of it on the real model where the two packages are installed."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "demo.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastlora_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastlora_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo = load()
Pair = demo.Pair


def missing() -> str | None:
    try:
        demo.check_packages()
    except demo.Missing as error:
        return str(error)
    return None


def test_pairs_are_the_first_two_turns() -> None:
    conversations = [["Hi", "Hello", "Bye"], ["What  is\n a list?", " A\n  sequence. "]]
    assert demo.pairs_of(conversations) == [Pair("Hi", "Hello"), Pair("What is a list?", "A\n  sequence.")]


@pytest.mark.parametrize("broken", ["question? - 'answer'", ["alone"], ["", "answer"], ["question", "  "], None])
def test_what_is_no_pair_is_passed_over(broken: Any) -> None:
    assert demo.pairs_of([broken, ["q", 22]]) == [Pair("q", "22")]


def test_read_pairs_reads_every_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text("conversations:\n- - second\n  - it\n", encoding="utf-8")
    (tmp_path / "a.yml").write_text("conversations:\n- - erst für\n  - it\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no", encoding="utf-8")
    assert [pair.question for pair in demo.read_pairs(tmp_path)] == ["erst für", "second"]


def test_distinct_drops_repeats_and_long_pairs() -> None:
    pairs = [Pair("Q", "a"), Pair("q", "A"), Pair("Q", "b"), Pair("Q", "x" * 20)]
    assert demo.distinct(pairs, longest=20) == [Pair("Q", "a"), Pair("Q", "b")]


def questions(n: int) -> list[Any]:
    return [Pair(text, str(i)) for i in range(n) for text in (f"Question {i}?", f"question {i}")]


def test_no_question_is_on_both_sides_of_the_split() -> None:
    training, evaluation = demo.split(questions(20), 5)
    assert len(evaluation) == 5
    assert len(training) == 30
    assert not {pair.answer for pair in training} & {pair.answer for pair in evaluation}


def test_split_is_a_function_of_the_seed() -> None:
    assert demo.split(questions(20), 5, seed=1) == demo.split(questions(20), 5, seed=1)
    assert demo.split(questions(20), 5, seed=1) != demo.split(questions(20), 5, seed=2)


def test_split_wants_enough_questions() -> None:
    with pytest.raises(ValueError, match="5 questions are too few to hold out 5"):
        demo.split(questions(5), 5)


def test_pairs_are_written_as_chat_messages(tmp_path: Path) -> None:
    demo.write_pairs([Pair("Qué?", "two\nlines"), Pair("q", "a")], tmp_path / "data" / "x.jsonl")
    lines = (tmp_path / "data" / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0])["messages"] == [
        {"role": "user", "content": "Qué?"},
        {"role": "assistant", "content": "two\nlines"},
    ]


def test_largest_difference() -> None:
    assert demo.largest_difference([(1, 2.0), (2, 1.0)], [(1, 2.25), (2, 0.5)]) == 0.5


@pytest.mark.parametrize("where", [0, 1])
def test_a_nan_in_a_curve_is_not_passed_over(where: int) -> None:
    one = [(1, 2.0), (2, 1.0)]
    other = [(step, math.nan if i == where else loss) for i, (step, loss) in enumerate(one)]
    assert math.isnan(demo.largest_difference(one, other))


@pytest.mark.parametrize("other", [[], [(1, 2.0)], [(1, 2.0), (3, 1.0)]])
def test_curves_of_other_steps_are_not_compared(other: list[tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="different steps"):
        demo.largest_difference([(1, 2.0), (2, 1.0)], other)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 30, 100])
def test_shown_steps_hold_the_first_and_the_last(steps: int) -> None:
    rows = demo.shown(steps)
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1], len(rows)) == (0, steps - 1, min(steps, 10))


def test_a_slower_fastlora_is_said() -> None:
    assert "1.25 times as fast" in demo.speed_line({"peft": 50.0, "fastlora": 40.0})
    assert "slower: 0.80 of" in demo.speed_line({"peft": 40.0, "fastlora": 50.0})


def test_a_missing_package_gets_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "EXTRA", (*demo.EXTRA, "no_such_package"))
    monkeypatch.setattr(demo, "CONTENT", {"no_such_model": "no-such-model"})
    assert demo.main([]) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "no_such_package, no_such_model; run 'make demo'" in line
    assert "pip install 'fastlora-kernels[demo]' and pip install --no-deps no-such-model" in line


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted: run it again to start over"),
        (demo.Failure("not so: the loss curves agree"), 1, "error: not so: the loss curves agree"),
    ],
)
def test_what_stops_the_demo_is_one_line_and_a_status(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any) -> None:
        raise error

    monkeypatch.setattr(demo, "check_packages", lambda: None)
    monkeypatch.setattr(demo, "run", stop)
    assert demo.main([]) == status
    line = capfd.readouterr().err
    assert line.startswith(text)
    assert line.count("\n") == 1


def test_the_corpus_gives_enough_pairs() -> None:
    pytest.importorskip("yaml")
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("chatterbot-corpus is not installed")
    corpus = demo.read_pairs(demo.package_folder("chatterbot_corpus") / "data" / "english")
    assert len(corpus) > 2000
    training, evaluation = demo.split(demo.distinct(corpus), demo.CPU.eval_pairs)
    assert len(training) >= demo.CPU.steps * demo.CPU.batch_size
    assert len(evaluation) == demo.CPU.eval_pairs


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    # All comes out of packages: a wish for the network is an error here.
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--device", "cpu", "--output-dir", str(tmp_path / "demo")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Warning" not in result.stderr
    assert "%|" not in result.stderr  # the libraries' progress bars
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["layers_replaced"] == 210
    assert summary["eval_loss_after"] < 0.75 * summary["eval_loss_before"]
    assert summary["max_loss_difference"] <= summary["loss_tolerance"]
    assert summary["max_logit_difference"] <= summary["logit_tolerance"]
    assert abs(summary["eval_loss_after_peft"] - summary["eval_loss_after"]) <= summary["eval_loss_tolerance"]
    assert all(summary["checks"].values())
    assert min(summary[key] for key in ("step_ms_fastlora", "step_ms_peft", "seconds", "tokens_per_second")) > 0
    for curve in summary["curves"].values():
        assert [step for step, _ in curve] == list(range(summary["steps"] + 2))
    adapter = Path(summary["adapter_path"])
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (adapter / "adapter_config.json").is_file()
    story = (
        *("layers fused", "a step: fastlora is", "step 0  evaluation loss", "the same run with PEFT's layers"),
        *("the two loss curves", "largest difference", "before and after", str(adapter), "summary.json"),
    )
    places = [result.stdout.find(part) for part in story]
    assert min(places) >= 0
    assert places == sorted(places)
