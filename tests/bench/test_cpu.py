"""The CPU's suite on a small layer: which rows there are, and what they compare."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")

from fastlora import native
from fastlora.bench import cpu

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
