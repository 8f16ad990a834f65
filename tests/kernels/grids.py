"""What the tests of the kernels run over, small in the interpreter and larger on a GPU, and how they judge it."""

from __future__ import annotations

import dataclasses
from typing import Any

import tolerance
import torch
from tolerance import Problem, Results

from fastlora import kernels

HAS_CUDA = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of ``tolerance.make_problem``."""

    m: int
    n: int
    k: int
    r: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.m}x{self.n}x{self.k}-r{self.r}-{options}".replace("torch.", "")


def _case(m: int, n: int, k: int, r: int, **options: Any) -> Case:
    return Case(m, n, k, r, options)


SMALL = (
    _case(1, 48, 64, 8, bias=True),
    _case(17, 48, 64, 3, blocksize=32, dropout_p=0.3),
    _case(17, 65, 96, 16, nested=False, bias=True, dropout_p=0.1),
    _case(33, 65, 33, 40, quant_type="fp4", dropout_p=0.5, bias=True),
    _case(33, 48, 130, 1, blocksize=128, nested=False),
    _case(5, 17, 130, 16, blocksize=4096, scale=2.0, dropout_p=1.0),
    _case(70, 130, 128, 16, blocksize=128, scale=-0.7),
    _case(150, 40, 96, 8, scale=0.0),
    _case(33, 65, 33, 0, bias=True),
    _case(33, 65, 33, 5, quant_type=None, bias=True, dropout_p=0.2),
    _case(130, 48, 64, 130, quant_type=None),
    _case(20, 48, 64, 8, adapter_dtype=torch.float32, dropout_p=0.2),
    _case(20, 48, 64, 33, adapter_dtype=torch.float16),
)
"""Ragged in every side: a single row, chunks of M that end early, odd K (bytes that straddle rows), every kind of
weight, ranks that are no power of two and above one tile."""

LARGE = (
    _case(1, 4096, 4096, 16),
    _case(16, 1024, 4096, 16, bias=True),
    _case(64, 4096, 1024, 64, dropout_p=0.1),
    _case(1000, 1024, 2048, 16, dropout_p=0.1, adapter_dtype=torch.float32),
    _case(2049, 1030, 1026, 17, bias=True, nested=False),
    _case(515, 1027, 1025, 200, quant_type="fp4", blocksize=256, dropout_p=0.25),
    _case(777, 512, 640, 1024, blocksize=32),
    _case(2048, 2048, 2048, 32, quant_type=None, bias=True),
)

CASES = SMALL + LARGE if HAS_CUDA else SMALL


def check(problem: Problem, needs: tuple[bool, bool, bool] = (True, True, True)) -> Results:
    """Hold the kernels to the tolerance policy on y, u and every gradient asked for; returns their results."""
    return tolerance.check(problem, kernels.forward, kernels.backward, needs)


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left right in ``dtype``; in float32 of 16-bit matrices, by the accumulators of the same hardware."""
    if left.is_cuda and left.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
