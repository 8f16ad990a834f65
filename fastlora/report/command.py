"""What ``fastlora report`` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastlora.report import page, runs


def report(
    folders: Sequence[Path], out: Path = Path("report.html"), plots: Path | None = None, title: str | None = None
) -> list[Path]:
    """Write the page of runs, and with ``plots`` each picture as SVG and PNG into that folder. Returns the files.

    folders: output folders of runs, or folders that hold some, such as that of a search. A run that cannot be read is
    left out, which the page says, and standard error too. Raises UserError for folders without a run that can be read,
    and for places that cannot be written.
    """
    found, unread = runs.find([Path(folder) for folder in folders])
    for reason in unread:
        print(reason, file=sys.stderr)
    made = page.make(found, unread)
    if title is None:
        title = f"Run {made.runs[0].name}" if len(made.runs) == 1 else f"{len(made.runs)} runs compared"
    written = [page.write(made, Path(out), title)]
    if plots is not None:
        from fastlora.report import plots as files

        written += files.write(made.pictures, plots)
    return written
