"""Adapters that are LoRA with other factors: a variant says which A, B and scale stand for the adapter's own.

A layer finds it in ``layer.lora_variant[adapter]``, where PEFT keeps its variants; the object answers PEFT's calls
(forward on unfused layers, merging) and the fused layers' question for ``factors`` alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Factors = tuple[torch.Tensor, torch.Tensor, "float | torch.Tensor"]
"""lora_a (R, K), lora_b (N, R) and the scale of their product."""


class Variant:
    """One adapter of one layer, or of all layers, computed as LoRA with the factors that it gives."""

    def factors(self, layer: Any, adapter: str) -> Factors:
        """What stands for A, B and scale, differentiable in the adapter's parameters."""
        raise NotImplementedError

    def delta_weight(self, layer: Any, adapter: str) -> torch.Tensor:
        """(N, K), or as the base stores its weight: what the adapter adds to the weight."""
        with torch.no_grad():
            lora_a, lora_b, scale = self.factors(layer, adapter)
            delta = scale * (lora_b.float() @ lora_a.float())
            return delta.T if getattr(layer, "fan_in_fan_out", False) else delta

    # What PEFT calls.

    def forward(self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> Any:
        """``result`` with the adapter's output added to it."""
        lora_a, lora_b, scale = self.factors(module, active_adapter)
        u = F.linear(module.lora_dropout[active_adapter](x), lora_a)
        return result + F.linear(u, lora_b) * scale

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + self.delta_weight(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += self.delta_weight(module, active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - self.delta_weight(module, active_adapter).to(orig_weight.dtype)


def lora_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """Name and layer of every LoRA linear layer of ``model`` that has ``adapter``, PEFT's and fastlora's."""
    for name, layer in model.named_modules():
        parts = layer._modules.get("lora_A")
        if isinstance(parts, nn.ModuleDict) and adapter in parts and "base_layer" in layer._modules:
            yield name, layer


def require_layers(model: nn.Module, adapter: str = "default") -> list[tuple[str, Any]]:
    """`lora_layers` as a list. Raises ValueError when there are none."""
    layers = list(lora_layers(model, adapter))
    if not layers:
        raise ValueError(f"the model has no LoRA linear layer with an adapter {adapter!r}; add one first")
    return layers


def set_variant(layer: Any, adapter: str, variant: Variant) -> None:
    """Let ``adapter`` of ``layer`` be computed by ``variant``. Raises ValueError where it is another variant."""
    present = layer.lora_variant.get(adapter)
    if present is not None and type(present) is not type(variant):
        raise ValueError(
            f"adapter {adapter!r} is a {type(present).__name__}, which cannot be a {type(variant).__name__} too: "
            "make the adapter without it"
        )
    layer.lora_variant[adapter] = variant


def factors_of(layer: Any, adapter: str) -> Factors:
    """What ``adapter`` of ``layer`` computes as LoRA: its variant's factors, or its own."""
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, Variant):
        return variant.factors(layer, adapter)
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
