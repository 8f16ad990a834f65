"""The record of a run, with its environment, under ``bench/results/<device>/``: rows with goals, or lines of times."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastlora import native
from fastlora.backends import package_version

RESULTS = Path("bench/results")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured value. ``goal`` is None where the row only informs."""

    case: str
    metric: str
    value: float | None
    """None where it could not be measured; ``note`` says why."""
    goal: float | None = None
    at_least: bool = False
    """Whether the value must reach the goal (a speed-up) or stay under it (a time, an error)."""
    note: str = ""

    @property
    def ok(self) -> bool:
        if self.goal is None:
            return True
        if self.value is None:
            return False
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def bound(self) -> str:
        """The goal as text, with its direction; empty without one."""
        return "" if self.goal is None else f"{'>=' if self.at_least else '<='} {self.goal:.4g}"

    @property
    def verdict(self) -> str:
        """pass, MISS, or nothing where there is no goal."""
        return "" if self.goal is None else "pass" if self.ok else "MISS"


def device_name() -> str:
    """Of the device that was measured, fit for a folder: "nvidia-h200", "cpu"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _said(*command: str) -> str:
    """The first line that a command prints; empty when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


@functools.cache
def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    cuda = torch.cuda.is_available()
    packages = ("triton", "bitsandbytes", "peft", "transformers", "liger_kernel", "unsloth")
    return {
        # A copy of the tree can be told what it is, whatever history lies beside it.
        "commit": os.environ.get("FASTLORA_COMMIT") or _said("git", "rev-parse", "--short", "HEAD"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: package_version(name) for name in packages},
        # Without it every kernel here is Triton's or PyTorch's, and a step costs the host more.
        "extension": native.available("cuda" if cuda else "cpu") or "loaded",
    }


def _path(name: str, folder: Path | None) -> Path:
    path = (folder or RESULTS) / device_name() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(suite: str, rows: list[Row], extra: dict[str, Any] | None = None, folder: Path | None = None) -> Path:
    """Write ``<folder>/<device>/<suite>.json`` (folder: bench/results) and return its path."""
    path = _path(f"{suite}.json", folder)
    table = [dataclasses.asdict(row) | {"ok": row.ok} for row in map(_short, rows)]
    path.write_text(json.dumps({**environment(), **(extra or {}), "rows": table}, indent=1) + "\n")
    return path


def _short(row: Row) -> Row:
    """The row with the digits that a record keeps; whether it passes is judged by them, in the file and out of it."""
    value, goal = (None if number is None else float(f"{number:.5g}") for number in (row.value, row.goal))
    return dataclasses.replace(row, value=value, goal=goal)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """A file that `write` wrote: what stands in it beside the rows, and the rows."""
    data = json.loads(path.read_text())
    names = {field.name for field in dataclasses.fields(Row)}
    rows = [_short(Row(**{key: value for key, value in row.items() if key in names})) for row in data.pop("rows")]
    return data, rows


def write_lines(suite: str, lines: Iterable[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write ``<folder>/<device>/<suite>.jsonl``, each line as soon as it is there, with the environment in it.

    Raises ValueError for a line with a name of the environment's.
    """
    path = _path(f"{suite}.jsonl", folder)
    with path.open("w") as file:
        for line in lines:
            if both := line.keys() & environment().keys():
                raise ValueError(f"a line and its environment both have {', '.join(sorted(both))}")
            file.write(json.dumps({**line, **environment()}) + "\n")
            file.flush()
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `write_lines` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("case", "metric", "value", "goal", "", "")]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g}"
        lines.append((row.case, row.metric, value, row.bound, row.verdict, row.note))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
