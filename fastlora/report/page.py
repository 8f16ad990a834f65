"""The page: what runs did, in one HTML file without a reference to anything outside of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastlora.report import norms
from fastlora.report.chart import COLOURS, Chart, Heat, Series, number, svg
from fastlora.report.runs import NAMES, Run, Score, differing, score
from fastlora.report.style import PAGE, SCRIPT
from fastlora.training.errors import UserError

MOST_ADAPTERS = 4
"""Runs whose layers are shown."""
NONE = "-"


@dataclasses.dataclass
class Report:
    """Everything on the page, before it is written."""

    runs: list[Run]
    """The best first."""
    score: Score | None
    curves: list[Chart]
    comparisons: list[Chart]
    layers: dict[str, list[Heat]]
    """By the name of the run, of the best ones."""
    ranks: dict[str, float]
    """Mean effective rank over the layers, by the name of the run."""
    notes: list[str]

    @property
    def pictures(self) -> list[Chart | Heat]:
        return [*self.curves, *self.comparisons, *(heat for heats in self.layers.values() for heat in heats)]


def make(runs: Sequence[Run], unread: Sequence[str] = ()) -> Report:
    """The charts of runs, and the runs sorted by their score. unread: what to say of others."""
    measure = score(runs)
    ordered = sorted(runs, key=measure.order) if measure else list(runs)
    colours: dict[str, int | None] = {run.name: (i if i < COLOURS else None) for i, run in enumerate(ordered)}
    layers: dict[str, list[Heat]] = {}
    ranks: dict[str, float] = {}
    notes = [*unread]
    for run in ordered:
        if run.adapter is None:
            continue
        try:
            changes = norms.of_adapter(run.adapter)
        except UserError as error:
            notes.append(str(error))
            continue
        if changes:
            ranks[run.name] = sum(c.effective_rank for c in changes) / len(changes)
        if changes and len(layers) < MOST_ADAPTERS:
            layers[run.name] = _heats(changes, f"layers-{len(layers) + 1}")
    if len(layers) < len(ranks):
        notes.append(f"The layers of the {len(layers)} best runs are shown.")
    return Report(
        ordered, measure, _curves(ordered, colours), _comparisons(ordered, colours, measure), layers, ranks, notes
    )


def _series(runs: Iterable[Run], key: str, colours: dict[str, int | None]) -> list[Series]:
    return [Series(run.name, points, colours[run.name]) for run in runs if (points := run.series(key))]


def _curves(runs: Sequence[Run], colours: dict[str, int | None]) -> list[Chart]:
    measures = dict.fromkeys(key for run in runs for key in run.measures)
    plans: list[tuple[str, str, str, dict[str, Any]]] = [
        ("loss", "Training loss", "nats a token", {"smooth": True}),
        *(
            (key, NAMES.get(key, key.removeprefix("eval_")).capitalize(), "on held-out examples", {})
            for key in measures
        ),
        ("grad_norm", "Gradient norm", "before clipping", {"log_y": True, "smooth": True}),
        ("learning_rate", "Learning rate", "of each step", {"from_zero": True}),
        ("tokens_per_second", "Tokens a second", "without padding", {"from_zero": True, "smooth": True}),
        ("memory_gib", "Memory", "GiB, the most held between two logs", {"from_zero": True}),
    ]
    found = []
    for key, title, unit, options in plans:
        series = _series(runs, key, colours)
        if not series:
            continue
        values = [y for one in series for _, y in one.points]
        spread = min(values) > 0 and max(values) / min(values) > 30
        options = {**options, "log_y": bool(options.get("log_y")) and spread}
        found.append(Chart(key, title, "step", title.lower(), series, note=unit, **options))
    return found


def _comparisons(runs: Sequence[Run], colours: dict[str, int | None], measure: Score | None) -> list[Chart]:
    if measure is None:
        return []
    scored = [(run, value) for run in runs if (value := measure.of(run)) is not None]
    better = "higher is better" if measure.high else "lower is better"
    found = []

    def dots(key: str, title: str, x: str, at: dict[str, float], **options: Any) -> None:
        series = [Series(run.name, [(at[run.name], v)], colours[run.name]) for run, v in scored if run.name in at]
        if len({s.points[0][0] for s in series}) > 1:
            found.append(Chart(key, title, x, measure.name, series, "dots", note=better, **options))

    for key, title, log in (("r", "Rank", True), ("lr", "Learning rate", True), ("lora_alpha", "Alpha", True)):
        values = {r.name: float(r.config[key]) for r, _ in scored if isinstance(r.config.get(key), int | float)}
        dots(f"{key}-score", f"{title} against {measure.name}", title.lower(), values, log_x=log)
    dropout = {r.name: float(r.config["lora_dropout"]) for r, _ in scored if "lora_dropout" in r.config}
    dots("dropout-score", f"Dropout against {measure.name}", "dropout", dropout)
    methods = list(dict.fromkeys(run.method for run, _ in scored))
    places = {run.name: float(methods.index(run.method)) for run, _ in scored}
    dots("method-score", f"Method against {measure.name}", "method", places, categories=tuple(methods))
    return found


def _heats(changes: Sequence[norms.LayerChange], key: str) -> list[Heat]:
    blocks = sorted({c.block for c in changes if c.block is not None})
    columns = [*map(str, blocks), *(["-"] if blocks and any(c.block is None for c in changes) else [])]
    places = [("all", c.layer) for c in changes]  # layers that lie on no grid: a line for each
    for name_of in (lambda c: c.kind, lambda c: c.within):
        grid = [("-" if c.block is None else str(c.block), name_of(c)) for c in changes]
        if blocks and len(set(grid)) == len(grid):
            places = grid
            break
    else:
        columns = ["all"]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    heats = []
    whole = max(c.rank for c in changes)
    for name, title, note in (
        ("norm", "Norm of the change", "Frobenius norm of scale · B A"),
        ("effective_rank", "Effective rank", f"exp of the entropy of the singular values of B A; the rank is {whole}"),
    ):
        values: list[list[float | None]] = [[None] * len(columns) for _ in kinds]
        for c, (column, kind) in zip(changes, places, strict=True):
            values[kinds.index(kind)][columns.index(column)] = getattr(c, name)
        heats.append(Heat(f"{key}-{name.replace('_', '-')}", title, columns, kinds, values, note=note))
    return heats


def html(report: Report, title: str) -> str:
    """The page as text."""
    parts = [
        f"{_head(title)}<main>",
        f"<header><h1>{escape(title)}</h1><p>{_lead(report)}</p></header>",
        _tiles(report),
    ]
    if report.comparisons:
        parts.append(_section("comparison", "What made the difference", _figures(report.comparisons)))
    if len({run.method for run in report.runs}) > 1:
        parts.append(_section("methods", "Methods", _methods(report)))
    if len(report.runs) > 1:
        parts.append(_section("runs", "Runs", _table(report)))
    if report.curves:
        parts.append(_section("curves", "Curves", _legend(report) + _figures(report.curves)))
    for name, heats in report.layers.items():
        head = "Layers of the adapter" + (f": {escape(name)}" if len(report.runs) > 1 else "")
        parts.append(_section("", head, _figures(heats, "figures pairs")))
    parts.append("".join(f'<p class="note">{escape(note)}</p>' for note in report.notes))
    parts.append(_section("settings", "Settings", _settings(report)))
    parts.append(f"</main><script>{SCRIPT}</script></body></html>")
    return "\n".join(parts)


def _section(key: str, title: str, body: str) -> str:
    name = f' id="{key}"' if key else ""
    return f"<section{name}><h2>{title}</h2>{body}</section>"


def _lead(report: Report) -> str:
    runs, measure = report.runs, report.score
    best = measure.best(runs) if measure else None
    ended = ""
    if len(runs) == 1 and runs[0].failed:
        ended = f" It is {runs[0].failed}." if runs[0].failed == "not finished" else f" It ended: {runs[0].failed}."
    if best is None or measure is None:
        return f"{len(runs)} run{'s' * (len(runs) > 1)}, none with a logged loss yet.{ended}"
    value = measure.of(best)
    assert value is not None
    points = best.series(measure.key)
    began = f", from {number(points[0][1])} at the start" if len(points) > 1 and points[0][0] == 0 else ""
    if len(runs) == 1:
        steps = f"{best.steps:,} steps of {escape(best.method)}"
        return f"{steps}: {measure.name} <strong>{number(value)}</strong>{began}.{ended}"
    differ = [key for key in differing(runs) if key not in ("model", "data")]
    what = f" They differ in {escape(', '.join(differ[:8]))}." if differ else ""
    name = f"<strong>{escape(best.name)}</strong>"
    return f"{len(runs)} runs. The best is {name} with {measure.name} <strong>{number(value)}</strong>{began}.{what}"


def _tiles(report: Report) -> str:
    """The numbers of the best run (of the only one)."""
    run = report.runs[0]
    facts: list[tuple[str, str]] = []
    keys = dict.fromkeys(([report.score.key] if report.score else []) + run.measures[:2])
    for points, name in ((run.series(key), NAMES.get(key, key.removeprefix("eval_"))) for key in keys):
        if points:
            began = f"{number(points[0][1])} → " if len(points) > 1 else ""
            facts.append((name, began + number(points[-1][1])))
    facts.append(("steps", f"{run.steps:,}"))
    facts += [(what, text) for what, text in _measured(run).items() if text != NONE]
    heading = '<p class="note">The best run:</p>' if len(report.runs) > 1 else ""
    tiles = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(text)}</dd></div>" for what, text in facts)
    return f'{heading}<dl class="tiles">{tiles}</dl>'


def _measured(run: Run) -> dict[str, str]:
    """Cost of a run as texts; `NONE` for what it does not know."""
    result = run.result

    def said(value: Any, form: str, scale: float = 1.0) -> str:
        known = isinstance(value, int | float) and math.isfinite(value)
        return form.format(value * scale) if known else NONE

    memory = result.get("peak_memory") or max((y * 2**30 for _, y in run.series("memory_gib")), default=None)
    rates = run.series("tokens_per_second")
    rate = result.get("tokens_per_second") or (sum(y for _, y in rates) / len(rates) if rates else None)
    return {
        "tokens a second": said(rate, "{:,.0f}"),
        "ms a step": said(result.get("step_ms"), "{:,.1f}"),
        "training time": _duration(run.seconds),
        "peak memory": said(memory, "{:.2f} GiB", 2.0**-30),
        "trained parameters": said(result.get("parameters"), "{:,.0f}"),
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _swatch(report: Report, run: Run) -> str:
    i = report.runs.index(run)
    return f'<i class="swatch {f"c{i}" if i < COLOURS else "rest"}"></i>'


def _legend(report: Report) -> str:
    if len(report.runs) == 1:
        return ""
    items = [f"<li>{_swatch(report, run)}{escape(run.name)}</li>" for run in report.runs[:COLOURS]]
    if len(report.runs) > COLOURS:
        items.append(f'<li><i class="swatch rest"></i>{_others(len(report.runs) - COLOURS)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _others(count: int) -> str:
    return f"{count} other{'s' * (count > 1)}"


def _figures(pictures: Sequence[Chart | Heat], kind: str = "figures") -> str:
    return f'<div class="{kind}">{"".join(map(_figure, pictures))}</div>'


def _figure(picture: Chart | Heat) -> str:
    note = f" <small>{escape(picture.note)}</small>" if picture.note else ""
    readout = (
        '<p class="readout" aria-hidden="true"></p>' if isinstance(picture, Chart) and picture.kind == "line" else ""
    )
    return f"<figure><figcaption>{escape(picture.title)}{note}</figcaption>{svg(picture)}{readout}</figure>"


def _plain(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= 48 else "…" + text[-47:]


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], marked: frozenset[int] = frozenset()) -> str:
    """A table in a frame of its own that scrolls; cells are HTML. marked: columns that stand out."""

    def line(cells: Sequence[str], kind: str) -> str:
        out = []
        for i, cell in enumerate(cells):
            classes = ' class="differs"' if i in marked and kind == "td" else ""
            tag, scope = ("th", ' scope="row"') if i == 0 and kind == "td" else (kind, ' scope="col"' * (kind == "th"))
            out.append(f"<{tag}{scope}{classes}>{cell}</{tag}>")
        return f"<tr>{''.join(out)}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    table = f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def _table(report: Report) -> str:
    runs, measure = report.runs, report.score
    differ = differing(runs)
    measures = list(dict.fromkeys(key for run in runs for key in run.measures))
    if measure is not None and measure.key not in measures:
        measures.insert(0, measure.key)
    measures.sort(key=lambda key: measure is None or key != measure.key)
    shown = [key for key in measures if any(run.series(key) for run in runs)]
    head = ["run", *(escape(NAMES.get(key, key.removeprefix("eval_"))) for key in shown), "steps"]
    head += [escape(key) for key in differ]
    cost = list(_measured(runs[0]))
    costs = {run.name: _measured(run) for run in runs}
    cost = [key for key in cost if any(costs[run.name][key] != NONE for run in runs)]
    head += cost + ["effective rank"] * bool(report.ranks)
    rows = []
    for run in runs:
        values = [points[-1][1] if (points := run.series(key)) else None for key in shown]
        ended = f" <small>{escape(run.failed)}</small>" if run.failed else ""
        cells = [f"{_swatch(report, run)}{escape(run.name)}{ended}"]
        best = report.score.best(runs) if report.score else None
        for key, value in zip(shown, values, strict=True):
            text = NONE if value is None else number(value)
            top = measure is not None and key == measure.key and run is best
            cells.append(f"<strong>{text}</strong>" if top else text)
        cells += [f"{run.steps:,}", *(escape(_plain(run.config.get(key))) for key in differ)]
        cells += [escape(costs[run.name][key]) for key in cost]
        if report.ranks:
            cells.append(f"{report.ranks[run.name]:.3g}" if run.name in report.ranks else NONE)
        rows.append(cells)
    first = 2 + len(shown)
    marked = frozenset(range(first, first + len(differ)))
    note = '<p class="note">Marked columns are the settings in which the runs differ.</p>' if marked else ""
    return _rows(head, rows, marked) + note


def _methods(report: Report) -> str:
    """The best run of each method."""
    assert report.score is not None or report.runs
    best: dict[str, Run] = {}
    for run in report.runs:
        best.setdefault(run.method, run)
    costs = {name: _measured(run) for name, run in best.items()}
    known = [key for key in next(iter(costs.values())) if any(cost[key] != NONE for cost in costs.values())]
    measure = report.score
    head = ["method", escape(measure.name) if measure else "score", *known, "run"]
    rows = []
    for name, run in best.items():
        value = measure.of(run) if measure else None
        cells = [escape(name), NONE if value is None else number(value)]
        rows.append([*cells, *(escape(costs[name][key]) for key in known), escape(run.name)])
    return _rows(head, rows)


def _settings(report: Report) -> str:
    differ = set(differing(report.runs)) if len(report.runs) > 1 else set()
    shared = {key: value for key, value in report.runs[0].config.items() if key not in differ}
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(_plain(v))}</dd></div>" for k, v in shared.items())
    where = "".join(f"<li>{escape(run.name)}: <code>{escape(str(run.folder))}</code></li>" for run in report.runs)
    head = "Settings that all runs share" if len(report.runs) > 1 else "All settings"
    shown = "" if len(report.runs) > 1 else " open"
    first = f'<details{shown}><summary>{head}</summary><dl class="settings">{items}</dl></details>' if shared else ""
    return f"{first}<details><summary>Folders</summary><ul>{where}</ul></details>"


def tables(title: str, parts: Iterable[tuple[str, Sequence[str], Iterable[Sequence[str]]]]) -> str:
    """A page of tables alone: heading, head and rows of each. What stands between two asterisks is marked."""

    def cell(text: str) -> str:
        if text.startswith("**") and text.endswith("**"):
            return f"<strong>{escape(text.strip('*'))}</strong>"
        return escape(text)

    body = "".join(
        _section(
            "", escape(name), _rows([escape(word) for word in head], [[cell(text) for text in row] for row in rows])
        )
        for name, head, rows in parts
    )
    return f"{_head(title)}<main><header><h1>{escape(title)}</h1></header>{body}</main></body></html>\n"


def _head(title: str) -> str:
    """Everything before the first element that is seen."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{PAGE}</style></head><body>"
    )


def write(report: Report, out: Path, title: str) -> Path:
    """Write the page, whole or not at all."""
    from fastlora.training.durable import write_text
    from fastlora.training.errors import disk_errors

    if out.is_dir():
        raise UserError(f"out: {out} is a folder: name a file such as {out / 'report.html'}")
    try:
        with disk_errors(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, html(report, title))
    except OSError as error:
        raise UserError(f"out: cannot write {out} ({error.strerror}): name another file") from error
    return out
