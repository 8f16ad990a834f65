"""The drop-in against PEFT: output error, layer time, loss curve: ``fastlora bench --suite drop-in``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora import backends, reference
from fastlora.bench import timing
from fastlora.bench.record import Row
from fastlora.linear import base_weight

LAYERS = 8
"""Layers in a row for the timing, as in a model, where a backward pass is handed to another thread once."""
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (576, 576))
TOKENS = (1, 64, 1024, 8192)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A way in which training scripts run a layer."""

    x: torch.dtype
    adapter: torch.dtype
    autocast: bool
    compute: torch.dtype

    def __str__(self) -> str:
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        cast = " autocast" if self.autocast else ""
        return f"x {short[self.x]}, adapters {short[self.adapter]}, base {short[self.compute]}{cast}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SETUPS = (
    Setup(BF16, BF16, True, BF16),
    Setup(BF16, FP32, True, BF16),
    Setup(FP32, FP32, True, BF16),
    Setup(FP32, FP32, False, BF16),
    Setup(BF16, FP32, False, BF16),
    Setup(BF16, BF16, False, BF16),
    Setup(FP16, FP16, False, FP16),
    Setup(FP16, FP32, False, FP16),
    Setup(FP32, FP32, False, FP32),
)


def peft_layer(
    n: int, k: int, r: int, compute: torch.dtype, adapter: torch.dtype, device: torch.device, base: str = "nf4"
) -> Any:
    """A PEFT LoRA layer over a 4-bit (or, for base "dense", a dense) linear layer with random weights."""
    linear = nn.Linear(k, n, bias=False, device=device)
    nn.init.normal_(linear.weight, std=1 / math.sqrt(k))
    wrapper: Any = nn.Module()
    if base == "dense":
        wrapper.linear = linear.to(device, compute)
    else:
        # On no device: its own weight is replaced at once.
        quantized = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=compute, quant_type=base, device="meta")
        quantized.weight = bnb.nn.Params4bit(linear.weight.data.to(compute), requires_grad=False, quant_type=base)
        quantized.support_avx512bf16_for_cpu = False
        wrapper.linear = quantized.to(device)
        wrapper.is_loaded_in_4bit = True
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["linear"], init_lora_weights=False)
    layer = get_peft_model(wrapper, config, autocast_adapter_dtype=False).base_model.model.linear
    for part in (layer.lora_A, layer.lora_B):
        part.to(device, adapter)
    # The size that B reaches in training: the LoRA term is then a tenth of the base output.
    layer.lora_B["default"].weight.data.mul_(0.1)
    return layer


def _fused(layer: Any) -> Any:
    """A fused twin of a PEFT layer, on the same weights."""
    twin = copy.copy(layer)
    wrapper = nn.Module()
    wrapper.add_module("linear", twin)
    fastlora.accelerate(wrapper)
    return twin


def _grads(layer: Any, x: torch.Tensor, dy: torch.Tensor, autocast: bool) -> dict[str, torch.Tensor]:
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.autocast(x.device.type, BF16, enabled=autocast):
        y = layer(x)
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.to(y.dtype))
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def errors(device: torch.device, m: int = 512, n: int = 1024, k: int = 1024, r: int = 16) -> list[Row]:
    """Relative Frobenius error against float64 of PEFT and of the fused layer, in every set-up, on the same inputs."""
    rows = []
    for base, setup in itertools.product(("nf4", "fp4", "dense"), SETUPS):
        if base == "dense" and setup.x != setup.compute:
            continue
        torch.manual_seed(0)
        layer = peft_layer(n, k, r, setup.compute, setup.adapter, device, base)
        fused = _fused(layer)
        x = torch.randn(m, k, device=device, dtype=setup.x, requires_grad=True)
        dy = torch.randn(m, n, device=device, dtype=setup.x)
        wide = [t.detach().double() for t in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
        x64, a64, b64 = wide
        w = base_weight(layer.base_layer)
        y64, u64 = reference.forward(x64, w, a64, b64, None, layer.scaling["default"], None)
        truth = dict(zip(("dx", "da", "db"), _truth_grads(dy, x64, u64, w, a64, b64, layer), strict=True), y=y64)
        theirs, ours = _grads(layer, x, dy, setup.autocast), _grads(fused, x, dy, setup.autocast)
        for name in ("y", "dx", "da", "db"):
            error = {
                who: ((grads[name].double() - truth[name]).norm() / truth[name].norm()).item()
                for who, grads in (("peft", theirs), ("fastlora", ours))
            }
            goal = error["peft"] if name == "y" else None
            case = f"{base}, {setup}"
            rows.append(Row(case, f"error of {name}, PEFT", error["peft"]))
            rows.append(Row(case, f"error of {name}", error["fastlora"], goal))
    return rows


def _truth_grads(dy: torch.Tensor, x: Any, u: Any, w: Any, a: Any, b: Any, layer: Any) -> Any:
    return reference.backward(dy.double(), x, u, w, a, b, layer.scaling["default"], None, (True, True, True))


def speed(device: torch.device, r: int = 16, rounds: int = 5) -> list[Row]:
    """Forward and backward with launches through a row of layers that alternate between (N, K) and (K, N), PEFT
    against fused, in each usual set-up; the ratio must be at least 1. Times are per layer."""
    rows = []
    setups = (SETUPS[0], SETUPS[1], SETUPS[4], SETUPS[5])
    for (n, k), setup in itertools.product(SHAPES, setups):
        torch.manual_seed(0)
        shapes = ((n, k), (k, n)) * (LAYERS // 2)
        layers = [peft_layer(*shape, r, setup.compute, setup.adapter, device) for shape in shapes]
        rivals = {"peft": layers, "fastlora": [_fused(layer) for layer in layers]}
        leaves = [layer.lora_A["default"].weight for layer in layers]
        leaves += [layer.lora_B["default"].weight for layer in layers]

        def step(layers: list[Any], x: torch.Tensor, leaves: list[Any] = leaves, setup: Setup = setup) -> None:
            with torch.autocast(x.device.type, BF16, enabled=setup.autocast):
                y = x
                for layer in layers:
                    y = layer(y)
            torch.autograd.grad(y, (x, *leaves), x.to(y.dtype))

        for m in TOKENS:
            x = torch.randn(m, k, device=device, dtype=setup.x, requires_grad=True)
            variants: dict[str, timing.Call] = {
                name: lambda _, rival=rival, x=x, step=step: step(rival, x)  # type: ignore[misc]
                for name, rival in rivals.items()
            }
            times = timing.measure(variants, device, rounds=rounds, budget_ms=15)
            case = f"{n} x {k}, M = {m}, {setup}"
            rows.append(Row(case, "fwd+bwd us, PEFT", times["peft"].p50 / LAYERS))
            rows.append(Row(case, "fwd+bwd us", times["fastlora"].p50 / LAYERS))
            rows.append(Row(case, "speed-up over PEFT", times["peft"].p50 / times["fastlora"].p50, 1.0, at_least=True))
    return rows


def _text(length: int, batch: int, steps: int, device: torch.device) -> torch.Tensor:
    """(steps, batch, length) bytes of Python's own reference manual."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
    count = steps * batch * length
    data = torch.frombuffer(bytearray((text * (-(-count // len(text))))[:count]), dtype=torch.uint8)
    return data.long().view(steps, batch, length).to(device)


@functools.lru_cache(maxsize=1)
def _initial(hidden: int) -> Any:
    """Two decoder layers of a Llama shape, not to be changed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=256,
    )
    return LlamaForCausalLM(config).to(BF16)


def _model(device: torch.device, hidden: int) -> tuple[Any, torch.optim.Optimizer]:
    """Two decoder layers in 4 bits with PEFT's LoRA layers, and their optimizer; every time the same."""
    model = copy.deepcopy(_initial(hidden))
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            quantized = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=BF16,
                quant_type="nf4",
                device="meta",
            )
            quantized.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            quantized.support_avx512bf16_for_cpu = False
            setattr(parent, name.rpartition(".")[2], quantized)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model.to(device), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)


def _to_float32(model: Any) -> None:
    """Everything but the packed bytes, in place; without autocast nothing is then rounded to 16 bits."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = FP32
    model.float()


def _rounded_apart(
    x: torch.Tensor,
    w: Any,
    lora_a: Any,
    lora_b: Any,
    bias: Any,
    scale: float,
    dropout: Any,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend's forward that rounds the base product to x's type before it adds the LoRA term, as PEFT does."""
    y, u = x @ backends.dense(w, x.dtype).T, x.new_empty(x.shape[0], 0)
    if lora_a is not None:
        u = (dropout.apply(x) if dropout else x) @ lora_a.to(x.dtype).T
        y.addmm_(u, lora_b.to(x.dtype).T, alpha=scale)
    return (y if bias is None else y.add_(bias)).to(out_dtype or x.dtype), u


@contextlib.contextmanager
def rounding_apart() -> Iterator[None]:
    """Inside, every backend's forward is `_rounded_apart`."""
    kept = dict(backends.BACKENDS)
    try:
        for name, backend in kept.items():
            backends.BACKENDS[name] = dataclasses.replace(backend, forward=_rounded_apart)
        yield
    finally:
        backends.BACKENDS.update(kept)


def _curve(device: torch.device, variant: str, steps: int, hidden: int, length: int) -> list[float]:
    model, optimizer = _model(device, hidden)
    if variant.startswith("fastlora"):
        fastlora.accelerate(model)
    if variant == "float32":
        _to_float32(model)
    losses = []
    for ids in _text(length, 4, steps, device):
        # The same batch in another order, or in two halves: only the order of the sums differs.
        parts = [ids.flip(0)] if variant == "flipped" else list(ids.chunk(2)) if variant == "halves" else [ids]
        total = 0.0
        for part in parts:
            with torch.autocast(device.type, BF16, enabled=variant != "float32"):
                loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


APART = "fastlora, rounded apart"
CURVES = ("peft", "flipped", "halves", "fastlora", APART, "float32")


def loss_curve(device: torch.device, steps: int = 50, hidden: int = 4096, length: int = 256) -> tuple[list[Row], Any]:
    """Two decoder layers in 4 bits, trained with PEFT, with PEFT summing in other orders, with fastlora, with fastlora
    made to round as PEFT does, and with PEFT in float32."""
    curves = {}
    for name in CURVES:
        with rounding_apart() if name == APART else contextlib.nullcontext():
            curves[name] = _curve(device, name, steps, hidden, length)
    return curve_rows(f"2 layers, hidden {hidden}, {steps} steps", curves), curves


def curve_rows(case: str, curves: dict[str, list[float]]) -> list[Row]:
    """What the loss curves of `CURVES` show."""

    def distance(a: str, b: str) -> float:
        return math.sqrt(sum((p - q) ** 2 for p, q in zip(curves[a], curves[b], strict=True)) / len(curves[a]))

    floor = max(distance(a, b) for a, b in itertools.combinations(("peft", "flipped", "halves"), 2))
    theirs = distance("peft", "float32")
    return [
        Row(case, "first loss", curves["fastlora"][0]),
        Row(case, "last loss, PEFT", curves["peft"][-1]),
        Row(case, "last loss", curves["fastlora"][-1]),
        Row(case, "last loss, float32", curves["float32"][-1]),
        Row(case, "rms distance between PEFT runs that sum in other orders", floor),
        Row(case, "rms distance from PEFT's curve", distance("peft", "fastlora"), floor),
        Row(case, "rms distance from PEFT's curve, rounded apart as PEFT does", distance("peft", APART), floor),
        Row(case, "rms distance of PEFT's curve from float32's", theirs),
        Row(case, "rms distance from float32's curve", distance("fastlora", "float32"), theirs),
    ]


def first_update(device: torch.device, hidden: int = 2048, length: int = 64) -> list[Row]:
    """How much of the first optimizer step reaches the loss of the next batch.

    B starts at zero, so the LoRA term is then smaller than half a unit in the last place of most outputs: added to an
    output that is rounded already, it is lost.
    """
    model, optimizer = _model(device, hidden)
    first, second = _text(length, 4, 2, device)
    with torch.autocast(device.type, BF16):
        model(input_ids=first, labels=first).loss.backward()
    optimizer.step()
    model.eval()

    @torch.no_grad()
    def effect(autocast: bool) -> float:
        with torch.autocast(device.type, BF16, enabled=autocast):
            adapted = model(input_ids=second, labels=second).loss.item()
            with model.disable_adapter():
                return adapted - model(input_ids=second, labels=second).loss.item()

    theirs = effect(autocast=True)
    fastlora.accelerate(model)
    ours = effect(autocast=True)
    fastlora.restore(model)
    _to_float32(model)
    exact = effect(autocast=False)
    case = f"2 layers, hidden {hidden}, after one step"
    return [
        Row(case, "change of the loss by the adapter, float32", exact),
        Row(case, "share of it left in bf16, PEFT", theirs / exact),
        Row(case, "share of it left in bf16", ours / exact, theirs / exact, at_least=True),
    ]


PARTS: dict[str, Callable[[torch.device], tuple[list[Row], Any]]] = {
    "errors": lambda device: (errors(device), None),
    "loss": loss_curve,
    "update": lambda device: (first_update(device), None),
    "speed": lambda device: (speed(device), None),
}
"""What is measured, by name: rows, and what the record keeps beside them."""
KEPT_AS = {"loss": "loss_curves"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the record; default: bench/results")
    args = parser.parse_args()
    from fastlora.bench import run

    print(*run.drop_in(args.only, out=args.out), sep="\n")


if __name__ == "__main__":
    main()
