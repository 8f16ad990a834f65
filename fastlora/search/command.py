"""What ``fastlora search`` shows: a bar on a terminal, a line for each trial, the best of them at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastlora.search import results, space, study

SHOWN = 10
WIDTH = 140
"""Characters of a line where there is no terminal."""


def run(path: Path, *, trials: int | None, jobs: int, folder: Path | None, final: bool) -> study.Outcome:
    """Searches as the file says and shows it. Raises what `fastlora.search.study.search` does."""
    config, settings = space.load(path, trials)
    folder = folder or config.output_dir / "search"
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    best = TextColumn("{task.description}")
    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), best)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=settings.trials)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        def say(line: str) -> None:
            bar.console.print(line, markup=False, soft_wrap=True)

        found = study.search(config, settings, folder, jobs=jobs, final=final, say=say, progress=progress)
    console.print(table(found, settings.metric, settings.direction))
    for name, values in found.held_out.items():
        text = "  ".join(f"{key} {results.short(values[key])}" for key in ("loss", "accuracy", "f1") if key in values)
        console.print(f"held out, {name:<8} {text}", markup=False, soft_wrap=True)
    console.print(f"best settings  {found.config}", markup=False, soft_wrap=True)
    return found


def table(found: study.Outcome, metric: str, direction: str) -> Table:
    """The best trials."""
    done = [row for row in found.rows if row["state"] == "finished"]
    done.sort(key=lambda row: row[metric], reverse=direction == "maximize")
    kept = ("trial", "seconds", metric)
    constant = {key for key in done[0] if key not in kept and len({row.get(key) for row in done}) == 1}
    keys = [key for key in done[0] if key not in ("state", "message", "steps", *constant)]
    result = Table(*keys)
    for row in done[:SHOWN]:
        result.add_row(*(_cell(row.get(key)) for key in keys))
    return result


def _cell(value: Any) -> str:
    return "" if value is None else results.short(value)
