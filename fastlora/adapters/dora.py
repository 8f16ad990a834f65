"""DoRA for standalone layers: rows of ``W + scale * B A`` of a learned length (Liu et al., "DoRA: Weight-Decomposed
Low-Rank Adaptation", 2024).

    n = row norms of W + scale * B A, a constant for the gradients
    y = (m / n) * (x W^T + scale * (x A^T) B^T) + bias               m (N,) learned, n at the start

The computation is `fastlora.dora`, which PEFT's DoRA layers share; the magnitude has PEFT's name in the state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora import dora
from fastlora.adapters.variant import require_layers
from fastlora.linear import FastLoRALinear, base_weight
from fastlora.nf4 import NF4Weight, Weight, version


class Magnitude(nn.Module):
    """The lengths m (N,) of the rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class DoRA:
    """One layer's adapter computed as DoRA. Keeps what is known of a packed base: the norms of its rows."""

    def __init__(self) -> None:
        self._norms: tuple[Any, torch.Tensor] | None = None

    def norms(self, base: Any, weight: Weight) -> torch.Tensor | None:
        """`fastlora.dora.row_norms` of a packed weight, taken once."""
        if not isinstance(weight, NF4Weight):
            return None
        key = (base.weight.data_ptr(), version(base.weight))
        if self._norms is None or self._norms[0] != key:
            self._norms = key, dora.row_norms(weight)
        return self._norms[1]

    def run(self, layer: Any, x: torch.Tensor, adapter: str, weight: Weight, p: float, backend: str) -> torch.Tensor:
        """y (..., N) of x (..., K)."""
        base = layer.base_layer
        return dora.dora_linear(
            x,
            weight,
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            layer.lora_magnitude_vector[adapter].weight,
            base.bias,
            layer.scaling[adapter],
            p,
            None,
            backend,
            self.norms(base, weight),
        )


@torch.no_grad()
def enable(model: nn.Module, adapter: str = "default") -> int:
    """Make ``adapter`` of every `FastLoRALinear` of ``model`` a DoRA, whose output is at first what it was.

    Returns how many layers changed. Raises ValueError for a rank of 0, which has no direction to learn, for layers that
    a variant of LoRA computes, and for PEFT's layers, whose DoRA is made with ``LoraConfig(use_dora=True)``.
    """
    layers = require_layers(model, adapter)
    for name, layer in layers:
        if not isinstance(layer, FastLoRALinear):
            raise ValueError(f"{name}: this is a layer of PEFT's: make it with LoraConfig(use_dora=True)")
        lora_a: Any = layer.lora_A[adapter].weight
        if lora_a.shape[0] < 1:
            raise ValueError(f"{name}: DoRA needs a rank of 1 or more")
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise ValueError(f"{name}: adapter {adapter!r} is a {kind}, which cannot be DoRA too: make it without it")
    for _, layer in layers:
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        norm = dora.weight_norm(base_weight(layer.base_layer), lora_a, lora_b, layer.scaling[adapter], lora_a.dtype)
        layer.lora_magnitude_vector = nn.ModuleDict({adapter: Magnitude(norm.to(lora_a.dtype))})
        layer.lora_variant[adapter] = DoRA()
    return len(layers)


def keep_type(model: nn.Module, adapter: str = "default") -> int:
    """Let DoRA on PEFT's layers, once they are fused, return the type of its input, as LoRA does.

    PEFT's DoRA does so too, but not on a GPU over a 4-bit base under autocast: there it returns float32. All that
    follows (rotary embeddings, activations, the residual stream) is then computed and kept in twice the bytes. Returns
    how many layers are concerned.
    """
    layers = require_layers(model, adapter)
    for _, layer in layers:
        layer.fastlora_keeps_type = True
    return len(layers)
