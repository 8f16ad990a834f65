"""A layer with quantized adapters, without gradients: what reads them as they are, and what decodes them for the rest.

The products of few rows decode A and B themselves: the extension's in 8 bits and NF4, Triton's in 8 bits. Every other
product takes matrices of the type computed in, which one launch makes of both where the GPU's time is what counts, and
the calls that cost the host least elsewhere (measured: docs/performance.md).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from fastlora import backends, native, ops, tables
from fastlora.int8 import Int8Matrix
from fastlora.nf4 import NF4Weight, Weight

Factor = Int8Matrix | NF4Weight
"""A or B in 8 bits, or in 4."""


def serves(x: torch.Tensor, bias: torch.Tensor | None, scale: Any) -> bool:
    """Whether this is the place for a layer of this x: nobody wants its gradients or to see its operators."""
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return not learns and isinstance(scale, (int, float)) and not ops.must_dispatch(x)


def read(
    x: torch.Tensor,
    w: Weight,
    lora_a: Factor,
    lora_b: Factor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None,
    backend: str,
) -> torch.Tensor | None:
    """y (M, N) of x (M, K) by a product that reads both factors as they are, where ``backend`` means one; or None."""
    r = lora_a.shape[0]
    if r == 0 or not isinstance(w, NF4Weight):
        return None
    name = ops.select(x, w, r, "forward", False, backend).name
    if name == "cuda":
        product = _extension(x, w, lora_a, lora_b)
    else:
        product = _triton(x, w, lora_a, lora_b) if name == "triton" else None
    if product is None:
        return None
    with torch.no_grad(), ops.without_autocast(x.device.type):
        y: torch.Tensor = product(x.contiguous(), w, lora_a, lora_b, bias, scale, out_dtype=out_dtype)[0]
    return y


def _extension(x: torch.Tensor, w: NF4Weight, lora_a: Factor, lora_b: Factor) -> Any:
    able = native.reads(lora_a) and native.reads(lora_b)
    return native.packed_forward if able and native.form_for(x, w, lora_a.shape[0], "forward") == "few_rows" else None


def _triton(x: torch.Tensor, w: NF4Weight, lora_a: Factor, lora_b: Factor) -> Any:
    if not (isinstance(lora_a, Int8Matrix) and isinstance(lora_b, Int8Matrix)):
        return None
    if not importlib.import_module("fastlora.kernels.forward").is_split(x, w, r=lora_a.shape[0], direction="forward"):
        return None
    return functools.partial(importlib.import_module("fastlora.kernels.split").linear, dropout=None)


def both(lora_a: Factor, lora_b: Factor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of A and B in ``dtype``."""
    on_gpu = lora_a.device.type == "cuda" and dtype in backends.COMPUTE_DTYPES
    if on_gpu and tables.captured() and backends.this_machine().triton is None:
        made = importlib.import_module("fastlora.kernels.dequantize").dequantize_pair(lora_a, lora_b, dtype)
        if made is not None:
            return made
    return _dense(lora_a, dtype, on_gpu), _dense(lora_b, dtype, on_gpu)


def _dense(factor: Factor, dtype: torch.dtype, on_gpu: bool) -> torch.Tensor:
    if isinstance(factor, Int8Matrix):
        return factor.dequantize(dtype)
    if on_gpu and not tables.captured() and backends.this_machine().native_cuda is None:
        return native.dequantize(factor, dtype)
    return backends.dense(factor, dtype)
