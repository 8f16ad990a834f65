"""What became of each LoRA layer."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fastlora import backends
from fastlora.backends import Problem
from fastlora.integrations.peft.copies import Copies
from fastlora.integrations.peft.situation import layer_weight
from fastlora.nf4 import NF4Weight

_REPORTED_TOKENS = 2048
"""The report names the backend for this many tokens: a usual training step of one sequence."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What became of one PEFT layer."""

    name: str
    kind: str
    shape: tuple[int, int]
    """(out_features, in_features)"""
    rank: int
    """The sum over the active adapters."""
    backend: str | None
    reason: str | None
    """Why PEFT's forward runs; None when the fused operator does."""


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """What became of layers of one module that could compute together."""

    name: str
    """The module's."""
    kind: str
    """"shared input", "gated MLP", "residual and norm", "norm", "head and loss" or "rotary embedding"."""
    layers: tuple[str, ...]
    reason: str | None
    """Why each layer computes for itself; None when they compute together."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `accelerate` did. ``str(report)`` is a table; layers that differ only by their number share a row."""

    layers: tuple[LayerReport, ...]
    blocks: tuple[BlockReport, ...] = ()
    """Empty where blocks were not asked for."""
    liger: tuple[str, ...] = ()
    """What Liger kernels replaced; empty where they were not asked for."""
    captured: bool = False
    """Whether Liger's cross-entropy was left out for the sake of CUDA graphs."""
    copies: Copies | None = None
    """The packed weights that are kept dense; None where that was not asked for."""

    @property
    def joined(self) -> list[BlockReport]:
        return [block for block in self.blocks if block.reason is None]

    @property
    def replaced(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.reason is not None]

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            key = (_numberless(layer.name), layer.kind, layer.shape, layer.rank, layer.backend, layer.reason)
            groups.setdefault(key, []).append(layer)
        rows: list[tuple[str, ...]] = [("layer", "count", "base", "out x in", "rank", "runs on")]
        for (pattern, kind, (n, k), rank, backend, reason), layers in groups.items():
            name = layers[0].name if len(layers) == 1 else pattern
            rows.append((name, str(len(layers)), kind, f"{n} x {k}", str(rank), backend or f"PEFT: {reason}"))
        lines = [*_table(rows), f"{len(self.replaced)} of {len(self.layers)} LoRA layers fused"]
        if self.blocks:
            lines += ["", *self._blocks()]
        if self.liger:
            loss = " (not its cross-entropy, which a CUDA graph cannot hold)" if self.captured else ""
            lines += ["", f"Liger kernels: {', '.join(self.liger)}{loss}"]
        if self.copies:
            lines += ["", str(self.copies)]
        return "\n".join(lines)

    def _blocks(self) -> list[str]:
        groups: dict[tuple[Any, ...], list[BlockReport]] = {}
        for block in self.blocks:
            key = (_numberless(block.name), block.kind, block.layers, block.reason)
            groups.setdefault(key, []).append(block)
        rows: list[tuple[str, ...]] = [("module", "count", "kind", "layers", "computed")]
        for (pattern, kind, layers, reason), blocks in groups.items():
            name = blocks[0].name if len(blocks) == 1 else pattern
            rows.append(
                (name, str(len(blocks)), kind, ", ".join(layers), f"by layer: {reason}" if reason else "together")
            )
        return [*_table(rows), f"{len(self.joined)} of {len(self.blocks)} blocks fused"]


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def report_layer(name: str, layer: Any, backend: str, reason: str | None) -> LayerReport:
    """The report of one layer, which runs on ``backend`` unless there is a ``reason`` why PEFT's forward runs."""
    rank = sum(layer.r[adapter] for adapter in layer.active_adapters if adapter in layer.r)
    shape = (layer.out_features, layer.in_features)
    kind, chosen = type(layer.base_layer).__name__, None
    if reason is None:
        weight = layer_weight(layer)
        problem = Problem(_REPORTED_TOKENS, *shape, rank, device_type=weight.device.type, dtype=weight.dtype)
        if isinstance(weight, NF4Weight):
            kind = f"{weight.quant_type}/{weight.blocksize}{' nested' if weight.nested else ''}"
            dtype = getattr(layer.base_layer, "compute_dtype", None) or weight.dtype
            problem = dataclasses.replace(
                problem, dtype=dtype, quant_type=weight.quant_type, blocksize=weight.blocksize, nested=weight.nested
            )
        else:
            kind = f"dense {str(weight.dtype).removeprefix('torch.')}"
            problem = dataclasses.replace(problem, quant_type=None)
        chosen = backends.select(problem, backend).name
    return LayerReport(name, kind, shape, rank, chosen, reason)
