"""bitsandbytes' 4-bit layers without adapters, computed by the fused operator of rank 0: y and dx alone.

For methods that train something else over a frozen base: prompts, prefixes, bottlenecks, single layers. As with
adapters, a layer is converted by changing its class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

try:
    import bitsandbytes as bnb
except ImportError as error:
    raise ImportError("fusing 4-bit layers needs bitsandbytes: pip install 'fastlora-kernels[train]'") from error

from fastlora import backends
from fastlora.integrations.converted import become, while_converted
from fastlora.linear import factors_forward, kept_weight


class FusedLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' ``Linear4bit`` with the fused forward and backward."""

    stock = bnb.nn.Linear4bit
    fastlora_backend: str = "auto"

    @while_converted
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.dim() == 0:
            return super().forward(x)
        return factors_forward(self, x, None, None, 1.0, 0.0, kept_weight(self, self), self.fastlora_backend)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "fastlora_weight"}


def fuse(model: nn.Module, backend: str = "auto") -> int:
    """Fuse every ``Linear4bit`` of ``model``, in place. Returns how many layers are fused.

    backend: see `fastlora.lora_linear`. Layers that PEFT holds as the base of an adapter are converted too, and are
    used where the adapter is disabled. Raises ValueError for a backend that is unknown.
    """
    if backend not in ("auto", *backends.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(('auto', *backends.BACKENDS))}")
    count = 0
    module: Any
    for module in model.modules():
        if type(module) in (bnb.nn.Linear4bit, FusedLinear4bit):
            become(module, FusedLinear4bit)
            module.fastlora_backend = backend
            if getattr(module, "support_avx512bf16_for_cpu", False):
                # bitsandbytes would repack these bytes in place during the first forward in eval mode.
                module.support_avx512bf16_for_cpu = False
                module.fastlora_repack = True
            count += 1
    return count


def unfuse(model: nn.Module) -> int:
    """Undo `fuse`. Returns how many layers changed."""
    count = 0
    for module in model.modules():
        if type(module) is FusedLinear4bit:
            become(module, bnb.nn.Linear4bit)
            for name in ("fastlora_backend", "fastlora_weight"):
                module.__dict__.pop(name, None)
            if module.__dict__.pop("fastlora_repack", False):
                module.support_avx512bf16_for_cpu = True
            count += 1
    return count
