"""The layers of a model in a table: shapes, parameters, and which of them learn."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from fastlora.linear import NF4Linear


@dataclasses.dataclass(frozen=True)
class Line:
    """A module of the model. Counts are those of its own parameters, without those of modules inside it."""

    name: str
    kind: str
    """The name of its class."""
    depth: int
    shape: tuple[int, ...] | None
    """Of its output; None where it was not seen."""
    parameters: int
    """A 4-bit weight counts as what it stands for, two a byte."""
    trainable: int


def _count(module: nn.Module, counted: set[int]) -> tuple[int, int]:
    """Own parameters of ``module`` that are not ``counted`` yet, and those of them that learn."""
    total = learn = 0
    for parameter in module.parameters(recurse=False):
        if id(parameter) in counted:
            continue
        counted.add(id(parameter))
        state = getattr(parameter, "quant_state", None)
        n = parameter.numel()
        if state is not None and getattr(state, "shape", None) is not None:
            n = math.prod(state.shape)
        total += n
        learn += n if parameter.requires_grad else 0
    if isinstance(module, NF4Linear) and id(module.weight) not in counted:  # whose packed weight is a buffer
        counted.add(id(module.weight))
        total += module.nf4.numel()
    return total, learn


def lines(model: nn.Module, *inputs: Any, **named: Any) -> list[Line]:
    """Every module of ``model`` in its order. A parameter that two modules share counts for the first.

    inputs, named: what to call the model with once, in evaluation mode and without gradients, to see the shapes of
    outputs; without any, only parameters are counted.
    """
    shapes: dict[int, tuple[int, ...]] = {}
    handles = []

    def seen(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if hasattr(first, "values") and not isinstance(first, torch.Tensor):  # the output of a transformers model
            first = next((value for value in first.values() if isinstance(value, torch.Tensor)), None)
        if isinstance(first, torch.Tensor):
            shapes[id(module)] = tuple(first.shape)

    if inputs or named:
        handles = [module.register_forward_hook(seen) for module in model.modules()]
        modes = [(module, module.training) for module in model.modules()]
        try:
            with torch.no_grad():
                model.eval()(*inputs, **named)
        finally:
            for module, training in modes:  # parts of a model that trains may be in evaluation mode
                module.training = training
            for handle in handles:
                handle.remove()
    counted: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and not len(module):
            continue  # PEFT keeps some for forms of an adapter that this one has not
        total, learn = _count(module, counted)
        depth = name.count(".") + 1 if name else 0
        found.append(Line(name, type(module).__name__, depth, shapes.get(id(module)), total, learn))
    return found


def table(model: nn.Module, *inputs: Any, depth: int | None = None, **named: Any) -> str:
    """`lines` as aligned text with a total: a module that is not shown counts for the one around it.

    depth: of the deepest modules shown; None for all.
    """
    found = lines(model, *inputs, **named)
    shown: list[Line] = []
    for line in found:
        if depth is None or line.depth <= depth:
            shown.append(line)
            continue
        at = next(i for i in range(len(shown) - 1, -1, -1) if _around(shown[i].name, line.name))
        sums = {key: getattr(shown[at], key) + getattr(line, key) for key in ("parameters", "trainable")}
        shown[at] = dataclasses.replace(shown[at], **sums)
    cells = [("layer", "output shape", "parameters", "trainable")]
    for line in shown:
        label = "  " * line.depth + (f"{line.name.rpartition('.')[2]}: " if line.name else "") + line.kind
        shape = "-" if line.shape is None else " x ".join(str(side) for side in line.shape)
        parameters, trainable = (f"{n:,}" if n else "-" for n in (line.parameters, line.trainable))
        cells.append((label, shape, parameters, trainable))
    total, learn = sum(line.parameters for line in found), sum(line.trainable for line in found)
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    rule = "-" * (sum(widths) + 6)
    share = f" ({learn / total:.2%})" if total else ""
    return "\n".join([text[0], rule, *text[1:], rule, f"{total:,} parameters, {learn:,} trainable{share}"])


def _around(outer: str, inner: str) -> bool:
    return not outer or inner.startswith(outer + ".")
