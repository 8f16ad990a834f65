"""Checkpoints of gradient checkpointing in the memory of the CPU, through PyTorch's own hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps what a layer is checkpointed by."""


class _Offloading:
    """A checkpointing function whose inputs wait on the CPU, in pinned memory, for their backward pass."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Only the inputs are kept under these hooks: what the function keeps goes through checkpointing's own.
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return self.checkpoint(function, *args, **kwargs)


def offload_checkpoints(model: nn.Module) -> int:
    """Have every checkpointed layer of a transformers model keep its inputs on the CPU; returns how many there are.

    To be called once gradient checkpointing (the kind without reentrance) is on. Calling it again is harmless.
    """
    count = 0
    for module in model.modules():
        checkpoint = module.__dict__.get(_FUNCTION)
        if checkpoint is None:
            continue
        count += 1
        if not isinstance(checkpoint, _Offloading):
            setattr(module, _FUNCTION, _Offloading(checkpoint))
    return count


class OffloadCheckpoints(TrainerCallback):
    """`offload_checkpoints`, after the trainer has turned checkpointing on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if offload_checkpoints(kwargs["model"]) == 0:
            raise RuntimeError("no layer of the model is checkpointed, so there is nothing to offload")
