"""The activation of a gated MLP, h = act(gate) * up, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""SwiGLU; GEGLU with the exact Gaussian error function; GEGLU with its approximation by tanh."""


def activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate)."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """h (M, N) for gate and up (M, N)."""
    return activate(gate, activation) * up


def backward(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dgate, dup, h), (M, N) each."""
    active = activate(gate, activation)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dh * up, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(dh * up, gate, approximate=approximate)
    return dgate, dh * active, active * up
