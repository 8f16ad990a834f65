"""Merging the adapters of a model into its base, so that a 4-bit base keeps what they learned."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from fastlora import dora, requantize
from fastlora.adapters import adalora, vera
from fastlora.adapters.variant import Factors, Variant, factors_of
from fastlora.backends import dense
from fastlora.linear import base_weight
from fastlora.nf4 import NF4Weight

MODES = ("requantize", "dense", "error-aware")
MOMENTS_BYTES = 1 << 31
"""Of the second moments that are held at once."""
READ_WEIGHT = 100.0
"""What an error in a direction that an adapter reads weighs on top, in units of the mean of all directions."""


def merge(
    model: Any,
    mode: str = "error-aware",
    *,
    dtype: torch.dtype | None = None,
    calibration: Iterable[Any] | None = None,
    progress: bool = False,
) -> Any:
    """Merge the active adapters of a PEFT model (LoRA, AdaLoRA, VeRA) into its base; returns that, changed in place.

    mode: what becomes of 4-bit base layers. "requantize": 4-bit again, with the largest element of each block as its
    scale, as PEFT does. "error-aware": 4-bit again, with the scales and codes of `fastlora.requantize.quantize`.
    "dense": every 4-bit layer of the model becomes an ``nn.Linear`` of ``dtype`` (default: the type that the layer
    computes in). Adapters on dense layers are merged by PEFT in every mode.

    calibration: batches for "error-aware", mappings of the model's arguments or single positional arguments: some
    thousand tokens of what the model is for. The second moments (K, K) of each layer's inputs then weigh the errors,
    which are those of the layer's outputs. They are gathered in passes over the batches, each of as many layers as
    `MOMENTS_BYTES` hold, and of a model whose layers before those are merged.

    With and without it, "error-aware" keeps the merged weight exact where the adapters read: an error in a direction
    of the rows of A weighs `READ_WEIGHT` more than one elsewhere, so that rounding does not undo small changes.

    progress: show a bar on the terminal.

    Raises ValueError for an unknown mode, for a model without adapters or merged already, for weights that are not
    finite, and for variants of LoRA other than DoRA on a 4-bit base; the model is then unchanged.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
    if calibration is not None and mode != "error-aware":
        raise ValueError(f"calibration is for mode 'error-aware', not for {mode!r}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (LoraLayer, VeraLayer))}
    if not layers or not hasattr(model, "unload"):
        raise ValueError("the model is not a PEFT model with LoRA layers")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name}: adapters are merged already; call unmerge_adapter first")
    packed = {name: layer for name, layer in layers.items() if _is_packed(layer.base_layer)}
    for name, layer in packed.items():
        _check_variants(name, layer)
        parts = [getattr(layer, part) for part in layer.adapter_layer_names if hasattr(layer, part)]
        if not all(p.isfinite().all() for part in parts for p in part.parameters()):
            raise ValueError(f"{name}: an adapter is not finite: it seems to be broken")
    batches = None if calibration is None else list(calibration)
    with _bar(len(layers), progress) as advance:
        for name, layer in layers.items():
            if name not in packed:
                layer.merge(safe_merge=True)
                advance()
        for group in _passes(packed) if batches is not None else [packed]:
            moments = {} if batches is None else _second_moments(model, group, batches)
            for name, layer in group.items():
                _merge_packed(layer, mode, dtype, moments.pop(name, None))
                advance()
    base = model.unload()
    if mode == "dense":
        _make_dense(base, dtype)
    return base


def _is_packed(base: Any) -> bool:
    return getattr(base.weight, "quant_state", None) is not None or getattr(base, "quant_state", None) is not None


def _active(layer: Any) -> list[str]:
    present = layer.vera_lambda_d if isinstance(layer, VeraLayer) else layer.lora_A
    return [name for name in layer.active_adapters if name in present]


def _is_dora(layer: Any, name: str) -> bool:
    return isinstance(getattr(layer, "lora_variant", {}).get(name), DoraLinearVariant)


def _check_variants(name: str, layer: Any) -> None:
    active = _active(layer)
    known = getattr(layer, "lora_variant", {})
    variants = [known[adapter] for adapter in active if adapter in known]
    kinds = [type(variant) for variant in variants if not isinstance(variant, Variant)]
    if any(kind is not DoraLinearVariant for kind in kinds):
        raise ValueError(f"{name}: {kinds[0].__name__} cannot be merged into a 4-bit base")
    if kinds and len(active) > 1:
        raise ValueError(f"{name}: DoRA is active together with other adapters")


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], Any]]:
    """What to call after each of ``total`` layers."""
    if not shown:
        yield lambda: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="merging", unit="layer") as bar:
        yield bar.update


def _passes(layers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The layers in their order, as many at once as `MOMENTS_BYTES` hold the second moments of, at least one."""
    group: dict[str, Any] = {}
    held = 0
    for name, layer in layers.items():
        size = 4 * base_weight(layer.base_layer).shape[1] ** 2
        if group and held + size > MOMENTS_BYTES:
            yield group
            group, held = {}, 0
        group[name], held = layer, held + size
    if group:
        yield group


@torch.no_grad()
def _second_moments(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, torch.Tensor]:
    """(K, K) for each layer: the mean of x x^T over the inputs x that it gets of ``batches``, in any unit."""
    sums: dict[str, torch.Tensor] = {}
    last: list[torch.Tensor] = []  # an input and its x^T x: layers in a row often share theirs
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not last or last[0] is not args[0]:
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                last[:] = args[0], x.T @ x
            if name in sums:
                sums[name] += last[1]
            else:
                sums[name] = last[1].clone()

        return hook

    training = model.training
    model.eval()
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(watch(name)))
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(batch)
            last.clear()
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for total in sums.values():
        total /= total.diagonal().mean().clamp(min=1e-38)
        # Features that never showed still count a little: without any, a block of them would have no scale at all.
        total.diagonal().add_(1e-4)
    return sums


@torch.no_grad()
def _importance(layer: Any, w: NF4Weight, moments: torch.Tensor | None) -> torch.Tensor:
    """(K, K): ``moments``, or I where nothing is known of the inputs, and `READ_WEIGHT` times the projection onto what
    the active adapters read of an input."""
    total = torch.eye(w.shape[1], device=w.device) if moments is None else moments
    rows = [_factors(layer, name, w)[0].to(w.device, torch.float32) for name in _active(layer)]
    if rows:
        _, lengths, directions = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        read = directions[lengths > 1e-6 * lengths.max()]
        total.addmm_(read.T, read, alpha=READ_WEIGHT)
    return total


def _factors(layer: Any, name: str, w: NF4Weight) -> Factors:
    """A, B and the scale of what one adapter of LoRA, of a variant of it, of AdaLoRA or of VeRA adds to w."""
    if isinstance(layer, VeraLayer):
        shared = (layer.vera_A[name].to(w.device), layer.vera_B[name].to(w.device))
        return *vera.factors(layer.vera_lambda_b[name], layer.vera_lambda_d[name], *shared, *w.shape), 1.0
    return adalora.factors(layer, name) if isinstance(layer, AdaLoraLayer) else factors_of(layer, name)


@torch.no_grad()
def _merged(layer: Any, w: NF4Weight) -> torch.Tensor:
    """W with the active adapters, float32."""
    merged = dense(w, torch.float32)
    for name in _active(layer):
        lora_a, lora_b, scale = _factors(layer, name, w)
        lora_a, lora_b = lora_a.float(), lora_b.float()
        magnitude = None
        if _is_dora(layer, name):
            magnitude = layer.lora_magnitude_vector[name].weight
            norm = dora.weight_norm(w, lora_a, lora_b, scale, torch.float32)
        merged = merged.addmm_(lora_b * scale, lora_a)
        if magnitude is not None:
            merged = merged.mul_((magnitude / norm)[:, None])
    return merged


@torch.no_grad()
def _merge_packed(layer: Any, mode: str, dtype: torch.dtype | None, moments: torch.Tensor | None) -> None:
    base = layer.base_layer
    w = base_weight(base)
    assert isinstance(w, NF4Weight)
    merged = _merged(layer, w)
    for name in _active(layer):
        if getattr(layer, "lora_bias", {}).get(name):
            extra = layer.lora_B[name].bias * layer.scaling[name]
            base.bias = nn.Parameter(extra if base.bias is None else (base.bias + extra).to(base.bias.dtype), False)
    if mode == "dense":
        layer.base_layer = _linear(base, merged, dtype)
        layer.merged_adapters.extend(_active(layer))
        return
    options: dict[str, Any] = {"blocksize": w.blocksize, "quant_type": w.quant_type, "nested": w.nested}
    if mode == "requantize":
        # As PEFT: rounded to the type that the weight dequantizes to, then quantized.
        new = NF4Weight.quantize(merged.to(w.dtype), **options)
    else:
        new = requantize.quantize(merged, _importance(layer, w, moments), dtype=w.dtype, **options)
    weight = new.to_bitsandbytes(base.weight.dtype)
    weight.module = base
    base.weight, base.quant_state = weight, weight.quant_state
    layer.merged_adapters.extend(_active(layer))  # from now on the base layer alone is the layer


def _linear(base: Any, w: torch.Tensor, dtype: torch.dtype | None) -> nn.Linear:
    dtype = dtype or getattr(base, "compute_dtype", None) or torch.get_default_dtype()
    linear = nn.Linear(w.shape[1], w.shape[0], base.bias is not None, device="meta")
    linear.weight = nn.Parameter(w.to(dtype), requires_grad=False)
    if base.bias is not None:
        linear.bias = nn.Parameter(base.bias.detach().to(dtype), requires_grad=False)
    return linear.train(base.training)


@torch.no_grad()
def _make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dequantize the 4-bit layers that had no adapter, and let nothing say any more that the model is quantized."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "weight") and isinstance(module, nn.Linear) and _is_packed(module):
            w = base_weight(module)
            model.set_submodule(name, _linear(module, dense(w, torch.float32), dtype))
    for attribute in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if attribute in model.__dict__:
            delattr(model, attribute)
    configuration: Any = getattr(model, "config", None)
    if hasattr(configuration, "quantization_config"):
        del configuration.quantization_config
