"""What a search found, as tables (CSV, JSON, Markdown) and plots."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.search.space import SearchConfig
from fastlora.training import durable

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

LOST = "lost"
"""Attribute of a trial that ended with its search, and does not count."""
LAST = "last"
"""Attribute with what was measured at the end of a trial."""
MEASURED = ("loss", "accuracy", "f1", "steps")
PLOTS = ("history", "importance", "slices", "parallel")


def counted(study: Study) -> list[FrozenTrial]:
    """The trials that have ended, without those that their search took down with it."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and not t.user_attrs.get(LOST)]


def finished(study: Study) -> list[FrozenTrial]:
    """The trials that ran to their end."""
    return [trial for trial in counted(study) if trial.state.name == "COMPLETE"]


def best(study: Study) -> Any:
    """The best of `finished`, None where there is none."""
    done = finished(study)
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number)) if done else None


def short(value: Any) -> str:
    """A value in a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(study: Study, settings: SearchConfig) -> list[dict[str, Any]]:
    """A row for each trial: trial, state, the metric, seconds, what was measured besides, the settings, a message."""
    names = list(dict.fromkeys(name for trial in counted(study) for name in trial.params))
    found = []
    for trial in counted(study):
        last = trial.user_attrs.get(LAST, {})
        seen = trial.intermediate_values
        value = trial.value if trial.value is not None else seen[max(seen)] if seen else None
        states = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed"}
        found.append(
            {
                "trial": trial.number,
                "state": states[trial.state.name],
                settings.metric: value,
                "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
                **{key: last[key] for key in MEASURED if key != settings.metric and key in last},
                **{name: trial.params.get(name) for name in names},
                "message": trial.user_attrs.get("message", ""),
            }
        )
    return found


def markdown(table: list[dict[str, Any]], metric: str, direction: str) -> str:
    """The rows as a Markdown table, the best first, those without a result last."""
    keys = list(dict.fromkeys(key for row in table for key in row))
    sign = 1 if direction == "minimize" else -1
    order = {"finished": 0, "stopped": 1, "failed": 2}
    ranked = sorted(
        table, key=lambda row: (order[row["state"]], float("inf") if row[metric] is None else sign * row[metric])
    )
    cells = [keys, ["---"] * len(keys)]
    cells += [["" if row.get(key) is None else short(row[key]).replace("|", "/") for key in keys] for row in ranked]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def write(
    study: Study,
    settings: SearchConfig,
    folder: Path,
    held_out: dict[str, dict[str, float]] | None = None,
    *,
    plots: bool = True,
) -> list[Path]:
    """Writes trials.csv, trials.json, trials.md and the plots; the files written."""
    table = rows(study, settings)
    if not table:
        return []
    keys = list(dict.fromkeys(key for row in table for key in row))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    page = markdown(table, settings.metric, settings.direction)
    if held_out:
        page += "\n" + _held_out(held_out)
    texts = {
        "trials.csv": lines.getvalue(),
        "trials.json": json.dumps({"metric": settings.metric, "trials": table, "held_out": held_out or {}}, indent=1),
        "trials.md": page,
    }
    for name, text in texts.items():
        durable.write_text(folder / name, text)
    files = [folder / name for name in texts]
    return files + (draw(study, settings, folder) if plots else [])


def _held_out(found: dict[str, dict[str, float]]) -> str:
    keys = [key for key in ("loss", "accuracy", "f1") if all(key in values for values in found.values())]
    lines = [["held-out data", *keys], ["---"] * (len(keys) + 1)]
    lines += [[name, *(short(values[key]) for key in keys)] for name, values in found.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- plots


def draw(study: Study, settings: SearchConfig, folder: Path) -> list[Path]:
    """Writes the plots that the trials suffice for, as PNG and SVG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = finished(study)
    names = [name for name in (done[0].params if done else ()) if len({t.params.get(name) for t in done}) > 1]
    files = []
    for plot in PLOTS:
        if plot != "history" and (len(done) < 2 or not names):
            continue
        if plot == "parallel" and len(names) < 2:  # lines lead from one setting to another
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        {"history": _history, "importance": _importance, "slices": _slices, "parallel": _parallel}[plot](
            figure, study, settings, names
        )
        for kind in ("png", "svg"):
            path = folder / f"{plot}.{kind}"
            figure.savefig(path, dpi=150)
            files.append(path)
    return files


def _history(figure: Any, study: Study, settings: SearchConfig, names: list[str]) -> None:
    axes = figure.add_subplot()
    done = finished(study)
    stopped = [t for t in counted(study) if t.state.name == "PRUNED" and t.intermediate_values]
    axes.plot([t.number for t in done], [t.value for t in done], "o", label="finished")
    if stopped:
        last = [t.intermediate_values[max(t.intermediate_values)] for t in stopped]
        axes.plot([t.number for t in stopped], last, "x", color="0.5", label="stopped")
    better = min if settings.direction == "minimize" else max
    so_far: list[Any] = []
    for trial in done:
        so_far.append(better([*so_far[-1:], trial.value]))
    axes.step([t.number for t in done], so_far, where="post", label="best so far")
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="trial", ylabel=f"validation {settings.metric}", title="Trials")
    axes.legend()


def _importance(figure: Any, study: Study, settings: SearchConfig, names: list[str]) -> None:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    # Over the finished trials: a trial that was stopped has another value than it would have had.
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), params=names)
    axes = figure.add_subplot()
    ordered = sorted(found, key=lambda name: found[name])
    axes.barh(ordered, [found[name] for name in ordered])
    axes.set(xlabel="share of the importance (PED-ANOVA)", title=f"What decides the {settings.metric}")


def _positions(values: list[Any]) -> tuple[list[float], list[str] | None]:
    """Where values stand on an axis, and its labels where they are no numbers."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values], None
    kinds = sorted({str(value) for value in values})
    return [float(kinds.index(str(value))) for value in values], kinds


def _slices(figure: Any, study: Study, settings: SearchConfig, names: list[str]) -> None:
    done = finished(study)
    columns = min(3, len(names))
    figure.set_size_inches(3.6 * columns, 3 * -(-len(names) // columns))
    for i, name in enumerate(names):
        axes = figure.add_subplot(-(-len(names) // columns), columns, i + 1)
        having = [t for t in done if name in t.params]
        places, labels = _positions([t.params[name] for t in having])
        axes.scatter(places, [t.value for t in having], c=[t.number for t in having], cmap="viridis", s=18)
        if getattr(having[0].distributions[name], "log", False):
            axes.set_xscale("log")
            ends = (min(places), max(places))
            axes.set_xticks(ends, [short(end) for end in ends])
            axes.minorticks_off()
        if labels is not None:
            axes.set_xticks(range(len(labels)), [label[:18] for label in labels], rotation=20, fontsize=8)
        axes.set_xlabel(name)
        if i % columns == 0:
            axes.set_ylabel(f"validation {settings.metric}")


def _parallel(figure: Any, study: Study, settings: SearchConfig, names: list[str]) -> None:
    import math

    import matplotlib

    done = [t for t in finished(study) if all(name in t.params for name in names)]
    axes = figure.add_subplot()
    values = [t.value or 0.0 for t in done]
    low, high = min(values), max(values)
    shade = matplotlib.colormaps["viridis_r" if settings.direction == "minimize" else "viridis"]
    heights: list[list[float]] = []
    for i, name in enumerate(names):
        places, labels = _positions([t.params[name] for t in done])
        if getattr(done[0].distributions[name], "log", False):
            places = [math.log10(place) for place in places]
        bottom, span = min(places), (max(places) - min(places)) or 1.0
        heights.append([(place - bottom) / span for place in places])
        ends = (labels[0], labels[-1]) if labels else [short(f(t.params[name] for t in done)) for f in (min, max)]
        axes.annotate(ends[0][:18], (i, -0.02), ha="center", va="top", fontsize=8)
        axes.annotate(ends[1][:18], (i, 1.02), ha="center", va="bottom", fontsize=8)
        axes.axvline(i, color="0.8", zorder=0)
    for j in sorted(range(len(done)), key=lambda j: values[j], reverse=settings.direction == "minimize"):
        share = (values[j] - low) / ((high - low) or 1.0)
        axes.plot(range(len(names)), [column[j] for column in heights], color=shade(share), alpha=0.8)
    axes.set_xticks(range(len(names)), names, rotation=15)
    axes.tick_params(axis="x", pad=12, length=0)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    norm = matplotlib.colors.Normalize(low, high)
    figure.colorbar(matplotlib.cm.ScalarMappable(norm, shade), ax=axes, label=f"validation {settings.metric}")
