"""Host side of a launch: the device guard, and the layouts that the kernels read."""

from __future__ import annotations

import contextlib

import torch
from triton import knobs

_NOTHING = contextlib.nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which is when they accept CPU tensors."""
    return bool(knobs.runtime.interpret)


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make ``t``'s device the current one for a launch. Raises ValueError for a tensor that no kernel can read."""
    if t.device.type == "cuda":
        if t.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(t.device)
    if t.device.type == "cpu" and interpreted():
        return _NOTHING
    raise ValueError(f"the Triton kernels need CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors), got {t.device}")


def with_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` (rows, columns) itself where each row is contiguous, else a copy."""
    return t if t.stride(1) == 1 else t.contiguous()
