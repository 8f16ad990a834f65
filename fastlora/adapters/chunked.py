"""A module a chunk of tokens at a time, for activations that do not fit: those inside an MLP are the widest of all.

    y = cat(f(x_1), ..., f(x_c)),   x = cat(x_1, ..., x_c)

Nothing inside f is kept for the backward pass but what the chunk in turn needs: each is computed again. The peak of a
module with H hidden features falls from the order of M * H to that of tokens * H. Gradients of parameters are the same
sums in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def chunk(module: nn.Module, tokens: int) -> nn.Module:
    """Let ``module``, which treats every token alone (a linear layer, an MLP), take at most ``tokens`` at a time.

    Its first argument is x (..., K); all others are the same for every chunk. In place; `unchunk` undoes it. Returns
    the module. Raises ValueError for tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be 1 or more, got {tokens}")
    unchunk(module)
    whole = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        m = x.numel() // max(1, x.shape[-1])
        if m <= tokens:
            return whole(x, *args, **kwargs)
        parts = []
        for part in x.reshape(m, x.shape[-1]).split(tokens):
            if torch.is_grad_enabled():
                parts.append(checkpoint(whole, part, *args, use_reentrant=False, **kwargs))
            else:
                parts.append(whole(part, *args, **kwargs))
        y = torch.cat(parts)
        return y.view(*x.shape[:-1], y.shape[-1])

    module.forward = forward
    return module


def unchunk(module: nn.Module) -> nn.Module:
    """Let ``module`` take all tokens at once again."""
    module.__dict__.pop("forward", None)
    return module


def chunk_mlps(model: nn.Module, tokens: int, name: str = "mlp") -> int:
    """`chunk` every submodule that is called ``name``. Returns how many; raises ValueError when there are none."""
    found = [module for path, module in model.named_modules() if path.rpartition(".")[2] == name]
    if not found:
        raise ValueError(f"no submodule is called {name!r}: name the module that treats every token alone")
    for module in found:
        chunk(module, tokens)
    return len(found)
