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


def side_by_side(gate: torch.Tensor, up: torch.Tensor, *, in_place: bool) -> torch.Tensor:
    """A matrix (M, 2 N) for what is made of gate and up (M, N): a new one, or ``in_place`` the one that they are in."""
    m, n = gate.shape
    return gate.as_strided((m, 2 * n), (gate.stride(0), 1)) if in_place else up.new_empty(m, 2 * n)
