"""The output folder of a run: may it be written, does it fit, what does it resume from."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import yaml

from fastlora.training import durable
from fastlora.training.config import FREE_ON_RESUME, TrainConfig
from fastlora.training.errors import UserError, disk_errors

CONFIG_NAME = "config.yaml"
"""The resolved configuration, in the output folder of its run."""
RESULT_NAME = "result.json"
ADAPTER = "adapter"
"""The folder of what a finished run has trained."""
_BYTES_OF_A_PARAMETER = 4
_CHECKPOINT_COPIES = 3
"""A checkpoint holds each trained parameter and Adam's two moments of it."""
_MARGIN = 64 * 2**20
"""Logs, tokenizer files and what else is small, in bytes."""


def finished(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    files = ("trainer_state.json", durable.MANIFEST)
    found = [p for p in output_dir.glob("checkpoint-*") if all((p / name).is_file() for name in files)]
    return sorted((p for p in found if p.name.split("-")[-1].isdigit()), key=lambda p: int(p.name.split("-")[-1]))


def prepare(config: TrainConfig) -> Path | None:
    """Makes the output folder ready. Returns the checkpoint to resume from, None for a new run.

    Raises UserError when the folder cannot be written, holds another run, or has nothing (fitting) to resume.
    """
    output_dir = config.output_dir
    make_writable(output_dir, "output_dir")
    done = finished(output_dir)
    shutil.rmtree(output_dir / durable.WRITING, ignore_errors=True)  # what a crash left
    if config.resume:
        if not done:
            raise UserError(
                f"resume: no finished checkpoint in {output_dir}: drop --resume, or name the run's output_dir"
            )
        _check_same_run(config)
        check(done)
        return done[-1]
    if config.overwrite:
        # The adapter and the result would stand beside another configuration if the new run does not end well.
        for folder in (*output_dir.glob("checkpoint-*"), output_dir / ADAPTER):
            durable.discard(folder)
        (output_dir / RESULT_NAME).unlink(missing_ok=True)
    elif not done and (output_dir / ADAPTER).is_dir():
        raise UserError(
            f"output_dir: {output_dir} holds the adapter of a finished run: "
            "pass --overwrite to replace it, or another --output-dir"
        )
    elif done:
        raise UserError(
            f"output_dir: {output_dir} holds a run that stopped at {done[-1].name}: "
            "pass --resume to go on, --overwrite to start again, or another --output-dir"
        )
    return None


def check(done: list[Path]) -> None:
    """Raises UserError, which names the file, when the last of ``done`` is not what was written there."""
    last = done[-1]
    problem = durable.damage(last)
    extra = [] if problem else durable.strangers(last)
    if extra:
        problem = f"{extra[0]} was not written by the run"
    if problem is None:
        return
    before = f" to go on from {done[-2].name}" if len(done) > 1 else " and start again"
    raise UserError(f"resume: {problem}: move it away, or delete {last}{before}")


def rotate(output_dir: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the oldest finished checkpoints but the last ``limit`` (None: keep all) and ``best``."""
    if limit is None:
        return
    done = [path for path in finished(output_dir) if best is None or path.name != best.name]
    for path in done[: max(0, len(done) - limit)]:
        durable.discard(path)


def check_adapter_files(folder: Path) -> None:
    """Raises UserError, which names the file, for an adapter with changed files or with pickles for weights."""
    problem = durable.damage(folder)
    if problem is not None:
        raise UserError(f"adapter: {problem}: use another copy")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p for p in folder.iterdir() if p.suffix in durable.PICKLES)
        if pickles:
            raise UserError(
                f"adapter: {pickles[0]} is a pickle, which can run code when it is read: "
                "load it with PEFT where you trust it, and save it as safetensors"
            )
        raise UserError(f"adapter: {folder} has no .safetensors file: use another copy")


def after_divergence(lr: float, output_dir: Path) -> str:
    """What to do about a loss that is no number, and which checkpoint is good."""
    done = finished(output_dir)
    good = f"{done[-1]} is the last good checkpoint" if done else "there is no checkpoint before it"
    advice = f"lower lr (now {lr:g}), set bf16 false, or look for odd examples in the data"
    return f"{advice}, and start again with --overwrite; {good}"


def make_writable(folder: Path, key: str) -> None:
    """Creates ``folder`` and proves that a file can be written there; raises UserError when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(f"{key}: cannot write to {folder} ({error.strerror}): set another {key}") from error


def check_space(folder: Path, needed: int, key: str) -> None:
    """Raises UserError when the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{key}: {folder} has {_size(free)} free and the run needs about {_size(needed)}: "
            f"free space or set another {key}"
        )


def needed_bytes(config: TrainConfig, parameters: int) -> int:
    """Bytes that a run with so many trained parameters writes: adapter, kept checkpoints and the one being written."""
    weights = parameters * _BYTES_OF_A_PARAMETER
    checkpoints = (config.save_total_limit or 1) + 1
    return weights * (1 + checkpoints * _CHECKPOINT_COPIES) + _MARGIN


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _check_same_run(config: TrainConfig) -> None:
    path = config.output_dir / CONFIG_NAME
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return  # the checkpoint alone says what it is; transformers compares the weights' shapes
    now = yaml.safe_load(config.to_yaml())
    changed = [key for key in now if key not in FREE_ON_RESUME and key in before and before[key] != now[key]]
    if changed:
        what = ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in changed)
        raise UserError(f"resume: the checkpoint in {config.output_dir} is of another run: {what}; set them back")


def write_config(config: TrainConfig) -> None:
    """Writes the resolved configuration, whole or not at all."""
    with disk_errors(config.output_dir):
        durable.write_text(config.output_dir / CONFIG_NAME, config.to_yaml())
