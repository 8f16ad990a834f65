"""The truth itself: against autograd of a formula written here, and against finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerance import DTYPES, GRADS, Problem, make_problem
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear

from fastlora import reference
from fastlora.dropout import Dropout
from fastlora.nf4 import NF4Weight

VARIANTS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4 flat": {"nested": False},
    "fp4": {"quant_type": "fp4", "blocksize": 32},
    "dense": {"quant_type": None},
    "bias": {"bias": True},
    "dropout": {"dropout_p": 0.4},
    "dense, bias, dropout": {"quant_type": None, "bias": True, "dropout_p": 0.4},
    "rank 0": {"r": 0},
    "rank 0, bias": {"r": 0, "bias": True},
    "rank 1": {"r": 1},
    "rank above both sides": {"r": 13},
    "one token": {"m": 1},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -3.0},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(**request.param).to(torch.float64)


def independent(problem: Problem, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    """y by PyTorch's own linear layers, with the mask as a constant."""
    x = leaves["x"]
    w = problem.w.dequantize(x.dtype) if isinstance(problem.w, NF4Weight) else problem.w
    y = linear(x, w, leaves.get("bias"))
    if "lora_a" not in leaves:
        return y
    dropped = x
    if problem.dropout:
        keep = problem.dropout.keep(*x.shape)
        dropped = torch.where(keep, x / (1 - problem.dropout.p), torch.zeros_like(x))
    return y + linear(linear(dropped, leaves["lora_a"]), leaves["lora_b"]) * problem.scale


def leaves_of(problem: Problem) -> dict[str, torch.Tensor]:
    """The tensors of ``problem`` that can learn, as leaves that require gradients."""
    names = ("x", "lora_a", "lora_b", "bias")
    return {name: t.clone().requires_grad_() for name in names if (t := getattr(problem, name)) is not None}


def test_forward_and_backward_against_autograd(problem: Problem) -> None:
    results = problem.run()
    leaves = leaves_of(problem)
    y = independent(problem, leaves)
    torch.testing.assert_close(results["y"], y)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), problem.dy), strict=True))
    torch.testing.assert_close(results["dx"], grads["x"])
    if problem.lora_a is None:
        assert results["da"] is None
        assert results["db"] is None
        assert results["u"] is not None
        assert results["u"].shape == (len(problem.x), 0)
    else:
        torch.testing.assert_close(results["da"], grads["lora_a"])
        torch.testing.assert_close(results["db"], grads["lora_b"])


def test_u_is_the_product_with_a() -> None:
    problem = make_problem(dropout_p=0.4).to(torch.float64)
    assert problem.dropout is not None
    assert problem.lora_a is not None
    torch.testing.assert_close(problem.run()["u"], problem.dropout.apply(problem.x) @ problem.lora_a.T)


def test_lora_linear_is_the_same_function(problem: Problem) -> None:
    leaves = leaves_of(problem)
    y = differentiable(problem, leaves)
    expected = independent(problem, leaves)
    torch.testing.assert_close(y, expected)
    values = list(leaves.values())
    got = torch.autograd.grad(y, values, problem.dy)
    for name, a, b in zip(leaves, got, torch.autograd.grad(expected, values, problem.dy), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def differentiable(problem: Problem, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    adapters = leaves.get("lora_a"), leaves.get("lora_b")
    return reference.lora_linear(leaves["x"], problem.w, *adapters, leaves.get("bias"), problem.scale, problem.dropout)


def test_gradcheck(problem: Problem) -> None:
    leaves = leaves_of(problem)
    assert gradcheck(lambda *t: differentiable(problem, dict(zip(leaves, t, strict=True))), tuple(leaves.values()))


def test_gradgradcheck(problem: Problem) -> None:
    leaves = leaves_of(problem)
    assert gradgradcheck(lambda *t: differentiable(problem, dict(zip(leaves, t, strict=True))), tuple(leaves.values()))


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b"])
def test_gradcheck_with_one_input_frozen(frozen: str) -> None:
    problem = make_problem(dropout_p=0.4).to(torch.float64)
    leaves = leaves_of(problem)
    constant = leaves.pop(frozen).detach()

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return differentiable(problem, dict(zip(leaves, tensors, strict=True)) | {frozen: constant})

    assert gradcheck(function, tuple(leaves.values()))
    assert gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("r", [0, 3])
def test_needs(needs: tuple[bool, bool, bool], r: int) -> None:
    problem = make_problem(r=r, dropout_p=0.4)
    everything, asked = problem.run(), problem.run(needs=needs)
    for name, need in zip(GRADS, needs, strict=True):
        expected = everything[name] if need else None
        assert (asked[name] is None) == (expected is None), name
        if expected is not None:
            assert torch.equal(asked[name], expected), name  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_x_is_not_needed_without_da(dropout_p: float) -> None:
    p = make_problem(dropout_p=dropout_p)
    everything = p.run()
    dx, da, db = reference.backward(
        p.dy, None, everything["u"], p.w, p.lora_a, p.lora_b, p.scale, p.dropout, (True, False, True)
    )  # type: ignore[arg-type]
    assert da is None
    assert torch.equal(dx, everything["dx"])  # type: ignore[arg-type]
    assert torch.equal(db, everything["db"])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_adapters_of_another_type(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """They compute in the type of x; their gradients come back in their own."""
    mixed = make_problem(dtype=dtype, adapter_dtype=adapter_dtype, bias=True, dropout_p=0.4)
    assert mixed.lora_a is not None
    assert mixed.lora_b is not None
    results = mixed.run()
    cast = Problem(
        mixed.x,
        mixed.dy,
        mixed.w,
        mixed.lora_a.to(dtype),
        mixed.lora_b.to(dtype),
        mixed.bias,
        mixed.scale,
        mixed.dropout,
    ).run()
    for name, result in results.items():
        assert result is not None
        expected = cast[name]
        assert expected is not None
        assert result.dtype == (adapter_dtype if name in ("da", "db") else dtype), name
        assert torch.equal(result, expected.to(result.dtype)), name


def test_scale_multiplies_only_the_adapters() -> None:
    none, one, three = (make_problem(scale=scale).to(torch.float64).run() for scale in (0.0, 1.0, 3.0))
    for name in ("y", "dx", "da", "db"):
        base, single, triple = none[name], one[name], three[name]
        assert base is not None
        assert single is not None
        assert triple is not None
        torch.testing.assert_close(triple - base, 3 * (single - base))
        assert (single - base).abs().max() > 0.1, name
    assert not none["da"].any()  # type: ignore[union-attr]
    assert not none["db"].any()  # type: ignore[union-attr]


def test_dropout_touches_only_the_adapters() -> None:
    """With everything dropped the layer is its base."""
    p = make_problem(bias=True).to(torch.float64)
    dropped = Problem(p.x, p.dy, p.w, p.lora_a, p.lora_b, p.bias, p.scale, Dropout(1.0, torch.tensor([3]))).run()
    base = Problem(p.x, p.dy, p.w, None, None, p.bias, p.scale).run()
    torch.testing.assert_close(dropped["y"], base["y"])
    torch.testing.assert_close(dropped["dx"], base["dx"])
    assert not dropped["da"].any()  # type: ignore[union-attr]
    assert not dropped["db"].any()  # type: ignore[union-attr]


def test_dense_of_both_kinds() -> None:
    w = NF4Weight.quantize(torch.randn(5, 33))
    assert torch.equal(reference.dense(w, torch.float64), w.dequantize(torch.float64))
    assert torch.equal(reference.dense(w.dequantize(), torch.bfloat16), w.dequantize(torch.bfloat16))
