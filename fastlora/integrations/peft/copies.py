"""Dense copies of the packed weights of fused layers, see ``fastlora/decoded.py``: which, and how many."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastlora import backends, decoded
from fastlora.integrations.peft.layers import Fused
from fastlora.integrations.peft.situation import layer_weight
from fastlora.nf4 import NF4Weight

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Copies:
    """What `keep` keeps."""

    layers: int
    """Layers whose weight is kept dense."""
    packed: int
    """Layers that it could have kept, with memory enough."""
    nbytes: int

    def __str__(self) -> str:
        return f"{self.layers} of {self.packed} packed weights kept dense, {self.nbytes / GIB:.2f} GiB"


def check(gib: float) -> None:
    """Raise ValueError unless ``gib`` is an amount of memory."""
    if not gib >= 0:
        raise ValueError(f"decoded is the memory for dense copies of packed weights in GiB, 0 or more, not {gib!r}")


def _dtype(layer: Any, weight: NF4Weight) -> torch.dtype:
    """What the layer computes in where x does not decide."""
    wanted = getattr(layer._modules["base_layer"], "compute_dtype", None)
    return wanted if isinstance(wanted, torch.dtype) else weight.dtype


def _packed(layer: Any) -> NF4Weight | None:
    """The weight that a fused layer multiplies by, where its kernels may read a copy of it."""
    try:
        weight = layer_weight(layer)
    except (ValueError, AttributeError):
        return None
    if not isinstance(weight, NF4Weight) or type(weight.w_packed) is not torch.Tensor:
        return None
    if layer.fastlora_backend == "torch":
        return weight
    # The kernels for CPUs decode what fits in a cache, as they multiply, and so do those of Triton in float32.
    reads = weight.device.type != "cpu" or layer.fastlora_backend == "triton"
    return weight if reads and _dtype(layer, weight).itemsize == 2 else None


def _groups(layers: Iterable[Any]) -> Iterator[list[tuple[Any, NF4Weight]]]:
    """Layers with their weights, those together that compute together, in the order in which they are stacked."""
    seen: set[int] = set()
    for layer in layers:
        if id(layer) in seen or not isinstance(layer, Fused):
            continue
        shared = getattr(layer, "fastlora_group", None)
        members = [layer] if shared is None else shared.layers
        seen.update(map(id, members))
        found = [(member, weight) for member in members if (weight := _packed(member)) is not None]
        if len(found) == len(members) and len({(w.shape[1], w.device, w.dtype) for _, w in found}) == 1:
            yield found
        else:
            yield from ([pair] for pair in found)


def keep(layers: Iterable[Any], gib: float) -> Copies:
    """Decode the packed weights of fused layers once, in their order, as far as they fit in ``gib`` GiB; all for inf.

    Raises torch.OutOfMemoryError, with none kept, where the device has less memory.
    """
    groups = list(_groups(layers))
    packed = [weight for group in groups for _, weight in group]
    taken, count = 0, 0
    try:
        for group in groups:
            weights, dtype = [weight for _, weight in group], _dtype(*group[0])
            nbytes = sum(weight.numel() for weight in weights) * dtype.itemsize
            if taken + nbytes > gib * GIB:
                continue
            if weights[0].device.type == "meta":
                rows = sum(weight.shape[0] for weight in weights)
                buffer = torch.empty(rows, weights[0].shape[1], dtype=dtype, device="meta")
            else:
                buffer = backends.multiplier(weights, dtype)
            decoded.keep(weights, buffer)
            taken, count = taken + nbytes, count + len(group)
    except torch.OutOfMemoryError:
        decoded.drop(packed)
        raise
    return Copies(count, len(packed), taken)


def drop(layers: Iterable[Any]) -> None:
    """Undo `keep`, whatever the layers have become since."""
    if not decoded.held():
        return
    for layer in layers:
        with contextlib.suppress(ValueError, AttributeError):
            if isinstance(weight := layer_weight(layer), NF4Weight):
                decoded.drop([weight])
