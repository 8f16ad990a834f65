"""Bottleneck adapters behind linear layers (Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019).

    h = x W^T + bias                                   the layer, frozen, in 4 bits or dense
    y = h + gelu(h D^T + d) U^T + u                    D (R, N), U (N, R), d (R,), u (N,) learned

U and u start at zero, so that the model starts as it was. Behind the last projections of attention and MLP it is the
paper's placement. `NF4Linear` runs on the fused operator of rank 0, and so do bitsandbytes' layers after
`fastlora.integrations.bitsandbytes.fuse`. The sum is part of the product with U.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.linear import NF4Linear, base_weight

TARGETS = ("o_proj", "down_proj")


class Bottleneck(nn.Module):
    """A linear layer, `NF4Linear` or bitsandbytes' too, with a bottleneck of size ``r`` behind it."""

    def __init__(self, base_layer: nn.Module, r: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r, the size of the bottleneck, must be 1 or more, got {r}")
        weight = base_weight(base_layer)
        n, device = weight.shape[0], weight.device
        self.base_layer, self.r = base_layer.requires_grad_(False), r
        self.down, self.up = nn.Linear(n, r, device=device, dtype=dtype), nn.Linear(r, n, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (..., N) of x (..., K)."""
        h = self.base_layer(x)
        flat = h.view(-1, h.shape[-1])
        with torch.autocast(h.device.type, enabled=False):
            inner = F.gelu(F.linear(flat, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype)))
            y = torch.addmm(flat, inner, self.up.weight.T.to(h.dtype)) + self.up.bias.to(h.dtype)
        return y.view(h.shape)


def add(
    model: nn.Module, r: int = 16, targets: tuple[str, ...] = TARGETS, *, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Freeze ``model`` and put bottlenecks behind the linear layers that ``targets`` names, by the ends of their names.

    dtype: of the bottlenecks. Returns the names. Raises ValueError when no layer has such a name.
    """
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and isinstance(module, (nn.Linear, NF4Linear))
    ]
    if not names:
        raise ValueError(f"no linear layer is called {' or '.join(targets)}: name the last projections of the blocks")
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, Bottleneck(model.get_submodule(name), r, dtype))
    return names
