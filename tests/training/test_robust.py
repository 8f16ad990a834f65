"""What goes wrong around a run ends in one line that says what to do: damage, full disks, no memory, no numbers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny  # noqa: F401  (skips where the train extra is missing)
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from fastlora.cli import main
from fastlora.training import checkpoints, durable
from fastlora.training.callbacks import LOG_NAME
from fastlora.training.config import load
from fastlora.training.train import train

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


def words(options: dict[str, Any], **values: Any) -> list[str]:
    found = ["train"]
    for key, value in (options | values).items():
        name = key.replace("_", "-")
        found += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return found


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora: ")
    assert error.count("\n") == 1, error
    return error


def adapter(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_no_pickle_is_written(trained: Any) -> None:
    found = [path for pattern in PICKLES for path in trained.output_dir.rglob(pattern)]
    assert found == []
    names = {path.name for path in (trained.output_dir / "checkpoint-16").iterdir()}
    assert names >= {
        "trainer_state.safetensors",
        "rng_state.safetensors",
        durable.MANIFEST,
        "adapter_model.safetensors",
    }


def test_damaged_checkpoints_are_refused(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train(load(None, options | {"save_steps": 2}))
    whole = adapter(options["output_dir"])
    output_dir = Path(options["output_dir"])
    last = output_dir / "checkpoint-4"
    for name in ("adapter_model.safetensors", "trainer_state.safetensors", "rng_state.safetensors"):
        for spoil in (flip, cut, Path.unlink):
            kept = (last / name).read_bytes()
            spoil(last / name)
            error = refused(capsys, words(options, resume=True))
            assert str(last / name) in error
            assert f"delete {last} to go on from checkpoint-2" in error
            (last / name).write_bytes(kept)
    (last / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pytorch_model.bin was not written by the run" in refused(capsys, words(options, resume=True))
    shutil.rmtree(last)
    resumed = train(load(None, options | {"resume": True}))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(resumed.output_dir).items())


def test_damaged_adapters_are_refused(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "x", "--device", "cpu", "--max-new-tokens", "1"]
    for i, spoil in enumerate((flip, cut)):
        folder = Path(shutil.copytree(trained.adapter_path, tmp_path / str(i)))
        file = folder / "adapter_model.safetensors"
        spoil(file)
        for arguments in (["generate", str(folder), *prompt], ["merge", str(folder), str(tmp_path / "new")]):
            assert str(file) in refused(capsys, arguments)
        (folder / durable.MANIFEST).unlink()  # as an adapter from elsewhere
        if spoil is cut:
            assert str(file) in refused(capsys, ["generate", str(folder), *prompt])
    pickled = Path(shutil.copytree(trained.adapter_path, tmp_path / "pickled"))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / durable.MANIFEST).unlink()
    error = refused(capsys, ["generate", str(pickled), *prompt])
    assert "adapter_model.bin is a pickle" in error
    (pickled / "adapter_config.json").write_text("{")
    assert str(pickled / "adapter_config.json") in refused(capsys, ["generate", str(pickled), *prompt])


def test_an_edited_model_card_is_no_damage(trained: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.adapter_path, tmp_path / "copy"))
    (folder / "README.md").write_text("what it is for")
    checkpoints.check_adapter_files(folder)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder``; skips the test where none may be mounted."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount") or os.name != "posix" or os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_fills_up(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a checkpoint, on a file system of its own; with more space the run goes on as if nothing was."""
    whole = train(load(None, options | {"save_steps": 2}))
    size = sum(p.stat().st_size for p in (whole.output_dir / "checkpoint-2").rglob("*") if p.is_file())
    monkeypatch.setattr(checkpoints, "check_space", lambda *arguments: None)
    with small_disk(tmp_path / "disk", int(1.6 * size)):
        output_dir = tmp_path / "disk" / "run"
        values = {"output_dir": str(output_dir), "save_steps": 2}
        error = refused(capsys, words(options, **values))
        assert f"the disk of {output_dir} is full" in error
        assert "--resume" in error
        assert [p.name for p in checkpoints.finished(output_dir)] == ["checkpoint-2"]
        assert not (output_dir / durable.WRITING).exists(), "what did not fit is gone"
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(tmp_path / "disk")], check=True)
        resumed = train(load(None, options | values | {"resume": True}))
        assert all(torch.equal(t, adapter(whole.output_dir)[name]) for name, t in adapter(output_dir).items())
        assert resumed.losses == whole.losses


def test_a_limit_on_files_is_one_line_too(options: dict[str, Any]) -> None:
    """RLIMIT_FSIZE, in a process of its own: no file of more than 20 kB can be written."""
    script = (
        "import resource, sys; from fastlora.cli import main; from fastlora.training import checkpoints\n"
        "checkpoints.make_writable = lambda *a: a[0].mkdir(parents=True, exist_ok=True)\n"
        "import fastlora.training.data as data; prepare = data.prepare\n"
        "def limited(*a):\n"
        "    found = prepare(*a); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); return found\n"
        "data.prepare = limited\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, *words(options, save_steps=1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"fastlora: the disk of {options['output_dir']} is full")
    assert "Traceback" not in done.stderr
    assert checkpoints.finished(Path(options["output_dir"])) == []


class At(TrainerCallback):
    """Does something to the model when a step has ended."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(model)


def poison(model: Any) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(options: dict[str, Any]) -> None:
    """Between two logs, where no loss is looked at."""
    from fastlora.training.errors import UserError

    with pytest.raises(UserError, match=r"not finite at step 3.*lower lr.*--overwrite.*checkpoint-2 is the last good"):
        train(load(None, options | {"save_steps": 1, "logging_steps": 100}), [At(3, poison)])
    assert [p.name for p in checkpoints.finished(Path(options["output_dir"]))] == ["checkpoint-1", "checkpoint-2"]


def test_a_loss_that_is_no_number_names_step_and_checkpoint(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = Trainer.training_step, 0

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return step(self, *args, **kwargs) * (float("nan") if calls == 4 else 1.0)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    error = refused(capsys, words(options, save_steps=3))
    assert "the loss is nan at step 4" in error
    assert "lower lr (now 0.01)" in error
    assert f"{options['output_dir']}/checkpoint-3 is the last good checkpoint" in error
    # What is good is good for use.
    arguments = ["generate", f"{options['output_dir']}/checkpoint-3", "--prompt", "x", "--max-new-tokens", "1"]
    assert main([*arguments, "--device", "cpu"]) == 0
    logs = [json.loads(line) for line in (Path(options["output_dir"]) / LOG_NAME).read_text().splitlines()]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("error", "values", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            {"chunked_loss": False},
            ["GPU memory", "batch_size (now 2)", "chunked_loss true"],
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), {"batch_size": 1}, ["out of memory: set grad"]),
        (MemoryError(), {"gradient_checkpointing": True}, ["out of memory", "set offload_checkpoints true"]),
    ],
)
def test_no_memory(
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    values: dict[str, Any],
    said: list[str],
) -> None:
    calls = 0

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return torch.zeros(())

    monkeypatch.setattr(Trainer, "training_step", training_step)
    shown = refused(capsys, words(options, save_steps=1, **values))
    assert all(word in shown for word in [*said, "max_length (now 32)", "--resume goes on from checkpoint-1"])
