"""How several projections of one x are computed: the three forms of a group, forward and backward.

    stacked   Triton: one dequantization, one product each way, one pass over x and dy for all adapters
    library   the same in library products, on any device: the `torch` backend
    each      one projection after the other, by the backend that is chosen for it

Every form has ``forward(x, projections, out_dtype) -> (parts of y, kept)`` and ``backward(dys, x, kept, projections,
needs) -> (dx, [dA_i], [dB_i])``; ``kept`` are the tensors to hold for the backward pass beside x.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fastlora import backends, native, ops, tables
from fastlora.nf4 import NF4Weight, Weight
from fastlora.stacking import as_one

__all__ = ["Each", "Form", "Library", "Needs", "Projection", "Stacked", "as_one", "columns", "form", "kernels", "sizes"]

Grads = tuple["torch.Tensor | None", list["torch.Tensor | None"], list["torch.Tensor | None"]]


@dataclasses.dataclass(eq=False, slots=True)
class Projection:
    """One linear layer of a group: W x + scale * B (A x) + bias."""

    w: Weight
    """(N, K), frozen"""
    lora_a: torch.Tensor | None = None
    """(R, K), None without an adapter"""
    lora_b: torch.Tensor | None = None
    """(N, R), None without an adapter"""
    bias: torch.Tensor | None = None
    """(N,)"""
    scale: float = 1.0

    @property
    def r(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]


@dataclasses.dataclass(frozen=True)
class Needs:
    """Which gradients a backward pass is asked for."""

    dx: bool
    da: tuple[bool, ...]
    db: tuple[bool, ...]


class Form(Protocol):
    """A way to compute a group."""

    def forward(
        self, x: torch.Tensor, projections: Sequence[Projection], out_dtype: torch.dtype | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """y of each, and what the backward pass needs."""
        ...

    def project(self, x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]: ...

    def backward(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor | None,
        kept: Sequence[torch.Tensor],
        projections: Sequence[Projection],
        needs: Needs,
        dtype: torch.dtype,
    ) -> Grads: ...


@functools.cache
def kernels(name: str) -> Any:
    """A module of `fastlora.kernels`, by name, so that importing this one never imports Triton."""
    return importlib.import_module(f"fastlora.kernels.{name}")


def columns(y: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The parts of y (M, sum of sizes), as views."""
    return list(y.split_with_sizes(sizes, 1))


def sizes(projections: Sequence[Projection]) -> list[int]:
    return [p.w.shape[0] for p in projections]


class Each:
    """One projection after the other."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, x: torch.Tensor, projections: Sequence[Projection], out_dtype: torch.dtype | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        ys, us = [], []
        for p in projections:
            y, u = ops.forward(x, p.w, p.lora_a, p.lora_b, p.bias, out_dtype, p.scale, 0.0, None, self.backend)
            ys.append(y)
            us.append(u)
        return ys, us

    def project(self, x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
        """What `forward` keeps, alone."""
        return [x.new_empty(x.shape[0], 0) if p.lora_a is None else x @ p.lora_a.to(x.dtype).T for p in projections]

    def backward(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor | None,
        kept: Sequence[torch.Tensor],
        projections: Sequence[Projection],
        needs: Needs,
        dtype: torch.dtype,
    ) -> Grads:
        total: torch.Tensor | None = None
        das: list[torch.Tensor | None] = []
        dbs: list[torch.Tensor | None] = []
        for i, (p, dy) in enumerate(zip(projections, dys, strict=True)):
            wanted = (needs.dx, needs.da[i], needs.db[i])
            dx = da = db = None
            if any(wanted):
                dy = dy.to(dtype)
                dx, da, db = ops.backward(
                    dy, x, kept[i], p.w, p.lora_a, p.lora_b, p.scale, 0.0, None, self.backend, wanted
                )
            if dx is not None:
                total = dx if total is None else total.add_(dx)
            das.append(da)
            dbs.append(db)
        return total, das, dbs


class Library:
    """Library products of the stacked weight, ordered so that y is rounded once."""

    def forward(
        self, x: torch.Tensor, projections: Sequence[Projection], out_dtype: torch.dtype | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        w, u = backends.multiplier([p.w for p in projections], x.dtype), self._project(x, projections)
        dtype, narrow = out_dtype or x.dtype, self._narrow(u, projections)
        if x.is_cuda and x.dtype.itemsize == 2:
            # cuBLAS rounds a 16-bit product before it adds to it: its float32 sums are kept until all is in.
            y = torch.mm(x, w.T, out_dtype=torch.float32)
        elif dtype != x.dtype:
            y = x.to(dtype) @ w.to(dtype).T
        else:
            y = x.new_zeros(x.shape[0], w.shape[0])
        for part, u_i, p in zip(columns(y, sizes(projections)), narrow, projections, strict=True):
            if p.lora_b is not None:
                b = p.lora_b.to(x.dtype).T
                term = torch.mm(u_i, b, out_dtype=y.dtype) if x.is_cuda and y.dtype != x.dtype else u_i @ b
                part.add_(term, alpha=p.scale)
            if p.bias is not None:
                part.add_(p.bias.to(x.dtype))
        if y.dtype == x.dtype and not (x.is_cuda and x.dtype.itemsize == 2):
            y.addmm_(x, w.T)
        return columns(y.to(dtype), sizes(projections)), [u]

    def project(self, x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
        """What `forward` keeps, alone."""
        return [self._project(x, projections)]

    def backward(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor | None,
        kept: Sequence[torch.Tensor],
        projections: Sequence[Projection],
        needs: Needs,
        dtype: torch.dtype,
    ) -> Grads:
        dys = [dy.to(dtype) for dy in dys]
        scaled = [
            dy.new_empty(dy.shape[0], 0) if p.lora_b is None else (dy @ p.lora_b.to(dtype)).mul_(p.scale)
            for dy, p in zip(dys, projections, strict=True)
        ]
        du = torch.cat(scaled, 1)
        dx = None
        if needs.dx:
            adapters = [p.lora_a.to(dtype) for p in projections if p.lora_a is not None]
            dy = torch.cat(dys, 1) if len(dys) > 1 else dys[0]
            w = backends.multiplier([p.w for p in projections], dtype)
            dx = (du @ torch.cat(adapters)).addmm_(dy, w) if adapters else dy @ w
        das: list[torch.Tensor | None] = [None] * len(dys)
        dbs: list[torch.Tensor | None] = [None] * len(dys)
        if any(needs.da):
            assert x is not None
            parts = (du.T @ x).split([p.r for p in projections])
            das = [
                part.to(p.lora_a.dtype) if need and p.lora_a is not None else None
                for part, p, need in zip(parts, projections, needs.da, strict=True)
            ]
        if any(needs.db):
            narrow = self._narrow(kept[0], projections)
            dbs = [
                (dy.T @ u_i).mul_(p.scale).to(p.lora_b.dtype) if need and p.lora_b is not None else None
                for dy, u_i, p, need in zip(dys, narrow, projections, needs.db, strict=True)
            ]
        return dx, das, dbs

    @staticmethod
    def _project(x: torch.Tensor, projections: Sequence[Projection]) -> torch.Tensor:
        adapters = [p.lora_a.to(x.dtype) for p in projections if p.lora_a is not None]
        return x @ torch.cat(adapters).T if adapters else x.new_empty(x.shape[0], 0)

    @staticmethod
    def _narrow(u: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
        return columns(u, [p.r for p in projections])


class Stacked:
    """The Triton kernels of `fastlora.kernels.stacked`."""

    def adapters(self, projections: Sequence[Projection], like: torch.Tensor) -> Any:
        """Packed, in the type of ``like``."""
        return kernels("stacked").Adapters(
            [p.w.shape for p in projections],
            [p.lora_a if p.r else None for p in projections],
            [p.lora_b if p.r else None for p in projections],
            [p.scale for p in projections],
            like,
        )

    def forward(
        self,
        x: torch.Tensor,
        projections: Sequence[Projection],
        out_dtype: torch.dtype | None,
        adapters: Any = None,
        u: torch.Tensor | None = None,
        *,
        keep: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """``adapters``, packed, and u are given where they are known. ``keep``: the adapters hold W from now on."""
        weights, biases = [p.w for p in projections], [p.bias for p in projections]
        adapters = adapters or self.adapters(projections, x)
        y, u = kernels("stacked").forward(x, weights, adapters, biases, out_dtype, u, keep=keep)
        return columns(y, sizes(projections)), [u]

    def project(self, x: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor]:
        """What `forward` keeps, alone."""
        return [kernels("stacked").project(x, self.adapters(projections, x))]

    def backward(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor | None,
        kept: Sequence[torch.Tensor],
        projections: Sequence[Projection],
        needs: Needs,
        dtype: torch.dtype,
        adapters: Any = None,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Grads:
        """``adapters`` and ``known``, dy as one matrix and du, are given where they are known."""
        adapters = adapters or self.adapters(projections, dys[0].new_empty(0, dtype=dtype))
        kinds, u, db = self.kinds(projections), kept[0] if any(needs.db) else None, None
        if known is None:
            dy, du, db = self.output_side(dys, u, adapters, kinds[1], dtype)
            known = dy, du
        dx, das, dbs = kernels("stacked").backward(
            *known,
            x,
            u if db is None else None,
            [p.w for p in projections],
            adapters,
            kinds,
            (needs.dx, any(needs.da), u is not None and db is None),
        )
        if db is not None:
            dbs = kernels("stacked").apart_b(db, adapters)
        for i, p in enumerate(projections):
            das[i] = _typed(das[i], p.lora_a, needs.da[i])
            dbs[i] = _typed(dbs[i], p.lora_b, needs.db[i])
        return dx, das, dbs

    @staticmethod
    def output_side(
        dys: Sequence[torch.Tensor], u: torch.Tensor | None, adapters: Any, kind: torch.dtype, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """All dy as one matrix of ``dtype``, du, and dB of all projections, packed, where the same read makes it.

        u: None where dB is not needed.
        """
        if u is None or adapters.b is None or dys[0].dtype != dtype or not native.one_pass(dys, adapters.span):
            return *kernels("stacked").project_gradients(dys, adapters, dtype), None
        dy, joined = as_one(dys), None
        if dy is None:
            dy = joined = u.new_empty(u.shape[0], sum(adapters.sizes))
        return dy, *native.du_db(dys, u, adapters.b, adapters.scales, kind, joined)

    @staticmethod
    def kinds(projections: Sequence[Projection]) -> tuple[torch.dtype, torch.dtype]:
        """The types that dA and dB of all projections are made in."""
        kinds_a = {p.lora_a.dtype for p in projections if p.lora_a is not None}
        kinds_b = {p.lora_b.dtype for p in projections if p.lora_b is not None}
        kind_a, kind_b = (kind.pop() if len(kind) == 1 else torch.float32 for kind in (kinds_a, kinds_b))
        return kind_a, kind_b

    @staticmethod
    def gradients_a(da: torch.Tensor, adapters: Any, projections: Sequence[Projection]) -> list[torch.Tensor | None]:
        """dA_i of packed ones."""
        parts = zip(kernels("stacked").apart_a(da, adapters), projections, strict=True)
        return [_typed(part, p.lora_a, True) for part, p in parts]

    @staticmethod
    def gradients_b(db: torch.Tensor, adapters: Any, projections: Sequence[Projection]) -> list[torch.Tensor | None]:
        """dB_i of packed ones."""
        parts = zip(kernels("stacked").apart_b(db, adapters), projections, strict=True)
        return [_typed(part, p.lora_b, True) for part, p in parts]


def _typed(grad: torch.Tensor | None, adapter: torch.Tensor | None, need: bool) -> torch.Tensor | None:
    if not need or adapter is None:
        return None
    # An adapter of rank 0 has no part in the packed ones.
    return torch.zeros_like(adapter) if grad is None else grad.to(adapter.dtype)


def form(x: torch.Tensor, projections: Sequence[Projection], backend: str) -> Form:
    """The form for x (M, K). A function of sizes, types, the machine and the tables.

    Raises ValueError for an unknown backend; one that cannot run raises when it is asked to compute.
    """
    if backend not in ("auto", *backends.BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(('auto', *backends.BACKENDS))}")
    if backend == "torch":
        return Library()
    if backend in ("auto", "triton") and _stacks(x, projections, backend):
        return Stacked()
    return Each(backend)


def _stacks(x: torch.Tensor, projections: Sequence[Projection], backend: str) -> bool:
    machine = backends.this_machine()
    if machine.triton is not None or not (x.is_cuda or machine.triton_interpreted) or not x.shape[0]:
        return False
    if kernels("stacked").unsupported(x, [p.w for p in projections]) is not None:
        return False
    (m, k), n, r = x.shape, sum(sizes(projections)), max(p.r for p in projections)
    least = tables.STACKED if tables.captured() else tables.PERSISTENT_WITH_LAUNCHES
    if backend == "auto" and m * n * k < least:
        return False
    packed = all(isinstance(p.w, NF4Weight) for p in projections)
    return bool(kernels("config").form(m, n, k, x.dtype, x.device, r, "forward", packed) == "persistent")
