"""The output folder of a run: may it be written, does it fit, what does it resume from."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import yaml

from fastlora.training.config import FREE_ON_RESUME, TrainConfig
from fastlora.training.errors import UserError, disk_errors

CONFIG_NAME = "config.yaml"
"""The resolved configuration, in the output folder of its run."""
_BYTES_OF_A_PARAMETER = 4
_CHECKPOINT_COPIES = 3
"""A checkpoint holds each trained parameter and Adam's two moments of it."""
_MARGIN = 64 * 2**20
"""Logs, tokenizer files and what else is small, in bytes."""


def finished(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. One that a crash cut short has no trainer state: it is written last."""
    found = [p for p in output_dir.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return sorted((p for p in found if p.name.split("-")[-1].isdigit()), key=lambda p: int(p.name.split("-")[-1]))


def prepare(config: TrainConfig) -> Path | None:
    """Makes the output folder ready. Returns the checkpoint to resume from, None for a new run.

    Raises UserError when the folder cannot be written, holds another run, or has nothing (fitting) to resume.
    """
    output_dir = config.output_dir
    make_writable(output_dir, "output_dir")
    done = finished(output_dir)
    if config.resume:
        if not done:
            raise UserError(
                f"resume: no finished checkpoint in {output_dir}: drop --resume, or name the run's output_dir"
            )
        _check_same_run(config)
        return done[-1]
    if config.overwrite:
        for checkpoint in output_dir.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    elif done:
        raise UserError(
            f"output_dir: {output_dir} holds a run that stopped at {done[-1].name}: "
            "pass --resume to go on, --overwrite to start again, or another --output-dir"
        )
    return None


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
    part = config.output_dir / (CONFIG_NAME + ".part")
    with disk_errors(config.output_dir):
        part.write_text(config.to_yaml(), encoding="utf-8")
        os.replace(part, config.output_dir / CONFIG_NAME)
