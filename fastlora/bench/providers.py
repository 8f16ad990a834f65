"""The ways to compute one QLoRA layer that the benchmark compares, all on the same packed weight and adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import backends
from fastlora.nf4 import NF4Weight

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's tensors. Adapters are leaves that require gradients."""

    w: NF4Weight
    dense: torch.Tensor
    """The same weight (N, K) in the type computed in: what the floor multiplies by."""
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float = 2.0

    @property
    def nbytes(self) -> int:
        return self.w.nbytes


def make_layer(
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quant_type: str = "nf4",
    nested: bool = True,
    adapter_dtype: torch.dtype | None = None,
) -> Layer:
    """A layer with random weights of the usual size; B is a tenth of A, as in training."""
    w = torch.randn(n, k, device=device, dtype=dtype) / math.sqrt(k)
    packed = NF4Weight.quantize(w, quant_type=quant_type, nested=nested)
    adapter_dtype = adapter_dtype or dtype
    a = torch.randn(r, k, device=device, dtype=adapter_dtype) / math.sqrt(k)
    b = torch.randn(n, r, device=device, dtype=adapter_dtype) / math.sqrt(r) / 10
    return Layer(packed, packed.dequantize(dtype), a.requires_grad_(), b.requires_grad_())


def floor(layer: Layer) -> Forward:
    """The base product alone with a dense weight: what any implementation in this type needs at least."""
    return lambda x: F.linear(x, layer.dense)


def fused(layer: Layer, backend: str = "auto") -> Forward:
    """This package."""
    return lambda x: fastlora.lora_linear(x, layer.w, layer.lora_a, layer.lora_b, scale=layer.scale, backend=backend)


def naive(layer: Layer) -> Forward:
    """Plain PyTorch: bitsandbytes' dequantizer, one product, two small products, a sum."""
    from bitsandbytes import functional as bnb

    weight = layer.w.to_bitsandbytes()
    a, b = layer.lora_a, layer.lora_b

    def forward(x: torch.Tensor) -> torch.Tensor:
        w = bnb.dequantize_4bit(weight, weight.quant_state).to(x.dtype)
        return F.linear(x, w) + layer.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    return forward


class _DequantMmAddmm(torch.autograd.Function):
    """The ordering of the fastest peers: dequantize, one product, the LoRA term added to its result in place."""

    @staticmethod
    def forward(ctx: Any, x: Any, a: Any, b: Any, weight: Any, scale: Any) -> Any:
        from bitsandbytes import functional as bnb

        ctx.save_for_backward(x, a, b)
        ctx.weight, ctx.scale = weight, scale
        y = x @ bnb.dequantize_4bit(weight, weight.quant_state).T
        return y.addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        from bitsandbytes import functional as bnb

        x, a, b = ctx.saved_tensors
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        du = dy @ b16
        da = (ctx.scale * (du.T @ x)).to(a.dtype)
        db = (ctx.scale * (dy.T @ (x @ a16.T))).to(b.dtype)
        dx = dy @ bnb.dequantize_4bit(ctx.weight, ctx.weight.quant_state)
        return dx.addmm_(du, a16, alpha=ctx.scale), da, db, None, None


def dequant_mm_addmm(layer: Layer) -> Forward:
    """The formula of the fastest peers, with bitsandbytes' dequantizer."""
    weight = layer.w.to_bitsandbytes()
    return lambda x: _DequantMmAddmm.apply(x, layer.lora_a, layer.lora_b, weight, layer.scale)


def peft(layer: Layer, adapter_dtype: torch.dtype, *, autocast: bool = False, compiled: bool = False) -> Forward:
    """PEFT's layer over bitsandbytes' ``Linear4bit``. Its adapters are its own: gradients go to ``.trained``."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    n, k = layer.w.shape
    base = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=layer.dense.dtype, quant_type=layer.w.quant_type)
    base.weight = layer.w.to_bitsandbytes()
    base.weight.module, base.quant_state = base, base.weight.quant_state
    base.support_avx512bf16_for_cpu = False
    wrapper: Any = nn.Module()
    wrapper.linear = base
    wrapper.is_loaded_in_4bit = True
    r = layer.lora_a.shape[0]
    config = LoraConfig(r=r, lora_alpha=round(layer.scale * r), target_modules=["linear"])
    module = get_peft_model(wrapper, config, autocast_adapter_dtype=False).base_model.model.linear
    for name, value in (("lora_A", layer.lora_a), ("lora_B", layer.lora_b)):
        getattr(module, name)["default"].weight = nn.Parameter(value.detach().to(adapter_dtype))
    call = torch.compile(module) if compiled else module

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, layer.dense.dtype, enabled=autocast):
            return call(x)

    forward.trained = (module.lora_A["default"].weight, module.lora_B["default"].weight)  # type: ignore[attr-defined]
    return forward


def trained(forward: Forward, layer: Layer) -> tuple[torch.Tensor, ...]:
    """The adapter leaves whose gradients ``forward`` produces."""
    return getattr(forward, "trained", (layer.lora_a, layer.lora_b))


PROVIDERS: dict[str, Callable[[Layer], Forward]] = {
    "two GEMMs (floor)": floor,
    **{f"fastlora {name}": (lambda layer, name=name: fused(layer, name)) for name in backends.BACKENDS},  # type: ignore[misc]
    "fastlora": fused,
    "dequant+mm+addmm": dequant_mm_addmm,
    "naive PyTorch": naive,
    "PEFT bf16": lambda layer: peft(layer, layer.dense.dtype),
    "PEFT fp32": lambda layer: peft(layer, torch.float32),
    "PEFT fp32 autocast": lambda layer: peft(layer, torch.float32, autocast=True),
    "PEFT compiled": lambda layer: peft(layer, layer.dense.dtype, compiled=True),
}
"""By the name in the tables. The fastlora backends that a machine lacks raise when called."""
