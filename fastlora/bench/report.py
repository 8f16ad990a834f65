"""The records under ``bench/results`` as Markdown tables and plots: ``fastlora bench --report``."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastlora.bench import layer, record, runs, timing
from fastlora.bench.record import Row
from fastlora.bench.train_step import ALIKE, PREDICTED
from fastlora.nf4 import NF4Weight

Lines = list[dict[str, Any]]

PLOTS = "plots"
"""The folder of the plots, beside the page that shows them."""
STEP_PICTURE = "![tokens a second and memory of a training step]"

OURS = ("#d62728", "#ff7f0e", "#8c1d40", "#e8b100", "#e377c2", "#7a4a00", "#ff9d8a", "#5c0000")
THEIRS = ("#1f77b4", "#17becf", "#7f7f7f", "#9467bd", "#2ca02c", "#1b3a5c", "#9ecae1", "#bcbd22", "#c5b0d5", "#3d3d3d")


def _colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, warm ones for what is fastlora's; no two alike as long as there are colours."""
    ours, theirs = itertools.cycle(OURS), itertools.cycle(THEIRS)
    return {name: next(ours if name.startswith("fastlora") else theirs) for name in names}


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _short(value: float | None) -> str:
    """A number that has to fit over a narrow bar."""
    return _number(value) if value is None or value < 10_000 else f"{value / 1000:.1f}k"


def rows_table(rows: Iterable[Row]) -> str:
    """A table of rows, a missed goal in bold."""
    return _markdown(
        ("case", "metric", "measured", "goal", "", "note"),
        (
            (
                row.case,
                row.metric,
                _number(row.value),
                row.bound,
                "**MISS**" if row.verdict == "MISS" else row.verdict,
                row.note.replace("|", "/"),
            )
            for row in rows
        ),
    )


def _conditions(data: dict[str, Any]) -> str:
    """What numbers depend on."""
    parts = [data.get("gpu") or f"CPU ({data.get('cpu')}, {data.get('threads')} threads)", f"torch {data.get('torch')}"]
    packages = ("triton", "bitsandbytes", "peft", "liger_kernel", "unsloth")
    parts += [f"{name} {data[name]}" for name in packages if data.get(name, "not installed") != "not installed"]
    if data.get("extension", "loaded") != "loaded":
        parts.append("without the extension")
    return f"{', '.join(parts)}, commit {data.get('commit')}"


def _source(path: Path, data: dict[str, Any]) -> str:
    """Where numbers come from."""
    return f"{_conditions(data)} ({'/'.join(path.parts[-4:])})"


def _found(results: Path, name: str) -> list[Path]:
    return sorted(results.glob(f"*/{name}"))


def _bound(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a goal."""
    return [row for row in rows if row.goal is not None]


def _reached(bound: list[Row]) -> str:
    return f"{sum(row.ok for row in bound)} of {len(bound)}"


def goals(results: Path, *, everything: bool = False) -> str:
    """Every goal of the committed runs, pass or miss, and with ``everything`` the rows that only inform."""
    blocks = []
    for path in _found(results, "goals.json"):
        data, rows = record.read(path)
        if data.get("quick"):
            continue
        bound = _bound(rows)
        head = f"{_source(path, data)}: {_reached(bound)} goals reached."
        blocks.append(f"{head}\n\n{rows_table(rows if everything else bound)}")
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite goals` on a GPU writes the record."


_SPEED = re.compile(r"(?P<layer>\d+ x \d+, M = \d+), (?P<setup>x .*)")


def drop_in(results: Path) -> str:
    """Speed-ups over PEFT of every layer and set-up of the committed runs on GPUs, the losses in bold."""
    blocks = []
    for path in _found(results, "drop_in.json"):
        data, rows = record.read(path)
        cells: dict[str, dict[str, str]] = {}
        for row in rows:
            match = _SPEED.fullmatch(row.case)
            if match and row.metric == "speed-up over PEFT" and row.value is not None:
                text = f"{row.value:.2f}x"
                cells.setdefault(match["layer"], {})[match["setup"]] = text if row.ok else f"**{text}**"
        setups = list(dict.fromkeys(itertools.chain.from_iterable(cells.values())))
        if data.get("gpu") and setups:
            body = ((case, *(found.get(setup, "-") for setup in setups)) for case, found in cells.items())
            blocks.append(f"{_source(path, data)}.\n\n{_markdown(('layer', *setups), body)}")
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite drop-in` on a GPU writes the record."


def _drop_in_rest(results: Path) -> str:
    """What the drop-in's records hold beside the speed: goals reached and missed, the loss curves."""
    blocks = []
    for path in _found(results, "drop_in.json"):
        data, rows = record.read(path)
        shown = [row for row in rows if not row.ok or "hidden" in row.case]
        text = f"{_source(path, data)}: {_reached(_bound(rows))} goals reached."
        blocks.append(f"{text} Every miss, and the loss curves:\n\n{rows_table(shown)}" if shown else text)
    return "\n\n".join(blocks)


_STACK = re.compile(r"(?P<what>.+?), (?P<stack>(?:HF \+ PEFT|Unsloth|fastlora (?:layers|blocks)).*)")
"""Metrics of one way to train; what is compared to others has another form."""


def _training_records(results: Path) -> Iterator[tuple[Path, dict[str, Any], list[Row]]]:
    """The committed records of training steps, the goals first."""
    for path in sorted(results.glob("*/train*.json"), key=lambda path: (path.parent, path.stem != "train", path.stem)):
        data, rows = record.read(path)
        if not data.get("quick"):
            yield path, data, rows


def _by_stack(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows of training steps by case, stack and metric."""
    found: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if match := _STACK.fullmatch(row.metric):
            found.setdefault(row.case, {}).setdefault(match["stack"], {})[match["what"]] = row
    return found


def _step_goals(rows: Iterable[Row]) -> list[Row]:
    """The rows of a training step that have a goal; how well its memory was predicted is told apart."""
    return [row for row in _bound(rows) if not row.metric.startswith(PREDICTED)]


def summary(results: Path) -> str:
    """Bars of speed and memory of whole training steps, their conditions, and how many goals each record reaches."""
    blocks, scores = [], []
    for path in _found(results, "goals.json"):
        data, rows = record.read(path)
        if not data.get("quick"):
            scores.append(f"one layer {_reached(_bound(rows))}")
    for path, data, rows in _training_records(results):
        if not (bound := _step_goals(rows)):
            continue
        name = _bars_name(path, data, rows)
        scores.append(f"{'training steps' if name else 'loss of a training run'} {_reached(bound)}")
        if name is not None:
            blocks.append(f"{STEP_PICTURE}(docs/{PLOTS}/{name}.png)\n\n{_source(path, data)}.")
    blocks += [f"Goals reached: {', '.join(scores)}."] if scores else []
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench` on a GPU writes the records."


def training(results: Path) -> str:
    """The goals of whole training steps, and how much faster all other steps are."""
    blocks, others, errors = [], [], []
    for path, data, rows in _training_records(results):
        errors += [row for row in rows if row.metric.startswith(PREDICTED)]
        if not (bound := _step_goals(rows)):
            others.append((path, data, rows))
            continue
        blocks.append(f"{_source(path, data)}: {_reached(bound)} goals reached.\n\n{rows_table(bound)}")
    # Of one device each: another one's speed says nothing of this one's peers.
    blocks += [_speed_ups(list(group)) for _, group in itertools.groupby(others, lambda found: found[0].parent)]
    if errors:
        worst = max(row.value or 0.0 for row in errors)
        text = (
            f"`fastlora explain --model` predicts the peak memory: of {len(errors)} of these steps within {worst:.1%}"
        )
        blocks.append(f"{text} ({sum(row.ok for row in errors)} within the goal of {errors[0].goal:.0%}).")
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite train` on a GPU writes the record."


def _speed_ups(records: list[tuple[Path, dict[str, Any], list[Row]]]) -> str:
    """The fastest of fastlora's stacks in a record over each of the others: a row for each, a column for each size."""
    sources: dict[str, list[str]] = {}
    table: dict[tuple[str, str], dict[str, str]] = {}
    for path, data, rows in records:
        sources.setdefault(_conditions(data), []).append(path.name)
        for case, stacks in _by_stack(rows).items():
            model, blocks, size = case.split(", ", 2)
            speeds = {stack: _value(stacks, stack, "tokens/s") for stack in stacks}
            best = max((speed or 0.0 for stack, speed in speeds.items() if stack.startswith("fastlora")), default=0.0)
            for stack, speed in speeds.items():
                if stack.startswith("fastlora"):
                    continue
                if speed and not best:
                    cell = "none of ours was measured"
                elif speed:
                    cell = f"{best / speed:.2f}x" if best >= speed else f"**{best / speed:.2f}x**"
                else:
                    cell = stacks[stack]["tokens/s"].note.replace("|", "/").rstrip(": ")
                table.setdefault((f"{model}, {blocks}", stack), {})[size] = cell
    sizes = list(dict.fromkeys(size for cells in table.values() for size in cells))
    body = [(*key, *(cells.get(size, "") for size in sizes)) for key, cells in sorted(table.items())]
    where = "\n".join(f"- {conditions} ({', '.join(names)})" for conditions, names in sources.items())
    text = (
        "Tokens/s of the fastest of fastlora's ways to train over those of others on the same model; bold where less:"
    )
    return f"{text}\n\n{_markdown(('model', 'over', *sizes), body)}\n\n{where}"


def _training_tables(results: Path) -> str:
    """Everything that the records of training steps hold."""
    blocks = []
    for path, data, rows in _training_records(results):
        blocks.append(f"{_source(path, data)}.")
        if (name := _bars_name(path, data, rows)) is not None:
            blocks.append(f"{STEP_PICTURE}({PLOTS}/{name}.png)")
        if "curves" in data:
            blocks += [f"![loss of a training step]({PLOTS}/{_plot_name(path)}.png)", rows_table(rows)]
            continue
        cases = _by_stack(rows)
        for case, stacks in cases.items():
            blocks += [f"### {case}", _stacks_table(stacks)]
            if any(what.startswith("GPU ms") for found in stacks.values() for what in found):
                blocks.append(_classes_table(stacks))
        shown = [row for row in rows if not _STACK.fullmatch(row.metric)]
        blocks.append(rows_table(shown))
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite train` on a GPU writes the record."


def _stacks_table(stacks: dict[str, dict[str, Row]]) -> str:
    body = []
    for stack, found in stacks.items():
        last = next((row for what, row in found.items() if what.startswith("loss")), None)
        columns = [found.get(what) for what in ("tokens/s", "ms a step", "peak memory GiB", "MFU")]
        cells = [_number(row.value if row else None) for row in (*columns, last)]
        note = found["tokens/s"].note.replace("|", "/") if "tokens/s" in found else ""
        body.append((stack, *cells, note))
    return _markdown(("stack", "tokens/s", "ms a step", "peak GiB", "MFU", "last loss", "note"), body)


def _classes_table(stacks: dict[str, dict[str, Row]]) -> str:
    """GPU milliseconds of a step by class of kernel."""
    kinds = dict.fromkeys(what for found in stacks.values() for what in found if what.startswith("GPU ms"))
    body = []
    for stack, found in stacks.items():
        if any(kind in found for kind in kinds):
            body.append((stack, *(_number(found[kind].value if kind in found else None) for kind in kinds)))
    return _markdown(("GPU ms of a step", *(kind.removeprefix("GPU ms, ") for kind in kinds)), body)


def _bars_name(path: Path, data: dict[str, Any], rows: list[Row]) -> str | None:
    """The name of the plot of a record; None where there is nothing to draw."""
    if data.get("gpu") and any(row.value is not None and row.metric.startswith("tokens/s,") for row in rows):
        return _plot_name(path)
    return None


def _plot_name(path: Path) -> str:
    return f"{path.parent.name}-{_slug(path.stem)}"


def curves(found: dict[str, list[dict[str, Any]]], title: str, stem: Path) -> None:
    """The training loss of every stack, the mean over the seeds and their spread, as PNG and SVG."""
    with _drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for i, (stack, seeds) in enumerate(found.items()):
            steps = list(zip(*(seed["losses"] for seed in seeds), strict=True))
            numbers = range(1, len(steps) + 1)
            mean = [sum(losses) / len(losses) for losses in steps]
            width = 3.0 if i == 0 else 1.2
            axes.plot(numbers, mean, "-" if i == 0 else "--", color=f"C{i}", linewidth=width, label=stack)
            if i == 0:
                low, high = [min(losses) for losses in steps], [max(losses) for losses in steps]
                axes.fill_between(numbers, low, high, color=f"C{i}", alpha=0.15, label=f"{stack}, seeds", linewidth=0)
        axes.set(xlabel="step", ylabel="training loss", title=title)
        axes.grid(True, alpha=0.2)
        axes.legend(fontsize=8)
        _save(figure, stem)


def _value(found: dict[str, dict[str, Row]], stack: str, what: str) -> float | None:
    row = found.get(stack, {}).get(what)
    return None if row is None else row.value


def bars(rows: list[Row], title: str, stem: Path) -> None:
    """Tokens a second and peak memory of the stacks in every case, as PNG and SVG."""
    cases = _by_stack(rows)
    panels = {"tokens/s": "tokens a second", "peak memory GiB": "peak memory, GiB"}
    stacks = list(dict.fromkeys(stack for found in cases.values() for stack in found))
    stacks = [stack for stack in stacks if any(_value(found, stack, "tokens/s") for found in cases.values())]
    stacks = [stack for stack in stacks if stack not in ALIKE]
    stacks.sort(key=lambda stack: stack.startswith("fastlora"))  # the peers first, whatever order they ran in
    colors = _colors(stacks)
    with _drawing() as pyplot:
        size = (max(7.0, 2.4 * len(cases)), 7)
        figure, axes = pyplot.subplots(len(panels), figsize=size, layout="constrained", sharex=True)
        for axis, (what, label) in zip(axes, panels.items(), strict=True):
            for stack in stacks:
                places, values = [], []
                for place, found in enumerate(cases.values()):
                    shown = [one for one in stacks if _value(found, one, what) is not None]
                    if stack in shown:
                        places.append(place + (shown.index(stack) - (len(shown) - 1) / 2) * 0.8 / len(shown))
                        values.append((_value(found, stack, what), 0.8 / len(shown)))
                heights, widths = [value for value, _ in values], [width for _, width in values]
                drawn = axis.bar(places, heights, widths, color=colors[stack], label=stack)
                axis.bar_label(drawn, [_short(value) for value in heights], fontsize=5, padding=1)
            axis.set_ylabel(label)
            axis.grid(True, axis="y", alpha=0.2)
        axes[-1].set_xticks(range(len(cases)), [case.replace(", ", ",\n", 2) for case in cases], fontsize=7)
        axes[0].set_title(title)
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")
        _save(figure, stem)


def _whole(results: Path, suite: str, picture: bool) -> str:
    """Every row of the records of a suite, and with ``picture`` its plot."""
    blocks = []
    for path in _found(results, f"{suite}.json"):
        data, rows = record.read(path)
        blocks.append(f"{_source(path, data)}.")
        if picture:
            blocks.append(f"![{suite}]({PLOTS}/{path.parent.name}-{suite}.png)")
        blocks.append(rows_table(rows))
    return "\n\n".join(blocks) or f"Not measured yet: `fastlora bench --suite {suite}` writes the record."


def _least(line: dict[str, Any]) -> float:
    """Microseconds of the roofline for the case of a line."""
    shape, m, mode = tuple(line["nk"]), line["m"], line["mode"]
    nbytes = layer.moved_bytes(NF4Weight.empty(shape).nbytes, shape, m, mode)
    ceilings = timing.Ceilings(**line["ceilings"])
    return ceilings.roofline(nbytes, layer.operations(shape, m, line["r"], mode))


def _shown_time(line: dict[str, Any]) -> tuple[float, bool] | None:
    """The GPU time of a line, or else the time with launches, and whether launches are in it."""
    times = line["gpu_us"] or line["wall_us"]
    return (times["p50"], times["launches"]) if times else None


def layer_table(lines: Lines) -> str:
    """Every line of a layer record."""
    body = []
    for line in lines:
        case = (line["shape"], line["mode"], str(line["r"]), str(line["m"]), line["provider"])
        if line["absent"]:
            body.append((*case, line["absent"].replace("|", "/"), "", "", "", ""))
            continue
        gpu, wall, host, peak = line["gpu_us"], line["wall_us"], line["host_us"], line["peak_bytes"]
        alone = f"{_number(gpu['p50'])} ({_number(gpu['p20'])} to {_number(gpu['p80'])})" if gpu else "-"
        if gpu and gpu["launches"]:
            alone += ", with launches"
        time = _shown_time(line)
        body.append(
            (
                *case,
                alone,
                _number(wall and wall["p50"]),
                _number(host and host["p50"]),
                _number(peak and peak / 1e6),
                _number(time and time[0] / _least(line)),
            )
        )
    head = ("layer", "mode", "r", "M", "provider", "GPU us (p20 to p80)", "with launches us", "host us", "peak MB")
    return _markdown((*head, "time / roofline"), body)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


@contextlib.contextmanager
def _drawing() -> Iterator[Any]:
    """pyplot without a screen, drawing the same bytes from the same record."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "fastlora", "font.size": 9}):
        yield pyplot
        pyplot.close("all")


def _save(figure: Any, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    figure.savefig(f"{stem}.png", dpi=120, metadata={"Software": None})


def plot(lines: Lines, title: str, stem: Path) -> None:
    """Time against M of every provider of one layer, mode and rank, with the roofline, as PNG and SVG."""
    colors = _colors(dict.fromkeys(line["provider"] for line in lines))
    with _drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name, color in colors.items():
            points = sorted(
                (line["m"], *time) for line in lines if line["provider"] == name and (time := _shown_time(line))
            )
            if not points:
                continue
            m, times, launches = zip(*points, strict=True)
            label = f"{name} (with launches)" if any(launches) else name
            width = 2.5 if name == "fastlora" else 1.2
            style = "--" if any(launches) else "-"
            axes.plot(m, times, style, marker="o", markersize=3, linewidth=width, color=color, label=label)
        least = sorted({line["m"]: _least(line) for line in lines}.items())
        axes.plot(*zip(*least, strict=True), color="black", linestyle=":", label="roofline (measured)")
        axes.set(xscale="log", yscale="log", xlabel="M (tokens)", ylabel="microseconds", title=title)
        axes.set_xticks([m for m, _ in least], [str(m) for m, _ in least])
        axes.minorticks_off()
        axes.grid(True, alpha=0.2)
        axes.legend(fontsize=7)
        _save(figure, stem)


@dataclasses.dataclass(frozen=True)
class _Group:
    """The lines of one plot and one table: a layer, a mode, a rank, every M and provider."""

    name: str
    title: str
    lines: Lines


def _groups(path: Path, lines: Lines) -> Iterator[_Group]:
    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["shape"], line["mode"], line["r"]

    for (shape, mode, r), group in itertools.groupby(sorted(lines, key=key), key):
        case = list(group)
        n, k = case[0]["nk"]
        name = f"{path.parent.name}-{_slug(shape)}-{_slug(mode)}-r{r}"
        yield _Group(name, f"{shape} ({n} x {k}), {mode}, r = {r}", case)


def _layers(results: Path) -> str:
    blocks = []
    for path in _found(results, "layer.jsonl"):
        lines = record.read_lines(path)
        if not lines:
            continue
        ceilings = timing.Ceilings(**lines[0]["ceilings"])
        blocks.append(
            f"{_source(path, lines[0])}. Roofline: {ceilings.bytes_per_second / 1e12:.2f} TB/s copied, "
            f"{ceilings.flops_per_second / 1e12:.0f} TFLOP/s of the library's bf16 product, both measured in the run."
        )
        for group in _groups(path, lines):
            blocks += [f"![{group.title}]({PLOTS}/{group.name}.png)", layer_table(group.lines)]
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite layer` writes the record."


def benchmarks(results: Path) -> str:
    """The page of all tables and plots."""
    sections = {
        "Goals": goals(results, everything=True),
        "Training step": _training_tables(results),
        "Drop-in: speed-up over PEFT": drop_in(results),
        "Drop-in: goals missed, loss curves": _drop_in_rest(results),
        "Training runs beside PEFT": _whole(results, "runs", picture=True),
        "What merging keeps of a fine-tune": _whole(results, "merge", picture=False),
        "One layer": _layers(results),
    }
    head = "# Benchmarks\n\nGenerated by `fastlora bench --report` from the records under `bench/results`. Medians.\n\n"
    return head + "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items()) + "\n"


def methods(results: Path) -> str:
    """Every method of the committed runs, a line each: in the shape of a large model, and on the task. Then what
    adapters do beside learning."""
    from fastlora.bench.methods import PLANS, table

    sources: list[str] = []
    groups: dict[str, list[Row]] = {}
    rest: list[Row] = []
    records = [(path, *record.read(path)) for path in _found(results, "methods.json")]
    for path, data, rows in sorted(records, key=lambda found: not found[1].get("gpu")):
        if data.get("quick"):
            continue
        by: dict[str, list[Row]] = {}
        for row in rows:
            method, _, setting = row.case.partition(", ")
            (by.setdefault(setting, []) if method in PLANS else rest).append(row)
        for setting, group in by.items():
            bound = _bound(group)
            reached = f", {_reached(bound)} goals reached" if bound else ""
            label = f"({len(sources) + 1})"
            sources.append(f"- {label} {setting}: {_source(path, data)}{reached}.")
            groups[label] = group
    blocks = ["\n".join(sources), table(groups)] if groups else []
    blocks += [rows_table(rest)] if rest else []
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite methods` writes the record."


def distributed(results: Path) -> str:
    """What the committed runs over several GPUs measured: goals, speed and memory by stack, loss."""
    blocks = []
    for path in _found(results, "distributed*.json"):
        data, rows = record.read(path)
        if data.get("quick"):
            continue
        bound = _bound(rows)
        head = f"{_source(path, data)}, {data.get('processes')} GPUs"
        blocks.append(f"{head}: {_reached(bound)} goals reached.\n\n{rows_table(bound)}")
        blocks += [f"### {case}\n\n{_ways_table(group)}" for case, group in _by_stack(rows).items()]
        other = [row for row in rows if row.goal is None and not _STACK.fullmatch(row.metric)]
        if other:
            blocks.append(rows_table(other))
    return (
        "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite distributed` on two GPUs writes the record."
    )


def _ways_table(stacks: dict[str, dict[str, Row]]) -> str:
    columns = ("tokens/s", "ms a step", "peak memory GiB", "base GiB a GPU", "loss")
    kinds = dict.fromkeys(what for found in stacks.values() for what in found if what.startswith("GPU ms"))
    body = []
    for stack, found in stacks.items():
        cells = [_number(found[what].value if what in found else None) for what in columns]
        note = found["tokens/s"].note.replace("|", "/") if "tokens/s" in found else ""
        body.append((stack, *cells, note))
    text = _markdown(("stack", *columns, "note"), body)
    return f"{text}\n\n{_classes_table(stacks)}" if kinds else text


def tasks(results: Path) -> str:
    """The examples' tasks as the committed runs have measured them."""
    blocks = []
    for path in _found(results, "tasks.json"):
        data, rows = record.read(path)
        if not data.get("quick"):
            blocks.append(f"{_source(path, data)}.\n\n{rows_table(rows)}")
    return "\n\n".join(blocks) or "Not measured yet: `fastlora bench --suite tasks` writes the record."


README_BLOCKS: dict[str, Callable[[Path], str]] = {
    "goals": goals,
    "training": training,
    "drop-in": drop_in,
    "summary": summary,
}
"""What stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in the README, from the folder of records."""


def fill(text: str, blocks: dict[str, str]) -> str:
    """``text`` with each block between its markers. Raises ValueError for a block without its pair of markers."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"expected one {begin} and one {end} after it")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return text


def readme(text: str, results: Path) -> str:
    """The README with its tables as the records have them."""
    return fill(text, {name: block(results) for name, block in README_BLOCKS.items()})


def write(results: Path, docs: Path, readme_path: Path) -> list[Path]:
    """Write ``benchmarks.md`` and the plots under ``docs`` and the tables of the README; the files written.

    Raises ValueError where the README lacks its markers.
    """
    filled = readme(readme_path.read_text(encoding="utf-8"), results)
    page = docs / "benchmarks.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(benchmarks(results), encoding="utf-8")
    readme_path.write_text(filled, encoding="utf-8")
    written = [page, readme_path]
    for path, data, rows in _training_records(results):
        if (name := _bars_name(path, data, rows)) is not None:
            stem = docs / PLOTS / name
            bars(rows, f"QLoRA training step, bf16, r = 16, NF4, AdamW, {data['gpu']}", stem)
            written += [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
        if "curves" in data:
            stem = docs / PLOTS / _plot_name(path)
            case = next(row.case for row in rows)
            curves(data["curves"], f"{case}, {data.get('gpu') or 'CPU'}", stem)
            written += [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
    methods_page = docs / "methods.md"
    if methods_page.is_file():
        text = fill(methods_page.read_text(encoding="utf-8"), {"methods": methods(results)})
        methods_page.write_text(text, encoding="utf-8")
        written.append(methods_page)
    page = docs / "distributed.md"
    if page.is_file():
        text = fill(page.read_text(encoding="utf-8"), {"distributed": distributed(results)})
        page.write_text(text, encoding="utf-8")
        written.append(page)
    page = docs / "tasks.md"
    if page.is_file():
        text = fill(page.read_text(encoding="utf-8"), {"tasks": tasks(results)})
        page.write_text(text, encoding="utf-8")
        written.append(page)
    for path in _found(results, "layer.jsonl"):
        lines = record.read_lines(path)
        for group in _groups(path, lines):
            stem = docs / PLOTS / group.name
            plot(group.lines, f"{group.title}, {lines[0].get('gpu') or 'CPU'}", stem)
            written += [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
    for path in _found(results, "runs.json"):
        data, _ = record.read(path)
        stem = docs / PLOTS / f"{path.parent.name}-runs"
        runs.plot(data["loss_curves"], f"Training beside PEFT, {data.get('gpu') or 'CPU'}", stem)
        written += [Path(f"{stem}.{kind}") for kind in ("png", "svg")]
    return written
