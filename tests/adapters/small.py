"""Small models with adapters, the same at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastlora import FastLoRALinear

SIZES = ((64, 128), (128, 64))
"""(in_features, out_features) of the layers of the models: whole blocks, which bitsandbytes' CPU kernel needs."""


def stack(
    r: int = 4,
    dtype: torch.dtype = torch.float64,
    *,
    quant_type: str | None = "nf4",
    learned: bool = True,
    bias: bool = True,
    **options: Any,
) -> nn.Sequential:
    """Two standalone layers. ``learned``: B is not zero."""
    torch.manual_seed(0)
    layers = [
        FastLoRALinear(
            k, n, r, 3, bias=bias, quant_type=quant_type, dtype=dtype, init_lora_weights=not learned, **options
        )
        for k, n in SIZES
    ]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Two layers with an activation between them, under names as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(*SIZES[0])
        self.norm = nn.LayerNorm(SIZES[0][1])
        self.down = nn.Linear(*SIZES[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def peft_mlp(config: Any = None, base: str = "4bit", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """`MLP` wrapped by PEFT with ``config``, or LoRA of rank 4 with the fields of ``lora``. base: "4bit" or "dense"."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MLP().to(dtype)
    if base == "4bit":
        bnb = pytest.importorskip("bitsandbytes")
        for name in ("up", "down"):
            dense = getattr(model, name)
            packed = bnb.nn.Linear4bit(
                dense.in_features, dense.out_features, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(
                dense.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
            )
            packed.bias = dense.bias
            packed.to("cpu")
            # Evaluation on a CPU with AVX512-BF16 would rewrite the packed bytes in place.
            packed.support_avx512bf16_for_cpu = False
            setattr(model, name, packed)
        model.is_loaded_in_4bit = True
    torch.manual_seed(1)
    if config is None:
        fields = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **lora}
        config = peft.LoraConfig(target_modules=["up", "down"], **fields)
    return peft.get_peft_model(model, config)


def batch(dtype: torch.dtype = torch.float64, m: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """x (M, 64) and a target (M, 64)."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(m, 64, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))  # type: ignore[return-value]


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x, target = batch(dtype)
    return (model(x) - target).square().mean()


def train(
    model: nn.Module, optimizer: Any, steps: int, dtype: torch.dtype = torch.float64, before: Any = None
) -> list[float]:
    """The losses of ``steps`` steps on one batch. ``before``: called with the number of each step, from 0."""
    losses = []
    for step in range(steps):
        if before is not None:
            before(step)
        optimizer.zero_grad()
        loss = loss_of(model, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
