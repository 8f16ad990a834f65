"""The rotary embedding of q and k in one pass over wherever they lie, see `fastlora.rotary`.

transformers' models call a function of their module for it. That function is replaced while a model of the module wants
it. What tells a call of this model from one of another is its cosines, which its own module makes and marks, and that
q and k are views of one buffer, as projections leave them that compute together.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora import rotary
from fastlora.integrations.converted import Converted, become, does_more, make_class, while_converted
from fastlora.integrations.inner import inner_model
from fastlora.integrations.peft.liger import is_ligers

FUNCTION = "apply_rotary_pos_emb"
MODULE = "rotary_emb"
"""The name of what makes the cosines and sines."""
_ORIGINAL, _MARK = "fastlora_original", "fastlora_mark"


class Marked(Converted):
    """The forward of what makes the cosines of a model whose q and k are to be rotated here."""

    @while_converted
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, tuple) and not torch.compiler.is_compiling():
            setattr(out[0], _MARK, True)
        return out


@functools.cache
def _marked(stock: Any) -> type:
    """The class that takes the place of one's whose cosines are to be marked."""
    return make_class(Marked, stock, (_marked, stock))


_users: dict[str, weakref.WeakSet[nn.Module]] = {}
"""The models that want the function of a module of transformers replaced."""


def _library(model: Any) -> Any:
    """The module that the transformers model inside of a PEFT model comes from; None for a class made elsewhere."""
    return sys.modules.get(type(inner_model(model)).__module__)


@functools.cache
def _recognize(function: Callable[..., Any]) -> str | None:
    """None where a function rotates the halves of q and k, by its values; else why it does not."""
    if is_ligers(function):
        return None  # which takes the place of one that does, and runs on GPUs only
    try:
        first = list(inspect.signature(function).parameters.values())[:5]
        if [p.name for p in first] != ["q", "k", "cos", "sin", "unsqueeze_dim"] or first[4].default != 1:
            return f"{FUNCTION} takes other arguments"
        x = torch.linspace(-2, 2, 48, dtype=torch.float64, device="cpu").view(1, 2, 4, 6).sin()
        q, k, cos, sin = (x * i for i in (1, 2, 3, 4))
        found = function(q, k, cos[:, 0], sin[:, 0])
    except Exception as error:  # whatever it raises, it needs more than the formula has
        return f"{FUNCTION} is another: {error}"
    for t, y in zip((q, k), found, strict=True):
        low, high = t.chunk(2, -1)
        turned = torch.cat((-high, low), -1)
        if y.shape != t.shape or not torch.allclose(y, t * cos[:, :1] + turned * sin[:, :1], rtol=1e-12):
            return f"{FUNCTION} computes something else"
    return None


def _replacement(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        found = None
        if not (torch.compiler.is_compiling() or args or kwargs or q.dim() != 4):
            mine = getattr(cos, _MARK, False) or not q.transpose(1, 2).is_contiguous()
            found = rotary.rotated(q, k, cos, sin) if mine else None
        return original(q, k, cos, sin, *args, **kwargs) if found is None else found

    setattr(apply, _ORIGINAL, original)
    return apply


def _makers(model: nn.Module) -> list[Any]:
    """What makes the cosines and sines of a model."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] == MODULE]


def rotates(model: nn.Module) -> bool:
    """Whether a model has a rotary embedding."""
    return bool(_makers(model))


def reason(model: nn.Module) -> str | None:
    """Why the rotary embedding of a model stays as it is, or None."""
    library = _library(model)
    function = getattr(library, FUNCTION, None)
    if function is None:
        return f"{getattr(library, '__name__', 'its module')} has no {FUNCTION}"
    return _recognize(getattr(function, _ORIGINAL, function))


def apply(model: nn.Module) -> None:
    """Replace the function for a model whose `reason` is None. Calling it again is harmless."""
    library = _library(model)
    _users.setdefault(library.__name__, weakref.WeakSet()).add(model)
    for module in _makers(model):
        if not isinstance(module, Marked) and not does_more(module):
            kind: Any = type(module)
            become(module, _marked(kind))
    _settle(library)


def undo(model: nn.Module) -> None:
    """Take back what `apply` did, if it did anything, unless another model wants it."""
    library = _library(model)
    if library is not None:
        _users.get(library.__name__, weakref.WeakSet()).discard(model)
        _settle(library)
    for module in _makers(model):
        if isinstance(module, Marked) and type(module) is _marked(module.stock):
            become(module, module.stock)


def _settle(library: Any) -> None:
    function: Any = getattr(library, FUNCTION, None)
    original = getattr(function, _ORIGINAL, None)
    wanted = bool(_users.get(library.__name__))
    if wanted and original is None:
        setattr(library, FUNCTION, _replacement(function))
    elif not wanted and original is not None:
        setattr(library, FUNCTION, original)
