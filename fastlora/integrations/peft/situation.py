"""What a layer is to compute at the moment: which function, which adapters, which base weight. Or why PEFT's forward
runs instead. Asked in every forward pass, because hooks, adapters and parameters come, go and are rebound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastlora import ops
from fastlora.adapters.quantized import QuantizedFactor
from fastlora.adapters.variant import Variant
from fastlora.integrations.converted import REPLACED, does_more
from fastlora.integrations.peft.forward import adapters_forward, beside_forward, dora_forward
from fastlora.linear import adapter_forward, kept_weight
from fastlora.nf4 import Weight

Situation = tuple[Callable[..., torch.Tensor], Any, Weight]
"""``run``, ``adapters`` and ``weight`` of the call ``run(layer, x, adapters, weight, backend)``."""

_PLAIN = (torch.Tensor, nn.Parameter)


def _variants(*names: str) -> tuple[type, ...]:
    """Those that the installed PEFT has."""
    return tuple(kind for name in names if (kind := getattr(variants, name, None)) is not None)


# Variants that differ from LoRA in their start and in what learns, not in what they compute.
_COMPUTED_AS_LORA = _variants("MiCALinearVariant")
# Variants that add to what the base layer gives, and keep less of x for the backward pass than the fused product.
_BESIDE_THE_BASE = _variants("VeloraLinearVariant")
_AS_PEFT_HAS_THEM = (*_COMPUTED_AS_LORA, *_BESIDE_THE_BASE)
# No other adapter and no mixed batch joins these.
_ALONE = (*_BESIDE_THE_BASE, Variant)


def _intact(module: nn.Module) -> str | None:
    """None when calling ``module`` does nothing but its class's forward; else what would be missed."""
    state = module.__dict__
    if does_more(module):
        return REPLACED
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return "it has hooks"
    return None


def _base_reason(base: Any, weight: Weight) -> str | None:
    """Why the base layer cannot be computed by the fused operator, or None."""
    if isinstance(weight, torch.Tensor):
        if type(base) is not nn.Linear and type(base) is not Conv1D:
            return f"the base layer is a {type(base).__name__}"
        if type(weight) not in _PLAIN:
            return f"the base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "the base weight is trained"
        if hasattr(base._parameters["weight"], "ds_id"):
            return "the base weight is partitioned by DeepSpeed"
        if weight.dim() != 2 or not weight.is_floating_point():
            return f"the base weight is {weight.dtype} of shape {tuple(weight.shape)}"
    elif type(weight.w_packed) not in _PLAIN:
        return f"the packed base weight is a {type(weight.w_packed).__name__}"
    return f"base layer: {reason}" if (reason := _intact(base)) else None


def _part_reason(name: str, part: Any) -> str | None:
    weight = part._parameters["weight"]  # as `part.weight`, but without a module's search
    if type(weight) not in _PLAIN:
        return f"{name} is sharded or wrapped ({type(weight).__name__})"
    if hasattr(weight, "ds_id"):
        return f"{name} is partitioned by DeepSpeed"
    return f"{name}: {reason}" if (reason := _intact(part)) else None


def _adapter_reason(layer: Any, modules: dict[str, Any], adapter: str) -> str | None:
    """Why ``adapter`` is not LoRA or DoRA on plain linear layers, or None."""
    if adapter in layer.lora_variant and (reason := _variant_reason(layer, modules, adapter)):
        return reason
    for name in ("lora_A", "lora_B"):
        part = modules[name]._modules[adapter]
        if type(part) is QuantizedFactor:
            if reason := _intact(part):
                return f"{name}: {reason}"
            continue  # looking at its weight would dequantize it
        if type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}"
        if reason := _part_reason(name, part):
            return reason
    dropout = modules["lora_dropout"]._modules[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is a {type(dropout).__name__}"
    return f"lora_dropout: {reason}" if (reason := _intact(dropout)) else None


def _variant_reason(layer: Any, modules: dict[str, Any], adapter: str) -> str | None:
    variant = layer.lora_variant[adapter]
    if type(variant) in _AS_PEFT_HAS_THEM or isinstance(variant, Variant):
        return None
    if type(variant) is not DoraLinearVariant:
        return f"adapter {adapter!r} uses {type(variant).__name__}"
    magnitude = modules["lora_magnitude_vector"]._modules[adapter]
    if type(magnitude) is not DoraLinearLayer:
        return f"the magnitude is a {type(magnitude).__name__}"
    if layer.lora_bias[adapter]:
        return f"DoRA adapter {adapter!r} has a bias on lora_B"
    if layer.fan_in_fan_out != (type(modules["base_layer"]) is Conv1D):
        return "fan_in_fan_out contradicts the base layer"
    if magnitude.weight.device != modules["lora_B"]._modules[adapter].weight.device:
        return "the magnitude is on another device"
    return _part_reason("the magnitude", magnitude)


def layer_weight(layer: Any) -> Weight:
    """The weight (N, K) of the base layer; a packed one is kept for as long as it has the same bytes and statistics.

    Raises ValueError or AttributeError when there is no such weight.
    """
    base = layer._modules["base_layer"]
    return base.weight.T if type(base) is Conv1D else kept_weight(layer, base)


def _fused_weight(layer: Any) -> str | Weight:
    if ops.transformed():
        return "a transform of torch.func or forward-mode differentiation is on"
    try:
        weight = layer_weight(layer)
    except (ValueError, AttributeError) as error:
        return str(error)
    return _base_reason(layer._modules["base_layer"], weight) or weight


def situation(layer: Any) -> str | Situation:
    """What the active adapters ask for, or why PEFT's forward runs at the moment."""
    # Of the class: a module's search for what it does not have takes longer than all of this.
    if (own := getattr(type(layer), "fastlora_situation", None)) is not None:
        found: str | Situation = own(layer)
        return found
    modules = layer._modules
    present = modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in present]
    if not active:
        return "no adapter is active"
    weight = _fused_weight(layer)
    if isinstance(weight, str):
        return weight
    for name in active:
        if reason := _adapter_reason(layer, modules, name):
            return reason
    first = active[0]
    if len(active) > 1:
        if any(_is_dora(layer, name) for name in active):
            return "DoRA is active together with other adapters"
        for name in active:
            if isinstance(variant := layer.lora_variant.get(name), _ALONE):
                return f"a {type(variant).__name__} adapter is active together with other adapters"
        return adapters_forward, active, weight
    if isinstance(layer.lora_variant.get(first), _BESIDE_THE_BASE):
        return beside_forward, first, weight
    if layer.lora_bias[first]:
        if isinstance(variant := layer.lora_variant.get(first), Variant):
            return f"a {type(variant).__name__} adapter has a bias on lora_B"
        return adapters_forward, active, weight
    if _is_dora(layer, first):
        return dora_forward, first, weight
    return (variant_forward if _has_other_factors(layer, first) else adapter_forward), first, weight


def variant_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    """`adapter_forward` of an adapter that is not its A, B and scale alone, which nobody may take in its place."""
    return adapter_forward(layer, x, adapter, weight, backend)


def _has_other_factors(layer: Any, adapter: str) -> bool:
    quantized = type(layer._modules["lora_A"]._modules[adapter]) is QuantizedFactor
    return quantized or isinstance(layer.lora_variant.get(adapter), Variant)


def _is_dora(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_variant and type(layer.lora_variant[adapter]) is DoraLinearVariant


def mixed_situation(layer: Any, names: list[str]) -> str | tuple[list[str], Weight]:
    """The adapters of a mixed batch, each once, and the base weight; or why PEFT's forward runs."""
    modules = layer._modules
    groups = [name for name in dict.fromkeys(names) if name in modules["lora_A"]._modules]
    weight = _fused_weight(layer)
    if isinstance(weight, str):
        return weight
    for name in groups:
        if _is_dora(layer, name) or isinstance(layer.lora_variant.get(name), _ALONE):
            return f"adapter {name!r} uses {type(layer.lora_variant[name]).__name__}"
        if reason := _adapter_reason(layer, modules, name):
            return reason
        dropout = modules["lora_dropout"]._modules[name]
        if dropout.training and type(dropout) is nn.Dropout:
            return f"adapter {name!r} has dropout"
    return groups, weight
