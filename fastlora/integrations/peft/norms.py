"""The root mean square norms of a model by one kernel each way.

A norm is found by what it has, one weight and an epsilon, and by what the forward of its class computes, which is tried
once for each class on numbers, in 32 and in 16 bits. What `fastlora.norm` does not compute (other devices and types,
compilation) its own forward does, or the one that Liger gave it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import torch
from torch import nn

from fastlora import norm
from fastlora.integrations.peft.report import BlockReport

NARROWEST = 512
"""Columns of a weight from which on a program for each row is worth it: not those of one head."""
_EPSILONS = {"variance_epsilon": 0.125, "eps": 0.0625}
"""Names that norms have for it, and values that tell which of them a forward reads."""
_ALIKE = 0.99
"""Part of the elements that must be the same to the bit in 16 bits: sums may be of another order."""
_REPLACED = "fastlora_replaced"
"""Where a converted norm keeps the forward that Liger gave the instance."""


@dataclasses.dataclass(frozen=True)
class Formula:
    """What a class of norms computes."""

    offset: int
    """What is added to the weight."""
    rounded: bool
    """Whether the normalized x is rounded before it is multiplied."""
    epsilon: str
    """The attribute."""


class FusedNorm:
    """The forward of a converted norm. Expects to stand before the norm's own class."""

    stock: type
    """The class that `separate` gives back."""
    fastlora_formula: Formula

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if not (args or kwargs) and weight is not None and norm.unsupported(x, weight) is None:
            formula = self.fastlora_formula
            eps = getattr(self, formula.epsilon)
            return norm.rms_norm(x, weight, eps, offset=formula.offset, rounded=formula.rounded)
        replaced = self.__dict__.get(_REPLACED)
        if replaced is not None:
            return replaced(self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Its class is made at run time: a copy or a pickle names the one it was made from.
        return _empty, (self.stock,), self.__dict__.copy()


@functools.cache
def _fused_norm(stock: type) -> type:
    formula = formula_of(stock)
    assert isinstance(formula, Formula)
    fields = {"stock": stock, "fastlora_formula": formula, "__module__": stock.__module__}
    return type(f"Fast{stock.__name__}", (FusedNorm, stock), fields)


def _empty(stock: type) -> Any:
    kind: Any = _fused_norm(stock)
    return kind.__new__(kind)


@functools.cache
def formula_of(kind: Any) -> Formula | str:
    """What ``kind.forward`` computes, or why it is no root mean square norm.

    It is run on an instance that has a weight and an epsilon, whichever name it has, and nothing else.
    """
    x = torch.linspace(-3, 40, 4096).sin().view(8, 512) * torch.linspace(0.25, 2, 8).view(8, 1)
    weight = torch.linspace(0, 9, 512).cos()
    other = f"the forward of {kind.__name__} computes something else"
    try:
        wide, narrow = (_tried(kind, x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    except Exception as error:  # whatever it raises, it needs more than the formula has
        return f"the forward of {kind.__name__} is another: {error}"
    if not all(isinstance(y, torch.Tensor) and y.shape == x.shape for y in (wide, narrow)):
        return other
    for epsilon, eps in _EPSILONS.items():
        for offset in (0, 1):
            if torch.allclose(wide, _plain(x, eps) * (offset + weight), rtol=1e-5, atol=1e-6):
                rounded = _rounded(x.bfloat16(), weight.bfloat16(), eps, offset, narrow)
                return f"{other} in 16 bits" if rounded is None else Formula(offset, rounded, epsilon)
    return other


def _tried(kind: Any, x: torch.Tensor, weight: torch.Tensor) -> Any:
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.weight = nn.Parameter(weight, requires_grad=False)
    for name, eps in _EPSILONS.items():
        setattr(made, name, eps)
    with torch.no_grad():
        return made.forward(x)


def _plain(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The normalized x, in float32."""
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def _rounded(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: int, y: torch.Tensor) -> bool | None:
    """Whether y was made of the rounded n; None where it was made in another way."""
    n = _plain(x, eps)
    made = {
        True: n.to(x.dtype) * (offset + weight),
        False: (n * (offset + weight.float())).to(x.dtype),
    }
    alike = {rounded: float((y == z).float().mean()) for rounded, z in made.items()}
    best = max(alike, key=lambda rounded: alike[rounded])
    return best if y.dtype == x.dtype and alike[best] >= _ALIKE else None


def convert(model: nn.Module) -> list[BlockReport]:
    """Convert the norms of ``model``. Returns what was found, by the modules that hold them, and why not."""
    found: dict[tuple[str, str | None], list[str]] = {}
    for name, module in model.named_modules():
        if _is_candidate(module):
            holder, _, own_name = name.rpartition(".")
            found.setdefault((holder, _convert(module)), []).append(own_name)
    return [BlockReport(holder, "norms", tuple(names), reason) for (holder, reason), names in found.items()]


def _is_candidate(module: nn.Module) -> bool:
    parameters = {name: t for name, t in module._parameters.items() if t is not None}
    if set(parameters) != {"weight"} or module._modules or module._buffers:
        return False
    return parameters["weight"].dim() == 1 and any(isinstance(getattr(module, eps, None), float) for eps in _EPSILONS)


def _convert(module: nn.Module) -> str | None:
    forward = module.__dict__.get("forward")
    if forward is not None and not _is_ligers(forward, module):
        return "its forward is replaced on the instance"
    kind: Any = type(module)
    formula = formula_of(kind)
    if isinstance(formula, str):
        return formula
    weight: Any = module._parameters["weight"]
    if weight.shape[0] < NARROWEST:
        return f"rows of {weight.shape[0]} columns are too short for its kernel"
    module.__class__ = _fused_norm(kind)
    own(module)
    # Only its sizes, its type and its device count.
    return norm.unsupported(weight.detach(), weight)


def _is_ligers(forward: Any, module: nn.Module) -> bool:
    ours = isinstance(forward, types.MethodType) and forward.__self__ is module
    return ours and str(getattr(forward, "__module__", "")).startswith("liger_kernel")


def own(model: nn.Module) -> None:
    """Have converted norms compute themselves where Liger gave the instance a forward of its own."""
    for module in model.modules():
        if isinstance(module, FusedNorm) and _is_ligers(module.__dict__.get("forward"), module):
            module.__dict__[_REPLACED] = module.__dict__.pop("forward").__func__


def separate(model: nn.Module) -> None:
    """Undo `convert` and `own`."""
    for module in model.modules():
        if isinstance(module, FusedNorm):
            replaced = module.__dict__.pop(_REPLACED, None)
            module.__class__ = module.stock
            if replaced is not None:
                module.__dict__["forward"] = types.MethodType(replaced, module)


__all__ = ["FusedNorm", "convert", "formula_of", "own", "separate"]
