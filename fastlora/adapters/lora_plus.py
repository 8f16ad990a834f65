"""LoRA+: B learns ``ratio`` times as fast as A (Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models",
2024).

    A <- A - lr * step(dA),   B <- B - ratio * lr * step(dB)

The layers compute plain LoRA; the method is the optimizer's parameter groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RATIO = 16.0
"""The paper's ratio for large models."""
EMBEDDING_LR = 1e-6
_NORMS = ("LayerNorm", "RMSNorm")


def parameter_groups(
    model: nn.Module,
    lr: float,
    ratio: float = RATIO,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = EMBEDDING_LR,
) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` in the groups of LoRA+, for any optimizer; groups without any are left out.

    lr: of A, of VeRA's and AdaLoRA's matrices, and of what else is trained. ratio: B and every vector (magnitudes,
    biases) learn at ``lr * ratio``. weight_decay: of all but biases and the weights of norms. embedding_lr: of adapters
    on embedding layers.

    Raises ValueError for a rate or ratio that is not positive, and when nothing is trained.
    """
    if lr <= 0 or ratio <= 0 or embedding_lr <= 0:
        raise ValueError(f"lr, ratio and embedding_lr must be positive, got {lr}, {ratio} and {embedding_lr}")
    names = ("A", "embedding", "B", "B, no decay")
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for path, module in model.named_modules():
        norm = type(module).__name__.endswith(_NORMS)
        for leaf, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                name = f"{path}.{leaf}"
                decays = not norm and "bias" not in name
                if "lora_embedding_" in name:
                    group = "embedding"
                elif "lora_B" in name or p.ndim == 1:
                    group = "B" if decays else "B, no decay"
                else:
                    group = "A"
                if not any(p is q for q in parameters[group]):
                    parameters[group].append(p)
    if not any(parameters.values()):
        raise ValueError("the model has no trained parameters: add an adapter first")
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio, "B, no decay": lr * ratio}
    return [
        {"params": parameters[name], "lr": rates[name], "weight_decay": 0.0 if "no decay" in name else weight_decay}
        for name in names
        if parameters[name]
    ]


def optimizer(
    model: nn.Module, kind: type[torch.optim.Optimizer], lr: float, ratio: float = RATIO, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of the class ``kind``, PyTorch's or bitsandbytes', on `parameter_groups`.

    options: ``weight_decay`` and ``embedding_lr`` go to the groups, all others to ``kind``.
    """
    own = {key: options.pop(key) for key in ("weight_decay", "embedding_lr") if key in options}
    return kind(parameter_groups(model, lr, ratio, **own), lr=lr, **options)  # type: ignore[call-arg]
