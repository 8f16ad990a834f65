"""Tables and plots are what the records say, and the committed ones are up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fastlora.bench import record, report
from fastlora.bench.record import Row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
MARKERS = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in report.README_BLOCKS)


def test_committed_readme_shows_the_committed_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.readme(text, RESULTS) == text, "run fastlora bench --report"


def test_committed_page_shows_the_committed_records() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert report.benchmarks(RESULTS) == page, "run fastlora bench --report"
    for link in re.findall(r"\]\((plots/[^)]*)\)", page):
        assert (ROOT / "docs" / link).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        MARKERS.replace("<!-- goals:end -->", ""),
        MARKERS * 2,
        "<!-- goals:end --><!-- goals:begin --><!-- drop-in:begin --><!-- drop-in:end -->",
    ],
)
def test_a_readme_without_its_markers_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="goals:begin"):
        report.readme(text, tmp_path)


def test_only_what_stands_between_markers_is_replaced() -> None:
    text = "before <!-- a:begin -->\nold\n<!-- a:end --> after"
    filled = report.fill(text, {"a": "new"})
    assert filled == "before <!-- a:begin -->\nnew\n<!-- a:end --> after"
    assert report.fill(filled, {"a": "new"}) == filled


GOALS = [
    Row("4096 x 4096, M = 1", "decode us", 12.34, 6.0),
    Row("4096 x 4096, M = 1", "speed-up", 1.5, 1.0, True),
    Row("4096 x 4096, M = 1", "only to inform", 7.0),
    Row("1 x 1", "not there", None, 1.0, note="a | b"),
]


def test_goals_show_misses_as_misses(tmp_path: Path) -> None:
    record.write("goals", GOALS, {"quick": False}, tmp_path)
    text = report.goals(tmp_path)
    assert "1 of 3 goals reached" in text
    assert "| 4096 x 4096, M = 1 | decode us | 12.3 | <= 6 | **MISS** |  |" in text
    assert "| speed-up | 1.5 | >= 1 | pass |" in text
    assert "| 1 x 1 | not there | - | <= 1 | **MISS** | a / b |" in text
    assert "only to inform" not in text
    assert "only to inform" in report.goals(tmp_path, everything=True)


def test_the_summary_counts_goals_and_shows_the_bars_with_their_conditions(tmp_path: Path) -> None:
    record.write("goals", GOALS, {"quick": False}, tmp_path)
    rows = [Row("a model", "tokens/s, Unsloth", 100.0), Row("a model", "tokens/s over Unsloth", 1.1, 1.2, True)]
    rows.append(Row("a model", "error of the predicted peak memory, fastlora blocks", 0.05, 0.1))
    path = record.write("train", rows, {"quick": False}, tmp_path)
    path.write_text(path.read_text().replace('"gpu": null', '"gpu": "Some GPU"'))
    record.write("train_loss", [Row("a model", "distance", 0.1, 0.5)], {"quick": False}, tmp_path)
    text = report.summary(tmp_path)
    assert f"](docs/plots/{path.parent.name}-train.png)\n\nSome GPU, torch " in text
    assert text.endswith("Goals reached: one layer 1 of 3, training steps 0 of 1, loss of a training run 1 of 1.")


def test_no_two_lines_of_a_picture_have_one_colour() -> None:
    names = ["bare GEMMs", "fastlora", "fastlora cuda", "fastlora triton", "fastlora torch", "PEFT bf16", "PEFT fp32"]
    names += ["dequant+mm+addmm", "naive PyTorch", "bitsandbytes base", "PEFT fp32 autocast", "compiled PEFT"]
    colors = report._colors(names)
    assert list(colors) == names
    assert len(set(colors.values())) == len(names)
    assert {colors[name] for name in names if name.startswith("fastlora")} <= set(report.OURS)


def test_quick_runs_are_not_shown(tmp_path: Path) -> None:
    record.write("goals", GOALS, {"quick": True}, tmp_path)
    assert report.goals(tmp_path).startswith("Not measured yet")


def test_drop_in_table_shows_losses_in_bold(tmp_path: Path) -> None:
    case = "64 x 128, M = 1, x bf16, adapters {}, base bf16"
    rows = [
        Row(case.format("bf16"), "speed-up over PEFT", 1.25, 1.0, True),
        Row(case.format("fp32"), "speed-up over PEFT", 0.75, 1.0, True),
        Row(case.format("fp32"), "fwd+bwd us", 3.0),
    ]
    path = record.write("drop_in", rows, folder=tmp_path)
    path.write_text(path.read_text().replace('"gpu": null', '"gpu": "Some GPU"'))
    assert "| 64 x 128, M = 1 | 1.25x | **0.75x** |" in report.drop_in(tmp_path)


def times(value: float, launches: bool) -> dict[str, Any]:
    return {"p20": value, "p50": value, "p80": value, "launches": launches}


def line(provider: str, m: int, **fields: Any) -> dict[str, Any]:
    row = {"shape": "some q/o", "nk": [64, 128], "m": m, "r": 4, "mode": "decode", "provider": provider}
    none = dict.fromkeys(("gpu_us", "wall_us", "host_us", "peak_bytes", "absent"))
    return {**row, **none, "ceilings": {"bytes_per_second": 1e9, "flops_per_second": 1e12}, **fields}


LINES = [
    line("fastlora", 1, gpu_us=times(40.0, False), wall_us=times(90.0, True), peak_bytes=2_500_000),
    line("fastlora", 16, gpu_us=times(50.0, False), wall_us=times(90.0, True)),
    line("PEFT", 1, gpu_us=times(70.0, True), wall_us=times(71.0, True), host_us=times(33.0, True)),
    line("gone", 1, absent="ImportError: x"),
]


def test_layer_table() -> None:
    _, _, first, _, third, fourth = report.layer_table(LINES).splitlines()
    # 4096 bytes packed, 128 uint8, one float32 and 256 more of statistics with the offset; x and y in 2 bytes
    least = (4096 + 128 + 4 + 1024 + 4 + 2 * (64 + 128)) / 1e9 * 1e6
    assert first == f"| some q/o | decode | 4 | 1 | fastlora | 40 (40 to 40) | 90 | - | 2.5 | {40 / least:.3g} |"
    assert "70 (70 to 70), with launches | 71 | 33 |" in third
    assert "ImportError: x" in fourth


def test_report_of_a_synthetic_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: bench)")
    results, docs, readme = tmp_path / "results", tmp_path / "docs", tmp_path / "README.md"
    readme.write_text(MARKERS)
    record.write("goals", GOALS, folder=results)
    record.write_lines("layer", LINES, results)
    written = report.write(results, docs, readme)
    assert "old" not in readme.read_text()
    assert "12.3" in readme.read_text()
    page = (docs / "benchmarks.md").read_text()
    links = re.findall(r"\]\((plots/[^)]*)\)", page)
    assert [(docs / link).exists() for link in links] == [True]
    svg = next(path for path in written if path.suffix == ".svg")
    drawn = svg.read_text()
    assert all(f"<!-- {label}" in drawn for label in ("roofline", "fastlora", "PEFT (with launches)"))
    assert "gone" not in drawn
    report.write(results, docs, readme)
    assert svg.read_text() == drawn, "the same record must give the same bytes"


def test_loss_curves_of_a_training_record_are_drawn_and_their_rows_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: bench)")
    results, docs, readme = tmp_path / "results", tmp_path / "docs", tmp_path / "README.md"
    readme.write_text(MARKERS)
    found = {stack: [{"losses": [3.0, 2.0], "evaluation": 1.5}] for stack in ("HF + PEFT", "fastlora blocks")}
    rows = [Row("a model", "distance, fastlora blocks", 0.25, 0.5), Row("a model", "evaluation loss, HF + PEFT", 1.5)]
    record.write("train_loss", rows, {"curves": found}, results)
    report.write(results, docs, readme)
    page = (docs / "benchmarks.md").read_text()
    assert "| a model | evaluation loss, HF + PEFT | 1.5 |" in page
    assert "| a model | distance, fastlora blocks | 0.25 | <= 0.5 | pass |" in page
    (link,) = re.findall(r"\]\((plots/[^)]*)\)", page)
    drawn = (docs / link).with_suffix(".svg").read_text()
    assert all(f"<!-- {stack}" in drawn for stack in found)


def test_speed_ups_of_training_steps_without_goals(tmp_path: Path) -> None:
    speeds = {"Unsloth": 100.0, "HF + PEFT": 400.0, "fastlora layers": 150.0, "fastlora blocks": 200.0}
    case = "a model, 2 blocks, 1 x 8"
    rows = [Row(case, f"tokens/s, {stack}", speed) for stack, speed in speeds.items()]
    rows += [Row(case, "tokens/s, HF + PEFT + Liger", None, note="liger_kernel is not installed")]
    rows += [Row(f"{case}, checkpointing", f"tokens/s, {stack}", 2 * speeds[stack]) for stack in list(speeds)[::2]]
    predicted = "error of the predicted peak memory, fastlora layers"
    rows += [Row(case, predicted, 0.12, 0.1), Row(f"{case}, checkpointing", predicted, 0.025, 0.1)]
    record.write("train_some", rows, {"quick": False}, tmp_path)
    text = report.training(tmp_path)
    assert "| model | over | 1 x 8 | 1 x 8, checkpointing |" in text
    assert "| a model, 2 blocks | Unsloth | 2.00x | 1.50x |" in text
    assert "| a model, 2 blocks | HF + PEFT | **0.50x** |  |" in text
    assert "| a model, 2 blocks | HF + PEFT + Liger | liger_kernel is not installed |  |" in text
    assert "(train_some.json)" in text
    assert "of 2 of these steps within 12.0% (1 within the goal of 10%)" in text


def test_speed_ups_are_those_of_one_device(tmp_path: Path) -> None:
    case = "a model, 2 blocks, 1 x 8"
    for device, ours in (("one-gpu", 200.0), ("other-gpu", 300.0)):
        rows = [Row(case, "tokens/s, HF + PEFT", 100.0), Row(case, "tokens/s, fastlora blocks", ours)]
        path = record.write("train_some", rows, {"quick": False}, tmp_path)
        (tmp_path / device).mkdir()
        path.rename(tmp_path / device / path.name)
    text = report.training(tmp_path)
    assert text.count("| a model, 2 blocks | HF + PEFT | 2.00x |") == 1
    assert text.count("| a model, 2 blocks | HF + PEFT | 3.00x |") == 1


def test_peers_alone_are_no_speed_up(tmp_path: Path) -> None:
    rows = [Row("a model, 2 blocks, 1 x 8", "tokens/s, HF + PEFT", 100.0)]
    record.write("train_some", rows, {"quick": False}, tmp_path)
    assert "| a model, 2 blocks | HF + PEFT | none of ours was measured |" in report.training(tmp_path)
