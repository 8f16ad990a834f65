"""What ``fastlora bench`` does: one function a suite, with a progress bar, that writes a record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastlora.bench import record

T = TypeVar("T")


def device() -> torch.device:
    """The one to measure."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tracked(items: Iterable[T], suite: str) -> Iterator[T]:
    """``items``, with a progress bar on stderr that names the one at work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    items = list(items)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(suite, total=len(items))
        for item in items:
            name = item if isinstance(item, str) else ", ".join(str(part) for part in item)  # type: ignore[attr-defined]
            progress.update(task, description=f"{suite}: {name}")
            yield item
            progress.advance(task)


def goals(*, quick: bool = False, out: Path | None = None) -> tuple[str, Path]:
    """Measure the goals; the table and the record's path."""
    from fastlora.bench import goals as suite

    run = suite.Run(device(), suite.QUICK if quick else suite.FULL)
    rows = [row for name in tracked(suite.CASES, "goals") for row in suite.measure(name, run)]
    path = record.write("goals", rows, {"quick": quick, "times": run.times}, out)
    missed, bound = sum(not row.ok for row in rows), sum(row.goal is not None for row in rows)
    return f"{record.table(rows)}\n{bound - missed} of {bound} goals reached", path


def layer(
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    ranks: tuple[int, ...],
    modes: tuple[Any, ...],
    providers: tuple[str, ...],
    *,
    graph: bool = True,
    out: Path | None = None,
) -> tuple[str, Path]:
    """Measure layers, a line of the record for each case and provider; the table and the record's path."""
    from fastlora.bench import layer as suite
    from fastlora.bench import report, timing

    where = device()
    ceilings = timing.ceilings(where)
    cases = tracked(suite.cases(shapes, tokens, ranks, modes), "layer")
    lines = (line for case in cases for line in suite.lines(case, providers, ceilings, where, graph=graph))
    path = record.write_lines("layer", lines, out)
    return report.layer_table(record.read_lines(path)), path


def drop_in(parts: Iterable[str], *, out: Path | None = None) -> tuple[str, Path]:
    """Measure the drop-in against PEFT; the table and the record's path."""
    from fastlora.bench import drop_in as suite

    rows: list[record.Row] = []
    extra = {}
    for part in tracked(parts, "drop-in"):
        found, kept = suite.PARTS[part](device())
        rows += found
        if part in suite.KEPT_AS:
            extra[suite.KEPT_AS[part]] = kept
    return record.table(rows), record.write("drop_in", rows, extra, out)
