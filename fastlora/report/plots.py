"""The pictures of a report as files: SVG by our own hand, PNG by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlora.report.chart import Chart, Heat, axes, mean, svg
from fastlora.report.style import PICTURE
from fastlora.training.errors import UserError, disk_errors, require

COLOURS = ("#0b63b5", "#d1490c", "#0a8f62", "#b8498f", "#8a6d00", "#3a9ad9")
_REST = "#c3cad3"


def write(pictures: list[Chart | Heat], folder: Path) -> list[Path]:
    """Write each picture as SVG and PNG. Raises UserError without matplotlib, and where it cannot write."""
    require("matplotlib", "bench")
    from matplotlib.figure import Figure

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(folder):
            for picture in pictures:
                path = folder / f"{picture.key}.svg"
                path.write_text(svg(picture, style=PICTURE), encoding="utf-8")
                figure = Figure(figsize=(6.4, 4.0), layout="constrained")
                if isinstance(picture, Heat):
                    _heat(figure, picture)
                else:
                    _chart(figure, picture)
                figure.savefig(path.with_suffix(".png"), dpi=150, metadata={"Description": picture.alt})
                written += [path, path.with_suffix(".png")]
    except OSError as error:
        raise UserError(f"plots: cannot write to {folder} ({error.strerror}): name another folder") from error
    return written


def _chart(figure: Any, chart: Chart) -> None:
    plot = figure.subplots()
    x, _, y, _ = axes(chart)
    for one in chart.series:
        colour = _REST if one.colour is None else COLOURS[one.colour]
        order = 1 if one.colour is None else 3
        xs, ys = zip(*one.points, strict=True)
        name = one.name if one.colour is not None else None
        if chart.kind == "dots":
            plot.scatter(xs, ys, color=colour, label=name, zorder=order)
            continue
        smooth = chart.smooth and len(one.points) >= 20
        if smooth:
            plot.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8)
            xs, ys = zip(*mean(one.points), strict=True)
        plot.plot(xs, ys, color=colour, label=name, zorder=order, marker="o" if len(xs) <= 12 else None, markersize=3)
    if x.log:
        plot.set_xscale("log")
    if y.log:
        plot.set_yscale("log")
    else:
        plot.set_ylim(y.low, y.high)
    if chart.categories:
        crowded = sum(map(len, chart.categories)) > 60  # letters that lie beside each other
        turned: dict[str, Any] = {"rotation": 35, "ha": "right", "fontsize": 8} if crowded else {}
        plot.set_xticks(range(len(chart.categories)), chart.categories, **turned)
    plot.set_title(chart.title, loc="left", fontsize=11)
    plot.set_xlabel(chart.x)
    plot.set_ylabel(chart.y)
    plot.grid(alpha=0.3)
    for side in ("top", "right"):
        plot.spines[side].set_visible(False)
    if len(chart.series) > 1:
        plot.legend(fontsize=8, frameon=False)


def _heat(figure: Any, heat: Heat) -> None:
    plot = figure.subplots()
    values = [[float("nan") if v is None else v for v in line] for line in heat.values]
    image = plot.imshow(values, aspect="auto", cmap="Blues")
    every = max(1, len(heat.columns) // 16)
    plot.set_xticks(range(0, len(heat.columns), every), heat.columns[::every])
    plot.set_yticks(range(len(heat.rows)), heat.rows, fontsize=8)
    plot.set_xlabel(heat.x)
    plot.set_title(heat.title, loc="left", fontsize=11)
    figure.colorbar(image)
