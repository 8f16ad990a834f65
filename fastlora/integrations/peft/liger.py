"""Liger kernels for what is not a linear layer: norms, the rotary embedding, and the cross-entropy with its logits.

Through Liger's public function for the model's type. It changes the norms and the forward of the model at hand, and
for every model of that type in the process which function applies the rotary embedding; `undo` takes all of it back.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastlora.integrations.inner import inner_model

_ABSENT = object()
_RECORD = "fastlora_liger"
_OWN_MLP = ("swiglu", "geglu")
"""What Liger would do to the MLP, whose layers are fused here."""
LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""What asks the device how many labels count, which a CUDA graph cannot."""

_applied: dict[str, tuple[int, dict[str, Any]]] = {}
"""For each changed module of transformers: how many models are as Liger left them, and what its names meant before."""


def is_ligers(what: Any) -> bool:
    """Whether Liger defines a function or a class."""
    return getattr(what, "__module__", "").startswith("liger_kernel.")


def _function(model: Any) -> Callable[..., None]:
    kind = getattr(getattr(inner_model(model), "config", None), "model_type", None)
    if kind is None:
        raise ValueError("liger=True needs a transformers model: this one has no config.model_type")
    try:
        library = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise ImportError("liger=True needs Liger kernels: pip install 'fastlora-kernels[liger]'") from error
    try:
        function: Any = getattr(library, f"apply_liger_kernel_to_{kind}")
    except (AttributeError, ImportError):
        function = None
    if function is None or "model" not in inspect.signature(function).parameters:
        raise ValueError(f"Liger has no kernels for models of type {kind!r}; leave liger=False")
    return function


def check(model: nn.Module) -> None:
    """Raise ImportError where Liger is not installed, ValueError where it has no kernels for ``model``."""
    _function(model)


def apply(model: nn.Module, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Have Liger change ``model``, unless it has, ``without`` what is named; returns the names of what it replaced."""
    base, function = inner_model(model), _function(model)
    parameters = inspect.signature(function).parameters
    options = {name: False for name in (*_OWN_MLP, *without) if name in parameters}
    replaced = tuple(
        name
        for name, parameter in parameters.items()
        if name not in options and name != "model" and parameter.default is True
    )
    if _RECORD in base.__dict__:
        return replaced
    library = sys.modules[type(base).__module__]
    before, names = {id(m): (m, dict(m.__dict__)) for m in base.modules()}, dict(vars(library))
    function(model=base, **options)
    changes = []
    for module, old in before.values():
        new = module.__dict__
        changed = {key: old.get(key, _ABSENT) for key in new if old.get(key, _ABSENT) is not new[key]}
        if changed:
            changes.append((module, changed))
    base.__dict__[_RECORD] = (library.__name__, changes)
    meant = {key: names.get(key, _ABSENT) for key in vars(library) if names.get(key, _ABSENT) is not vars(library)[key]}
    count, first = _applied.get(library.__name__, (0, {}))
    _applied[library.__name__] = (count + 1, {**meant, **first})
    return replaced


def undo(model: nn.Module) -> None:
    """Take back what `apply` did, if it did anything."""
    base = inner_model(model)
    if _RECORD not in base.__dict__:
        return
    name, changes = base.__dict__.pop(_RECORD)
    for module, changed in changes:
        _restore(module.__dict__, changed)
    count, meant = _applied.pop(name, (1, {}))
    if count > 1:
        _applied[name] = (count - 1, meant)
    else:
        _restore(vars(sys.modules[name]), meant)


def _restore(namespace: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if value is _ABSENT:
            namespace.pop(key, None)
        else:
            namespace[key] = value
