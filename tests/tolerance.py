"""The one tolerance policy of the tests, and the problems that they share.

``truth`` is ``fastlora.reference`` in float64 on the same packed bytes; ``plain`` is the same computation in plain
PyTorch at the working type. A result passes when both of its errors against the truth are within

    largest absolute error   2 * (that of plain) + unit * max |truth|
    Frobenius norm           2 * (that of plain) + unit / 2 * ||truth||

where unit is ``torch.finfo(actual.dtype).eps``: the floor of the first is about one unit in the last place of the
largest element, that of the second is what one rounding of every element can cost. No test has a number of its own.

Only in float32 the sum itself is rounded as coarsely as its result. A kernel keeps one accumulator per output and
rounds it after every term, a BLAS keeps many and errs by less than one rounding, so the plain error says little about
the kernel's. There unit is 32 eps: over 4096 random terms one accumulator errs by 22 eps in the largest element and by
10 eps in the norm, products rounded to TF32 by more than 2000.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastlora import reference
from fastlora.dropout import Dropout
from fastlora.nf4 import NF4Weight, Weight

_ACCUMULATION = 32
"""Units in the last place that one float32 accumulator may lose."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADS = ("dx", "da", "db")

Results = dict[str, torch.Tensor | None]
"""``y``, ``u``, ``dx``, ``da`` and ``db`` of one problem."""


def assert_close(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str = "result") -> None:
    """Raise AssertionError unless ``actual`` is as good as the policy above asks.

    ``truth`` is float64, ``plain`` has the type that ``actual`` must have, and all three have one shape. A NaN or an
    infinity never passes. Raises ValueError when truth or plain cannot judge anything.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"{name}: truth must be float64, got {truth.dtype}")
    if plain.shape != truth.shape:
        raise ValueError(f"{name}: plain has shape {tuple(plain.shape)}, truth {tuple(truth.shape)}")
    if not (truth.isfinite().all() and plain.isfinite().all()):
        raise ValueError(f"{name}: truth and plain must be finite; choose inputs that do not overflow {plain.dtype}")
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, must be {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, must be {plain.dtype}"
    if not truth.numel():
        return
    actual = actual.detach().to(truth.device)
    bad = ~actual.isfinite()
    assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} elements are not finite, first at {_first(bad)}"

    unit = torch.finfo(actual.dtype).eps * (_ACCUMULATION if actual.dtype == torch.float32 else 1)
    error = actual.double() - truth
    plain_error = plain.detach().to(truth.device).double() - truth
    rows = (
        ("largest", error.abs().max(), plain_error.abs().max(), unit * truth.abs().max()),
        ("Frobenius", error.norm(), plain_error.norm(), unit / 2 * truth.norm()),
    )
    if all(bool(got <= 2 * reference_error + floor) for _, got, reference_error, floor in rows):
        return
    worst = tuple(int(i) for i in torch.unravel_index(error.abs().argmax(), error.shape))
    lines = [
        f"{kind} error {got.item():.3e}, bound {(2 * reference_error + floor).item():.3e} "
        f"= 2 * {reference_error.item():.3e} (plain) + {floor.item():.3e} (floor)"
        f"{'' if got <= 2 * reference_error + floor else '  <- too large'}"
        for kind, got, reference_error, floor in rows
    ]
    where = f"worst at {worst}: got {actual[worst].item():.8g}, plain {plain[worst].item():.8g}, "
    where += f"truth {truth[worst].item():.8g}"
    raise AssertionError("\n  ".join([f"{name} {tuple(truth.shape)} {actual.dtype}", *lines, where]))


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One call of the fused linear. Every term has elements of about 1, so that an error in any of them shows."""

    x: torch.Tensor
    """(M, K)"""
    dy: torch.Tensor
    """(M, N)"""
    w: Weight
    """(N, K)"""
    lora_a: torch.Tensor | None
    """(R, K), None for rank 0"""
    lora_b: torch.Tensor | None
    """(N, R), None for rank 0"""
    bias: torch.Tensor | None
    """(N,)"""
    scale: float = 1.0
    dropout: Dropout | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """Every dense tensor in ``dtype``; a packed weight stays as it is."""
        changed: dict[str, Any] = {
            field.name: value.to(dtype)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **changed)

    def run(
        self,
        forward: Callable[..., Any] = reference.forward,
        backward: Callable[..., Any] = reference.backward,
        needs: tuple[bool, bool, bool] = (True, True, True),
    ) -> Results:
        """All results of an implementation with the signatures of ``fastlora.reference``; backward sees its own u."""
        y, u = forward(self.x, self.w, self.lora_a, self.lora_b, self.bias, self.scale, self.dropout)
        grads = backward(self.dy, self.x, u, self.w, self.lora_a, self.lora_b, self.scale, self.dropout, needs)
        return {"y": y, "u": u, **dict(zip(GRADS, grads, strict=True))}


def make_problem(
    m: int = 5,
    n: int = 7,
    k: int = 11,
    r: int = 3,
    dtype: torch.dtype = torch.float32,
    *,
    quant_type: str | None = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = False,
    scale: float = 0.5,
    dropout_p: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A random problem; the same on every device. ``quant_type=None`` gives a dense weight, ``r=0`` no adapters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device, kind)

    x, dy, w = normal(m, k), normal(m, n), normal(n, k, std=k**-0.5)
    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=x,
        dy=dy,
        w=NF4Weight.quantize(w, blocksize=blocksize, quant_type=quant_type, nested=nested) if quant_type else w,
        lora_a=normal(r, k, std=k**-0.5, kind=adapter_dtype) if r else None,
        lora_b=normal(n, r, std=r**-0.5, kind=adapter_dtype) if r else None,
        bias=normal(n) if bias else None,
        scale=scale,
        dropout=Dropout(dropout_p, torch.tensor([seed + 12345], device=device)) if dropout_p else None,
    )


def truth_and_plain(problem: Problem, needs: tuple[bool, bool, bool] = (True, True, True)) -> tuple[Results, Results]:
    """The float64 truth and the plain PyTorch results of ``problem``."""
    return problem.to(torch.float64).run(needs=needs), problem.run(needs=needs)


def check(
    problem: Problem,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> Results:
    """Hold an implementation to the policy on y, u and every gradient asked for; returns its results."""
    actual = problem.run(forward, backward, needs)
    truth, plain = truth_and_plain(problem, needs)
    for name, expected in truth.items():
        result, baseline = actual[name], plain[name]
        if expected is None:
            assert result is None, f"{name} was not asked for, got a tensor of shape {tuple(result.shape)}"
        else:
            assert result is not None, f"{name} is missing"
            assert baseline is not None
            assert_close(result, baseline, expected, name)
    return actual
