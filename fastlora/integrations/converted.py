"""Modules that take another class: how they get it and lose it, and whose forward an instance runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_ACCELERATES = "accelerate.hooks"
REPLACED = "its forward is replaced on the instance"
"""Why a module is not computed, or not converted: see `does_more` and `replaced`."""


def become(module: Any, kind: type) -> None:
    """Give ``module`` another class. A forward of the class before that the instance kept makes way for the new one."""
    state, old = module.__dict__, type(module)
    kept = [name for name in ("forward", "_old_forward") if _is_of(state.get(name), module, old)]
    module.__class__ = kind
    for name in kept:
        state[name] = kind.forward.__get__(module)  # type: ignore[attr-defined]


def _is_of(forward: Any, module: Any, kind: Any) -> bool:
    """Whether ``forward`` is that of a class, bound to ``module``."""
    return getattr(forward, "__func__", None) is kind.forward and forward.__self__ is module


def replaced(module: Any) -> bool:
    """Whether an instance has a forward of its own that does not end in that of its class: accelerate's does, which
    moves tensors before and after it, and what accelerate leaves behind when it is taken away is that of the class."""
    state, kind = module.__dict__, type(module)
    if "forward" not in state or _is_of(state["forward"], module, kind):
        return False
    return not (_accelerates(state) and _is_of(state.get("_old_forward"), module, kind))


def does_more(module: Any) -> bool:
    """Whether a call of ``module`` does more than the forward of its class: as `replaced`, or because accelerate
    fetches its weights or sends its results elsewhere.

    Where accelerate only moves inputs to the device of the weights, as in a model that a ``device_map`` spreads over
    several, whoever has them there already can do without.
    """
    state = module.__dict__
    if "forward" not in state:
        return False
    if replaced(module):
        return True
    if not _accelerates(state):
        return False
    hook = state.get("_hf_hook")
    aligns = type(hook).__name__ == "AlignDevicesHook" and type(hook).__module__ == _ACCELERATES
    return not aligns or hook.offload or hook.io_same_device


def _accelerates(state: dict[str, Any]) -> bool:
    """Whether the forward of an instance is the one that accelerate gives it."""
    return getattr(getattr(state["forward"], "func", None), "__module__", None) == _ACCELERATES


def while_converted(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a converted class, for as long as a module has that class.

    A wrapper on an instance may keep the forward that it found and call it when the module has its own class again:
    then the forward of that one runs.
    """

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(type(self), "stock"):
            return forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    return checked


class Converted:
    """A class that `make_class` made. Stands before the class whose place it takes."""

    stock: type
    """The class whose place it takes, which a module gets back."""
    made: tuple[Any, ...]
    """The function that made it, and its arguments."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle names what its class is made of.
        return _empty, self.made, self.__dict__.copy()


def _empty(make: Callable[..., Any], *args: Any) -> Any:
    kind = make(*args)
    return kind.__new__(kind)


def make_class(base: type[Converted], stock: type, made: tuple[Any, ...], **fields: Any) -> type:
    """A subclass of ``base`` and ``stock`` with more ``fields``, for the function in ``made``, which keeps it.

    It has the name of ``stock``: trainers and wrapping policies look modules up by it.
    """
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (base, stock), {**names, "stock": stock, "made": made, **fields})
