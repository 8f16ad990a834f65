"""Delta-LoRA: the base weight moves with the product of the factors (Zi et al., "Delta-LoRA: Fine-Tuning High-Rank
Parameters with the Delta of Low-Rank Matrices", 2023).

    W(t+1) = W(t) + weight * (B(t+1) A(t+1) - B(t) A(t))        from step k on
    y      = x W(t)^T + scale * (x A^T) B^T

The sum telescopes: ``W(t) = W + weight * (B A - B_k A_k)`` with A_k and B_k as they were at step k. So nothing is ever
added to W, which may be in 4 bits, and no rounding piles up:

    y = x W^T + (scale + weight) * (x A^T) B^T - weight * (x A_k^T) B_k^T

The gradients of A and B are those of the LoRA term alone, since W(t) is a constant of step t; that of x is of all.
Both are one fused product of rank 2 R (of rank R where B_k is zero, as it is when the updates begin with training).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.adapters import rank as ranks
from fastlora.adapters.variant import Factors, Variant, require_layers, set_variant

FILE = "delta_lora.safetensors"


class DeltaLoRA(Variant):
    """The state of one layer: the weight of the updates, and A_k and B_k once they have begun."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.begun = False
        self.start: tuple[torch.Tensor, torch.Tensor] | None = None
        """A_k (R, K) and B_k (N, R); None before the updates begin, and where their product is zero."""
        self._turned: tuple[Any, torch.Tensor] | None = None

    def begin(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Let the updates begin at these factors."""
        self.begun = True
        nothing = not bool(lora_b.any()) or not bool(lora_a.any())
        self.start = None if nothing else (lora_a.detach().clone(), lora_b.detach().clone())

    def factors(self, layer: Any, adapter: str) -> Factors:
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scale = layer.scaling[adapter]
        if not self.begun:
            return lora_a, lora_b, scale
        share = scale / (scale + self.weight)
        if self.start is None:
            return *_Moving.apply(lora_a, lora_b, None, None, share), scale + self.weight
        start_a, start_b = self.start
        if start_a.device != lora_a.device:
            self.start = start_a, start_b = start_a.to(lora_a.device), start_b.to(lora_a.device)
        key = (scale, self.weight, id(start_b))
        if self._turned is None or self._turned[0] != key:
            self._turned = key, start_b * (-self.weight / (scale + self.weight))
        return *_Moving.apply(lora_a, lora_b, start_a, self._turned[1], share), scale + self.weight


class _Moving(torch.autograd.Function):
    """A over A_k, and B beside the frozen ``turned_b``. The product of A and B also moves the base, which is a constant
    for them: ``share`` of their gradients is LoRA's."""

    @staticmethod
    def forward(ctx: Any, lora_a: torch.Tensor, lora_b: torch.Tensor, start_a: Any, turned_b: Any, share: float) -> Any:
        ctx.share, ctx.r = share, lora_a.shape[0]
        if start_a is None:
            return lora_a.view_as(lora_a), lora_b.view_as(lora_b)
        return torch.cat((lora_a, start_a)), torch.cat((lora_b, turned_b), 1)

    @staticmethod
    def backward(ctx: Any, da: torch.Tensor | None, db: torch.Tensor | None) -> Any:
        return (
            None if da is None else da[: ctx.r] * ctx.share,
            None if db is None else db[:, : ctx.r] * ctx.share,
            None,
            None,
            None,
        )


def enable(model: nn.Module, weight: float = 1.0, adapter: str = "default") -> list[DeltaLoRA]:
    """Make ``adapter`` of every LoRA layer a Delta-LoRA, whose updates do not yet `begin`.

    weight: lambda of the paper, multiplied with B A, not with scale * B A. Raises ValueError for a weight that is not
    a positive number and for layers with other variants of LoRA.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"the weight of the updates must be a positive number, got {weight}")
    variants = []
    for _, layer in require_layers(model, adapter):
        variant = DeltaLoRA(weight)
        set_variant(layer, adapter, variant)
        variants.append(variant)
    return variants


def _deltas(model: nn.Module, adapter: str) -> dict[str, tuple[Any, DeltaLoRA]]:
    found = {}
    for name, layer in require_layers(model, adapter):
        variant = layer.lora_variant.get(adapter)
        if not isinstance(variant, DeltaLoRA):
            raise ValueError(f"{name}: adapter {adapter!r} is no Delta-LoRA: call enable first")
        found[name] = layer, variant
    return found


def begin(model: nn.Module, adapter: str = "default") -> None:
    """Let the base of every layer move from now on. Raises ValueError when it moves already."""
    layers = _deltas(model, adapter)
    for name, (layer, variant) in layers.items():
        if variant.begun:
            raise ValueError(f"{name}: the updates have begun already: begin them once, at one step")
        variant.begin(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)


def save(model: nn.Module, folder: str | Path, adapter: str = "default") -> Path:
    """Write what a run needs, beside the adapter's own file, to go on: the weight and A_k, B_k of every layer."""
    from safetensors.torch import save_file

    tensors, weight, begun = {}, 0.0, False
    for name, (_, variant) in _deltas(model, adapter).items():
        weight, begun = variant.weight, variant.begun
        for part, t in zip(("lora_A", "lora_B"), variant.start or (), strict=False):
            tensors[f"{name}.{part}"] = t.contiguous()
    path = Path(folder) / FILE
    save_file(tensors, path, {"weight": repr(weight), "begun": str(int(begun))})
    return path


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Read what `save` wrote into the variants of ``model``, on which `enable` was called.

    Raises ValueError for a file of another model.
    """
    from safetensors import safe_open

    layers = _deltas(model, adapter)
    with safe_open(Path(folder) / FILE, framework="pt") as file:
        metadata = file.metadata()
        known = {key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118
        if strange := known - layers.keys():
            raise ValueError(f"{FILE} has a layer {min(strange)} that the model lacks: load it into the same model")
        for name, (layer, variant) in layers.items():
            variant.weight, variant.begun = float(metadata["weight"]), metadata["begun"] == "1"
            variant.start = None
            if name in known:
                device = layer.lora_A[adapter].weight.device
                parts = [file.get_tensor(f"{name}.{part}").to(device) for part in ("lora_A", "lora_B")]
                variant.start = parts[0], parts[1]


@torch.no_grad()
def export(model: nn.Module, adapter: str = "default") -> None:
    """Turn the Delta-LoRA ``adapter`` of ``model`` into plain LoRA with the same output, which any PEFT loads.

    Its rank is 2 R where A_k, B_k are part of it. Raises ValueError when the adapter is no Delta-LoRA.
    """
    for _, (layer, variant) in _deltas(model, adapter).items():
        lora_a, lora_b, scale = variant.factors(layer, adapter)
        del layer.lora_variant[adapter]
        ranks.replace(layer, adapter, lora_a, lora_b)
        ranks.set_scale(layer, adapter, float(scale))
    ranks.write_config(model, adapter)
