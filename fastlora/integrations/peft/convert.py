"""The ways in and out: a model that has its adapters, a configuration, all that PEFT makes in a ``with`` block."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from fastlora import backends
from fastlora.integrations import converted
from fastlora.integrations.peft import blocks as joint
from fastlora.integrations.peft import copies, norms, rotary
from fastlora.integrations.peft import liger as liger_kernels
from fastlora.integrations.peft import loss as losses
from fastlora.integrations.peft.layers import FUSED, Fused, FusedMethod, convert, convertible, revert
from fastlora.integrations.peft.report import BlockReport, Report, report_layer
from fastlora.integrations.peft.situation import Situation, situation


def _check_backend(backend: str) -> None:
    if backend not in ("auto", *backends.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(('auto', *backends.BACKENDS))}")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, VeraLayer)):
            yield name, module


def _situation(layer: Any) -> str | Situation:
    """`situation` of a layer whose class has a fused one, converted or not yet."""
    kind = FUSED.get(type(layer), type(layer))
    return kind.fastlora_situation(layer) if issubclass(kind, FusedMethod) else situation(layer)


def accelerate(
    model: nn.Module,
    backend: str = "auto",
    *,
    blocks: bool = False,
    liger: bool | str = False,
    loss: bool = False,
    decoded: float = 0.0,
) -> Report:
    """Turn every PEFT LoRA linear layer of ``model`` into a fused one, in place, sharing all its weights; so, too, the
    layers of VeRA and AdaLoRA.

    model: a PEFT model, or any module with such layers inside, on a bitsandbytes 4-bit or a dense base.
    backend: see `fastlora.lora_linear`. Calling it again (after other adapters were loaded, say) is harmless.
    blocks: let projections that share their input, gated MLPs, and sums with the norm behind them compute together, and
        norms and the rotary embedding in one pass each: see `fastlora.blocks`, `fastlora.norm` and `fastlora.rotary`.
    liger: have Liger kernels compute the norms, the rotary embedding and the cross-entropy of the model; "captured":
        all but the cross-entropy, which reads the number of labels on the host, so that a step can be a CUDA graph.
    loss: compute the cross-entropy of training some tokens at a time, as `fastlora.loss` does, instead of Liger's: the
        logits of all tokens never exist (an output has none), and nothing waits for the device.
    decoded: GiB of the device's memory to keep dense copies of packed weights in, layer after layer as far as they
        fit: what reads whole weights then does not decode them in each pass. Results are the same bits.

    Returns the report of every LoRA layer: fused, or left to PEFT and why; of every block; and of the loss. Raises
    ValueError when the model has no PEFT LoRA layer, the backend or ``liger`` is unknown, ``decoded`` is no amount, or
    Liger has no kernels for the model, RuntimeError when a named backend cannot run on these layers, ImportError when
    Liger is not installed; the model is then unchanged. Raises torch.OutOfMemoryError, the model being fused but
    without copies, when the device has less memory than ``decoded``.
    """
    _check_backend(backend)
    if liger not in (True, False, "captured"):
        raise ValueError(f"liger is True, False or 'captured', not {liger!r}")
    copies.check(decoded)
    if liger:
        liger_kernels.check(model)
    layers = list(_lora_layers(model))
    if not layers:
        raise ValueError("the model has no PEFT LoRA layers; wrap it with peft.get_peft_model first")
    reports, fusible = [], []
    for name, layer in layers:
        able = convertible(layer)
        found = _situation(layer) if able else f"{type(layer).__name__} layers are not linear LoRA layers"
        if not isinstance(layer, Fused) and converted.replaced(layer):
            found = converted.REPLACED  # by one that calls PEFT's
        reports.append(report_layer(name, layer, backend, found if isinstance(found, str) else None))
        if able:
            fusible.append(layer)
    for layer in fusible:
        convert(layer, backend)
    joint.separate(model)
    norms.undo(model)
    rotary.undo(model)
    joined = (*joint.join(model, rotary.rotates(model)), *norms.fuse(model)) if blocks else ()
    losses.undo(model)
    if loss:
        reason = losses.reason(model)
        joined += (BlockReport("", "head and loss", (losses.HEAD,), reason),)
        if reason is None:
            losses.fuse(model)
    own = loss and joined[-1].reason is None
    replaced = liger_kernels.apply(model, liger_kernels.LOSSES if liger == "captured" or own else ()) if liger else ()
    if blocks and rotary.rotates(model):
        reason = rotary.reason(model)
        joined += (BlockReport("", "rotary embedding", (rotary.FUNCTION,), reason),)
        if reason is None:
            rotary.apply(model)
    copies.drop(fusible)
    fused = [layer for (_, layer), report in zip(layers, reports, strict=True) if report.reason is None]
    kept = copies.keep(fused, decoded) if decoded else None
    report = Report(tuple(reports), joined, replaced, liger == "captured" and not own, kept)
    if not report.replaced:
        warnings.warn(f"no layer was fused:\n{report}", stacklevel=2)
    return report


def restore(model: nn.Module) -> int:
    """Give every fused layer of ``model`` its PEFT class back, and undo what came with it. Returns how many layers
    changed."""
    joint.separate(model)
    norms.undo(model)
    losses.undo(model)
    liger_kernels.undo(model)
    rotary.undo(model)  # after Liger, which puts back what it had found
    fused_layers = [layer for _, layer in _lora_layers(model) if isinstance(layer, Fused)]
    copies.drop(fused_layers)
    for layer in fused_layers:
        revert(layer)
    return len(fused_layers)


class _Factory:
    """Makes the layer that PEFT would make, and fuses it. Called as PEFT calls a custom module class."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> Any:
        registered = config._custom_modules
        config._custom_modules = {
            kind: make for kind, make in (registered or {}).items() if not isinstance(make, _Factory)
        }
        try:
            layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        finally:
            config._custom_modules = registered
        if convertible(layer):
            convert(layer, self.backend)
        return layer


def register(config: LoraConfig, backend: str = "auto") -> LoraConfig:
    """Let ``get_peft_model(model, register(config))`` make fused layers from the start. Returns ``config``.

    The layers are those that PEFT would make, converted as `accelerate` does: for layers that it cannot convert, and
    for kinds that ``config`` has other custom modules for, nothing changes. PEFT does not save registrations: register
    the configuration of a loaded adapter again, or use `fused`. Raises ValueError when the backend is unknown.
    """
    _check_backend(backend)
    config._register_custom_module({nn.Module: _Factory(backend)})
    return config


def unregister(config: LoraConfig) -> LoraConfig:
    """Undo `register`: what PEFT makes from ``config`` from now on is its own. Returns ``config``."""
    kept = {kind: make for kind, make in (config._custom_modules or {}).items() if not isinstance(make, _Factory)}
    config._custom_modules = kept or None
    return config


@contextlib.contextmanager
def fused(backend: str = "auto") -> Iterator[None]:
    """Within the block, every LoRA layer that PEFT makes is fused: by ``get_peft_model``, transformers'
    ``add_adapter``, ``PeftModel.from_pretrained``, ``inject_adapter_in_model``.

    Replaces ``LoraModel._create_new_module`` for the whole process until the block ends; the layers made stay fused
    until `restore`. Raises ValueError when the backend is unknown.
    """
    _check_backend(backend)
    stock: Callable[..., Any] = LoraModel._create_new_module

    def create(*args: Any, **kwargs: Any) -> Any:
        layer = stock(*args, **kwargs)
        if convertible(layer):
            convert(layer, backend)
        return layer

    LoraModel._create_new_module = staticmethod(create)
    try:
        yield
    finally:
        LoraModel._create_new_module = staticmethod(stock)
