"""What the package sets out to reach on a CPU, measured in one run: ``fastlora bench --suite cpu``.

Rank 16, nested NF4, launches included; the variants take turns. Single layers, of random data, and a training step of
SmolLM2-135M.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import fastlora
from fastlora import backends
from fastlora.bench import real, timing
from fastlora.bench.providers import FLOOR, PROVIDERS, make_layer
from fastlora.bench.record import Row

CPU = torch.device("cpu")
N, K, RANK = 4096, 4096, 16
TOKENS = (1, 32, 512)
SPEED, BANDWIDTH, STEP_SPEED = 1.5, 0.6, 1.3
"""Goals: a layer's times as fast as PEFT, share of the copy's bandwidth, a training step's times as fast as PEFT."""
OURS = "fastlora cpu"
FUSED_LOSS = f"{OURS}, fused loss"
PEFT = {torch.bfloat16: ("PEFT bf16", "PEFT fp32"), torch.float32: ("PEFT fp32",)}
"""PEFT's adapters in the type computed in, and in float32."""

Found = tuple[list[Row], list[dict[str, Any]]]


def _kept(case: str, times: dict[str, timing.Times]) -> list[dict[str, Any]]:
    return [{"case": case, "variant": name} | dataclasses.asdict(t) for name, t in times.items()]


def layer(dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS, n: int = N, k: int = K, rounds: int = 15) -> Found:
    """Forward and backward of one layer against PEFT with bitsandbytes, and what surrounds it."""
    packed = make_layer(n, k, RANK, dtype, CPU)
    names = (OURS, *PEFT[dtype], "fastlora torch", FLOOR)
    providers = {name: PROVIDERS[name](packed) for name in names}
    rows: list[Row] = []
    kept: list[dict[str, Any]] = []
    for m in tokens:
        x, dy = torch.randn(m, k).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
        calls = {name: provider.call(x, dy, "fwd+bwd") for name, provider in providers.items()}
        times = timing.measure(
            {name: lambda _, call=call: call() for name, call in calls.items()},  # type: ignore[misc]
            CPU,
            rounds=rounds,
            budget_ms=50,
        )
        case = f"M={m} N={n} K={k} {str(dtype).removeprefix('torch.')}, forward and backward"
        rows += [Row(case, f"us, {name}", t.p50) for name, t in times.items()]
        rows += [
            Row(case, f"speed-up over {name}", times[name].p50 / times[OURS].p50, SPEED, at_least=True)
            for name in PEFT[dtype]
        ]
        kept += _kept(case, times)
    return rows, kept


def dequantize(dtype: torch.dtype, n: int = N, k: int = K, rounds: int = 15) -> Found:
    """Into a matrix that exists, against a copy that moves as many bytes."""
    w = make_layer(n, k, RANK, dtype, CPU).w
    out = torch.empty(n, k, dtype=dtype)
    source = torch.ones((w.nbytes + out.nbytes) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = timing.measure(
        {"dequantize": lambda _: backends.dequantize(w, dtype, out), "copy": lambda _: target.copy_(source)},
        CPU,
        rounds=rounds,
    )
    case = f"dequantize N={n} K={k} {str(dtype).removeprefix('torch.')}"
    rows = [Row(case, f"us, {name}", t.p50) for name, t in times.items()]
    share = times["copy"].p50 / times["dequantize"].p50
    return [*rows, Row(case, "share of the copy's bandwidth", share, BANDWIDTH, at_least=True)], _kept(case, times)


def _step(model: Any, ids: torch.Tensor) -> timing.Call:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def call(_: Any) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def step(dtype: torch.dtype, batch: int = 4, length: int = 128, rounds: int = 7) -> Found:
    """A training step of SmolLM2-135M with adapters on every linear layer, ours with the fused loss of the head, too.

    Without the model's package, a row that says so.
    """
    import peft

    case = f"{real.NAME}, {batch} x {length} tokens, {str(dtype).removeprefix('torch.')}, training step"
    if missing := real.missing():
        return [Row(case, "speed-up over PEFT", None, STEP_SPEED, True, f"not installed: {', '.join(missing)}")], []
    base, _ = real.load(CPU, dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    names = ("PEFT", OURS, FUSED_LOSS)
    models = {name: peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train() for name in names}
    for name in (OURS, FUSED_LOSS):
        fastlora.accelerate(models[name], loss=name == FUSED_LOSS)
    ids = torch.randint(base.config.vocab_size, (batch, length))
    times = timing.measure({name: _step(model, ids) for name, model in models.items()}, CPU, rounds=rounds)
    rows = [Row(case, f"ms, {name}", t.p50 / 1e3) for name, t in times.items()]
    layers, whole = (times["PEFT"].p50 / times[name].p50 for name in (OURS, FUSED_LOSS))
    rows.append(Row(case, "speed-up over PEFT, layers alone", layers))
    rows.append(Row(case, "speed-up over PEFT", whole, STEP_SPEED, at_least=True, note=FUSED_LOSS))
    return rows, _kept(case, times)


def parts() -> Iterator[Found]:
    """Every case, one after the other."""
    for dtype in (torch.bfloat16, torch.float32):
        yield dequantize(dtype)
        yield layer(dtype)
        yield step(dtype)
