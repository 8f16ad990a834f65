"""From one task to another on one base: several adapters loaded, one of them active.

`Tasks.use` points every layer to another adapter and touches no weight; `copy` writes one adapter's factors over those
of another in place, for programs that were captured or compiled with that one. A batch of several tasks is PEFT's
``adapter_names``, which fused layers compute as one adapter of the summed rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.adapters.variant import require_layers


class Tasks:
    """The adapters of a PEFT model, ready to be switched between.

    Make it anew after adapters were added or deleted. Unlike PEFT's ``set_adapter`` a switch leaves ``requires_grad``
    as it is: it is for serving.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layers = [layer for layer in model.modules() if hasattr(layer, "_active_adapter")]
        self.names: tuple[str, ...] = tuple(getattr(model, "peft_config", {}))
        if not self._layers or not self.names:
            raise ValueError("the model is not a PEFT model with adapters")

    def use(self, name: str) -> None:
        """Let ``name`` be the active adapter. Raises ValueError when there is no such adapter, or one is merged."""
        if name not in self.names:
            raise ValueError(f"no adapter {name!r}; choose from {', '.join(self.names)}")
        if any(layer.merged_adapters for layer in self._layers):
            raise ValueError("an adapter is merged into the base: call unmerge_adapter first")
        active = [name]
        for layer in self._layers:
            layer._active_adapter = active
        for holder in (self.model, getattr(self.model, "base_model", None)):
            if holder is not None and "active_adapter" in vars(holder):
                holder.active_adapter = name if holder is self.model else active


@torch.no_grad()
def copy(model: nn.Module, source: str, target: str) -> None:
    """Write the factors of adapter ``source`` over those of ``target``, in place; a smaller rank is filled with zeros.

    The scale of ``target`` stays, as it may be a constant of a captured graph: B makes up for it. Raises ValueError
    when a layer has a smaller rank in ``target``, or lacks one of the two.
    """
    pairs = []
    sources = dict(require_layers(model, source))
    for name, layer in require_layers(model, target):
        if name not in sources:
            raise ValueError(f"{name}: the layer has no adapter {source!r}")
        (a, b), (a2, b2) = (
            (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight) for adapter in (source, target)
        )
        if a.shape[0] > a2.shape[0]:
            raise ValueError(f"{name}: rank {a.shape[0]} does not fit into {a2.shape[0]}: make {target!r} larger")
        pairs.append((a, b, a2, b2, layer.scaling[source] / layer.scaling[target]))
    for a, b, a2, b2, factor in pairs:
        r = a.shape[0]
        a2[:r].copy_(a)
        b2[:, :r].copy_(b * factor)
        a2[r:].zero_()
        b2[:, r:].zero_()
