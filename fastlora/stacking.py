"""Matrices side by side in one buffer."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def as_one(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The matrix (M, sum N) whose columns ``parts`` (M, N_i) are, one after the other, or None where there is none."""
    first = parts[0]
    if len(parts) == 1:
        return first
    start, stride, storage = first.storage_offset(), first.stride(0), first.untyped_storage().data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == storage and part.dtype == first.dtype
        if not same or part.stride() != (stride, 1) or part.storage_offset() != start:
            return None
        start += part.shape[1]
    n = start - first.storage_offset()
    return first.as_strided((first.shape[0], n), (stride, 1)) if stride >= n else None
