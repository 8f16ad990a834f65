"""Checkpoints of gradient checkpointing in the memory of the CPU, through PyTorch's hooks for saved tensors.

A checkpoint leaves on a stream of its own while its block computes, and comes back while the block after it is in its
backward pass. PyTorch's ``save_on_cpu`` has the computation wait for every copy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FUNCTION = "_gradient_checkpointing_func"
"""Where transformers keeps what a layer is checkpointed by."""


_LEAVING = 2
"""Tensors on the device whose copies to the CPU may be under way: more would take memory, one would stop the pass."""


class Side:
    """Copies between the CPU's memory and a CUDA device, on a stream of their own, in the order they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        """Start once the computation has come to here; returns what `wait` takes."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Have the computation wait for a copy; the host goes on."""
        torch.cuda.current_stream(self.device).wait_event(copied)


class AtOnce:
    """The same for a device without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        target.copy_(source)

    def wait(self, copied: Any) -> None:
        pass


class _Kept:
    """A tensor on the CPU, and the one that left before it."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: Callable[[], _Kept | None]) -> None:
        self.host, self.device, self.before = host, device, before
        self.used = False


class Pipe:
    """Saved tensors that wait on the CPU. `pack` and `unpack` are hooks for ``saved_tensors_hooks``.

    Both run on streams of the computation. Memory of the device that a copy reads or writes belongs to the stream of
    the computation, and is only let go once that stream waits for the copy: no other use can overtake it.
    """

    def __init__(self, side: Callable[[torch.device], Any] | None = None) -> None:
        self._make_side = side
        self._sides: dict[torch.device, Any] = {}
        self._leaving: deque[tuple[_Kept, torch.Tensor, Any, int]] = deque()
        self._coming: dict[_Kept, tuple[torch.Tensor, Any]] = {}
        self._last: Callable[[], _Kept | None] = lambda: None

    def pack(self, t: torch.Tensor) -> Any:
        # A checkpoint also saves an empty tensor, which lies on the CPU.
        if not t.is_floating_point() or not t.numel():
            return t
        self._drop_coming()
        t = t.detach()  # not the graph that made it
        kept = _Kept(torch.empty_like(t, device="cpu", pin_memory=t.is_cuda), t.device, self._last)
        self._leaving.append((kept, t, self._side(t.device).copy(kept.host, t), t._version))
        if len(self._leaving) > _LEAVING:
            self._gone(*self._leaving.popleft())
        self._last = weakref.ref(kept)
        return kept

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Kept):
            return packed
        found = self._take(packed)
        packed.used = True
        before = packed.before()
        while before is not None and before.used:
            before = before.before()
        if before is not None:
            self._fetch(before)
        return found

    def _take(self, kept: _Kept) -> torch.Tensor:
        side = self._side(kept.device)
        for entry in self._leaving:
            if entry[0] is kept:
                self._leaving.remove(entry)
                return self._gone(*entry)
        self._fetch(kept)
        found, copied = self._coming.pop(kept)
        side.wait(copied)
        return found

    def _gone(self, kept: _Kept, t: torch.Tensor, copied: Any, version: int) -> torch.Tensor:
        if t._version != version:
            raise RuntimeError("a checkpoint was changed in place while it was copied to the CPU")
        self._side(kept.device).wait(copied)
        return t

    def _fetch(self, kept: _Kept) -> None:
        if kept in self._coming or any(kept is left for left, *_ in self._leaving):
            return
        target = torch.empty_like(kept.host, device=kept.device)
        self._coming[kept] = target, self._side(kept.device).copy(target, kept.host)

    def _drop_coming(self) -> None:
        """What a backward pass that came to no end had asked for."""
        for target, copied in self._coming.values():
            self._side(target.device).wait(copied)
        self._coming.clear()

    def _side(self, device: torch.device) -> Any:
        if device not in self._sides:
            make = self._make_side or (Side if device.type == "cuda" else AtOnce)
            self._sides[device] = make(device)
        return self._sides[device]


class _Offloading:
    """A checkpointing function whose inputs wait on the CPU, in pinned memory, for their backward pass."""

    def __init__(self, checkpoint: Callable[..., Any], pipe: Pipe) -> None:
        self.checkpoint, self.pipe = checkpoint, pipe

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Only the inputs are kept under these hooks: what the function keeps goes through checkpointing's own.
        with torch.autograd.graph.saved_tensors_hooks(self.pipe.pack, self.pipe.unpack):
            return self.checkpoint(function, *args, **kwargs)


def offload_checkpoints(model: nn.Module) -> int:
    """Have every checkpointed layer of a transformers model keep its inputs on the CPU; returns how many there are.

    To be called once gradient checkpointing (the kind without reentrance) is on. Calling it again is harmless. The
    step must be launched kernel by kernel: neither compiled nor captured.
    """
    count, pipe = 0, Pipe()
    for module in model.modules():
        checkpoint = module.__dict__.get(_FUNCTION)
        if checkpoint is None:
            continue
        count += 1
        if not isinstance(checkpoint, _Offloading):
            setattr(module, _FUNCTION, _Offloading(checkpoint, pipe))
    return count


class OffloadCheckpoints(TrainerCallback):
    """`offload_checkpoints`, after the trainer has turned checkpointing on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if offload_checkpoints(kwargs["model"]) == 0:
            raise RuntimeError("no layer of the model is checkpointed, so there is nothing to offload")
