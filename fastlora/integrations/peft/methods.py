"""Fused layers for PEFT's methods beside LoRA: VeRA and AdaLoRA.

As for LoRA, a layer is converted by changing its class: parameters, files and methods stay PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from peft.tuners.vera.layer import Linear as VeraLinear
from torch import nn

from fastlora.adapters import adalora, vera
from fastlora.integrations.peft.layers import FUSED, FusedMethod
from fastlora.integrations.peft.situation import Situation, _fused_weight, _intact
from fastlora.linear import factors_forward
from fastlora.nf4 import Weight


def _dropout_reason(dropout: nn.Module) -> str | None:
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"the dropout is a {type(dropout).__name__}"
    return f"the dropout: {reason}" if (reason := _intact(dropout)) else None


def _p(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _single(layer: Any, present: Any, dropouts: Any, weight: str | Weight) -> str | tuple[str, Weight]:
    """The one active adapter and the base weight, or why PEFT's forward runs."""
    active = [name for name in layer.active_adapters if name in present]
    if len(active) != 1:
        return "no adapter is active" if not active else "several adapters are active"
    if isinstance(weight, str):
        return weight
    return _dropout_reason(dropouts[active[0]]) or (active[0], weight)


class FastVeraLinear(FusedMethod, VeraLinear):
    """PEFT's VeRA layer with the fused forward."""

    stock = VeraLinear

    def fastlora_situation(self: Any) -> str | Situation:
        found = _single(self, self.vera_lambda_d, self.vera_dropout, _fused_weight(self))
        return found if isinstance(found, str) else (_vera_forward, *found)


def _vera_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    shared = (_on(layer.vera_A, adapter, weight.device), _on(layer.vera_B, adapter, weight.device))
    b, d = layer.vera_lambda_b[adapter], layer.vera_lambda_d[adapter]
    lora_a, lora_b = vera.factors(b, d, *shared, *weight.shape)
    p = _p(layer.vera_dropout[adapter])
    return factors_forward(layer.base_layer, x, lora_a, lora_b, 1.0, p, weight, backend)


def _on(shared: Any, adapter: str, device: torch.device) -> torch.Tensor:
    """A shared factor, moved to ``device`` once and for all layers. PEFT moves it in every forward pass."""
    t: torch.Tensor = shared[adapter]
    if t.device != device:
        t = shared[adapter] = t.to(device)
    return t


class FusedAdaLora(FusedMethod):
    """The fused forward of AdaLoRA's layers."""

    def fastlora_situation(self: Any) -> str | Situation:
        found = _single(self, self.lora_A, self.lora_dropout, _fused_weight(self))
        return found if isinstance(found, str) else (_adalora_forward, *found)


def _adalora_forward(layer: Any, x: torch.Tensor, adapter: str, weight: Weight, backend: str) -> torch.Tensor:
    p = _p(layer.lora_dropout[adapter])
    return factors_forward(layer.base_layer, x, *adalora.factors(layer, adapter), p, weight, backend)


class FastSVDLinear(FusedAdaLora, SVDLinear):
    """PEFT's AdaLoRA layer on a dense base with the fused forward."""

    stock = SVDLinear


FUSED |= {VeraLinear: FastVeraLinear, SVDLinear: FastSVDLinear}

try:
    from peft.tuners.adalora import SVDLinear4bit
except ImportError:  # without bitsandbytes
    pass
else:

    class FastSVDLinear4bit(FusedAdaLora, SVDLinear4bit):
        """PEFT's AdaLoRA layer on a 4-bit base with the fused forward."""

        stock = SVDLinear4bit

    FUSED[SVDLinear4bit] = FastSVDLinear4bit
