"""Fused QLoRA linear layers for PyTorch: ``y = W_q x + s * B(A x)`` over a frozen 4-bit base, forward and backward."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from fastlora.linear import FastLoRALinear, NF4Linear, lora_linear
from fastlora.nf4 import NF4Weight
from fastlora.tables import for_graphs

if TYPE_CHECKING:
    from fastlora.integrations.peft import accelerate, fused, merge, register, restore
    from fastlora.training.step import capture_steps

__all__ = [
    "FastLoRALinear",
    "NF4Linear",
    "NF4Weight",
    "accelerate",
    "capture_steps",
    "for_graphs",
    "fused",
    "lora_linear",
    "merge",
    "register",
    "restore",
]

try:
    __version__ = importlib.metadata.version("fastlora-kernels")
except importlib.metadata.PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"


# These need PEFT or transformers, which importing fastlora must not.
_LAZY = {
    "capture_steps": "fastlora.training.step",
    **dict.fromkeys(("accelerate", "fused", "merge", "register", "restore"), "fastlora.integrations.peft"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
