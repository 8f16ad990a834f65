"""Dense copies of packed weights, where there is memory to spare for them.

A product that reads a whole dense matrix has W decoded for it, to the same values in each pass. A copy that is kept
saves that: results are the same bits. Products that decode W as they multiply, of few rows, read the packed bytes.

A copy lives as long as the memory of the packed bytes that it was made of, and is passed over once they change.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch

from fastlora.nf4 import NF4Weight, version

_Key = tuple[int, int | torch.SymInt]


@dataclasses.dataclass(frozen=True, eq=False)
class _Copy:
    buffer: torch.Tensor
    """Of one or several weights of one K, one below the other."""
    row: int
    """Where in it this one begins."""
    state: tuple[int, ...]


_copies: dict[_Key, _Copy] = {}
"""By the storage of the packed bytes, which is alive, and where in it they begin."""


def _key(w: NF4Weight) -> _Key:
    return w.w_packed.untyped_storage()._cdata, w.w_packed.storage_offset()


def _state(w: NF4Weight) -> tuple[int, ...]:
    """What a change of the weight's tensors, in place or for others, changes."""
    statistics = w.absmax if w.absmax_q is None else w.absmax_q
    assert statistics is not None
    return version(w.w_packed), version(statistics), statistics.data_ptr()


def keep(weights: Sequence[NF4Weight], buffer: torch.Tensor) -> None:
    """Have `find` return ``buffer`` (sum of N_i, K), what ``weights`` (N_i, K) decode to, which nobody changes."""
    row = 0
    for w in weights:
        key = _key(w)
        if key not in _copies:
            weakref.finalize(w.w_packed.untyped_storage(), _copies.pop, key, None)
        _copies[key] = _Copy(buffer, row, _state(w))
        row += w.shape[0]


def find(weights: Sequence[NF4Weight], dtype: torch.dtype) -> torch.Tensor | None:
    """The dense matrices of ``weights`` one below the other, (sum of N_i, K) of ``dtype``, not to be changed, or None
    where there is no copy of them in this order."""
    if not _copies:
        return None
    first: _Copy | None = None
    end = 0
    for w in weights:
        copy = _copies.get(_key(w))
        if copy is None or copy.buffer.dtype != dtype or copy.state != _state(w):
            return None
        if first is None:
            first, end = copy, copy.row
        elif copy.buffer is not first.buffer or copy.row != end:
            return None
        end += w.shape[0]
    assert first is not None
    return first.buffer if end - first.row == first.buffer.shape[0] else first.buffer[first.row : end]


def drop(weights: Sequence[NF4Weight]) -> None:
    """Keep no copies of ``weights``."""
    for w in weights:
        _copies.pop(_key(w), None)


def held() -> list[torch.Tensor]:
    """All copies: for who replays kernels that read them, and so must keep them alive."""
    copies = tuple(_copies.values())  # at once: a weight may go while a loop runs
    return list({id(copy.buffer): copy.buffer for copy in copies}.values())
