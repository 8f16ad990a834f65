"""Some linear layers trained in full, all others frozen in 4 bits.

    y = x W^T + bias,   W and bias learned in the chosen layers, W fixed in all others

What trains the fewest layers needs the fewest gradients: none is computed below the first of them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from fastlora.backends import dense
from fastlora.linear import NF4Linear, base_weight


def unfreeze(model: nn.Module, layers: str, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze ``model`` but the linear layers whose whole name the regular expression ``layers`` matches.

    A layer in 4 bits becomes a dense one. dtype: of the trained weights; under autocast, or on inputs of another type,
    they are used in the type that the layer computed in. Returns the names. Raises ValueError when no layer matches.
    """
    pattern = re.compile(layers)
    names = [
        name
        for name, module in model.named_modules()
        if pattern.fullmatch(name) and isinstance(module, (nn.Linear, NF4Linear))
    ]
    if not names:
        raise ValueError(f"no linear layer has a name like {layers!r}, a regular expression for the whole of it")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, Trained.of(model.get_submodule(name), dtype))
    return names


class Trained(nn.Linear):
    """A linear layer whose weight is of another type than it computes in."""

    @classmethod
    def of(cls, base: Any, dtype: torch.dtype) -> Trained:
        """The dense form of ``base``, trainable."""
        n, k = base_weight(base).shape
        layer = cls(k, n, base.bias is not None, device="meta")
        layer.weight = nn.Parameter(dense(base_weight(base), dtype).detach().clone())
        if base.bias is not None:
            layer.bias = nn.Parameter(base.bias.detach().to(dtype).clone())
        return layer.train(base.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)
