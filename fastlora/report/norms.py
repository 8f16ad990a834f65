"""How much each layer of an adapter changes, and in how many directions.

The change of a layer is ``D = scale * B A`` (N, K), of which only the factors are known. With ``B = Qb Rb`` and
``A^T = Qa Ra`` the singular values of D are those of the (R, R) matrix ``scale * Rb Ra^T``: D itself is never made.

The effective rank is that of Roy and Vetterli (2007): the exponential of the entropy of the singular values, as shares
of their sum. It is 1 where all of the change lies in one direction, and R where R directions take part alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from fastlora.training.errors import UserError, first_line, require

_PARTS = re.compile(
    r"^(?:base_model\.model\.)?(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B)(?:\.weight)?$"
)
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of a block in the order in which x meets them."""
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """One adapted layer."""

    layer: str
    norm: float
    """Frobenius norm of the change."""
    effective_rank: float
    """0 for a layer that has not changed."""
    rank: int

    @property
    def block(self) -> int | None:
        """The number of its block; None for a layer outside of them."""
        match = _BLOCK.search(self.layer)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """The last part of its name."""
        return self.layer.rpartition(".")[2]

    @property
    def within(self) -> str:
        """Its whole name within its block."""
        match = _BLOCK.search(self.layer)
        return self.layer[match.end() :] if match else self.layer


def singular_values(lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The singular values (min(R, N, K),) of ``scale * lora_b @ lora_a``, descending, in float64.

    lora_a: (R, K). lora_b: (N, R).
    """
    ra = torch.linalg.qr(lora_a.double().t(), mode="r").R
    rb = torch.linalg.qr(lora_b.double(), mode="r").R
    return torch.linalg.svdvals(scale * rb @ ra.t())


def effective_rank(values: torch.Tensor) -> float:
    """The exponential of the entropy of singular values as shares of their sum; 0 where all are 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return math.exp(-(shares * shares.log()).sum().item())


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    alpha = config.get("lora_alpha") or rank
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if layer == pattern or layer.endswith("." + pattern) or re.fullmatch(rf".*\.{pattern}", layer):
            alpha = value
            break
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def of_adapter(folder: Path) -> list[LayerChange]:
    """The layers of a saved LoRA, DoRA or AdaLoRA adapter; empty for an adapter of another kind.

    Raises UserError, which names the file, when it cannot be read.
    """
    path = folder / "adapter_model.safetensors"
    load_file = require("safetensors.torch").load_file
    try:
        weights = load_file(path)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): use another copy") from error
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        match = _PARTS.match(key)
        if match:
            part = match["part"].replace("embedding_", "")
            layers.setdefault(match["layer"], {})[part] = tensor.detach().flatten(1)
    found = []
    for layer, parts in layers.items():
        if "lora_A" not in parts or "lora_B" not in parts:
            continue
        a, b = parts["lora_A"].double(), parts["lora_B"].double()
        rank = a.shape[0]
        if rank == 0:
            found.append(LayerChange(layer, 0.0, 0.0, 0))
            continue
        scale = _scale(config, layer, rank)
        if "lora_E" in parts:  # the triplets of AdaLoRA, whose scale is lora_alpha / r of the start
            a, scale = a * parts["lora_E"].double(), (config.get("lora_alpha") or 1) / (config.get("init_r") or rank)
        values = singular_values(a, b, scale)
        found.append(LayerChange(layer, values.square().sum().sqrt().item(), effective_rank(values), rank))
    return sorted(found, key=_place)


def _place(change: LayerChange) -> tuple[int, int, str]:
    """A key by which layers are in the order of the model, which the file does not keep."""
    place = ORDER.index(change.kind) if change.kind in ORDER else len(ORDER)
    return (-1 if change.block is None else change.block, place, change.layer)
