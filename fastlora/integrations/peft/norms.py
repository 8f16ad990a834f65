"""The norms of a model, and the residual stream of its decoder layers: sums and norms in one node each, see
`fastlora.norm`.

A layer is recognized by what its forward computes, run once on a stand-in, and a norm by its values; then the layer's
forward is written down again with the sum and the norm as one step, and norms outside of such steps take a class of
their own. Where the kernels do not take the operands of a call, the same is computed as the model does: by PyTorch's
sum and the norm's own forward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from fastlora import norm
from fastlora.integrations.converted import (
    REPLACED,
    Converted,
    become,
    does_more,
    make_class,
    replaced,
    while_converted,
)
from fastlora.integrations.peft.liger import is_ligers
from fastlora.integrations.peft.report import BlockReport

ATTENTION, MLP = "self_attn", "mlp"
_FIRST = "input_layernorm"
_NORMS = (
    (None, "post_attention_layernorm", None),
    ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
"""The fields of a `Layout` that name norms."""
_DROPOUTS = ("resid_attn_dropout", "resid_mlp_dropout")
"""What some layers do to a branch before they add it, which is nothing where p is 0."""
_EPS = ("variance_epsilon", "eps")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a class of layers does beside its attention and its MLP, each after a norm and added to what came before."""

    after: str | None
    """The norm behind the attention."""
    second: str
    """The norm before the MLP."""
    last: str | None
    """The norm behind the MLP."""
    defaults: dict[str, Any]
    """What the attention is handed where nothing is given."""


class FusedResidual(Converted):
    """The forward of a converted decoder layer."""

    layout: Layout
    added = staticmethod(norm.added)

    @while_converted
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not _plain(self):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        layout, modules = self.layout, self._modules
        residual, x = _step(self, modules[_FIRST], hidden_states, None)
        x = modules[ATTENTION](hidden_states=x, **{**layout.defaults, **kwargs})[0]
        x = x if layout.after is None else modules[layout.after](x)
        residual, x = _step(self, modules[layout.second], x, residual)
        x = modules[MLP](x)
        return residual + (x if layout.last is None else modules[layout.last](x))


class FusedNorm(Converted):
    """The forward of a norm that no `FusedResidual` computes: the last one, and those of q and k."""

    formula: tuple[float, str]
    added = staticmethod(norm.added)

    @while_converted
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            offset, eps = self.formula
            found = self.added(args[0], self._parameters["weight"], getattr(self, eps), offset, None)
            if found is not None:
                return found[1]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _plain(layer: Any) -> bool:
    """Whether a layer adds its branches as they are."""
    dropouts = (layer._modules.get(name) for name in _DROPOUTS)
    return not any(dropout is not None and dropout.training and dropout.p for dropout in dropouts)


def _step(layer: Any, module: Any, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """residual + x, and its norm."""
    formula = None if torch.compiler.is_compiling() else _formula_of(module)
    if formula is not None:
        offset, eps = formula
        found: tuple[torch.Tensor, torch.Tensor] | None = layer.added(
            x, module._parameters["weight"], getattr(module, eps), offset, residual
        )
        if found is not None:
            return found
    if residual is not None:
        x = residual + x
    return x, module(x)


def _formula_of(module: Any) -> tuple[float, str] | None:
    """The offset of a norm's weight and the name of its epsilon, where nothing but the formula is computed."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if does_more(module) and not is_ligers(module.__dict__["forward"]):
        return None
    kind = type(module)
    if is_ligers(kind):
        # A model that was built after Liger replaced its classes. They run on GPUs only, and say what they compute.
        told = module.__dict__.keys() >= {"offset", "casting_mode", _EPS[0]}
        return (module.offset, _EPS[0]) if told and module._parameters.get("weight") is not None else None
    if kind not in _formulas:
        _formulas[kind] = _recognize_norm(module)
    return _formulas[kind]


_formulas: dict[type, tuple[float, str] | None] = {}


def _recognize_norm(module: Any) -> tuple[float, str] | None:
    """Which formula the class of a norm computes, by its values."""
    if set(module._parameters) != {"weight"} or module._modules or module._buffers:
        return None
    w = torch.linspace(-1, 2, 6, dtype=torch.float32, device="cpu")
    x = torch.linspace(-3, 4, 24, dtype=torch.float32, device="cpu").view(4, 6).sin()
    for eps in _EPS:
        if eps not in module.__dict__:
            continue
        probe = copy.copy(module)
        probe.__dict__ = {**module.__dict__, **dict.fromkeys(_EPS, 0.0), eps: 0.5}
        probe.__dict__["_parameters"] = {"weight": nn.Parameter(w, requires_grad=False)}
        try:
            y: Any = type(module).forward(probe, x)
        except Exception:  # whatever it raises, it needs more than the formula has
            continue
        for offset in (0.0, 1.0):
            truth = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 0.5) * (offset + w)
            if isinstance(y, torch.Tensor) and y.shape == truth.shape and torch.allclose(y, truth, rtol=1e-5):
                return offset, eps
    return None


class _Attention:
    """That of a stand-in, which tells what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __call__(self, *, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        self.given = kwargs
        return (hidden_states * 1.3).cos(), None


def _recognize(kind: Any) -> str | Layout:
    """The layout of a class of layers, or why it is not a known one."""
    parameters = inspect.signature(kind.forward).parameters
    if list(parameters)[:2] != ["self", "hidden_states"]:
        return f"the forward of {kind.__name__} takes other arguments"
    named = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD][2:]
    anything = ["anything"] if len(named) + 2 < len(parameters) else []
    given = {name: object() for name in (*named, *anything)}
    x = torch.linspace(-1, 2, 12, dtype=torch.float64, device="cpu").view(1, 2, 6)
    reason = f"the forward of {kind.__name__} is another"
    for after, second, last in _NORMS:
        names = (_FIRST, after, second, last)
        norms = {name: functools.partial(_stand_in_norm, i) for i, name in enumerate(names) if name}
        attention = _Attention()
        # transformers wraps the forward of a layer by one that asks whether to checkpoint it.
        state = {"forward": kind.forward, "training": False, "gradient_checkpointing": False}
        stand_in = type(kind.__name__, (), state)()
        vars(stand_in).update(norms, **{ATTENTION: attention, MLP: torch.tanh}, **dict.fromkeys(_DROPOUTS, _same))
        try:
            outs: list[Any] = [kind.forward(stand_in, x)]
            defaults = attention.given
            outs.append(kind.forward(stand_in, hidden_states=x, **given))
        except Exception as error:  # whatever it raises, it needs more than the formula has
            reason = f"the forward of {kind.__name__} is another: {error}"
            continue
        if attention.given != given:
            return f"the forward of {kind.__name__} changes what it hands its attention"
        first, behind, before, end = (norms.get(name or "", _same) for name in names)
        h = x + behind(attention(hidden_states=first(x))[0])
        truth = h + end(torch.tanh(before(h)))
        if all(isinstance(out, torch.Tensor) and torch.equal(out, truth) for out in outs):
            return Layout(after, second, last, defaults)
    return reason


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


def _stand_in_norm(number: int, t: torch.Tensor) -> torch.Tensor:
    return (t * number + 0.1).sin()


@functools.cache
def _fused(stock: Any) -> str | type:
    """The class that takes a class's place, or why there is none."""
    layout = _recognize(stock)
    if isinstance(layout, str):
        return layout
    return make_class(FusedResidual, stock, (_fused, stock), layout=layout)


def _reason(layer: Any, kind: Any) -> str | None:
    """Why a layer's forward stays as it is, or None."""
    if replaced(layer):
        return REPLACED
    if isinstance(kind, str):
        return kind
    for name in (_FIRST, kind.layout.second):
        if _formula_of(layer._modules[name]) is None:
            return f"{name} is no root mean square norm, or has hooks"
    return None


@functools.cache
def _fused_norm(stock: Any, formula: tuple[float, str]) -> type:
    """The class that takes the place of a norm's."""
    return make_class(FusedNorm, stock, (_fused_norm, stock, formula), formula=formula)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if {ATTENTION, MLP, _FIRST} <= module._modules.keys():
            yield name, module


def fuse(model: nn.Module) -> Iterator[BlockReport]:
    """Have the decoder layers of a model add and normalize in one step where they can, and compute its other norms by
    the same kernels. Tells what became of each layer, and which other norms there are."""
    for name, layer in _layers(model):
        stock: Any = type(layer)
        kind: Any = stock if issubclass(stock, FusedResidual) else _fused(stock)
        reason = _reason(layer, kind)
        if reason is None:
            become(layer, kind)
        second = "post_attention_layernorm" if isinstance(kind, str) else kind.layout.second
        yield BlockReport(name, "residual and norm", (_FIRST, second), reason)
    for name, module in model.named_modules():
        stepped = (_FIRST, module.layout.second) if isinstance(module, FusedResidual) else ()
        rest = {child: m for child, m in module._modules.items() if child not in stepped and _fuse_norm(m)}
        if rest:
            yield BlockReport(name, "norm", tuple(rest), None)


def _fuse_norm(module: Any) -> bool:
    """Convert a module if it is a norm that this can compute, and say whether it is one."""
    if isinstance(module, FusedNorm):
        return True
    # Liger's are one kernel each, too. What is replaced on an instance has to run.
    if module is None or is_ligers(type(module)) or does_more(module):
        return False
    formula, kind = _formula_of(module), cast(Any, type(module))
    if formula is not None:
        become(module, _fused_norm(kind, formula))
    return formula is not None


def undo(model: nn.Module) -> None:
    """Take back what `fuse` did, if it did anything, but where FSDP has made a class of its own from it."""
    for module in model.modules():
        kind: Any = type(module)
        if isinstance(module, FusedResidual | FusedNorm) and kind is kind.made[0](*kind.made[1:]):
            become(module, kind.stock)
