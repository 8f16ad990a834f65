"""What adapters do beside learning, in the shape of a large model: switching tasks, chunks of tokens, fewer bits."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlora.bench import timing
from fastlora.bench.record import Row


@dataclasses.dataclass(frozen=True)
class Shape:
    """Blocks of a model, and the tokens of one step."""

    blocks: int
    tokens: int
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 8192
    r: int = 16
    rounds: int = 7
    budget_ms: float = 150.0

    @property
    def name(self) -> str:
        return f"{self.blocks} blocks of {self.hidden} x {self.intermediate}, M = {self.tokens}"


LLAMA_8B = Shape(8, 4096)
SMALL = Shape(1, 32, 64, 128, 4, 2, 128, 4, rounds=2, budget_ms=1.0)
_LONG = Shape(2, 16384)
"""For chunks of tokens, which are for sequences whose activations do not fit."""
_CHUNKS = 8
_SWITCH_US = 1000.0
_SAME = 0.05
"""Relative error of gradients that are sums of bfloat16 products in another order."""


def base_model(shape: Shape, device: torch.device) -> Any:
    """A random Llama in NF4, nested, that computes in bfloat16 (float32 on a CPU)."""
    import transformers

    from fastlora.bench import models

    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.tokens,
        pad_token_id=0,
    )
    return models.base(config, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def rows(device: torch.device, shape: Shape | None = None) -> Iterator[list[Row]]:
    """The rows of each in turn. shape: of the model, for all of them."""
    size = shape or (dataclasses.replace(_LONG, tokens=2048) if device.type == "cuda" else SMALL)
    base = base_model(size, device)
    yield _switching(base, size, device)
    for kind in ("int8", "nf4"):
        yield _quantized(base, kind, size, device)
    if shape is None and device.type == "cuda":
        size, base = _LONG, base_model(_LONG, device)
    yield _chunked(base, size, device)


def _adapted(base: Any, size: Shape, *others: str) -> Any:
    """A fused copy of ``base`` with adapters that are not zero."""
    import peft

    import fastlora

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=size.r, lora_alpha=2 * size.r, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name in others:
        model.add_adapter(name, config)
    fastlora.accelerate(model)
    return model


def _host_us(call: Callable[[int], Any], calls: int, device: torch.device) -> float:
    """Microseconds a call until the device is done as well, after one that is not counted."""
    call(1)
    timing._wall(lambda _: None, 1, device)
    begin = time.perf_counter()
    for i in range(calls):
        call(i)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1e6 / calls


def _switching(base: Any, size: Shape, device: torch.device) -> list[Row]:
    from fastlora.adapters import switch
    from fastlora.adapters.variant import require_layers

    model = _adapted(base, size, "other", "target")
    layers = len(require_layers(model))
    tasks, names = switch.Tasks(model), ("default", "other")
    case = f"task switching, {size.name}"
    use = _host_us(lambda i: tasks.use(names[i % 2]), 100, device) / layers
    copied = _host_us(lambda i: switch.copy(model, names[i % 2], "target"), 20, device) / layers
    stock = _host_us(lambda i: model.set_adapter(names[i % 2]), 10, device) / layers
    return [
        Row(case, "us a layer", use, _SWITCH_US),
        Row(
            case,
            "us a layer, in place",
            copied,
            _SWITCH_US,
            note="the factors are copied over those of a captured graph",
        ),
        Row(case, "us a layer of PEFT's set_adapter", stock),
    ]


def _quantized(base: Any, kind: str, size: Shape, device: torch.device) -> list[Row]:
    from fastlora.adapters import quantized

    whole, packed = _adapted(base, size).eval(), _adapted(base, size).eval()
    quality = quantized.quantize(packed, kind)
    ids = torch.ones(1, 1, dtype=torch.long, device=device)

    def forward(model: Any) -> Callable[[int], Any]:
        def call(_: int) -> Any:
            with torch.inference_mode():
                return model(input_ids=ids).logits

        return call

    variants = {"whole": forward(whole), "packed": forward(packed)}
    times = timing.measure(variants, device, rounds=size.rounds, budget_ms=size.budget_ms)
    case = f"{kind} adapter, {size.name}"
    errors = list(quality.errors.values())
    return [
        Row(case, "MiB", quality.bytes_after / 2**20, note=f"{quality.bytes_before / 2**20:.2f} MiB in float32"),
        Row(case, "relative error of its output", sum(errors) / len(errors)),
        Row(case, "times a pass of one token", times["packed"].p50 / times["whole"].p50),
    ]


def _chunked(base: Any, size: Shape, device: torch.device) -> list[Row]:
    from fastlora.adapters import chunked

    model = _adapted(base, size).train()
    ids = torch.randint(1, size.vocab, (1, size.tokens), device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(_: int = 0) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        step()
        return [p.grad.clone() for p in parameters if p.grad is not None]

    tokens = max(1, size.tokens // _CHUNKS)
    found: dict[bool, tuple[list[torch.Tensor], float, int | None]] = {}
    for on in (False, True):
        if on:
            chunked.chunk_mlps(model, tokens)
        grads = gradients()
        found[on] = (
            grads,
            min(timing._wall(step, 1, device) for _ in range(size.rounds)),
            timing.peak_memory(step, device),
        )
    (whole, before, peak), (parts, after, less) = found[False], found[True]
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(parts, whole, strict=True))
    case, note = f"chunked MLPs, {size.name}", f"{tokens} tokens at a time"
    result = [
        Row(case, "relative error of gradients", error, _SAME, note=note),
        Row(case, "times the step", after / before, note="each chunk is computed twice"),
    ]
    if peak is not None and less is not None:
        result.append(Row(case, "peak memory MiB", less / 2**20, peak / 2**20, note="goal: the peak without chunks"))
    return result
