"""Layers that are computed together: projections that share their input, and gated MLPs.

Both are found by what modules have, not by what they are called: the names of their layers, and for an MLP that its
forward computes ``down(act(gate(x)) * up(x))``, which is tried once for each class on numbers. In any situation that
the fused nodes do not compute (several adapters, DoRA, dropout in training, hooks on a layer, compilation) each layer
computes for itself, as without blocks.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastlora import activation as activations
from fastlora import blocks, ops, tables
from fastlora.blocks import Projection
from fastlora.integrations.converted import REPLACED, Converted, become, make_class, replaced, while_converted
from fastlora.integrations.peft.layers import SLOT, Fused, forget
from fastlora.integrations.peft.report import BlockReport
from fastlora.integrations.peft.situation import _intact, situation
from fastlora.linear import adapter_forward, compute_type
from fastlora.nf4 import version

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names under which one module keeps projections of one x."""
JOINT = ("qkv_proj", "gate_up_proj")
"""Names of projections that are one layer already."""
_OTHER_INPUTS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Parameters by which an attention's forward takes a second input."""
_MANY_TOKENS = 8192
"""The report says whether a group computes together for so many tokens; for fewer it may leave them to its layers."""
_MISSES = 3
"""Times in a row that a result is not asked for until a group gives up."""


def _projection(layer: Any) -> str | Projection:
    """What the layer computes at the moment, or why it is not one plain adapter without dropout."""
    if not isinstance(layer, Fused):
        return f"it is a {type(layer).__name__}"
    state: Any = layer
    if state._disable_adapters:
        return "its adapters are disabled"
    if state.merged_adapters:
        return "its adapters are merged"
    if reason := _intact(state):
        return reason
    found = situation(state)
    if isinstance(found, str):
        return found
    run, adapter, weight = found
    if run is not adapter_forward:
        return "it has more than one plain adapter"
    modules = state._modules
    dropout = modules["lora_dropout"]._modules[adapter]
    if dropout.training and isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return "it has dropout, whose mask is each layer's own"
    a, b = modules["lora_A"]._modules[adapter], modules["lora_B"]._modules[adapter]
    # `_parameters`: as attributes, but without a module's search.
    return Projection(
        weight,
        a._parameters["weight"],
        b._parameters["weight"],
        modules["base_layer"].bias,
        state.scaling[adapter],
    )


def _projections(layers: Sequence[Any]) -> str | list[Projection]:
    made = []
    for layer in layers:
        found = _projection(layer)
        if isinstance(found, str):
            return found
        made.append(found)
    return made


def _same(new: Projection, old: Projection) -> bool:
    same = new.w is old.w and new.lora_a is old.lora_a and new.lora_b is old.lora_b and new.bias is old.bias
    return same and new.scale == old.scale


def _versions(p: Projection) -> tuple[int, ...]:
    return tuple(version(t) for t in (p.lora_a, p.lora_b, p.bias))


def _mode(x: torch.Tensor) -> tuple[Any, ...]:
    """What decides, beside the arguments, what a call returns."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), cast


def _typed(layers: Sequence[Any], projections: Sequence[Projection], x: torch.Tensor) -> Any:
    """(x in the type to compute in, wider type to write, type to return), or None where the layers do not agree."""
    first = compute_type(layers[0]._modules["base_layer"], projections[0].w, x)
    none = x.new_empty(0)
    for layer, p in zip(layers[1:], projections[1:], strict=True):
        found = compute_type(layer._modules["base_layer"], p.w, none)
        if (found[0].dtype, *found[1:]) != (first[0].dtype, *first[1:]):
            return None
    return first


class _Results:
    """What a group computed for one x and its other layers have not asked for yet."""

    def __init__(self, group: SharedInput, x: torch.Tensor) -> None:
        self.group, self.x, self.version, self.mode = group, weakref.ref(x), x._version, _mode(x)
        self.waiting: dict[int, tuple[torch.Tensor, Projection, tuple[int, ...]]] = {}
        self.refused: set[int] = set()
        """Layers that are to compute for themselves."""

    def of(self, group: SharedInput, x: torch.Tensor) -> bool:
        return self.group is group and self.x() is x and self.version == x._version and self.mode == _mode(x)


class SharedInput:
    """Layers of one module that are called one after the other with one x.

    The first that is called computes for all; each of the others takes its result if nothing that it depends on has
    changed in between.
    """

    def __init__(self, layers: Sequence[Any], apart: Sequence[int] = ()) -> None:
        self.layers, self.apart = list(layers), tuple(apart)
        self.given_up = False
        self._misses = 0
        self._stacks: dict[Any, bool] = {}

    def missed(self) -> None:
        """A result was computed in vain."""
        self._misses += 1
        self.given_up = self._misses >= _MISSES

    def __call__(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's result for x, or None where it is to compute it itself."""
        if self.given_up or x.is_inference() or x.dim() < 2:
            return None
        results = SLOT.results
        if results is not None and results.of(self, x):
            if id(layer) in results.refused:
                return None
            if id(layer) in results.waiting:
                return self._take(results, layer)
        forget()
        return self._compute(layer, x)

    def _take(self, results: _Results, layer: Any) -> torch.Tensor | None:
        y, before, versions = results.waiting.pop(id(layer))
        if not results.waiting:
            SLOT.results, self._misses = None, 0
        now = _projection(layer)
        if isinstance(now, str) or not _same(now, before) or _versions(now) != versions:
            return None
        return y

    def _compute(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        if not any(member is layer for member in self.layers) or len(self.layers) < 2:
            return None
        key = (
            x.shape.numel() // max(x.shape[-1], 1),
            x.dtype,
            _mode(x)[1],
            layer.fastlora_backend,
            tables.captured(),
        )
        if self._stacks.get(key) is False:
            return None
        results = _Results(self, x)
        projections = _projections(self.layers)
        typed = None if isinstance(projections, str) else _typed(self.layers, projections, x)
        if isinstance(projections, str) or typed is None or x.shape[-1] != projections[0].w.shape[1]:
            results.refused = {id(member) for member in self.layers}
            SLOT.results = results
            return None
        computed, wide, dtype = typed
        if key not in self._stacks:
            if len(self._stacks) >= 64:
                self._stacks.clear()
            self._stacks[key] = blocks.stacks(computed, projections, layer.fastlora_backend)
            if not self._stacks[key]:
                return None
        ys = blocks.lora_linears(
            computed, projections, out_dtype=wide, backend=layer.fastlora_backend, apart=self.apart
        )
        mine = None
        for member, y, p in zip(self.layers, ys, projections, strict=True):
            if member is layer:
                mine = y.to(dtype)
            else:
                results.waiting[id(member)] = (y.to(dtype), p, _versions(p))
        SLOT.results = results
        return mine


class FusedMLP(Converted):
    """The forward of a converted MLP."""

    @while_converted
    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and not kwargs:  # x has another name in every model
            found = _mlp(self)
            if not isinstance(found, str):
                (x,) = args
                layers, projections, activation = found
                typed = _typed(layers, projections, x) if x.dim() and x.is_floating_point() else None
                if typed is not None and typed[0].shape[-1] == projections[0].w.shape[1]:
                    computed, wide, dtype = typed
                    *inner, down = projections
                    backend = layers[0].fastlora_backend
                    if not ops.must_dispatch(x):
                        forget()
                    y = blocks.gated_mlp(computed, inner, down, activation, out_dtype=wide, backend=backend)
                    return y.to(dtype)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _fused_mlp(stock: type) -> type:
    return make_class(FusedMLP, stock, (_fused_mlp, stock))


_MLP_NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
_ACTIVATION_NAMES = ("act_fn", "activation_fn")


def _mlp_layers(module: nn.Module) -> list[Any] | None:
    """gate, up and down, or the joint projection and down, where a module has layers of these names."""
    for names in _MLP_NAMES:
        layers = [module._modules.get(name) for name in names]
        if all(layer is not None for layer in layers):
            return layers
    return None


def _mlp(module: Any) -> str | tuple[list[Any], list[Projection], str]:
    """What a converted MLP computes at the moment, or why its own forward runs."""
    layers = _mlp_layers(module)
    if layers is None:
        return "its layers are gone"
    kind = _activation(module)
    if kind not in activations.ACTIVATIONS:
        return kind
    if len({layer.fastlora_backend for layer in layers if isinstance(layer, Fused)}) > 1:
        return "its layers have different backends"
    found = _projections(layers)
    return found if isinstance(found, str) else (layers, found, kind)


def _activation(module: nn.Module) -> str:
    """The activation's name, or why it has none."""
    for name in _ACTIVATION_NAMES:
        act = getattr(module, name, None)
        if act is None:
            continue
        if isinstance(act, nn.Module):
            if reason := _intact(act):
                return f"{name}: {reason}"
            if next(act.parameters(), None) is not None:
                return f"its activation, a {type(act).__name__}, has parameters"
            known = act.__dict__.get("fastlora_activation")
            if known is None:
                known = act.__dict__["fastlora_activation"] = _recognize(act)
            return known
        return _recognize(act)
    return "it has no activation"


def _recognize(act: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The activation that a function is, by its values."""
    x = torch.linspace(-8, 8, 641, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = act(x)
    except Exception as error:  # whatever it raises, it is not one that is known
        return f"its activation raises {type(error).__name__}"
    if isinstance(y, torch.Tensor) and y.shape == x.shape:
        for name in activations.ACTIVATIONS:
            if torch.allclose(y.double(), activations.activate(x, name), rtol=1e-9, atol=1e-12):
                return name
    return f"its activation is a {type(act).__name__}"


@functools.cache
def _computes_gated_mlp(kind: type) -> str | None:
    """None when ``kind.forward`` is ``down(act(gate(x)) * up(x))`` or its joint form, else why it is not.

    It is run on a stand-in that has nothing but the layers and the activation, with functions that no other order
    and no further step would give the same result with.
    """
    x = torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu").view(2, 4)

    def gate(t: torch.Tensor) -> torch.Tensor:
        return t * 1.5 + 0.25

    def up(t: torch.Tensor) -> torch.Tensor:
        return t.flip(-1) - 0.75

    def down(t: torch.Tensor) -> torch.Tensor:
        return t.cumsum(-1) * 0.5 + 0.125

    def both(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((gate(t), up(t)), -1)

    act = torch.sin
    layers = {"gate_proj": gate, "up_proj": up, "gate_up_proj": both, "down_proj": down}
    stand_in = types.SimpleNamespace(**layers, **dict.fromkeys(_ACTIVATION_NAMES, act))
    forward: Any = kind.forward  # type: ignore[attr-defined]
    try:
        y = forward(stand_in, x)
    except Exception as error:  # whatever it raises, it needs more than the formula has
        return f"the forward of {kind.__name__} is another: {error}"
    if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, down(act(gate(x)) * up(x)), rtol=1e-12):
        return None
    return f"the forward of {kind.__name__} computes something else"


def _mlp_class_reason(module: nn.Module) -> str | None:
    if replaced(module):
        return REPLACED
    kind: Any = type(module)
    return _computes_gated_mlp(kind)


def _shared_reason(module: nn.Module) -> str | None:
    """Why the projections of a module may not share their input."""
    parameters = inspect.signature(type(module).forward).parameters
    other = next((name for name in _OTHER_INPUTS if name in parameters), None)
    return None if other is None else f"the forward of {type(module).__name__} also takes {other}"


def _first_reason(layers: dict[str, Any]) -> str | None:
    """Why the layers do not run together at the moment."""
    for name, layer in layers.items():
        if isinstance(found := _projection(layer), str):
            return f"{name}: {found}"
    return None


def _stacking_reason(shared: SharedInput) -> str | None:
    """Why a group would leave a large batch to its layers, all of which can run together at the moment."""
    projections = _projections(shared.layers)
    assert not isinstance(projections, str)
    w, base = projections[0].w, shared.layers[0]._modules["base_layer"]
    dtype = getattr(base, "compute_dtype", None) or w.dtype
    # Only its sizes and its type count.
    x = torch.empty(1, dtype=dtype, device=w.device).expand(_MANY_TOKENS, w.shape[1])
    if blocks.stacks(x, projections, shared.layers[0].fastlora_backend):
        return None
    return f"stacking is not faster for {str(dtype).removeprefix('torch.')} on {w.device.type} here"


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if module._modules and not isinstance(module, Fused):
            yield name, module


def join(model: nn.Module, rotates: bool = False) -> list[BlockReport]:
    """Have the fused layers of ``model`` compute together where they can. Returns what was found, and why not.

    rotates: whether attention multiplies copies of q and k, rotated.
    """
    separate(model)
    reports: list[BlockReport] = []
    for name, module in _walk(model):
        if any(isinstance(layer, Fused) for layer in module._modules.values()):
            reports += _join(name, module, rotates)
    return reports


def _apart(module: nn.Module, names: Sequence[str]) -> tuple[int, ...]:
    """The place of v, which attention keeps for its backward pass beside rotated copies of q and k, where q and k are
    not kept themselves, by norms of theirs."""
    normed = any("norm" in name for name in module._modules)
    return (names.index("v_proj"),) if "v_proj" in names and not normed else ()


def _join(name: str, module: nn.Module, rotates: bool) -> Iterator[BlockReport]:
    mlp = _mlp_layers(module)
    converted = False
    if mlp is not None:
        names = next(names for names in _MLP_NAMES if names[0] in module._modules)
        present = dict(zip(names, mlp, strict=True))
        reason = next((f"{key} has no adapter" for key, layer in present.items() if not isinstance(layer, Fused)), None)
        reason = reason or _mlp_class_reason(module)
        if reason is None and (act := _activation(module)) not in activations.ACTIVATIONS:
            reason = act
        converted = reason is None
        if converted:
            kind: Any = type(module)
            become(module, _fused_mlp(kind))
            reason = _first_reason(present)
        yield BlockReport(name, "gated MLP", tuple(names), reason)
    for names in SHARED:
        present = {key: layer for key in names if isinstance(layer := module._modules.get(key), Fused)}
        if not present:
            continue
        if len(present) < 2:
            yield BlockReport(name, "shared input", tuple(present), "the others have no adapter")
            continue
        shared = SharedInput(list(present.values()), _apart(module, list(present)) if rotates else ())
        reason = _shared_reason(module)
        if len({layer.in_features for layer in shared.layers}) > 1:
            reason = "their inputs have different sizes"
        if len({layer.fastlora_backend for layer in shared.layers}) > 1:
            reason = "their backends differ"
        if reason is None:
            # In a converted MLP too: for the situations in which its own forward runs.
            for layer in shared.layers:
                layer.__dict__["fastlora_group"] = shared
            reason = _first_reason(present) or _stacking_reason(shared)
        if not converted:
            yield BlockReport(name, "shared input", tuple(present), reason)
    for joint in JOINT:
        if isinstance(module._modules.get(joint), Fused) and mlp is None:
            yield BlockReport(name, "shared input", (joint,), "it is one layer already")


def separate(model: nn.Module) -> None:
    """Undo `join`."""
    for module in model.modules():
        module.__dict__.pop("fastlora_group", None)
        if isinstance(module, FusedMLP):
            become(module, module.stock)
            for name in _ACTIVATION_NAMES:
                getattr(getattr(module, name, None), "__dict__", {}).pop("fastlora_activation", None)
