"""The compiled extension ``fastlora._C``: loaded at first use, with the reason kept when it cannot be.

Nothing here raises at import. ``available`` says whether the extension serves a device, and if not, why.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from fastlora.nf4 import NF4Weight

CAPABILITIES = ("plain", "avx2", "avx512")
"""CPU code paths, from the least to the most capable; all give the same bits."""

CAPABILITY_VARIABLE = "FASTLORA_CPU_CAPABILITY"
"""Environment variable that names a path at most as capable as the processor, read at every call."""


@functools.cache
def _load() -> tuple[Any, str | None]:
    """The extension module, or None and the reason."""
    try:
        return importlib.import_module("fastlora._C"), None
    except ModuleNotFoundError as error:
        if error.name != "fastlora._C":
            return None, f"fastlora._C cannot be loaded: {error}"
    except ImportError as error:
        return None, f"fastlora._C cannot be loaded: {' '.join(str(error).split())}"
    try:
        reason = (Path(__file__).parent / "_build_info.txt").read_text(encoding="utf-8").strip()
    except OSError:
        reason = "build it with: pip install --no-build-isolation ."
    return None, f"fastlora._C is not built: {reason}"


@functools.cache
def _best_capability() -> int:
    return int(torch.ops.fastlora_native.cpu_capability())


def available(device_type: str) -> str | None:
    """None if the extension serves tensors on ``device_type`` ("cpu" or "cuda"), else the reason as one sentence."""
    module, reason = _load()
    if module is None:
        return reason
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"fastlora._C has no code for device type {device_type!r}"
    if not module.WITH_CUDA:
        return "fastlora._C was built without CUDA (no nvcc, or a CPU build of torch, at build time)"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def capability() -> str:
    """The CPU path that ``dequantize`` takes: "avx512", "avx2" or "plain".

    Raises RuntimeError without the extension, ValueError when ``FASTLORA_CPU_CAPABILITY`` is no path of this processor.
    """
    return CAPABILITIES[_capability()]


def _capability() -> int:
    reason = available("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    best = _best_capability()
    name = os.environ.get(CAPABILITY_VARIABLE)
    if not name:
        return best
    if name not in CAPABILITIES[: best + 1]:
        raise ValueError(f"{CAPABILITY_VARIABLE} must be one of {CAPABILITIES[: best + 1]} here, got {name!r}")
    return CAPABILITIES.index(name)


def dequantize(w: NF4Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix (N, K) in ``dtype`` (float32, bfloat16 or float16), bit-equal to ``w.dequantize(dtype)``.

    ``out``: (N, K) of that dtype on the weight's device, its last dimension contiguous; it is filled and returned.
    Raises RuntimeError when the extension does not serve the device, ValueError for a wrong tensor.
    """
    reason = available(w.device.type)
    if reason is not None:
        raise RuntimeError(reason)
    dtype = dtype or w.dtype
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.device)
    elif out.dtype != dtype:
        raise ValueError(f"out must be {dtype}, got {out.dtype}")
    torch.ops.fastlora_native.dequantize(
        w.w_packed,
        w.absmax,
        w.absmax_q,
        w.absmax_scale,
        w.absmax_code,
        w.absmax_offset,
        *w.shape,
        w.blocksize,
        w.quant_type == "fp4",
        _capability() if w.device.type == "cpu" else 0,
        out,
    )
    return out
