"""What merging into 4 bits leaves of a fine-tune: ``fastlora bench --suite merge``.

A real model learns from real text, and the adapter is merged in every mode. Measured on text that was not trained on:
the loss, and how far the next-token distributions moved from those of the adapter left beside its base (mean KL
divergence over the tokens of the answers).
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastlora
from fastlora.bench import real
from fastlora.bench.record import Row


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained and measured."""

    steps: int = 40
    batch_size: int = 8
    lr: float = 1e-3
    rank: int = 16
    held_out: int = 64
    calibration: int = 64
    """Training examples whose inputs weigh the errors of the error-aware merge."""


FULL = Plan()

Batches = list[dict[str, torch.Tensor]]


def train(model: Any, rows: real.Rows, plan: Plan, device: torch.device) -> Any:
    """``model`` with an adapter on all its linear layers that has learned from ``rows``."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    fastlora.accelerate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=plan.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, plan.steps)
    model.train()
    for step in range(plan.steps):
        first = step * plan.batch_size
        chosen = [rows[i % len(rows)] for i in range(first, first + plan.batch_size)]
        model(**real.batch(chosen, device)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def answers(model: Any, data: Batches) -> tuple[float, list[torch.Tensor]]:
    """The loss for each token of the answers, and the log-probabilities there (tokens, vocabulary), one a batch."""
    total, count, found = 0.0, 0, []
    for part in data:
        logits = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"]).logits[:, :-1].float()
        labels = part["labels"][:, 1:]
        inside = labels != -100
        known = F.log_softmax(logits[inside], -1)
        total += F.nll_loss(known, labels[inside], reduction="sum").item()
        count += int(inside.sum())
        found.append(known)
    return total / count, found


def divergence(truth: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Mean KL divergence of ``other`` from ``truth`` in nats per token."""
    total = sum(F.kl_div(q, p, reduction="sum", log_target=True).item() for p, q in zip(truth, other, strict=True))
    return total / sum(len(p) for p in truth)


def measure(
    model: Any, learned: real.Rows, held_out: real.Rows, plan: Plan, device: torch.device, name: str
) -> list[Row]:
    """The rows of one model, which gets an adapter here."""
    data = real.batches(held_out, 16, device)
    model.eval()
    before, _ = answers(model, data)
    adapted = train(model, learned, plan, device)
    beside, truth = answers(adapted, data)
    calibration = [
        {key: part[key] for key in ("input_ids", "attention_mask")}
        for part in real.batches(learned[: plan.calibration], 16, device)
    ]
    merges: dict[str, Callable[[Any], Any]] = {
        "requantize": lambda m: fastlora.merge(m, "requantize"),
        "error-aware": lambda m: fastlora.merge(m, "error-aware"),
        "error-aware, calibrated": lambda m: fastlora.merge(m, "error-aware", calibration=calibration),
        "dense, bfloat16": lambda m: fastlora.merge(m, "dense", dtype=torch.bfloat16).float(),
        "dense, float32": lambda m: fastlora.merge(m, "dense", dtype=torch.float32),
    }
    case = f"{name}, r = {plan.rank}, {plan.steps} steps"
    rows = [Row(case, "loss, base", before), Row(case, "loss, adapter beside the base", beside)]
    for way, merge in merges.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = merge(copy.deepcopy(adapted)).eval()
        loss, found = answers(merged, data)
        kept = 100 * (before - loss) / (before - beside)
        rows.append(Row(case, f"loss, {way}", loss, note=f"{kept:.1f} % of what was learned is kept"))
        rows.append(Row(case, f"KL divergence, {way}", divergence(truth, found)))
        del merged
    return rows


def rows(device: torch.device, plan: Plan = FULL) -> list[Row]:
    """The rows of SmolLM2-135M-Instruct in NF4 with nested statistics. Raises UserError without the packages."""
    model, tokenizer = real.load(device, torch.float32)
    learned, held_out = real.text(tokenizer, plan.held_out)
    return measure(model, learned, held_out, plan, device, f"{real.NAME}, NF4")
