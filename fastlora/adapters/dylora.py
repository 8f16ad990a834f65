"""DyLoRA: one adapter whose first b rows and columns are an adapter of rank b (Valipour et al., "DyLoRA:
Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation", 2023).

    b ~ uniform(min_rank .. R), drawn for each step
    y = x W^T + (alpha / b) * (x A[:b]^T) B[:, :b]^T            (alpha / sqrt(b) for rsLoRA)

Only the b rows are computed. With ``frozen`` the rows before the b-th are constants of the step, as in the paper's
cheaper form, in which each row learns when it is the last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastlora.adapters import rank as ranks
from fastlora.adapters.variant import Factors, Variant, require_layers, set_variant


class DyLoRA(Variant):
    """The rank that all layers of a model compute with: a sampled one in training, a chosen one in evaluation."""

    def __init__(self, min_rank: int, max_rank: int, frozen: bool = False, seed: int = 0) -> None:
        self.min_rank, self.max_rank, self.frozen = min_rank, max_rank, frozen
        self.rank = self.eval_rank = max_rank
        self._generator = torch.Generator().manual_seed(seed)

    def sample(self) -> int:
        """Draw the rank of the next training step."""
        self.rank = int(torch.randint(self.min_rank, self.max_rank + 1, (1,), generator=self._generator))
        return self.rank

    def use(self, rank: int) -> None:
        """Evaluate with ``rank``. Raises ValueError outside of the ranks that are trained."""
        if not self.min_rank <= rank <= self.max_rank:
            raise ValueError(f"rank must be from {self.min_rank} to {self.max_rank}, which are trained; got {rank}")
        self.eval_rank = rank

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "eval_rank": self.eval_rank, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank, self.eval_rank = state["rank"], state["eval_rank"]
        self._generator.set_state(state["generator"])

    def factors(self, layer: Any, adapter: str) -> Factors:
        b = self.rank if layer.training else self.eval_rank
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        scale = scale_at(layer, adapter, b)
        if self.frozen and layer.training and b > 1:
            lora_a = torch.cat((lora_a[: b - 1].detach(), lora_a[b - 1 : b]))
            lora_b = torch.cat((lora_b[:, : b - 1].detach(), lora_b[:, b - 1 : b]), 1)
            return lora_a, lora_b, scale
        return lora_a[:b], lora_b[:, :b], scale


def scale_at(layer: Any, adapter: str, rank: int) -> float:
    """The scale of the first ``rank`` rows: the layer's own is that of all of them."""
    full = layer.lora_A[adapter].weight.shape[0]
    rslora = layer.use_rslora[adapter] if isinstance(layer.use_rslora, dict) else layer.use_rslora
    return layer.scaling[adapter] * (math.sqrt(full / rank) if rslora else full / rank)


def enable(
    model: nn.Module, min_rank: int = 1, *, frozen: bool = False, seed: int = 0, adapter: str = "default"
) -> DyLoRA:
    """Make ``adapter`` of every LoRA layer nested. Call ``sample()`` of the result before each training step.

    Raises ValueError for a min_rank outside of 1 to the adapter's rank, and for layers of different ranks.
    """
    layers = require_layers(model, adapter)
    sizes = {layer.lora_A[adapter].weight.shape[0] for _, layer in layers}
    if len(sizes) > 1:
        raise ValueError(f"all layers must have one rank, got {sorted(sizes)}: leave rank_pattern out")
    (size,) = sizes
    if not 1 <= min_rank <= size:
        raise ValueError(f"min_rank must be from 1 to the rank {size}, got {min_rank}")
    variant = DyLoRA(min_rank, size, frozen, seed)
    for _, layer in layers:
        set_variant(layer, adapter, variant)
    return variant


def truncate(model: nn.Module, rank: int, adapter: str = "default") -> None:
    """Turn a nested adapter into a plain LoRA adapter of ``rank``, with its own scale; what is beyond is dropped.

    Raises ValueError outside of the ranks that were trained, and where the adapter is not nested.
    """
    layers = require_layers(model, adapter)
    for name, layer in layers:
        variant = layer.lora_variant.get(adapter)
        if not isinstance(variant, DyLoRA):
            raise ValueError(f"{name}: adapter {adapter!r} is no DyLoRA: call enable before training")
        variant.use(rank)
    for _, layer in layers:
        scale = scale_at(layer, adapter, rank)
        del layer.lora_variant[adapter]
        keep = torch.arange(rank, device=layer.lora_A[adapter].weight.device)
        ranks.select(layer, adapter, keep)
        ranks.set_scale(layer, adapter, scale)
    ranks.write_config(model, adapter)
