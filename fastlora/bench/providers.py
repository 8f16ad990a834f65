"""The ways to compute one QLoRA layer that the benchmark compares, all on the same packed weight and adapters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import backends
from fastlora.nf4 import NF4Weight

Forward = Callable[[torch.Tensor], torch.Tensor]
Mode = Literal["fwd", "bwd", "fwd+bwd", "decode"]
MODES: tuple[Mode, ...] = ("fwd", "bwd", "fwd+bwd", "decode")
"""With gradients to come; the gradients alone; both; without gradients."""


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
    # Its own generator: the default one is not to be relied on once a capture has failed.
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=kind, generator=generator)

    packed = NF4Weight.quantize(random(n, k, kind=dtype) / math.sqrt(k), quant_type=quant_type, nested=nested)
    adapter_dtype = adapter_dtype or dtype
    a = random(r, k, kind=adapter_dtype) / math.sqrt(k)
    b = random(n, r, kind=adapter_dtype) / math.sqrt(r) / 10
    return Layer(packed, packed.dequantize(dtype), a.requires_grad_(), b.requires_grad_())


def copy_of(layer: Layer) -> Layer:
    """The same layer at other addresses."""
    packed: dict[str, Any] = {name: t.clone() for name, t in layer.w.tensors().items()}
    a, b = (t.detach().clone().requires_grad_() for t in (layer.lora_a, layer.lora_b))
    return dataclasses.replace(
        layer, w=dataclasses.replace(layer.w, **packed), dense=layer.dense.clone(), lora_a=a, lora_b=b
    )


@dataclasses.dataclass(frozen=True)
class Provider:
    """One layer as somebody computes it."""

    forward: Forward
    trained: tuple[torch.Tensor, ...]
    """The adapter leaves whose gradients it produces."""

    def call(self, x: torch.Tensor, dy: torch.Tensor, mode: Mode) -> Callable[[], Any]:
        """What one measured call does. x (M, K) is a leaf that requires a gradient; dy: (M, N)."""
        forward, leaves = self.forward, (x, *self.trained)
        if mode == "fwd":
            return lambda: forward(x)
        if mode == "decode":
            return torch.no_grad()(lambda: forward(x))
        if mode == "fwd+bwd":
            return lambda: torch.autograd.grad(forward(x), leaves, dy)
        kept: list[torch.Tensor] = []

        def backward() -> Any:
            if not kept:  # on the stream of the first call: autograd comes back to it
                kept.append(forward(x))
            return torch.autograd.grad(kept[0], leaves, dy, retain_graph=True)

        return backward


class Products(Provider):
    """The base products alone with a dense weight: what any implementation in this type needs at least."""

    def call(self, x: torch.Tensor, dy: torch.Tensor, mode: Mode) -> Callable[[], Any]:
        (w,), x = self.trained, x.detach()
        y, dx = dy.new_empty(dy.shape), torch.empty_like(x)
        forward, backward = lambda: torch.mm(x, w.T, out=y), lambda: torch.mm(dy, w, out=dx)
        if mode == "bwd":
            return backward
        return (lambda: (forward(), backward())) if mode == "fwd+bwd" else forward


def products(layer: Layer) -> Provider:
    """cuBLAS on a GPU: x W^T, and dy W for a backward pass, into outputs that exist."""
    return Products(lambda x: F.linear(x, layer.dense), (layer.dense,))


def fused(layer: Layer, backend: str = "auto") -> Provider:
    """This package."""
    w, a, b, scale = layer.w, layer.lora_a, layer.lora_b, layer.scale
    return Provider(lambda x: fastlora.lora_linear(x, w, a, b, scale=scale, backend=backend), (a, b))


def naive(layer: Layer) -> Provider:
    """Plain PyTorch: bitsandbytes' dequantizer, one product, two small products, a sum."""
    from bitsandbytes import functional as bnb

    weight = layer.w.to_bitsandbytes()
    a, b = layer.lora_a, layer.lora_b

    def forward(x: torch.Tensor) -> torch.Tensor:
        w = bnb.dequantize_4bit(weight, weight.quant_state).to(x.dtype)
        return F.linear(x, w) + layer.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    return Provider(forward, (a, b))


def bitsandbytes_base(layer: Layer) -> Provider:
    """The base layer of bitsandbytes without an adapter: what PEFT's layer needs at least."""
    import bitsandbytes as bnb

    weight = layer.w.to_bitsandbytes()
    return Provider(lambda x: bnb.matmul_4bit(x, weight.t(), quant_state=weight.quant_state), ())


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


def dequant_mm_addmm(layer: Layer) -> Provider:
    """The formula of the fastest peers, with bitsandbytes' dequantizer."""
    weight = layer.w.to_bitsandbytes()
    a, b = layer.lora_a, layer.lora_b
    return Provider(lambda x: _DequantMmAddmm.apply(x, a, b, weight, layer.scale), (a, b))


def peft(layer: Layer, adapter_dtype: torch.dtype, *, autocast: bool = False, compiled: bool = False) -> Provider:
    """PEFT's layer over bitsandbytes' ``Linear4bit``, with adapters of its own."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    n, k = layer.w.shape
    dtype = layer.dense.dtype
    base = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type=layer.w.quant_type, device="meta")
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
    if compiled:
        # Each of the copies is compiled: past the limit the compiler would quietly run PEFT uncompiled. A backward
        # pass that may give its saved tensors away cannot be run twice.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        torch._functorch.config.donated_buffer = False
        module = torch.compile(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not autocast:
            return module(x)
        with torch.autocast(x.device.type, dtype):  # its cache of casts lives no longer than the call
            return module(x)

    plain = module._orig_mod if compiled else module
    return Provider(forward, (plain.lora_A["default"].weight, plain.lora_B["default"].weight))


FLOOR, BASE = "bare GEMMs", "bitsandbytes base"
WITHOUT_ADAPTER = (FLOOR, BASE)
"""Providers that compute less than the layer: lower bounds, not rivals."""
PROVIDERS: dict[str, Callable[[Layer], Provider]] = {
    FLOOR: products,
    "fastlora": fused,
    **{f"fastlora {name}": (lambda layer, name=name: fused(layer, name)) for name in backends.BACKENDS},  # type: ignore[misc]
    "dequant+mm+addmm": dequant_mm_addmm,
    "naive PyTorch": naive,
    "bitsandbytes base": bitsandbytes_base,
    "PEFT bf16": lambda layer: peft(layer, layer.dense.dtype),
    "PEFT fp32": lambda layer: peft(layer, torch.float32),
    "PEFT fp32 autocast": lambda layer: peft(layer, torch.float32, autocast=True),
    "PEFT compiled": lambda layer: peft(layer, layer.dense.dtype, compiled=True),
}
"""By the name in the tables. The fastlora backends that a machine lacks raise when called."""
