"""Fused layers in place of PEFT's: ``fastlora.accelerate(model)`` and ``fastlora.restore(model)``.

A layer is converted by changing its class to a subclass of its own: parameters, optimizer references, hooks, buffers
and state-dict names stay the same objects, and every PEFT method goes on working. Only ``forward`` differs, and only
where the fused operator computes what PEFT would; in any other situation PEFT's own forward runs.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlora import backends, ops
from fastlora.backends import Problem
from fastlora.linear import adapter_forward, base_weight
from fastlora.nf4 import NF4Weight, Weight

try:
    from peft.tuners import lora
    from peft.tuners.lora import LoraLayer
except ImportError as error:
    raise ImportError("fastlora.accelerate needs PEFT: pip install 'fastlora-kernels[train]'") from error

_REPORTED_TOKENS = 2048
"""The report names the backend for this many tokens: a usual training step of one sequence."""


def _intact(module: nn.Module) -> str | None:
    """None when calling ``module`` does nothing but its class's forward; else what would be missed."""
    state = module.__dict__
    if "forward" in state:
        return "its forward is replaced on the instance"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return None


_PLAIN = (torch.Tensor, nn.Parameter)


def _base_reason(layer: Any, base: Any, weight: Weight) -> str | None:
    """Why the base layer cannot be computed by the fused operator, or None."""
    if layer.fan_in_fan_out:
        return "the base layer stores its weight as (in_features, out_features)"
    if isinstance(weight, torch.Tensor):
        if type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if type(weight) not in _PLAIN:
            return f"the base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "the base weight is trained"
        if weight.dim() != 2 or not weight.is_floating_point():
            return f"the base weight is {weight.dtype} of shape {tuple(weight.shape)}"
    elif type(weight.w_packed) not in _PLAIN:
        return f"the packed base weight is a {type(weight.w_packed).__name__}"
    return f"base layer: {reason}" if (reason := _intact(base)) else None


def _adapter_reason(layer: Any, modules: dict[str, Any], adapter: str) -> str | None:
    """Why ``adapter`` is not plain LoRA on plain linear layers, or None."""
    if adapter in layer.lora_variant:
        return f"adapter {adapter!r} uses {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias[adapter]:
        return f"adapter {adapter!r} has a bias on lora_B"
    for name in ("lora_A", "lora_B"):
        part = modules[name]._modules[adapter]
        if type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}"
        weight = part.weight
        if type(weight) not in _PLAIN:
            return f"{name} is sharded or wrapped ({type(weight).__name__})"
        if hasattr(weight, "ds_id"):
            return f"{name} is partitioned by DeepSpeed"
        if reason := _intact(part):
            return f"{name}: {reason}"
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}"
    return f"lora_dropout: {reason}" if (reason := _intact(dropout)) else None


def _active(layer: Any) -> list[str]:
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _situation(layer: Any) -> str | tuple[str, Weight]:
    """The adapter and the base weight for the fused operator, or why PEFT's forward runs at the moment."""
    active, modules = _active(layer), layer._modules
    if len(active) != 1:
        return f"{len(active)} adapters are active" if active else "no adapter is active"
    base = modules["base_layer"]
    try:
        weight = _base_weight(layer, base)
    except (ValueError, AttributeError) as error:
        return str(error)
    reason = _base_reason(layer, base, weight) or _adapter_reason(layer, modules, active[0])
    return reason or (active[0], weight)


def _base_weight(layer: Any, base: Any) -> Weight:
    """`base_weight`, kept on the layer for as long as the base layer holds the same bytes and statistics."""
    packed = base.weight
    state = getattr(packed, "quant_state", None)
    if state is None or ops.must_dispatch(packed.data):
        return base_weight(base)
    key = (packed.data_ptr(), id(state), id(state.absmax))
    known = layer.__dict__.get("fastlora_weight")
    if known is None or known[0] != key:
        # The statistics are kept alive with their ids, so that no other object can come to have them.
        known = layer.__dict__["fastlora_weight"] = (key, base_weight(base), state, state.absmax)
    return known[1]


class _Fused:
    """The forward that the converted classes share. Expects to stand before a PEFT layer class."""

    stock: type
    """The PEFT class that `restore` gives back."""
    fastlora_backend: str = "auto"

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (args or self._disable_adapters or self.merged_adapters) and x.is_floating_point():
            situation = _situation(self) if all(value is None for value in kwargs.values()) else ""
            if not isinstance(situation, str):
                return adapter_forward(self, x, *situation, self.fastlora_backend)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "fastlora_weight"}


class FastLinear(_Fused, lora.Linear):
    """PEFT's ``lora.Linear`` with the fused forward."""

    stock = lora.Linear


FUSED: dict[type, type] = {lora.Linear: FastLinear}
"""The fused class of each PEFT class."""

# By this name, which imports lora.bnb at first use; there is no such name without bitsandbytes.
if hasattr(lora, "Linear4bit"):

    class FastLinear4bit(_Fused, lora.Linear4bit):
        """PEFT's ``lora.bnb.Linear4bit`` with the fused forward."""

        stock = lora.Linear4bit

    FUSED[lora.Linear4bit] = FastLinear4bit


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one PEFT layer."""

    name: str
    kind: str
    shape: tuple[int, int]
    """(out_features, in_features)"""
    rank: int
    backend: str | None
    reason: str | None
    """Why PEFT's forward runs; None when the fused operator does."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `accelerate` did. ``str(report)`` is a table; layers that differ only by their number share a row."""

    layers: tuple[LayerReport, ...]

    @property
    def replaced(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.reason is not None]

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            pattern = re.sub(r"\.\d+(?=\.)", ".*", layer.name)
            key = (pattern, layer.kind, layer.shape, layer.rank, layer.backend, layer.reason)
            groups.setdefault(key, []).append(layer)
        rows = [("layer", "count", "base", "out x in", "rank", "runs on")]
        for (pattern, kind, (n, k), rank, backend, reason), layers in groups.items():
            name = layers[0].name if len(layers) == 1 else pattern
            rows.append((name, str(len(layers)), kind, f"{n} x {k}", str(rank), backend or f"PEFT: {reason}"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        total = f"{len(self.replaced)} of {len(self.layers)} LoRA layers fused"
        return "\n".join([*lines, total])


def _report(name: str, layer: Any, backend: str, reason: str | None) -> LayerReport:
    rank = next((layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.r), 0)
    shape = (layer.out_features, layer.in_features)
    kind, chosen = type(layer.base_layer).__name__, None
    if reason is None:
        weight = base_weight(layer.base_layer)
        problem = Problem(_REPORTED_TOKENS, *shape, rank, device_type=weight.device.type, dtype=weight.dtype)
        if isinstance(weight, NF4Weight):
            kind = f"{weight.quant_type}/{weight.blocksize}{' nested' if weight.nested else ''}"
            dtype = getattr(layer.base_layer, "compute_dtype", None) or weight.dtype
            problem = dataclasses.replace(
                problem, dtype=dtype, quant_type=weight.quant_type, blocksize=weight.blocksize, nested=weight.nested
            )
        else:
            kind = f"dense {str(weight.dtype).removeprefix('torch.')}"
            problem = dataclasses.replace(problem, quant_type=None)
        chosen = backends.select(problem, backend).name
    return LayerReport(name, kind, shape, rank, chosen, reason)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def accelerate(model: nn.Module, backend: str = "auto") -> Report:
    """Turn every PEFT LoRA linear layer of ``model`` into a fused one, in place, sharing all its weights.

    model: a PEFT model, or any module with PEFT LoRA layers inside, on a bitsandbytes 4-bit or a dense base.
    backend: see `fastlora.lora_linear`. Calling it again (after other adapters were loaded, say) is harmless.

    Returns the report of every LoRA layer: fused, or left to PEFT and why. Raises ValueError when the model has no PEFT
    LoRA layer or the backend is unknown, RuntimeError when a named backend cannot run on these layers; the model is
    then unchanged.
    """
    if backend not in ("auto", *backends.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(('auto', *backends.BACKENDS))}")
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError("the model has no PEFT LoRA layers; wrap it with peft.get_peft_model first")
    reports, fused = [], []
    for name, layer in layers:
        convertible = type(layer) in FUSED or isinstance(layer, _Fused)
        situation = _situation(layer) if convertible else f"{type(layer).__name__} layers are not linear LoRA layers"
        reason = situation if isinstance(situation, str) else None
        reports.append(_report(name, layer, backend, reason))
        if convertible:
            fused.append(layer)
    for layer in fused:
        layer.__class__ = FUSED.get(type(layer), type(layer))
        layer.fastlora_backend = backend
        if getattr(layer.base_layer, "support_avx512bf16_for_cpu", False):
            # bitsandbytes would repack these bytes in place during the first forward in eval mode.
            layer.base_layer.support_avx512bf16_for_cpu = False
            layer.fastlora_repack = True
    report = Report(tuple(reports))
    if not report.replaced:
        warnings.warn(f"no layer was fused:\n{report}", stacklevel=2)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: give every fused layer its PEFT class back. Returns how many layers changed."""
    count = 0
    for _, layer in _lora_layers(model):
        if isinstance(layer, _Fused):
            layer.__class__ = layer.stock
            layer.__dict__.pop("fastlora_backend", None)
            layer.__dict__.pop("fastlora_weight", None)
            if layer.__dict__.pop("fastlora_repack", False):
                layer.base_layer.support_avx512bf16_for_cpu = True  # type: ignore[attr-defined]
            count += 1
    return count
