"""What ``fastlora report`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlora.report import page, runs


def report(
    folders: Sequence[Path], out: Path = Path("report.html"), plots: Path | None = None, title: str | None = None
) -> list[Path]:
    """Write the page of runs, and with ``plots`` each picture as SVG and PNG into that folder. Returns the files.

    folders: output folders of runs, or folders that hold some, such as that of a search. Raises UserError for folders
    without a run, files that cannot be read, and places that cannot be written.
    """
    made = page.make(runs.find([Path(folder) for folder in folders]))
    if title is None:
        title = f"Run {made.runs[0].name}" if len(made.runs) == 1 else f"{len(made.runs)} runs compared"
    written = [page.write(made, Path(out), title)]
    if plots is not None:
        from fastlora.report import plots as files

        written += files.write(made.pictures, plots)
    return written
