"""A layer with quantized adapters, without gradients: which product reads them as they are, and what decodes the rest.

Triton's products read A and B in 8 bits or NF4 themselves (see `fastlora.int8.Factor`). The others take matrices of the
type computed in, which a launch makes before them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fastlora import backends, ops, tables
from fastlora.int8 import Factor, Int8Matrix
from fastlora.nf4 import NF4Weight, Weight

READ_ROWS = range(1, 65)
"""Rows for which, in a CUDA graph, Triton's product of few rows takes less time than decoding both adapters and the
product in C++."""


def chosen(x: torch.Tensor, w: Weight, r: int, backend: str) -> backends.Backend | None:
    """The backend that reads packed adapters of rank ``r`` in a product of x (M, K); None where they are decoded for
    another one. ``backend``: "auto", or a name."""
    found = ops._select(x, w, r, "forward", False, backend)
    if found.name == "triton":
        return found
    few = x.shape[0] in READ_ROWS and x.shape[1] % 32 == 0 and isinstance(w, NF4Weight)
    if backend == "auto" and found.name == "cuda" and few and tables.captured():
        return backends.BACKENDS["triton"] if backends.this_machine().triton is None else None
    return None


def dense(factor: Factor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix of an adapter in ``dtype``."""
    if isinstance(factor, NF4Weight):
        return backends.dense(factor, dtype)
    return factor.dequantize(dtype) if isinstance(factor, Int8Matrix) else factor.to(dtype)


def both(lora_a: Factor, lora_b: Factor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of A and B in ``dtype``, from one launch where Triton runs."""
    if lora_a.device.type == "cuda" and dtype in backends.COMPUTE_DTYPES and backends.this_machine().triton is None:
        made = importlib.import_module("fastlora.kernels.dequantize").dequantize_together(None, (lora_a, lora_b), dtype)
        return made[1][0], made[1][1]
    return dense(lora_a, dtype), dense(lora_b, dtype)


def serves(x: torch.Tensor, bias: torch.Tensor | None, scale: Any) -> bool:
    """Whether `linear` may compute a layer of this x: nobody wants its gradients or to see its operators."""
    learns = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    return not learns and isinstance(scale, (int, float)) and not ops.must_dispatch(x)


def linear(
    reader: backends.Backend,
    x: torch.Tensor,
    w: Weight,
    lora_a: Factor,
    lora_b: Factor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """y (M, N) of x (M, K) by a ``reader`` that `chosen` returned; nothing is recorded for a backward pass."""
    with torch.no_grad(), ops._without_autocast(x.device.type):
        return reader.forward(x.contiguous(), w, lora_a, lora_b, bias, scale, None, out_dtype)[0]
