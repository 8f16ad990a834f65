"""The autograd node in C++ for layers that the extension computes: a call without Python between its two ends.

`call` does what `fastlora.ops.lora_linear` does for plain tensors on a packed weight, where the backends chosen for
both directions are the extension's own, and declines everything else.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

from fastlora import backends, native, tables
from fastlora.backends import Problem
from fastlora.nf4 import NF4Weight, Weight

_Choice = tuple[str | None, str | None, int | None]


@tables.cached(maxsize=4096)  # what it costs to ask is felt by small layers
def chosen(backend: str, *problem: Any) -> str:
    """The name of what `backends.select` takes for ``Problem(*problem)``."""
    return backends.select(Problem(*problem), backend).name


def call(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    scale: float | torch.Tensor,
    backend: str,
    autocast: bool = False,
    p: float = 0.0,
) -> torch.Tensor | None:
    """y (..., N) of x (..., K), recorded by autograd; None for what this module does not compute, errors included.

    With ``autocast`` x is first cast to the type that autocast wants, if it is on. p: of the dropout, whose seed is
    drawn as `fastlora.dropout.draw_seed` draws it, unless the call is declined.
    """
    if type(w) is not NF4Weight or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    layer = w.__dict__.get("_layer", 0)  # not an attribute of the class, so that it is no part of the weight's value
    if layer == 0:
        layer = w.__dict__["_layer"] = _make(w)
    if layer is None or tables.forced_forms:
        return None
    y: torch.Tensor | None = layer.call(x, lora_a, lora_b, bias, scale, p, out_dtype, autocast, backend, tables.state())
    return y


def _make(w: NF4Weight) -> Any:
    module, _ = native.autograd()
    if module is None or w.device.type not in ("cpu", "cuda") or native.available(w.device.type) is not None:
        return None
    choose = functools.partial(_choose, *w.shape, w.quant_type, w.blocksize, w.nested, w.device)
    try:
        return module.Layer(*native.weight_arguments(w), choose)
    except TypeError:  # a subclass of Tensor, as while tracing
        return None


def _choose(
    n: int, k: int, quant_type: str, blocksize: int, nested: bool, device: torch.device,
    m: int, r: int, dtype: torch.dtype, dropout: bool, backend: str,
) -> _Choice:  # fmt: skip
    """The operators of a problem, forward and backward, None for those of other backends, and the CPU's code path."""
    capability = native.best_capability() if device.type == "cpu" else None

    def operator(direction: str) -> str | None:
        problem = (m, n, k, r, dtype, device.type, quant_type, blocksize, nested, direction, dropout, tables.captured())
        try:
            name = chosen(backend, *problem)
        except (RuntimeError, ValueError):  # to be raised by the one who computes
            return None
        if getattr(backends.BACKENDS[name], direction) is not getattr(native, direction):
            return None
        form = "linear"
        if device.type == "cuda":
            form = native.chosen_form(m, n, k, blocksize, dtype, device.index, r, direction, tables.captured())
        return f"fastlora_native::{form}_{direction}"

    return operator("forward"), operator("backward"), capability
