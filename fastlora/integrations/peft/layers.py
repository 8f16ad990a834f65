"""The fused classes, and how a layer becomes one of them and returns."""

from __future__ import annotations

import abc
import threading
from typing import Any

import torch
from peft.tuners import lora

from fastlora import ops
from fastlora.integrations.converted import become, while_converted
from fastlora.integrations.peft.forward import mixed_forward
from fastlora.integrations.peft.situation import Situation, mixed_situation, situation

_CACHES = ("fastlora_weight", "fastlora_norms", "fastlora_share")


class _Slot(threading.local):
    """The results that a group of layers computed and some of them have not asked for yet: see ``blocks.py``.

    At most those of one group in a thread, and no longer than to the next call of a fused layer.
    """

    results: Any = None


SLOT = _Slot()


def forget() -> None:
    """Drop the results that nobody has asked for."""
    if (left := SLOT.results) is not None:
        SLOT.results = None
        if left.waiting:
            left.group.missed()


class _Named(abc.ABCMeta):
    """Messages of PEFT name the classes of layers; those of fused layers read as PEFT's own."""

    def __repr__(cls) -> str:
        return repr(cls.__dict__["stock"]) if "stock" in cls.__dict__ else super().__repr__()


class Fused(metaclass=_Named):
    """The forward that the converted classes share. Expects to stand before a PEFT layer class."""

    stock: type
    """The PEFT class that `revert` gives back."""
    fastlora_backend: str = "auto"

    @while_converted
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (args or self._disable_adapters or self.merged_adapters) and x.is_floating_point():
            if not kwargs or all(value is None for value in kwargs.values()):
                if not ops.must_dispatch(x):
                    if (group := self.__dict__.get("fastlora_group")) is None:
                        forget()
                    elif (y := group(self, x)) is not None:
                        return y
                found = situation(self)
                if not isinstance(found, str):
                    run, adapters, weight = found
                    return run(self, x, adapters, weight, self.fastlora_backend)
            elif (names := kwargs.get("adapter_names")) is not None and x.dim() > 1:
                rest = [value for name, value in kwargs.items() if name != "adapter_names"]
                mixed = "" if any(value is not None for value in rest) else mixed_situation(self, names)
                if not isinstance(mixed, str):
                    self._check_forward_args(x, adapter_names=names)
                    return mixed_forward(self, x, names, *mixed, self.fastlora_backend)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _get_name(self) -> str:
        return self.stock.__name__

    def extra_repr(self: Any) -> str:
        given = super().extra_repr()  # type: ignore[misc]
        return f"{given}{', ' if given else ''}fused, backend={self.fastlora_backend!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _CACHES}


class FusedMethod(Fused):
    """The same for methods other than LoRA, which say in `fastlora_situation` what `situation` says for LoRA."""

    def fastlora_situation(self) -> str | Situation:
        raise NotImplementedError

    @while_converted
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (args or kwargs or self._disable_adapters or self.merged_adapters) and x.is_floating_point():
            found = situation(self)
            if not isinstance(found, str):
                run, adapter, weight = found
                return run(self, x, adapter, weight, self.fastlora_backend)
        return super(Fused, self).forward(x, *args, **kwargs)  # type: ignore[misc]


class FastLinear(Fused, lora.Linear):
    """PEFT's ``lora.Linear`` with the fused forward."""

    stock = lora.Linear


FUSED: dict[type, type] = {lora.Linear: FastLinear}
"""The fused class of each PEFT class."""

# By this name, which imports lora.bnb at first use; there is no such name without bitsandbytes.
if hasattr(lora, "Linear4bit"):

    class FastLinear4bit(Fused, lora.Linear4bit):
        """PEFT's ``lora.bnb.Linear4bit`` with the fused forward."""

        stock = lora.Linear4bit

    FUSED[lora.Linear4bit] = FastLinear4bit


def convertible(layer: Any) -> bool:
    """Whether ``layer`` is of a PEFT class that has a fused one, or fused already."""
    return type(layer) in FUSED or isinstance(layer, Fused)


def convert(layer: Any, backend: str) -> None:
    """Give a `convertible` layer its fused class."""
    become(layer, FUSED.get(type(layer), type(layer)))
    layer.fastlora_backend = backend
    if getattr(layer.base_layer, "support_avx512bf16_for_cpu", False):
        # bitsandbytes would repack these bytes in place during the first forward in eval mode.
        layer.base_layer.support_avx512bf16_for_cpu = False
        layer.fastlora_repack = True


def revert(layer: Any) -> None:
    """Undo `convert`."""
    become(layer, layer.stock)
    for name in ("fastlora_backend", "fastlora_group", *_CACHES):
        layer.__dict__.pop(name, None)
    if layer.__dict__.pop("fastlora_repack", False):
        layer.base_layer.support_avx512bf16_for_cpu = True
