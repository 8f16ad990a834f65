"""Records: what passes, what is written, what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora.bench import record, run
from fastlora.bench.record import Row


@pytest.mark.parametrize(
    ("value", "goal", "at_least", "ok", "verdict"),
    [
        (1.0, None, False, True, ""),
        (1.0, 1.0, False, True, "pass"),
        (1.1, 1.0, False, False, "MISS"),
        (1.1, 1.0, True, True, "pass"),
        (0.9, 1.0, True, False, "MISS"),
        (None, 1.0, True, False, "MISS"),
        (None, None, False, True, ""),
        (float("nan"), 1.0, False, False, "MISS"),
    ],
)
def test_a_goal_is_passed_or_missed(
    value: float | None, goal: float | None, at_least: bool, ok: bool, verdict: str
) -> None:
    row = Row("case", "metric", value, goal, at_least)
    assert (row.ok, row.verdict) == (ok, verdict)


ROWS = [
    Row("a", "time", 1.23456789, 1.0),
    Row("a", "speed-up", 2.0, 1.5, True, "with launches"),
    Row("b", "time", None, 3.0, note="RuntimeError: no"),
]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = record.write("goals", ROWS, {"quick": False}, tmp_path)
    data, rows = record.read(path)
    assert [row.value for row in rows] == [1.2346, 2.0, None]
    assert [row.ok for row in rows] == [row.ok for row in ROWS] == [False, True, False]
    assert rows[1] == ROWS[1]
    assert data["quick"] is False


def test_the_verdict_is_that_of_the_digits_kept(tmp_path: Path) -> None:
    rows = [Row("a", "error", 2.7730449e-07, 2.77304491e-07), Row("a", "error", 1.00000001, 1.0)]
    path = record.write("goals", rows, folder=tmp_path)
    assert [row["ok"] for row in json.loads(path.read_text())["rows"]] == [True, True]
    assert [row.ok for row in record.read(path)[1]] == [True, True]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "bench/results").glob("*/*.json")), ids=str)
def test_committed_verdicts_are_those_of_their_rows(path: Path) -> None:
    stored = [row["ok"] for row in json.loads(path.read_text())["rows"]]
    assert [row.ok for row in record.read(path)[1]] == stored


def test_schema_of_a_record(tmp_path: Path) -> None:
    data = json.loads(record.write("goals", ROWS, folder=tmp_path).read_text())
    assert {"commit", "gpu", "driver", "torch", "triton", "extension", "rows"} <= data.keys()
    for row in data["rows"]:
        assert {"case", "metric", "goal", "value", "ok"} <= row.keys()
        assert isinstance(row["ok"], bool)


def test_commit_of_a_copy_without_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("FASTLORA_COMMIT", "abc1234")
    monkeypatch.setenv("PATH", "")
    record.environment.cache_clear()
    assert record.environment()["commit"] == "abc1234"
    record.environment.cache_clear()


def test_a_record_says_whether_the_extension_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, said in ((None, "loaded"), ("no compiler", "no compiler")):
        monkeypatch.setattr(record.native, "available", lambda device_type, reason=reason: reason)
        record.environment.cache_clear()
        assert record.environment()["extension"] == said
    record.environment.cache_clear()


def test_lines_carry_the_environment_and_never_hide_it(tmp_path: Path) -> None:
    path = record.write_lines("layer", [{"m": 1}, {"m": 2}], tmp_path)
    lines = record.read_lines(path)
    assert [line["m"] for line in lines] == [1, 2]
    assert all({"torch", "commit", "gpu"} <= line.keys() for line in lines)
    with pytest.raises(ValueError, match="both have gpu"):
        record.write_lines("layer", [{"gpu": 1.0}], tmp_path)


def test_table_shows_a_miss_and_its_reason() -> None:
    lines = record.table(ROWS).splitlines()
    assert "<= 1" in lines[1]
    assert "MISS" in lines[1]
    assert "pass" in lines[2]
    assert "RuntimeError: no" in lines[3]


@pytest.mark.parametrize("before", [False, True], ids=["whole", "quick"])
@pytest.mark.parametrize("now", [False, True], ids=["then whole", "then quick"])
def test_quick_rows_do_not_mix_with_others(
    before: bool, now: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.bench import tasks

    for part in ("one", "two"):
        monkeypatch.setitem(tasks.PARTS, part, lambda quick, part=part: iter([[record.Row(part, "metric", 1.0)]]))
    run.tasks(["one"], quick=before, out=tmp_path)
    _, path = run.tasks(["two"], quick=now, out=tmp_path)
    extra, rows = record.read(path)
    assert extra["quick"] is now
    assert [row.case for row in rows] == (["two"] if before or now else ["one", "two"])
