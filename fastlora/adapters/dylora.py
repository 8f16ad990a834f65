"""DyLoRA: one adapter whose first b rows and columns are an adapter of rank b (Valipour et al., "DyLoRA:
Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation", 2023).

    b ~ uniform(min_rank .. R), drawn for each step
    y = x W^T + (alpha / b) * (x A[:b]^T) B[:, :b]^T            (alpha / sqrt(b) for rsLoRA)

Only the b rows are computed. (On a GPU up to the next multiple of 8, with zeros in B from b on: its fast products want
rows of 16-bit factors to begin at multiples of 16 bytes.) With ``frozen`` the rows before the b-th are constants of the
step, as in the paper's cheaper form, in which each row learns when it is the last.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from fastlora.adapters import rank as ranks
from fastlora.adapters.variant import Factors, Variant, require_layers, set_variant

_ALIGNED = 8
"""16-bit elements in the 16 bytes at whose multiples rows must begin for the fast products of a GPU."""


def computed(rank: int, full: int, device: torch.device) -> int:
    """How many rows of A, of the ``full`` ones that there are, a layer multiplies by where it uses ``rank`` of them."""
    return min(full, -(-rank // _ALIGNED) * _ALIGNED) if device.type == "cuda" else rank


class _Nested(torch.autograd.Function):
    """The first ``size`` rows of A and columns of B, the latter zero from the b-th on; those from ``first`` to b learn.

    One node for both, whose backward fills whole gradients: slices take a node each, and more launches.
    """

    @staticmethod
    def forward(ctx: Any, lora_a: torch.Tensor, lora_b: torch.Tensor, first: int, b: int, size: int) -> Any:
        ctx.first, ctx.b, ctx.full = first, b, lora_a.shape[0]
        part = lora_b[:, :size]
        if b < size:
            part = part * _ones(0, b, size, lora_b)
        return lora_a[:size], part

    @staticmethod
    def backward(ctx: Any, da: torch.Tensor | None, db: torch.Tensor | None) -> Any:
        first, b, full = ctx.first, ctx.b, ctx.full
        if da is not None and (first or da.shape[0] < full):  # else rows from b on have no gradient: B is zero there
            whole = da.new_zeros(full, da.shape[1])
            whole[first:b] = da[first:b]
            da = whole
        if db is not None and (first or b < full):
            if db.shape[1] == full:
                db = db * _ones(first, b, full, db)
            else:
                whole = db.new_zeros(db.shape[0], full)
                whole[:, first:b] = db[:, first:b]
                db = whole
        return da, db, None, None, None


@functools.lru_cache(maxsize=256)
def _mask(first: int, b: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        i = torch.arange(size, device=device)
        return ((i >= first) & (i < b)).to(dtype)


def _ones(first: int, b: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """(size,): ones from ``first`` to b, zeros elsewhere."""
    return _mask(first, b, size, like.dtype, like.device)


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
        size = computed(b, lora_a.shape[0], lora_a.device)
        first = b - 1 if self.frozen and layer.training else 0
        return *_Nested.apply(lora_a, lora_b, first, b, size), scale


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
