"""What a PEFT layer computes beyond one plain adapter: several at once, one for each row of a batch, DoRA."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import dora as peft_dora
from torch import nn

from fastlora import dora, ops
from fastlora.linear import _run, compute_type, factors_forward, lora_linear
from fastlora.nf4 import NF4Weight, Weight, version


def _check(x: torch.Tensor, weight: Weight) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        lora_linear(x, weight)  # says what is wrong


def _factors(modules: dict[str, Any], adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    return modules["lora_A"]._modules[adapter].weight, modules["lora_B"]._modules[adapter].weight


def _dropout_p(modules: dict[str, Any], adapter: str) -> float:
    dropout = modules["lora_dropout"]._modules[adapter]
    return dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0


def _stack(layer: Any, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One adapter (R, K), (N, R) of scale 1 that adds up ``adapters``; the gradients reach each of them."""
    pairs = [_factors(layer._modules, name) for name in adapters]
    lora_b = [b * layer.scaling[name] for name, (_, b) in zip(adapters, pairs, strict=True)]
    return torch.cat([a for a, _ in pairs]), torch.cat(lora_b, dim=1)


def _bias(layer: Any, adapters: list[str]) -> torch.Tensor | None:
    """The biases of the base layer and of each lora_B, added up as the output needs them."""
    bias = layer._modules["base_layer"].bias
    for name in adapters:
        if layer.lora_bias[name]:
            term = layer._modules["lora_B"]._modules[name].bias * layer.scaling[name]
            bias = term if bias is None else bias + term
    return bias


def adapters_forward(layer: Any, x: torch.Tensor, adapters: list[str], weight: Weight, backend: str) -> torch.Tensor:
    """``adapters`` of a PEFT layer, added up, with the bias that any lora_B may have.

    Those without dropout join the base product as one adapter of the summed rank. Where there are none, the first
    joins it, with its dropout: masks are independent, so each of the others is a small product of its own.
    """
    _check(x, weight)
    modules = layer._modules
    x, wide, dtype = compute_type(modules["base_layer"], weight, x)
    probabilities = {name: _dropout_p(modules, name) for name in adapters}
    joined = [name for name in adapters if not probabilities[name]] or adapters[:1]
    bias = _bias(layer, adapters)
    if len(joined) == 1:
        name = joined[0]
        lora_a, lora_b = _factors(modules, name)
        y = _run(x, weight, lora_a, lora_b, bias, layer.scaling[name], probabilities[name], wide, backend)
    else:
        y = _run(x, weight, *_stack(layer, joined), bias, 1.0, 0.0, wide, backend)
    for name in adapters:
        if name not in joined:
            lora_a, lora_b = _factors(modules, name)
            u = F.linear(F.dropout(x, probabilities[name]), lora_a.to(x.dtype))
            y = y + F.linear(u, (lora_b * layer.scaling[name]).to(x.dtype)).to(y.dtype)
    return y.to(dtype)


def _own_columns(
    names: tuple[str, ...], groups: tuple[str, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(rows, sum(sizes)): 1 in the columns of each row's own group, which has ``sizes`` of them."""
    number = {group: i for i, group in enumerate(groups)}
    with torch.inference_mode(False):
        mine = torch.tensor([number.get(name, -1) for name in names])
        columns = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
        return (mine[:, None] == columns).to(device, dtype)


_kept_columns = functools.lru_cache(maxsize=64)(_own_columns)


def _membership(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`_own_columns` for x, kept where it is a tensor and not what a mode or a compiler that looks on makes of one."""
    return (_own_columns if ops.must_dispatch(x) else _kept_columns)(*args)


def mixed_forward(
    layer: Any, x: torch.Tensor, names: list[str], groups: list[str], weight: Weight, backend: str
) -> torch.Tensor:
    """Row i of a batch x (B, ..., K) with the adapter ``names[i]``; ``groups`` are those that the layer has.

    All adapters are one of the summed rank, of which each row keeps the columns of its own: the same few products
    for any number of rows and adapters.
    """
    _check(x, weight)
    modules = layer._modules
    x, wide, dtype = compute_type(modules["base_layer"], weight, x)
    y = _run(x, weight, None, None, modules["base_layer"].bias, 1.0, 0.0, wide, backend)
    if groups:
        lora_a, lora_b = _stack(layer, groups)
        ranks = tuple(_factors(modules, name)[0].shape[0] for name in groups)
        between = (1,) * (x.dim() - 2)
        own = _membership(x, tuple(names), tuple(groups), ranks, x.dtype, x.device).view(len(names), *between, -1)
        u = F.linear(x, lora_a.to(x.dtype)) * own
        y = y + F.linear(u, lora_b.to(x.dtype)).to(y.dtype)
        biased = tuple(name for name in groups if layer.lora_bias[name])
        if biased:
            own = _membership(x, tuple(names), biased, (1,) * len(biased), y.dtype, x.device)
            rows = [modules["lora_B"]._modules[name].bias * layer.scaling[name] for name in biased]
            y = y + (own @ torch.stack(rows).to(y.dtype)).view(len(names), *between, -1)
    return y.to(dtype)


def _stays_wide(layer: Any, weight: Weight) -> bool:
    """Whether PEFT's DoRA returns float32 on a GPU: under autocast its norms, and what they multiply, are of that type,
    and over a 4-bit base it does not go back to that of x. Not where `fastlora.adapters.dora.keep_type` was called."""
    autocast = isinstance(weight, NF4Weight) and torch.is_autocast_enabled()
    return autocast and "fastlora_keeps_type" not in layer.__dict__


def beside_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    """One adapter of a variant that PEFT adds to what the base layer gives: that alone is fused."""
    _check(x, weight)
    y = factors_forward(layer._modules["base_layer"], x, None, None, 1.0, 0.0, weight, backend)
    x = layer._cast_input_dtype(x, layer.lora_A[adapter].weight.dtype)
    added: torch.Tensor = layer.lora_variant[adapter].forward(layer, active_adapter=adapter, x=x, result=y)
    return added.to(y.dtype)


def dora_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    """One DoRA adapter of a PEFT layer."""
    _check(x, weight)
    modules = layer._modules
    base = modules["base_layer"]
    x, wide, dtype = compute_type(base, weight, x)
    if x.is_cuda and _stays_wide(layer, weight):
        wide, dtype = (torch.promote_types(kind, torch.float32) for kind in (x.dtype, dtype))
    lora_a, lora_b = _factors(modules, adapter)
    magnitude, scale = modules["lora_magnitude_vector"]._modules[adapter], layer.scaling[adapter]
    norms, norm = _row_norms(layer, base.weight, weight), None
    if not getattr(peft_dora, "ENABLE_DORA_CACHING", False) or magnitude.training:
        if getattr(magnitude, "_dora_cache", None):
            magnitude._cache_clear()
    else:
        # Under PEFT's DoraCaching the norm is kept where PEFT keeps its own, and goes when that does.
        key = f"weight-norm-{adapter}"
        norm = magnitude._cache_get(key, None)
        if norm is None:
            norm = dora.weight_norm(weight, lora_a, lora_b, scale, x.dtype, backend, norms)
            magnitude._cache_store(key, norm)
    p, bias = _dropout_p(modules, adapter), base.bias
    y = dora.dora_linear(x, weight, lora_a, lora_b, magnitude.weight, bias, scale, p, wide, backend, norms, norm)
    return y.to(dtype)


def _row_norms(layer: Any, packed: torch.Tensor, weight: Weight) -> torch.Tensor | None:
    """`dora.row_norms` of a packed weight, kept on the layer for as long as the weight stays what it is."""
    known = layer.__dict__.get("fastlora_weight")
    if known is None or known[2] is not weight:  # a dense weight, or one that a compiler traces
        return None
    key = (weight, version(packed), version(known[1]))
    norms = layer.__dict__.get("fastlora_norms")
    if norms is None or norms[0] != key:
        norms = layer.__dict__["fastlora_norms"] = (key, dora.row_norms(weight))
    return norms[1]
