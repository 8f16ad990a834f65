"""The files of runs: settings, logs, results, adapters."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fastlora.training.errors import UserError, first_line, require

Point = tuple[float, float]
CONFIG, LOG, RESULT = "config.yaml", "log.jsonl", "result.json"
WHERE_ONLY = frozenset({"output_dir", "resume", "overwrite", "tensorboard", "logging_steps", "save_steps"})
"""Settings that say where and how a run writes, not what it is."""
BETTER_HIGH = ("eval_f1", "eval_accuracy", "eval_score")
"""Measures that are taken as the score where every run has them, in this order; else the evaluation loss is."""
_NOT_A_MEASURE = ("_runtime", "_per_second", "_model_preparation_time")


@dataclasses.dataclass(frozen=True)
class Score:
    """What runs are compared by."""

    key: str
    high: bool
    """Whether more is better."""

    @property
    def name(self) -> str:
        return NAMES.get(self.key, self.key.removeprefix("eval_").replace("_", " "))

    def best(self, runs: Iterable[Run]) -> Run | None:
        """The run with the best value; None where none has one."""
        found = [run for run in runs if self.of(run) is not None]
        return min(found, key=self.order, default=None)

    def of(self, run: Run) -> float | None:
        """The last value of a run."""
        points = run.series(self.key)
        return points[-1][1] if points else None

    def order(self, run: Run) -> float:
        """A key to sort runs by, the best first and those without a value last."""
        value = self.of(run)
        return math.inf if value is None else -value if self.high else value


NAMES = {"eval_loss": "evaluation loss", "loss": "training loss", "eval_f1": "F1", "eval_accuracy": "accuracy"}


@dataclasses.dataclass
class Run:
    """One output folder of `fastlora train`."""

    folder: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]
    result: dict[str, Any]
    name: str = ""

    def series(self, key: str) -> list[Point]:
        """The (step, value) pairs of a logged number, finite ones only."""
        found = {}
        for entry in self.log:
            value = entry.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                found[float(entry["step"])] = float(value)
        return sorted(found.items())

    @property
    def measures(self) -> list[str]:
        """Keys of what evaluations measure, the loss first."""
        keys = dict.fromkeys(key for entry in self.log for key in entry if key.startswith("eval_"))
        found = [key for key in keys if not key.endswith(_NOT_A_MEASURE) and self.series(key)]
        return sorted(found, key=lambda key: key != "eval_loss")

    @property
    def steps(self) -> int:
        return int(max((entry["step"] for entry in self.log), default=0))

    @property
    def failed(self) -> str:
        """How the run ended, where it did not end well; empty for a finished one."""
        if self.result:
            return ""
        losses = [entry["loss"] for entry in self.log if isinstance(entry.get("loss"), int | float)]
        if losses and not math.isfinite(losses[-1]):
            return "the loss is no number"
        return "not finished"

    @property
    def method(self) -> str:
        """The method, with the start of its factors where that is another one."""
        init = self.config.get("init", "default")
        return str(self.config.get("method", "lora")) + (f" + {init}" if init != "default" else "")

    @property
    def seconds(self) -> float | None:
        """The time of all steps of the process that finished the run."""
        value = self.result.get("seconds")
        return float(value) if value is not None else None

    @cached_property
    def adapter(self) -> Path | None:
        """The folder of the adapter, of the last checkpoint where the run has not finished."""
        checkpoints = [p for p in self.folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
        latest = sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
        for folder in (self.folder / "adapter", *latest):
            if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
                return folder
        return None


def is_run(folder: Path) -> bool:
    """Whether a folder is the output folder of a run that has logged something."""
    return (
        (folder / LOG).is_file() or (folder / RESULT).is_file() or any(folder.glob("checkpoint-*/trainer_state.json"))
    )


def find(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs that ``paths`` are, or hold at most two folders deep, named by what tells their folders apart; and for
    each one that cannot be read, why.

    Raises UserError for a path without a run, and where no run can be read.
    """
    folders: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"no such folder: {path}: name the output folders of runs, or a folder that holds them")
        inside = [p for pattern in ("*", "*/*") for p in sorted(path.glob(pattern)) if p.is_dir() and is_run(p)]
        found = [path] if is_run(path) else inside
        if not found:
            raise UserError(f"{path} holds no run: name an output folder of fastlora train or fastlora search")
        folders += [folder for folder in found if folder not in folders]
    runs: list[Run] = []
    unread: list[UserError] = []
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            run = read(folder)
        except UserError as error:
            unread.append(error)
        else:
            run.name = name
            runs.append(run)
    if not runs:
        raise unread[0]
    return runs, [f"Left out: {error}" for error in unread]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    whole = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def read(folder: Path) -> Run:
    """The run in a folder. Raises UserError, which names the file, for one that cannot be read."""
    result = _json(folder / RESULT) if (folder / RESULT).is_file() else {}
    log = result.get("log_history", [])
    if (folder / LOG).is_file():
        log = _lines(folder / LOG)
    elif not log:
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        log = _json(states[-1]).get("log_history", []) if states else []
    placed = [entry for entry in log if isinstance(entry.get("step"), int | float)]
    return Run(folder, _yaml(folder / CONFIG), placed, result)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not keys and values")
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): use another copy") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): use another copy") from error
    for i, line in enumerate(lines):
        try:
            entries.append(_mapping(json.loads(line)))
        except ValueError as error:
            if i < len(lines) - 1:  # the last one may be cut short by a crash
                raise UserError(f"cannot read {path} line {i + 1} ({first_line(error)}): use another copy") from error
    return entries


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    yaml = require("yaml")
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): use another copy") from error


def score(runs: Sequence[Run]) -> Score | None:
    """What all of ``runs`` can be compared by; None where they have no measure in common."""
    done = [run for run in runs if run.measures] or runs
    for key in BETTER_HIGH:
        if all(run.series(key) for run in done):
            return Score(key, True)
    for key in ("eval_loss", "loss"):
        if any(run.series(key) for run in done):
            return Score(key, False)
    return None


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings, in their order, that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in WHERE_ONLY)
    return [key for key in keys if len({json.dumps(run.config.get(key), sort_keys=True) for run in runs}) > 1]
