"""What ``fastlora bench`` does: one function a suite, with a progress bar, that writes a record."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastlora.bench import record

T = TypeVar("T")


def device() -> torch.device:
    """The one to measure."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tracked(items: Iterable[T], suite: str) -> Iterator[T]:
    """``items``, with a progress bar on stderr that names the one at work; lines where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    items, console, begin = list(items), Console(stderr=True), time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(suite, total=len(items))
        for i, item in enumerate(items):
            name = item if isinstance(item, str) else ", ".join(str(part) for part in item)  # type: ignore[attr-defined]
            progress.update(task, description=f"{suite}: {name}")
            if not console.is_terminal:
                print(f"{suite} {i + 1}/{len(items)}, {time.monotonic() - begin:.0f} s: {name}", file=sys.stderr)
            yield item
            progress.advance(task)


def goals(*, quick: bool = False, out: Path | None = None) -> tuple[str, Path]:
    """Measure the goals; the table and the record's path. The record grows with every case."""
    from fastlora.bench import goals as suite

    run = suite.Run(device(), suite.QUICK if quick else suite.FULL)
    rows: list[record.Row] = []
    for name in tracked(suite.CASES, "goals"):
        rows += suite.measure(name, run)
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
    """Measure the drop-in against PEFT; the table and the record's path. The record grows with every part."""
    from fastlora.bench import drop_in as suite

    rows: list[record.Row] = []
    extra: dict[str, Any] = {}
    for part in tracked(parts, "drop-in"):
        found, kept = suite.PARTS[part](device())
        rows += found
        if part in suite.KEPT_AS:
            extra[suite.KEPT_AS[part]] = kept
        path = record.write("drop_in", rows, extra, out)
    return record.table(rows), path


def methods(parts: Iterable[str], *, quick: bool = False, out: Path | None = None) -> tuple[str, Path]:
    """Measure the methods beside each other; the table and the record's path. The record grows with every method.

    Beside the record lie its tables, ``methods.md`` and ``methods.html``.
    """
    from fastlora.bench import methods as suite

    rows: list[record.Row] = []
    for part in tracked(parts, "methods"):
        sizes = (suite.QUICK[part],) if quick else ()
        for found in suite.PARTS[part](device(), *sizes):
            rows += found
            path = record.write("methods", rows, {"quick": quick}, out)
            suite.write_tables(rows, path)
            print(found[0].case, file=sys.stderr)
    return record.table(rows), path


def tasks(parts: Iterable[str], *, quick: bool = False, out: Path | None = None) -> tuple[str, Path]:
    """Measure the examples' tasks; the table and the record's path. What the record has of other parts stays, unless
    one of the two runs is quick."""
    from fastlora.bench import tasks as suite

    path = (out or record.RESULTS) / record.device_name() / "tasks.json"
    rows: list[record.Row] = []
    if path.is_file() and not quick:
        data, before = record.read(path)
        rows = [] if data.get("quick") else before
    for part in tracked(parts, "tasks"):
        rows = [row for row in rows if row.case.split(",")[0] != part]
        for found in suite.PARTS[part](quick):
            rows += found
            path = record.write("tasks", rows, {"quick": quick}, out)
    return record.table(rows), path


def cpu(*, out: Path | None = None) -> tuple[str, Path]:
    """Measure the goals on a CPU; the table and the record's path. The record grows with every part."""
    from fastlora.bench import cpu as suite

    rows: list[record.Row] = []
    times: list[dict[str, Any]] = []
    for found, kept in suite.parts():
        rows += found
        times += kept
        path = record.write("cpu", rows, {"times": times}, out)
    return record.table(rows), path


def train(
    parts: Iterable[str], *, quick: bool = False, out: Path | None = None, stacks: Sequence[str] | None = None
) -> Iterator[tuple[str, Path]]:
    """Measure whole training steps; for each part the table and the record's path. A record grows as it is measured.

    stacks: those to measure, of the part's; by default all.

    The goals are ``train.json``, every other part is a record of its own, so that parts of several runs go together.
    """
    from fastlora.bench import train_step as suite

    for name in tracked(parts, "train"):
        file = "train" if name == "goals" else f"train_{name}"
        if name == suite.LOSS:
            from fastlora.bench import train_loss

            rows, extra = train_loss.rows(device(), train_loss.QUICK if quick else train_loss.FULL)
            yield record.table(rows), record.write(file, rows, {"quick": quick, **extra}, out)
            continue
        part = suite.tiny(suite.PARTS[name]) if quick else suite.PARTS[name]
        if stacks is not None:
            part = dataclasses.replace(part, names=tuple(stack for stack in part.names if stack in stacks))
        found: list[suite.Measured] = []
        path = record.write(file, [], {"quick": quick}, out)
        for one in suite.measure_part(part, separate=not quick):
            found.append(one)
            print(f"train: {suite.line(one)}", file=sys.stderr, flush=True)
            path = record.write(file, list(suite.by_case(part, found)), {"quick": quick}, out)
        yield record.table(list(suite.by_case(part, found))), path


def distributed(
    *, quick: bool = False, out: Path | None = None, world: int = 2, blocks: int | None = None, seconds: float = 270
) -> tuple[str, Path]:
    """Measure training steps over ``world`` processes; the table and the record's path. The record grows with every
    task. blocks: of the large model, at most. seconds: after which what is left is not measured.
    """
    from fastlora.bench import distributed as suite

    sizes = suite.QUICK if quick else suite.FULL
    if blocks is not None:
        sizes = dataclasses.replace(sizes, large=dataclasses.replace(sizes.large, blocks=blocks))
    cuda = device().type == "cuda"
    found: list[suite.Found] = []
    path = record.write("distributed", [], {"quick": quick}, out)
    for one in suite.measure(suite.tasks(sizes), world, cuda=cuda, steps=sizes.steps, seconds=seconds):
        found.append(one)
        print(f"distributed: {suite.line(one)}", file=sys.stderr, flush=True)
        extra = {"quick": quick, "processes": world, "loss_curves": suite.curves(found)}
        path = record.write("distributed", suite.rows(found, world), extra, out)
    return record.table(suite.rows(found, world)), path


def merge(*, out: Path | None = None) -> tuple[str, Path]:
    """Measure what each way of merging keeps of a fine-tune; the table and the record's path."""
    from fastlora.bench import merge as suite

    rows = suite.rows(device())
    return record.table(rows), record.write("merge", rows, {}, out)


def runs(*, out: Path | None = None) -> tuple[str, Path]:
    """Train whole models beside PEFT; the table and the record's path."""
    from fastlora.bench import runs as suite

    rows, curves = suite.measure(device())
    return record.table(rows), record.write("runs", rows, {"loss_curves": curves}, out)
