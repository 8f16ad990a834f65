"""Where A and B start, when not at random and zero: from the base weight, which changes so that the model does not.

    PiSSA   B A = svd_r(W) / scale, W' = q(W - scale * B A)    (Meng et al., "PiSSA: Principal Singular Values and
            Singular Vectors Adaptation of Large Language Models", 2024)
    OLoRA   B A = first r columns and rows of W = Q R, W' = q(W - scale * B A)    (Buyukakyuz, "OLoRA: Orthonormal
            Low-Rank Adaptation of Large Language Models", 2024)
    LoftQ   rounds of W' = q(W - scale * B A), B A = svd_r(W - W') / scale    (Li et al., "LoftQ:
            LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023)

q quantizes as the base is quantized, and is nothing on a dense base. W is best the weight before quantization: of a
weight in 4 bits only its rounded form is left.

The changed base belongs to the adapter: `save_base` writes it beside the adapter's file, `load_base` reads it again.
On a dense base `export` makes plain LoRA of rank 2 R of both, for any PEFT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.adapters import rank as ranks
from fastlora.adapters.variant import require_layers
from fastlora.backends import dense
from fastlora.linear import NF4Linear, base_weight
from fastlora.nf4 import NF4Weight

FILE = "base_layers.safetensors"
STARTS = ("pissa", "olora", "loftq")
_OVERSAMPLE = 8
Pair = tuple[torch.Tensor, torch.Tensor]
"""lora_a (R, K) and lora_b (N, R)."""


def _svd(w: torch.Tensor, r: int, niter: int | None) -> Pair:
    """The best rank-r factors of w, each with the roots of the singular values."""
    if niter is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(w, min(r + _OVERSAMPLE, *w.shape), niter)
        vt = v.T
    root = s[:r].sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


def pissa(w: torch.Tensor, r: int, scale: float, niter: int | None = None) -> Pair:
    """The principal singular vectors of w (N, K), whose product times ``scale`` is w's best approximation of rank r.

    niter: rounds of a randomized decomposition, far faster than the full one; None for the full one.
    """
    a, b = _svd(w / scale, r, niter)
    return a, b


def olora(w: torch.Tensor, r: int) -> Pair:
    """r orthonormal columns B and the rows A of w = Q R that belong to them."""
    q, upper = torch.linalg.qr(w)
    return upper[:r], q[:, :r]


def loftq(
    w: torch.Tensor,
    r: int,
    scale: float,
    quantize: Callable[[torch.Tensor], NF4Weight],
    rounds: int = 5,
    niter: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, NF4Weight]:
    """A, B and a quantized weight whose sum ``W' + scale * B A`` is near w (N, K); the nearest of ``rounds`` rounds."""
    a, b = w.new_zeros(r, w.shape[1]), w.new_zeros(w.shape[0], r)
    best: tuple[float, Any] = (float("inf"), None)
    for _ in range(rounds):
        q = quantize(w - scale * (b @ a))
        rest = w - q.dequantize(w.dtype)
        a, b = _svd(rest / scale, r, niter)
        error = float((rest - scale * (b @ a)).norm())
        if error < best[0]:
            best = error, (a, b, q)
    return best[1]


def _quantizer(like: NF4Weight) -> Callable[[torch.Tensor], NF4Weight]:
    def quantize(w: torch.Tensor) -> NF4Weight:
        q = NF4Weight.quantize(w, blocksize=like.blocksize, quant_type=like.quant_type, nested=like.nested)
        return dataclasses.replace(q, dtype=like.dtype)

    return quantize


def set_base_weight(base: Any, w: NF4Weight | torch.Tensor) -> None:
    """Put a weight (N, K) into a base layer of the same format."""
    if isinstance(base, NF4Linear):
        assert isinstance(w, NF4Weight)
        base._set(w)
    elif isinstance(w, NF4Weight):
        weight = w.to_bitsandbytes(base.weight.dtype)
        weight.module = base
        base.weight, base.quant_state = weight, weight.quant_state
    else:
        base.weight.data = w.to(base.weight.dtype)


@torch.no_grad()
def apply(
    model: nn.Module,
    start: str,
    originals: Mapping[str, torch.Tensor] | None = None,
    *,
    niter: int | None = 4,
    rounds: int = 5,
    adapter: str = "default",
) -> None:
    """Start ``adapter`` of every LoRA layer as ``start`` says, and change the base so that the model stays what it was.

    originals: the weights (N, K) before quantization by the names of the layers, without PEFT's prefix; by default the
    base's own. niter: rounds of the randomized decomposition of PiSSA and LoftQ, None for the full one. rounds: of
    LoftQ.

    Raises ValueError for an unknown start, for LoftQ on a dense base, for a rank that a layer does not have, and for
    layers that store their weight transposed, and for LoftQ without originals, to which nothing is left to do.
    """
    if start not in STARTS:
        raise ValueError(f"unknown start {start!r}; choose from {', '.join(STARTS)}")
    layers = require_layers(model, adapter)
    for name, layer in layers:
        weight, r = base_weight(layer.base_layer), layer.r[adapter]
        if getattr(layer, "fan_in_fan_out", False):
            raise ValueError(f"{name}: the base stores its weight as (in_features, out_features)")
        if r > min(weight.shape):
            raise ValueError(f"{name}: a layer {tuple(weight.shape)} has no rank {r}: lower r")
        if start == "loftq" and not isinstance(weight, NF4Weight):
            raise ValueError(f"{name}: LoftQ is for quantized bases, and this one is dense: choose pissa or olora")
        if start == "loftq" and name.removeprefix("base_model.model.") not in (originals or {}):
            raise ValueError(f"{name}: LoftQ makes up for what quantization loses: give the weight as it was before")
    for name, layer in layers:
        base, r, scale = layer.base_layer, layer.r[adapter], float(layer.scaling[adapter])
        weight = base_weight(base)
        original = (originals or {}).get(name.removeprefix("base_model.model."))
        w = dense(weight, torch.float32) if original is None else original.to(weight.device, torch.float32)
        if start == "loftq":
            assert isinstance(weight, NF4Weight)
            a, b, q = loftq(w, r, scale, _quantizer(weight), rounds, niter)
            changed: NF4Weight | torch.Tensor = q
        else:
            a, b = pissa(w, r, scale, niter) if start == "pissa" else olora(w, r)
            changed = w - scale * (b @ a)
            if isinstance(weight, NF4Weight):
                changed = _quantizer(weight)(changed)
        set_base_weight(base, changed)
        for part, t in ((layer.lora_A, a), (layer.lora_B, b)):
            part[adapter].weight.copy_(t)


def save_base(model: nn.Module, folder: str | Path, adapter: str = "default") -> Path:
    """Write the 4-bit base weights of the layers that have ``adapter``, as bitsandbytes names their parts."""
    from safetensors.torch import save_file

    tensors = {}
    for name, layer in require_layers(model, adapter):
        w = base_weight(layer.base_layer)
        if not isinstance(w, NF4Weight):
            raise ValueError(f"{name}: the base is dense: export the adapter as plain LoRA instead")
        prefix = name.removeprefix("base_model.model.")
        tensors[f"{prefix}.weight"] = w.w_packed
        tensors |= {f"{prefix}.weight.{key}": value for key, value in w.state_dict().items()}
    path = Path(folder) / FILE
    save_file({key: t.detach().clone() for key, t in tensors.items()}, path)  # the layers share their tables
    return path


def load_base(model: nn.Module, folder: str | Path, adapter: str = "default") -> None:
    """Put the base weights that `save_base` wrote into ``model``. Raises ValueError when they do not fit."""
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / FILE)
    for name, layer in require_layers(model, adapter):
        prefix = name.removeprefix("base_model.model.") + ".weight"
        present = base_weight(layer.base_layer)
        if prefix not in tensors or not isinstance(present, NF4Weight):
            raise ValueError(f"{name}: {FILE} is for a model in 4 bits with other layers")
        state = {key[len(prefix) + 1 :]: t for key, t in tensors.items() if key.startswith(prefix + ".")}
        device = present.device
        state = {key: t.to(device) for key, t in state.items()}
        loaded = NF4Weight.from_state_dict(tensors[prefix].to(device), state).check()
        if loaded.shape != present.shape:
            raise ValueError(f"{name}: the saved weight is {loaded.shape}, the layer's {present.shape}")
        set_base_weight(layer.base_layer, loaded)


@torch.no_grad()
def export(model: nn.Module, first: Mapping[str, Pair], adapter: str = "default") -> None:
    """Turn the adapter into plain LoRA of rank 2 R on the dense base that the model had before `apply`.

    first: A and B of every layer, by name, as they were after `apply`. The base itself stays changed.
    """
    for name, layer in require_layers(model, adapter):
        scale, (a, b) = layer.scaling[adapter], first[name]
        lora_a, lora_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        new = torch.cat((lora_a, a.to(lora_a))), torch.cat((lora_b, -b.to(lora_b)), 1)
        ranks.replace(layer, adapter, *new)
        ranks.set_scale(layer, adapter, scale)
    ranks.write_config(model, adapter)


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Pair]:
    """Copies of A and B of every layer, by name: what `export` wants."""
    return {
        name: (layer.lora_A[adapter].weight.detach().clone(), layer.lora_B[adapter].weight.detach().clone())
        for name, layer in require_layers(model, adapter)
    }
