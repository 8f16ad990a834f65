"""The goals' machinery: ratios, guards, what counts as saved or as repeated; their values need a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")

from fastlora.bench import goals, providers, run
from fastlora.bench.layer import Measured
from fastlora.bench.record import Row
from fastlora.bench.timing import Times

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def times(value: float, launches: bool = False) -> Times:
    return Times(value, value, value, launches)


def test_ratio_of_gpu_times() -> None:
    found = {"a": Measured(gpu_us=times(3.0)), "b": Measured(gpu_us=times(2.0))}
    row = goals.ratio("c", "m", found, "a", "b", 1.4, False)
    assert (row.value, row.ok, row.note) == (1.5, False, "")
    assert goals.ratio("c", "m", found, "a", "b", 1.4, True).ok


def test_a_time_with_launches_is_compared_with_its_like() -> None:
    ours = Measured(gpu_us=times(1.0), wall_us=times(8.0, True))
    theirs = Measured(gpu_us=times(9.0, True), wall_us=times(9.0, True))
    row = goals.ratio("c", "m", {"a": theirs, "b": ours}, "a", "b", 2.0, True)
    assert (row.value, row.ok, row.note) == (9 / 8, False, "with launches")


def test_a_missing_rival_is_a_miss_with_its_reason() -> None:
    found = {"a": Measured(absent="ImportError: x"), "b": Measured(gpu_us=times(2.0))}
    row = goals.ratio("c", "m", found, "a", "b", 1.0, True)
    assert (row.value, row.ok, row.note) == (None, False, "a: ImportError: x")


def test_memory_goal_is_the_best_peer() -> None:
    found = {
        goals.FLOOR: Measured(peak_bytes=0),
        goals.OURS: Measured(peak_bytes=3_000_000),
        "x": Measured(peak_bytes=2_000_000),
        "y": Measured(peak_bytes=4_000_000),
        "z": Measured(absent="no"),
    }
    row, *rest = goals._memory("c", found, torch.device("cuda"))
    assert (row.value, row.goal, row.ok, row.note) == (3.0, 2.0, False, "best peer: x")
    assert [one.value for one in rest] == [2.0, 4.0]


def test_a_case_that_fails_keeps_its_rows_and_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: goals.Run) -> Iterator[Row]:
        yield Row("c", "m", 1.0)
        raise RuntimeError("broken")

    monkeypatch.setitem(goals.CASES, "failing", failing)
    rows = goals.measure("failing", goals.Run(DEVICE))
    assert [row.ok for row in rows] == [True, False]
    assert rows[1].note == "RuntimeError: broken"


def test_saved_bytes_finds_what_is_kept() -> None:
    layer = providers.make_layer(64, 128, 16, torch.bfloat16, DEVICE)
    x = torch.zeros(8, 128, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    assert goals.saved_bytes(providers.fused(layer), layer, x) == 8 * 16 * 2
    # The dense weight is the least that plain PyTorch keeps.
    assert goals.saved_bytes(providers.naive(layer), layer, x) >= layer.dense.nbytes


def test_differing_counts_elements() -> None:
    layer = providers.make_layer(64, 128, 4, torch.bfloat16, DEVICE)
    x = torch.zeros(8, 128, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    dy = torch.ones(8, 64, dtype=torch.bfloat16, device=DEVICE)
    steady = providers.fused(layer)
    assert goals.differing(steady, x, dy) == 0
    calls: list[int] = []

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        y = steady.forward(x)
        return y + torch.nn.functional.one_hot(torch.tensor(0), 64).to(y) * len(calls)

    assert goals.differing(dataclasses.replace(steady, forward=drifting), x, dy) == 8


CASES = (
    "device",
    "forward",
    "training 4096 x 4096, 8192",
    "training 4096 x 4096, 2048",
    "decode 4096 x 4096, 1",
    "decode 14336 x 4096, 16",
    "launches",
    "dequantize 4096 x 4096",
    "saved",
    "repeated 16",
    "repeated torch",
)
"""One of each kind."""


def test_quick_run_writes_the_whole_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(goals, "CASES", {name: goals.CASES[name] for name in CASES})
    table, path = run.goals(quick=True, out=tmp_path)
    data = json.loads(path.read_text())
    assert data["quick"] is True
    rows = data["rows"]
    failed = [row for row in rows if row["value"] is None and "CPU" not in row["note"]]
    assert not failed
    found = {row["metric"]: row for row in rows}
    for metric, goal in (
        ("fwd: time over the bare GEMM", 1.08),
        ("fwd+bwd: speed-up over PEFT fp32", 1.9),
        ("decode us", None),  # the last one has the roofline for a goal
        ("decode: time over the byte roofline", 2.0),
        ("decode: speed-up over bf16 cuBLAS", 1.0),
        ("host us of fwd+bwd", 120.0),
        ("share of the copy bandwidth", 0.9),
        ("speed-up over bitsandbytes", 1.7),
        ("run to run, backend auto: differing elements", 0),
    ):
        assert found[metric]["goal"] == goal
    assert found["saved for backward beside x and references, bytes"]["ok"]
    assert {"case", "metric", "variant", "p20", "p50", "p80", "launches"} == data["times"][0].keys()
    assert "goals reached" in table


def test_every_goal_of_the_table_has_a_case() -> None:
    for n, k in ((4096, 4096), (14336, 4096), (4096, 14336)):
        assert {f"training {n} x {k}, 8192", f"training {n} x {k}, 2048"} <= goals.CASES.keys()
    assert {f"decode 4096 x 4096, {m}" for m in (1, 16, 64, 256)} <= goals.CASES.keys()
    assert goals.FULL.shape(14336, 4096) == (14336, 4096)
    assert goals.FULL.tokens(8192) == 8192
