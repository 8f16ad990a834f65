"""The replayed mask of the kernels is that of fastlora.dropout, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora.dropout import Dropout
from fastlora.kernels.dropout import drop_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 2, -1])
def test_same_bits(seed: int, p: float, dtype: torch.dtype, kernel_device: str) -> None:
    x = torch.randn(37, 83, device=kernel_device).to(dtype)
    dropout = Dropout(p, torch.tensor([seed], device=kernel_device))
    expected = dropout.apply(x)
    wide = torch.full((37, 90), torch.nan, device=kernel_device, dtype=dtype)
    wide[:, :83] = x
    assert drop_(x, dropout) is x
    assert torch.equal(x, expected)
    assert torch.equal(drop_(wide[:, :83], dropout), expected)
    assert wide[:, 83:].isnan().all()
