"""The suite over two gloo processes: what it measures, what it makes of failures, hangs and missing peers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")
pytest.importorskip("transformers", reason="transformers is missing (extra: bench)")
pytest.importorskip("rich", reason="rich is missing (extra: bench)")

from fastlora.bench import distributed as suite
from fastlora.bench import record, report, run
from fastlora.bench.distributed import BLOCKS, DDP, FSDP, IN_PARTS, LARGE, LOSS, ONE, SPEED, Found, Task
from fastlora.bench.train_step import PEFT, PEFT_PREPARED


def found(way: str, stack: str = BLOCKS, ms: float = 100.0, kind: str = SPEED, **values: Any) -> Found:
    case = {SPEED: suite.FULL.speed, LOSS: suite.FULL.loss, LARGE: suite.FULL.large}[kind]
    processes = 1 if way in (ONE, IN_PARTS) else 2
    values = {"base_bytes": 1000 if way != FSDP else 520, "losses": (3.0, 2.0), "processes": processes} | values
    return Found(Task(kind, way, stack, case), None, ms, 2**30, **values)


def goals(*measured: Found) -> dict[str, record.Row]:
    return {row.metric: row for row in suite.rows(measured) if row.goal is not None}


def test_the_goals() -> None:
    peers = found(FSDP, PEFT, 200), found(FSDP, PEFT_PREPARED, 230)
    rows = goals(found(ONE), found(DDP, ms=104), found(FSDP, ms=125), *peers)
    values = [(round(row.value or 0, 3), row.ok) for row in rows.values()]
    assert values == [(1.923, True), (1.6, False), (1.84, True), (1.6, False), (0.04, True)]
    rows = goals(found(ONE), found(DDP, ms=106), found(FSDP, ms=117, base_bytes=560), *peers)
    assert [row.ok for row in rows.values()] == [False, True, True, False, False]


def test_what_is_missing_is_a_miss_with_its_reason() -> None:
    rows = goals(found(ONE), dataclasses.replace(found(DDP), absent="no"), found(FSDP))
    assert rows["tokens/s of DDP over one GPU"].note == "none of ours was measured"
    for peer, which in ((PEFT, ""), (PEFT_PREPARED, ", prepared")):
        assert f"{peer}, FSDP2: not measured" in rows[f"tokens/s of FSDP2 over PEFT's FSDP2{which}"].note
    assert not any(row.ok for row in rows.values() if row.value is None)


def test_loss_curves_are_held_against_the_noise_floor() -> None:
    curves = {ONE: (4.0, 3.0), IN_PARTS: (4.0, 3.01), DDP: (4.0, 3.015), FSDP: (4.0, 3.03)}
    rows = suite.rows([found(way, kind=LOSS, losses=curve) for way, curve in curves.items()])
    bound = [row for row in rows if row.goal is not None]
    assert [round(row.value or 0, 2) for row in bound] == [1.5, 3.0]
    assert [row.ok for row in bound] == [True, False]


def test_the_formula_of_what_fits() -> None:
    """Twice the processes hold less than twice the blocks: adapters and statistics are whole in each."""
    case = suite.FULL.large
    one, two, more = (suite.fitting_blocks(case, 141 * 2**30, world) for world in (1, 2, 8))
    assert 150 < one < two < 2 * one < more
    assert suite.fitting_blocks(case, 2**30, 1) == 0


def test_a_run_on_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of each kind; the report has its rows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    every = suite.tasks(suite.QUICK, (PEFT, BLOCKS))
    keep = {(suite.LINKS, DDP), (LOSS, ONE), (LOSS, IN_PARTS), (LOSS, FSDP), (SPEED, FSDP), (LARGE, FSDP)}
    wanted = [task for task in every if (task.kind, task.way) in keep]
    monkeypatch.setattr(suite, "tasks", lambda sizes: wanted)
    table, path = run.distributed(quick=True, out=tmp_path)
    data, rows = record.read(path)
    assert [row for row in rows if row.value is None and row.goal is None] == []
    floor = next(row for row in rows if row.goal == suite.STEADY and row.metric.endswith(FSDP))
    assert floor.ok, floor
    assert set(data["loss_curves"]) == {ONE, IN_PARTS, FSDP}
    assert "llama-3-70b, 3 blocks, 1 x 16, checkpointing" in table
    assert report.distributed(tmp_path).startswith("Not measured yet"), "tiny models are no measurement"
    path.write_text(path.read_text().replace('"quick": true', '"quick": false'))
    assert "| fastlora blocks, FSDP2 |" in report.distributed(tmp_path)


SCRIPT = """
import os, sys, time
from fastlora.bench import distributed as suite
real = suite._measure
def measure(task, rank, world, device, steps):
    if task.stack and rank == 1:
        {fault}
    return real(task, rank, world, device, steps)
suite._measure = measure
sys.exit(suite.child(__import__("pathlib").Path(sys.argv[-1])))
"""


@pytest.mark.parametrize(
    ("fault", "seconds", "why"),
    [("os.kill(os.getpid(), 9)", 60, "ended with -9"), ("time.sleep(600)", 3, "it took too long")],
    ids=["dies", "hangs"],
)
def test_one_failure_does_not_take_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, seconds: float, why: str
) -> None:
    script = tmp_path / "child.py"
    script.write_text(SCRIPT.format(fault=fault))
    real = suite.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([command[0], str(script), *command[3:]], **options)

    monkeypatch.setattr(suite.subprocess, "Popen", start)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = suite.QUICK.speed
    wanted = [Task(suite.LINKS, DDP, BLOCKS, case, seconds), Task(suite.LINKS, DDP, "", case)]
    first, second = suite.measure(wanted, 2, cuda=False, steps=2)
    assert why in str(first.absent)
    assert first.task.stack == BLOCKS
    assert second.absent is None
    assert second.links["all-gather"] > 0


def test_committed_page_shows_the_committed_records() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "distributed.md").read_text(encoding="utf-8")
    filled = report.fill(page, {"distributed": report.distributed(root / "bench" / "results")})
    assert filled == page, "run fastlora bench --report"


def test_found_survives_json() -> None:
    one = found(DDP, gpu_ms={"products": 1.0})
    assert Found.from_json(json.dumps(dataclasses.asdict(one))) == one
