"""Runs as files: their logs, settings and adapters, without training any."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

STEPS = 40
LAYERS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")]


def write_adapter(folder: Path, r: int, *, alpha: float = 16, seed: int = 0, **config: Any) -> dict[str, torch.Tensor]:
    """A LoRA adapter of ``r`` in which B of the last layer is zero."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    weights = {}
    for layer in LAYERS:
        weights[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(r, 24, generator=generator)
        weights[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(20, r, generator=generator)
    weights[f"base_model.model.{LAYERS[-1]}.lora_B.weight"].zero_()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": r, **config}))
    return weights


def write_run(
    folder: Path, *, r: int = 4, lr: float = 1e-3, end: float = 2.0, finished: bool = True, **config: Any
) -> Path:
    folder.mkdir(parents=True)
    entries: list[dict[str, Any]] = [{"eval_loss": 6.0, "eval_runtime": 1.0, "step": 0}]
    for step in range(1, STEPS + 1):
        share = 1 - step / STEPS
        loss = end + (6 - end) * share**2 + 0.2 * math.sin(step)
        entry = {"loss": loss, "grad_norm": 1 + share, "learning_rate": lr * share, "epoch": 1.0, "step": step}
        entries.append({**entry, "tokens_per_second": 1000.0 + step, "memory_gib": 1.5})
        if step % 10 == 0:
            entries.append({"eval_loss": end + (6 - end) * share**2, "step": step})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = {"model": "m", "data": "d.jsonl", "method": "lora", "r": r, "lora_alpha": 16.0, "lr": lr, **config}
    settings["output_dir"] = str(folder)
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    if finished:
        cost = {"step_ms": 12.5, "tokens_per_second": 1020.0, "peak_memory": 3 * 2**29, "seconds": 0.5}
        (folder / "result.json").write_text(json.dumps({**cost, "parameters": 1000 * r, "log_history": entries}))
        write_adapter(folder / "adapter", r)
    return folder
