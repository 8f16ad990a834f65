"""The compiled extension ``fastlora._C``: loaded at first use, with the reason kept when it cannot be.

Nothing here raises at import. ``available`` says whether the extension serves a device, and if not, why.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastlora import tables
from fastlora.activation import ACTIVATIONS
from fastlora.dropout import Dropout
from fastlora.int8 import Int8Matrix
from fastlora.nf4 import NF4Weight
from fastlora.stacking import side_by_side

CAPABILITIES = ("plain", "avx2", "avx512", "avx512_bf16")
"""CPU code paths, from the least to the most capable; all dequantize to the same bits."""

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
    return None, f"fastlora._C is not built: {_left_out() or 'build it with: pip install --no-build-isolation .'}"


@functools.cache
def _left_out() -> str:
    """What the build says that it left out, and why; empty where it says nothing."""
    try:
        return (Path(__file__).parent / "_build_info.txt").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


@functools.cache
def autograd() -> tuple[Any, str | None]:
    """The module with the autograd node, or None and the reason.

    It is built against torch's C++ API: the name of the file carries the version of torch, and its suffix that of
    Python, so that no other version ever loads it.
    """
    version = re.sub(r"\W", "_", torch.__version__.partition("+")[0])
    try:
        return importlib.import_module(f"fastlora._autograd_{version}"), None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return None, f"not built for torch {torch.__version__} and Python {platform.python_version()}"
        return None, f"cannot be loaded: {' '.join(str(error).split())}"


@functools.cache
def best_capability() -> int:
    """The best of `CAPABILITIES` on this processor, as a number."""
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
        return f"fastlora._C was built without CUDA: {_left_out() or 'there was no nvcc, or a CPU build of torch'}"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def _operator(name: str, device_type: str) -> Any:
    """An operator for tensors on ``device_type``. Raises RuntimeError when the extension does not serve them."""
    reason = available(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    return getattr(torch.ops.fastlora_native, name).default


def capability() -> str:
    """The CPU path that is taken, one of `CAPABILITIES`.

    Raises RuntimeError without the extension, ValueError when ``FASTLORA_CPU_CAPABILITY`` is no path of this processor.
    """
    return CAPABILITIES[_capability()]


def _capability() -> int:
    reason = available("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    best = best_capability()
    name = os.environ.get(CAPABILITY_VARIABLE)
    if not name:
        return best
    if name not in CAPABILITIES[: best + 1]:
        raise ValueError(f"{CAPABILITY_VARIABLE} must be one of {CAPABILITIES[: best + 1]} here, got {name!r}")
    return CAPABILITIES.index(name)


def weight_arguments(w: NF4Weight) -> tuple[Any, ...]:
    """The arguments that stand for a packed weight in every operator of the extension."""
    statistics = (w.absmax, w.absmax_q, w.absmax_scale, w.absmax_code, w.absmax_offset)
    return (w.w_packed, *statistics, *w.shape, w.blocksize, w.quant_type == "fp4")


def dequantize(w: NF4Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix (N, K) in ``dtype`` (float32, bfloat16 or float16), bit-equal to ``w.dequantize(dtype)``.

    ``out``: (N, K) of that dtype on the weight's device, its last dimension contiguous; it is filled and returned.
    Raises RuntimeError when the extension does not serve the device, ValueError for a wrong tensor.
    """
    operator = _operator("dequantize", w.device.type)
    dtype = dtype or w.dtype
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.device)
    elif out.dtype != dtype:
        raise ValueError(f"out must be {dtype}, got {out.dtype}")
    capability = _capability() if w.device.type == "cpu" else 0
    operator(*weight_arguments(w), capability, out)
    return out


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    scale: torch.Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: None,
    gradient: bool,
) -> None:
    """The loss (M,) float32 of each row of logits (M, V); with ``gradient`` their gradient, times scale, over them.

    For contiguous logits on a CPU, in float32 or bfloat16. Raises ValueError for tensors that do not fit, RuntimeError
    without the extension.
    """
    operator = _operator("cross_entropy", "cpu")
    operator(logits, labels, scale, ignore_index, label_smoothing, gradient, _capability(), loss)


def _on_hopper(capability: tuple[int, int]) -> bool:
    """Whether kernels for this compute capability alone run there: it is 9.0, and the extension, if any, has them."""
    module, _ = _load()
    return capability == (9, 0) and (module is None or not module.WITH_CUDA or bool(module.WITH_HOPPER))


def few_rows(capability: tuple[int, int]) -> int:
    """The most rows of x or dy that the kernels for few rows take on a GPU of this compute capability.

    On an H200 they were measured to be faster for all of these, launches included, than making the weight dense for a
    library product.
    """
    if capability[0] in (9, 10):
        return 64
    return 32 if capability in ((8, 0), (8, 7)) else 16  # the others have less shared memory


def forms(
    m: int, n: int, k: int, r: int, blocksize: int, capability: tuple[int, int], direction: str = "forward"
) -> tuple[str, ...]:
    """The ways to compute a product on a GPU that `forward` and `backward` choose from.

    "few_rows": the packed weight is read once, inside a product of a few rows; "tile": it is decoded inside the tiles
    of a tensor core product, on compute capability 9.0; "library": it is made dense, then multiplied.
    """
    few = m <= few_rows(capability) and k % 32 == 0 and n % 8 == 0
    fits = k % 64 == 0 and n % 8 == 0 and blocksize % 64 == 0
    tile = _on_hopper(capability) and fits and (direction == "forward" or r % 8 == 0)
    return (*(("few_rows",) if few else ()), *(("tile",) if tile else ()), "library")


@functools.cache
def gpu(index: int | None) -> tuple[tuple[int, int], tables.Device]:
    """The compute capability of a GPU, and the GPU as the tables know it; the current one for None."""
    p = torch.cuda.get_device_properties(index)
    capability = (p.major, p.minor)
    return capability, tables.Device("cuda", p.name, f"{p.major}.{p.minor}", p.multi_processor_count)


def form_for(x: torch.Tensor, w: NF4Weight, r: int, direction: str) -> str:
    """The one of `forms` that the tables call the fastest; without a measurement, that of the built-in rule."""
    if tables.forced_forms and "cuda" in tables.forced_forms:
        return tables.forced_forms["cuda"]
    shape = (x.shape[0], *w.shape)
    return chosen_form(*shape, w.blocksize, x.dtype, x.device.index, r, direction, tables.captured())


@tables.cached(maxsize=4096)
def chosen_form(
    m: int, n: int, k: int, blocksize: int, dtype: torch.dtype, index: int | None, r: int, direction: str,
    captured: bool,
) -> str:  # fmt: skip
    """The one of `forms` that `forward` or `backward` takes on GPU ``index``, unless a measurement forces another."""
    capability, device = gpu(index)
    able = forms(m, n, k, r, blocksize, capability, direction)
    kind = tables.Class(direction, tables.dtype_class(dtype, "cuda"), "packed", r)
    if measured := tables.fastest_form("cuda", able, device, kind, m, n, k, captured):
        return measured
    if "tile" in able and tables.tiles_gain(m, n if direction == "forward" else k, device.multiprocessors):
        return "tile"
    return "few_rows" if "few_rows" in able else "library"


def _adapters(
    x: torch.Tensor, lora_a: torch.Tensor | None, lora_b: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The adapters as the operators read them: contiguous, both float32 or both of the type of x."""
    if lora_a is None or lora_b is None or lora_a.shape[0] == 0:
        return None, None
    if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (x.dtype, torch.float32):
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return lora_a.contiguous(), lora_b.contiguous()


def _bias(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The bias as the operators read it."""
    return None if bias is None else (bias if bias.dtype == x.dtype else bias.float()).contiguous()


_DROPPED = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}


def drop(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """``dropout.apply(x)`` for x (M, K) on any device, to the bit; by the extension where it has code for x."""
    device = x.device.type
    if x.dtype in _DROPPED.get(device, ()) and available(device) is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _operator("dropout", device)(x.contiguous(), *_dropout_arguments(dropout), out)
        return out
    return dropout.apply(x)


def _dropout_arguments(dropout: Dropout | None) -> tuple[Any, ...]:
    return () if dropout is None else (dropout.seed, dropout.threshold, dropout.gain)


def forward(
    x: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
    form: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) and u (M, R) as ``fastlora.reference.forward``, for a packed weight; x is bfloat16 or float16 on a GPU,
    bfloat16 or float32 on a CPU.

    form, on a GPU: one of `forms`, by default the fastest. Raises RuntimeError where the extension does not serve the
    device, ValueError for tensors that do not fit.
    """
    lora_a, lora_b = _adapters(x, lora_a, lora_b)
    arguments = (x, *weight_arguments(w), lora_a, lora_b, _bias(bias, x), scale, out_dtype == torch.float32)
    if x.device.type == "cpu":
        return _operator("linear_forward", "cpu")(*arguments, _capability(), *_dropout_arguments(dropout))
    form = form or form_for(x, w, 0 if lora_a is None else lora_a.shape[0], "forward")
    return _operator(f"{form}_forward", "cuda")(*arguments, *_dropout_arguments(dropout))


def reads(factor: Int8Matrix | NF4Weight) -> bool:
    """Whether `packed_forward` reads it."""
    if isinstance(factor, Int8Matrix):
        return True
    return (factor.quant_type, factor.blocksize, factor.nested) == ("nf4", 64, False)


def packed_forward(
    x: torch.Tensor,
    w: NF4Weight,
    lora_a: Int8Matrix | NF4Weight,
    lora_b: Int8Matrix | NF4Weight,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` in the form "few_rows", of adapters that its products decode. They are (R, K) and (N, R); `reads` must
    accept them.

    Raises RuntimeError where the extension does not serve the device, ValueError for tensors that do not fit.
    """
    of_a, of_b = (
        (factor.values, factor.scales) if isinstance(factor, Int8Matrix) else (factor.w_packed, factor.absmax)
        for factor in (lora_a, lora_b)
    )
    arguments = (x, *weight_arguments(w), *of_a, *of_b, lora_a.shape[0], _bias(bias, x), scale)
    y, u = _operator("few_rows_packed", "cuda")(*arguments, out_dtype == torch.float32)
    return y, u


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    w: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
    form: str | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dA and dB as ``fastlora.reference.backward``; form one of `forms`, as there."""
    need_dx, need_da, need_db = needs
    a, b = _adapters(dy, lora_a, lora_b)
    arguments = (dy, x, u, *weight_arguments(w), a, b, scale, need_dx, need_da, need_db)
    if dy.device.type == "cpu":
        dx, da, db = _operator("linear_backward", "cpu")(*arguments, _capability(), *_dropout_arguments(dropout))
    else:
        form = form or form_for(dy, w, 0 if a is None else a.shape[0], "backward")
        dx, da, db = _operator(f"{form}_backward", "cuda")(*arguments, *_dropout_arguments(dropout))
    grads: list[torch.Tensor | None] = [dx if need_dx else None]
    for need, grad, adapter in ((need_da, da, lora_a), (need_db, db, lora_b)):
        if not need or adapter is None:
            grads.append(None)
        else:
            grads.append(grad.to(adapter.dtype) if adapter.shape == grad.shape else torch.zeros_like(adapter))
    return grads[0], grads[1], grads[2]


_NARROW = (16, 32)
"""Widths of the packed adapters whose sums over a strip of columns fit the registers of a GPU."""


def _strips(*wide: torch.Tensor) -> bool:
    """Whether the kernels that walk down strips of columns read these matrices (M, N).

    They were measured to be faster than the Triton kernels on compute capability 9.0, and are taken there.
    """
    first = wide[0]
    if first.device.type != "cuda" or first.dtype not in (torch.bfloat16, torch.float16) or not first.shape[0]:
        return False
    if available("cuda") is not None or not _on_hopper(gpu(first.device.index)[0]):
        return False
    for t in wide:
        row, column = t.stride()
        rows = column == 1 and row >= t.shape[1] and row % 8 == 0
        if not rows or t.dtype != first.dtype or t.shape[1] % 8 or t.data_ptr() % 16:
            return False
    return True


def gates(gate: torch.Tensor, up: torch.Tensor, *widths: int) -> bool:
    """Whether `gated_forward` and `gated_gradients` serve gate and up (M, N) and adapters of these widths."""
    return set(widths) <= set(_NARROW) and gate.stride() == up.stride() and _strips(gate, up)


def gated_forward(
    gate: torch.Tensor, up: torch.Tensor, activation: str, lora_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = act(gate) * up (M, N), and u = h A^T (M, RD) of down, from one read of gate and up (M, N).

    lora_a: (RD, N) of their type. `gates` must accept them. Raises RuntimeError where the extension does not serve the
    device, ValueError for tensors that do not fit.
    """
    h, u = gate.new_empty(gate.shape), gate.new_empty(gate.shape[0], lora_a.shape[0])
    _operator("gated_forward", "cuda")(gate, up, lora_a, ACTIVATIONS.index(activation), h, u)
    return h, u


def gated_gradients(
    gate: torch.Tensor,
    up: torch.Tensor,
    dh: torch.Tensor,
    activation: str,
    u: torch.Tensor,
    scales: tuple[float, float],
    du_down: torch.Tensor,
    lora_b: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    shared: bool = False,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dgate and dup side by side (M, 2 N), du of both, dB of gate above that of up (2 N, R), and dA of down (RD, N).

    u and du: (M, 2 R), of gate and of up, or where ``shared`` (M, R), of both. lora_b: (2 N, columns of u), of gate
    above that of up, multiplied by the scales. du_down: (M, RD). dtypes: of dB and dA. ``in_place``: over gate and up,
    which must lie side by side. The sums repeat to the bit. `gates` must accept gate, up, R and RD. Raises as
    `gated_forward`.
    """
    n = gate.shape[1]
    d, du = side_by_side(gate, up, in_place=in_place), torch.empty_like(u)
    db = gate.new_empty(2 * n, u.shape[1] // (1 if shared else 2), dtype=dtypes[0])
    da = gate.new_empty(du_down.shape[1], n, dtype=dtypes[1])
    _operator("gated_gradients", "cuda")(
        gate, up, dh.contiguous(), u, du_down, lora_b, *map(float, scales), shared, ACTIVATIONS.index(activation),
        *d.chunk(2, 1), du, db, da,
    )  # fmt: skip
    return d, du, db, da


_MOST_PROJECTIONS = 4


def one_pass(dys: Sequence[torch.Tensor], rank: int) -> bool:
    """Whether `du_db` serves the gradients dy_i (M, N_i) and packed adapters of this rank."""
    return rank in _NARROW and len(dys) <= _MOST_PROJECTIONS and _strips(*dys)


def du_db(
    dys: Sequence[torch.Tensor],
    u: torch.Tensor,
    lora_b: torch.Tensor,
    scales: Sequence[float],
    dtype: torch.dtype,
    joined: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """du (M, P R), all dy_i B_i side by side, and dB (sum N, R) of ``dtype``, all scale_i * dy_i^T u_i.

    From one read of the dy_i (M, N_i). u: (M, P R). lora_b: (sum N, P R) of their type, block diagonal, multiplied by
    the scales. ``joined``, (M, sum N), is filled with all dy_i side by side. The sums repeat to the bit.

    `one_pass` must accept the dy_i and R. Raises RuntimeError where the extension does not serve the device, ValueError
    for tensors that do not fit.
    """
    absent = _MOST_PROJECTIONS - len(dys)
    du, db = torch.empty_like(u), u.new_empty(lora_b.shape[0], u.shape[1] // len(dys), dtype=dtype)
    _operator("du_db", "cuda")(*dys, *[None] * absent, *map(float, scales), *[1.0] * absent, u, lora_b, joined, du, db)
    return du, db
