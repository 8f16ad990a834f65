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

__all__ = [
    "FastLoRALinear",
    "NF4Linear",
    "NF4Weight",
    "accelerate",
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


def __getattr__(name: str) -> Any:
    # These need PEFT, which importing fastlora must not.
    if name in ("accelerate", "fused", "merge", "register", "restore"):
        return getattr(importlib.import_module("fastlora.integrations.peft"), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
