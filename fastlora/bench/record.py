"""The record of a run: goal rows and environment, as JSON under ``bench/results/<device>/``."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastlora.backends import package_version


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured value. ``goal`` is None where the row only informs."""

    case: str
    metric: str
    value: float
    goal: float | None = None
    at_least: bool = False
    """Whether the value must reach the goal (a speed-up) or stay under it (a time, an error)."""

    @property
    def ok(self) -> bool:
        if self.goal is None:
            return True
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def device_name() -> str:
    """Of the device that was measured, fit for a folder: "nvidia-h200", "cpu"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cuda = torch.cuda.is_available()
    packages = ("triton", "bitsandbytes", "peft", "transformers")
    return {
        # A copy of the tree without its history can be told what it is.
        "commit": commit.stdout.strip() or os.environ.get("FASTLORA_COMMIT"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: package_version(name) for name in packages},
    }


def write(suite: str, rows: list[Row], extra: dict[str, Any] | None = None, folder: Path | None = None) -> Path:
    """Write ``<folder>/<device>/<suite>.json`` (folder: bench/results) and return its path."""
    path = (folder or Path("bench/results")) / device_name() / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [dataclasses.asdict(row) | {"value": float(f"{row.value:.5g}"), "ok": row.ok} for row in rows]
    path.write_text(json.dumps({**environment(), **(extra or {}), "rows": table}, indent=1) + "\n")
    return path


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("case", "metric", "value", "goal", "")]
    for row in rows:
        goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:.4g}"
        verdict = "" if row.goal is None else ("pass" if row.ok else "MISS")
        lines.append((row.case, row.metric, f"{row.value:.4g}", goal, verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
