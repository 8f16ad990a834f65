"""What a checkpointed block makes again in the backward pass and the backward pass of the same block can use as it is.

A checkpoint throws away the autograd nodes of what it computes again, and looks at how many tensors they keep. What is
handed over here therefore hangs on a tensor that they do keep, a view or a detached copy of it included: it lives as
long as the memory of that tensor, and no longer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

_held: dict[int, Any] = {}
"""By the address of a storage that is alive."""


def running() -> bool:
    """Whether this is inside of a backward pass: a forward pass there is a checkpoint's second."""
    return bool(torch._C._current_graph_task_id() != -1)


def hand_over(kept: torch.Tensor, value: Any) -> None:
    """Leave ``value`` to whoever takes it with ``kept``."""
    storage = kept.untyped_storage()
    key = storage._cdata
    if key not in _held:
        weakref.finalize(storage, _held.pop, key, None)
    _held[key] = value


def take(kept: torch.Tensor) -> Any:
    """What was left with ``kept``, once, or None."""
    key = kept.untyped_storage()._cdata
    return _held.pop(key, None)
