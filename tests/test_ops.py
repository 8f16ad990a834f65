"""The operators and ``fastlora.lora_linear``: every gradient, layouts, autocast, replayed dropout, compilation."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerance import GRADS, Problem, Results, assert_close, make_problem, truth_and_plain
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastlora import NF4Weight, backends, lora_linear, node, ops, reference, tables
from fastlora.dropout import Dropout, draw_seed

BACKENDS = tuple(backends.BACKENDS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEEDS = ((True, True, True), (True, False, False), (False, True, False), (False, False, True), (False, True, True))


def require(
    name: str, dtype: torch.dtype, device: str, *, quant_type: str | None = "nf4", dropout: bool = False
) -> None:
    """Skip, with the backend's own reasons, where this machine cannot run it."""
    if name == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes in numpy, which has no bfloat16")
    problem = backends.Problem(8, 8, 8, 8, dtype, device, quant_type=quant_type, dropout=dropout)
    if reasons := backends.BACKENDS[name].unsupported(problem, backends.this_machine()):
        pytest.skip("; ".join(reasons))


def through_autograd(problem: Problem, backend: str, call: Callable[..., torch.Tensor] = lora_linear) -> Results:
    """y and every gradient of ``problem`` as a user gets them; the gradient of the bias under "dbias"."""
    leaves = [
        t if t is None else t.detach().clone().requires_grad_()
        for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)
    ]
    x, lora_a, lora_b, bias = leaves
    p = problem.dropout.p if problem.dropout else 0.0
    y = call(x, problem.w, lora_a, lora_b, bias, scale=problem.scale, dropout_p=p, backend=backend)
    y.backward(problem.dy)
    grads = [t if t is None else t.grad for t in leaves]
    return {"y": y.detach(), **dict(zip((*GRADS, "dbias"), grads, strict=True))}


def hold(problem: Problem, actual: Results) -> None:
    truth, plain = truth_and_plain(problem)
    if problem.bias is not None:
        truth["dbias"], plain["dbias"] = problem.dy.double().sum(0), problem.dy.sum(0).to(problem.bias.dtype)
    for name, expected in truth.items():
        if name == "u":
            continue
        result, baseline = actual[name], plain[name]
        if expected is None:
            assert result is None, name
        else:
            assert result is not None, name
            assert baseline is not None
            assert_close(result, baseline, expected, name)


def forward_args(problem: Problem, backend: str = "auto", out_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.fastlora.lora_linear``."""
    p, seed = (problem.dropout.p, problem.dropout.seed) if problem.dropout else (0.0, None)
    adapter = (problem.lora_a, problem.lora_b, problem.bias)
    return (problem.x, *ops.weight_args(problem.w), *adapter, out_dtype, problem.scale, p, seed, backend)


def backward_args(
    problem: Problem, backend: str = "auto", needs: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.fastlora.lora_linear_backward``."""
    p, seed = (problem.dropout.p, problem.dropout.seed) if problem.dropout else (0.0, None)
    _, u = torch.ops.fastlora.lora_linear(*forward_args(problem, backend))
    x, adapter = (problem.x if needs[1] else None), (problem.lora_a, problem.lora_b)
    return (problem.dy, x, u, *ops.weight_args(problem.w), *adapter, problem.scale, p, seed, backend, *needs)


# -- accuracy ------------------------------------------------------------------------------------------------------

CASES = {
    "plain": {},
    "one row": {"m": 1},
    "rank 1": {"r": 1},
    "no adapters": {"r": 0},
    "bias": {"bias": True},
    "dropout": {"dropout_p": 0.4},
    "everything": {"bias": True, "dropout_p": 0.25, "scale": -1.75},
    "flat fp4": {"quant_type": "fp4", "nested": False},
    "short blocks": {"blocksize": 32, "n": 33, "k": 65},
    "one long block": {"blocksize": 4096},
    "dense": {"quant_type": None},
    "dense with everything": {"quant_type": None, "bias": True, "dropout_p": 0.25},
    "more than a tile": {"m": 70, "n": 35, "k": 150, "r": 17},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_backend_meets_the_tolerance(case: str, backend: str, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(dtype=dtype, device=device, **CASES[case])
    quant_type = CASES[case].get("quant_type", "nf4")
    require(backend, dtype, device, quant_type=quant_type, dropout=problem.dropout is not None)
    if problem.dropout:
        torch.manual_seed(7)
        seed = draw_seed(torch.device(device))
        problem = dataclasses.replace(problem, dropout=Dropout(problem.dropout.p, seed))
        torch.manual_seed(7)
    hold(problem, through_autograd(problem, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_float32_adapters_get_float32_gradients(
    quant_type: str | None, dtype: torch.dtype, backend: str, device: str
) -> None:
    require(backend, dtype, device, quant_type=quant_type)
    problem = make_problem(dtype=dtype, adapter_dtype=torch.float32, quant_type=quant_type, device=device)
    results = through_autograd(problem, backend)
    assert results["y"].dtype == results["dx"].dtype == dtype
    assert results["da"].dtype == results["db"].dtype == torch.float32
    hold(problem, results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_1024(backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu":
        pytest.skip("a rank this large takes Triton's interpreter minutes")
    require(backend, torch.float32, device)
    problem = make_problem(4, 16, 24, 1024, device=device)
    hold(problem, through_autograd(problem, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_weight_of_another_type_than_x(backend: str, device: str) -> None:
    require(backend, torch.float16, device, quant_type=None)
    problem = make_problem(dtype=torch.float16, quant_type=None, device=device)
    results = through_autograd(dataclasses.replace(problem, w=problem.w.float()), backend)
    assert results["y"].dtype == torch.float16
    hold(problem, results)


@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
def test_gradcheck(quant_type: str | None, backend: str) -> None:
    problem = make_problem(3, 5, 7, 2, torch.float64, quant_type=quant_type, bias=True)
    inputs = tuple(t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias))

    def layer(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)  # one mask for every evaluation
        return lora_linear(x, problem.w, lora_a, lora_b, bias, scale=0.7, dropout_p=0.3, backend=backend)

    assert torch.autograd.gradcheck(layer, inputs)


# -- registration --------------------------------------------------------------------------------------------------

OPCHECK = {
    "nested nf4": {},
    "flat fp4": {"quant_type": "fp4", "nested": False},
    "dense": {"quant_type": None},
    "no adapters": {"r": 0},
    "bias": {"bias": True},
    "dropout": {"dropout_p": 0.5},
    "bfloat16": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32},
    "float16": {"dtype": torch.float16},
}
OUT_DTYPES = {"default": None, "wide": torch.float32}


@pytest.mark.parametrize("out", OUT_DTYPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck_forward(case: str, backend: str, out: str, device: str) -> None:
    if out == "wide" and "dtype" not in OPCHECK[case]:
        pytest.skip("float32 is the type computed in")
    problem = make_problem(device=device, **OPCHECK[case])
    for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias):
        if t is not None:
            t.requires_grad_()
    opcheck(torch.ops.fastlora.lora_linear.default, forward_args(problem, backend, OUT_DTYPES[out]))


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck_backward(case: str, needs: tuple[bool, bool, bool], device: str) -> None:
    problem = make_problem(device=device, **OPCHECK[case])
    if problem.lora_a is None:
        needs = (True, False, False)
    args = backward_args(problem, needs=needs)
    opcheck(torch.ops.fastlora.lora_linear_backward.default, args)
    assert [grad.numel() > 0 for grad in torch.ops.fastlora.lora_linear_backward(*args)] == list(needs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_opcheck_dequantize(nested: bool, quant_type: str, dtype: torch.dtype, device: str) -> None:
    w = make_problem(quant_type=quant_type, nested=nested, device=device).w
    assert isinstance(w, NF4Weight)
    args = (*ops.weight_args(w), dtype)
    opcheck(torch.ops.fastlora.dequantize.default, args)
    assert torch.equal(torch.ops.fastlora.dequantize(*args), w.dequantize(dtype))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_operators_refuse_shapes_that_do_not_fit(backend: str) -> None:
    problem = make_problem()
    _, *rest = forward_args(problem, backend)
    with pytest.raises(RuntimeError, match=r"matrix with 11 columns for a base weight \(7, 11\), got \(5, 12\)"):
        torch.ops.fastlora.lora_linear(torch.randn(5, 12), *rest)
    with pytest.raises(RuntimeError, match=r"lora_b must be \(7, 3\)"):
        torch.ops.fastlora.lora_linear(*forward_args(dataclasses.replace(problem, lora_b=torch.randn(8, 3)), backend))
    with pytest.raises(RuntimeError, match=r"lora_a must be \(R, 11\)"):
        torch.ops.fastlora.lora_linear(*forward_args(dataclasses.replace(problem, lora_a=torch.randn(3, 12)), backend))


# -- layouts -------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.T.contiguous().T,
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "columns of a wider matrix": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_x_and_dy(layout: str, backend: str, device: str) -> None:
    require(backend, torch.float32, device)
    problem = make_problem(6, 7, 11, dropout_p=0.0, device=device)
    strided = [LAYOUTS[layout](t) for t in (problem.x, problem.dy)]
    assert not any(t.is_contiguous() for t in strided)
    x = strided[0].requires_grad_()
    lora_a, lora_b = (t.clone().requires_grad_() for t in (problem.lora_a, problem.lora_b))
    y = lora_linear(x, problem.w, lora_a, lora_b, scale=problem.scale, backend=backend)
    dx, da, db = torch.autograd.grad(y, (x, lora_a, lora_b), strided[1])
    hold(problem, {"y": y.detach(), "dx": dx, "da": da, "db": db})


def test_backends_are_given_contiguous_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def spy(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            given.extend(t for t in args[:3] if isinstance(t, torch.Tensor))
            return implementation(*args)

        return call

    spied = dataclasses.replace(
        backends.BACKENDS["reference"], forward=spy(reference.forward), backward=spy(reference.backward)
    )
    monkeypatch.setitem(backends.BACKENDS, "reference", spied)
    problem = make_problem(6, 7, 11)
    x = problem.x.T.contiguous().T.requires_grad_()
    y = lora_linear(x, problem.w, problem.lora_a.requires_grad_(), problem.lora_b.requires_grad_(), backend="reference")
    y.backward(problem.dy.T.contiguous().T)
    assert [tuple(t.shape) for t in given] == [(6, 11), (3, 11), (6, 7), (6, 11), (6, 3)]
    assert all(t.is_contiguous() for t in given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_dy(backend: str, device: str) -> None:
    require(backend, torch.float32, device)
    problem = make_problem(device=device)
    problem = dataclasses.replace(problem, dy=torch.ones_like(problem.dy))
    x, lora_a, lora_b = (t.clone().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b))
    y = lora_linear(x, problem.w, lora_a, lora_b, scale=problem.scale, backend=backend)
    y.sum().backward()
    hold(problem, {"y": y.detach(), "dx": x.grad, "da": lora_a.grad, "db": lora_b.grad})


@pytest.mark.parametrize("shape", [(11,), (4, 11), (2, 3, 11), (2, 1, 3, 11), (2, 1, 2, 2, 11)], ids=str)
def test_dimensions(shape: tuple[int, ...], device: str) -> None:
    problem = make_problem(dropout_p=0.3, bias=True, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    flat = x.detach().reshape(-1, 11).requires_grad_()
    results = []
    for t in (x, flat):
        torch.manual_seed(1)
        y = lora_linear(t, problem.w, problem.lora_a, problem.lora_b, problem.bias, dropout_p=0.3)
        y.square().sum().backward()
        results.append(y.detach())
    assert results[0].shape == (*shape[:-1], 7)
    assert torch.equal(results[0].reshape(-1, 7), results[1])
    assert x.grad.shape == x.shape
    assert torch.equal(x.grad.reshape(-1, 11), flat.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 11), (2, 0, 11)], ids=str)
@pytest.mark.parametrize("r", [0, 3])
def test_zero_rows(r: int, shape: tuple[int, ...], backend: str, device: str) -> None:
    problem = make_problem(r=r, bias=True, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device, requires_grad=True)
    leaves = [t.requires_grad_() for t in (problem.lora_a, problem.lora_b, problem.bias) if t is not None]
    y = lora_linear(x, problem.w, problem.lora_a, problem.lora_b, problem.bias, dropout_p=0.5, backend=backend)
    assert y.shape == (*shape[:-1], 7)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.shape == x.shape
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_gradients_through_views() -> None:
    problem = make_problem(6, 7, 11)
    whole = torch.randn(3, 2, 22, requires_grad=True)
    y = lora_linear(whole[..., ::2], problem.w, problem.lora_a, problem.lora_b, scale=0.5)
    (y[:, 1] * 2).sum().backward()
    expected = whole.detach().clone().requires_grad_()
    x = expected[..., ::2].reshape(-1, 11)
    reference_y = reference.lora_linear(x, problem.w, problem.lora_a, problem.lora_b, scale=0.5).view(3, 2, 7)
    (reference_y[:, 1] * 2).sum().backward()
    torch.testing.assert_close(whole.grad, expected.grad)
    assert whole.grad[:, 0].count_nonzero() == 0


def test_output_may_be_changed_in_place() -> None:
    problem = make_problem()
    x, lora_a, lora_b = (t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b))
    expected = torch.autograd.grad(lora_linear(x, problem.w, lora_a, lora_b).sum(), (x, lora_a, lora_b))
    y = lora_linear(x, problem.w, lora_a, lora_b)
    y += 1
    for got, want in zip(torch.autograd.grad(y.sum(), (x, lora_a, lora_b)), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "no adapters", "everything", "dense with everything"])
def test_out_dtype(case: str, backend: str, device: str) -> None:
    """A float32 result of 16-bit products is at least as good as the 16-bit one, and takes float32 gradients."""
    require(backend, torch.float16, device, quant_type=CASES[case].get("quant_type", "nf4"))
    problem = make_problem(dtype=torch.float16, device=device, **CASES[case] | {"dropout_p": 0.0})

    def wide(*args: Any, **kwargs: Any) -> torch.Tensor:
        return lora_linear(*args, **kwargs, out_dtype=torch.float32)

    narrow = through_autograd(problem, backend)
    results = through_autograd(dataclasses.replace(problem, dy=problem.dy.float()), backend, wide)
    truth, _ = truth_and_plain(problem)
    assert results["y"].dtype == torch.float32
    error, narrow_error = ((t["y"].double() - truth["y"]).norm().item() for t in (results, narrow))
    # The 16-bit result has the additional rounding of y; u is rounded in both.
    assert error <= narrow_error
    for name in (*GRADS, "dbias"):
        assert narrow[name] is None if results[name] is None else torch.equal(results[name], narrow[name]), name


@pytest.mark.parametrize("shape", [(0, 11), (3, 11)], ids=str)
def test_out_dtype_of_any_number_of_rows(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    y = lora_linear(x, make_problem().w, out_dtype=torch.float32)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.int64, torch.complex64, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_out_dtype_that_no_accumulator_fills_is_refused(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    problem = make_problem(dtype=dtype)
    with pytest.raises(ValueError, match=f"out_dtype must be {dtype}, the type computed in.*; got {out_dtype}"):
        lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, out_dtype=out_dtype)


# -- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("quant_type", ["nf4", None])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(x_dtype: torch.dtype, quant_type: str | None, backend: str, device: str) -> None:
    problem = make_problem(dtype=torch.float32, quant_type=quant_type, bias=True, device=device)
    x = problem.x.to(x_dtype).requires_grad_()
    lora_a, lora_b = problem.lora_a.requires_grad_(), problem.lora_b.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(x, problem.w, lora_a, lora_b, problem.bias, scale=problem.scale, backend=backend)
    assert y.dtype == torch.bfloat16
    y.backward(problem.dy.bfloat16())  # outside autocast, as every trainer does
    assert (x.grad.dtype, lora_a.grad.dtype, lora_b.grad.dtype) == (x_dtype, torch.float32, torch.float32)
    # Judged as the problem that autocast makes of it: its casts of x, bias and a dense weight are not its error.
    cast = {name: getattr(problem, name).bfloat16() for name in ("x", "dy", "bias")}
    if quant_type is None:
        cast["w"] = problem.w.bfloat16()
    problem = dataclasses.replace(problem, lora_a=lora_a.detach(), lora_b=lora_b.detach(), **cast)
    results = {"y": y.detach(), "dx": x.grad.bfloat16(), "da": lora_a.grad, "db": lora_b.grad}
    hold(problem, {**results, "dbias": problem.dy.sum(0)})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_autocast_does_not_reach_into_the_operators(direction: str, backend: str, device: str) -> None:
    problem = make_problem(bias=True, device=device)
    args, op = forward_args(problem, backend), torch.ops.fastlora.lora_linear
    if direction == "backward":
        args, op = backward_args(problem, backend), torch.ops.fastlora.lora_linear_backward
    expected = op(*args)
    with torch.autocast(device, torch.bfloat16):
        actual = op(*args)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_float64_is_left_alone_by_autocast(device: str) -> None:
    problem = make_problem(dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, scale=problem.scale)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, problem.run()["y"])


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_see_one_mask(backend: str, device: str) -> None:
    require(backend, torch.float32, device, dropout=True)
    k = 12
    w = NF4Weight.quantize(torch.zeros(4, k, device=device))
    lora_a = torch.eye(k, device=device, requires_grad=True)
    lora_b = torch.ones(4, k, device=device, requires_grad=True)
    x = torch.ones(6, k, device=device, requires_grad=True)
    y = lora_linear(x, w, lora_a, lora_b, dropout_p=0.5, backend=backend)
    y[:, 0].sum().backward()
    # With these weights each row of y counts the elements that are kept, and dx holds the mask itself.
    assert set(x.grad.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(y[:, 0], x.grad.sum(1))
    torch.testing.assert_close(lora_a.grad, x.grad.sum(0).expand(k, k))
    torch.testing.assert_close(lora_b.grad[0], x.grad.sum(0))


def test_masks_differ_between_calls_and_repeat_with_the_seed(device: str) -> None:
    problem = make_problem(8, 8, 64, device=device)

    def call() -> torch.Tensor:
        return lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_kept_elements(p: float, device: str) -> None:
    m, k = 64, 256
    x = torch.ones(m, k, device=device, requires_grad=True)
    w = torch.zeros(1, k, device=device)
    y = lora_linear(x, w, torch.ones(1, k, device=device), torch.ones(1, 1, device=device), dropout_p=p)
    y.sum().backward()
    kept = (x.grad != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / (m * k)) ** 0.5
    assert x.grad.max().item() == pytest.approx(1 / (1 - p))


def test_dropping_everything_leaves_the_base(device: str) -> None:
    problem = make_problem(device=device)
    x = problem.x.requires_grad_()
    y = lora_linear(x, problem.w, problem.lora_a, problem.lora_b, dropout_p=1.0)
    base = lora_linear(x, problem.w)
    torch.testing.assert_close(y, base)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, base)))


def test_without_dropout_no_random_number_is_drawn(device: str) -> None:
    problem = make_problem(device=device)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b)
    lora_linear(problem.x, problem.w, dropout_p=0.5)  # without adapters there is nothing to drop
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_mask(reentrant: bool, device: str) -> None:
    problem = make_problem(device=device)

    def block(x: torch.Tensor) -> torch.Tensor:
        h = lora_linear(x, problem.w, problem.lora_a, problem.lora_b, dropout_p=0.4).tanh()
        x = h @ torch.ones(7, 11, device=device)
        return lora_linear(x, problem.w, problem.lora_a, problem.lora_b, dropout_p=0.4)

    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        run(problem.x).square().sum().backward()
        grads.append([t.grad.clone() for t in leaves])
        for t in leaves:
            t.grad = None
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)
        assert got.count_nonzero()


# -- what is kept for backward -------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded() -> Iterator[list[torch.Tensor]]:
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield saved


@pytest.mark.parametrize("learns", ["both", "only a", "only b", "neither"])
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_what_is_saved(quant_type: str | None, learns: str) -> None:
    problem = make_problem(16, 24, 32, 4, quant_type=quant_type, bias=True)
    x = problem.x.requires_grad_()
    problem.lora_a.requires_grad_(learns in ("both", "only a"))
    problem.lora_b.requires_grad_(learns in ("both", "only b"))
    with recorded() as saved:
        y = lora_linear(x, problem.w, problem.lora_a, problem.lora_b, problem.bias, dropout_p=0.5)
    weights = problem.w.tensors() if isinstance(problem.w, NF4Weight) else {"w": problem.w}
    references = [*weights.values(), problem.lora_a, problem.lora_b]
    own = [t for t in saved if t.data_ptr() not in {r.data_ptr() for r in references}]
    seeds = [t for t in own if t.dtype == torch.int64]
    us = [t for t in own if t.shape == (16, 4)]
    xs = [t for t in own if t.shape == (16, 32)]
    assert len(seeds) == 1
    assert seeds[0].numel() == 1
    assert len(us) == (learns in ("both", "only b"))
    assert len(xs) == (learns in ("both", "only a"))
    assert all(t.data_ptr() == x.data_ptr() for t in xs), "x itself, not a copy"
    assert len(own) == len(seeds) + len(us) + len(xs), [tuple(t.shape) for t in own]
    y.sum().backward()
    assert (problem.lora_a.grad is not None) == (learns in ("both", "only a"))
    assert (problem.lora_b.grad is not None) == (learns in ("both", "only b"))
    assert x.grad is not None


def test_u_is_no_way_for_gradients() -> None:
    problem = make_problem()
    problem.lora_a.requires_grad_()
    y, u = torch.ops.fastlora.lora_linear(*forward_args(problem))
    assert y.requires_grad
    assert not u.requires_grad


def test_nothing_is_saved_without_gradients() -> None:
    problem = make_problem()
    with recorded() as saved:
        lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, dropout_p=0.5)
    assert not saved


@pytest.mark.parametrize("needs", NEEDS[1:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_some_gradients(backend: str, needs: tuple[bool, bool, bool], device: str) -> None:
    require(backend, torch.float32, device)
    problem = make_problem(dropout_p=0.0, device=device)
    leaves = [problem.x, problem.lora_a, problem.lora_b]
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    y = lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, scale=problem.scale, backend=backend)
    y.backward(problem.dy)
    truth, plain = truth_and_plain(dataclasses.replace(problem, **_detached(problem)))
    for name, leaf, need in zip(GRADS, leaves, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_close(leaf.grad, plain[name], truth[name], name)


def _detached(problem: Problem) -> dict[str, torch.Tensor]:
    return {name: getattr(problem, name).detach() for name in ("x", "lora_a", "lora_b")}


def test_backward_twice_over_a_retained_graph() -> None:
    problem = make_problem(bias=True)
    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)]
    x, lora_a, lora_b, bias = leaves
    y = lora_linear(x, problem.w, lora_a, lora_b, bias, dropout_p=0.5)
    first = torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)
    for got, want in zip(torch.autograd.grad(y, leaves, problem.dy), first, strict=True):
        assert torch.equal(got, want)


def test_second_derivative_raises_one_clear_error() -> None:
    problem = make_problem()
    x = problem.x.requires_grad_()
    y = lora_linear(x, problem.w, problem.lora_a.requires_grad_(), problem.lora_b)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again; fastlora\.reference\.lora_linear"):
        dx.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", ["x", "lora_a", "lora_b", "bias"])
def test_a_forward_mode_derivative_is_refused(which: str, compiled: bool) -> None:
    """PyTorch would go on without the tangent, as if it were zero."""
    problem = make_problem(bias=True)
    kept = {name: getattr(problem, name) for name in ("x", "lora_a", "lora_b", "bias")}
    at = kept.pop(which)

    def tangent(t: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda t: lora_linear(w=problem.w, **{which: t}, **kept), (t,), (t,))[1]

    run = torch.compile(tangent, backend="aot_eager") if compiled else tangent
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        run(at)
    if not compiled:
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jacfwd(lambda t: lora_linear(w=problem.w, **{which: t}, **kept))(at)
        with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            lora_linear(w=problem.w, **{which: forward_ad.make_dual(at, at)}, **kept)
        # Whoever differentiates something else is not in the way.
        assert torch.func.jvp(lambda t: t + lora_linear(w=problem.w, **{which: at}, **kept).sum(), (at,), (at,))


def test_a_base_weight_that_learns_is_refused() -> None:
    with pytest.raises(RuntimeError, match="base weight of a fused LoRA layer is frozen"):
        lora_linear(torch.randn(5, 11), torch.randn(7, 11, requires_grad=True))


# -- scale ---------------------------------------------------------------------------------------------------------


def test_scale_as_a_tensor_is_read_at_run_time(device: str) -> None:
    problem = make_problem(bias=True, device=device)
    scale = torch.tensor(0.25, device=device)
    for value in (0.25, -3.0):
        scale.fill_(value)
        results = through_autograd(dataclasses.replace(problem, scale=scale), "auto")
        hold(dataclasses.replace(problem, scale=value), results)


def test_a_scale_that_learns_gets_its_gradient() -> None:
    problem = make_problem(dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, scale=scale)
    y.backward(problem.dy)
    u = problem.x @ problem.lora_a.T
    torch.testing.assert_close(scale.grad, ((u @ problem.lora_b.T) * problem.dy).sum())


# -- compilation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def frames() -> Iterator[Any]:
    """A compiler backend that counts the graphs it is given and runs them as they are."""
    import torch._dynamo.testing

    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


def test_compiled_with_dynamic_rows(frames: Any) -> None:
    problem = make_problem(bias=True)
    lora_a, lora_b = problem.lora_a.requires_grad_(), problem.lora_b.requires_grad_()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, problem.w, lora_a, lora_b, problem.bias, scale=0.5)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=frames)
    # No size of the weight's tensors, or Dynamo takes the rows for that size and compiles again.
    for m in (6, 9, 13, 65):
        x = torch.randn(m, 11)
        torch.testing.assert_close(compiled(x), layer(x))
    assert frames.frame_count == 1


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_compiled_once_for_all_scales(kind: str, frames: Any) -> None:
    problem = make_problem()

    def layer(x: torch.Tensor, scale: Any) -> torch.Tensor:
        return lora_linear(x, problem.w, problem.lora_a, problem.lora_b, scale=scale)

    compiled = torch.compile(layer, fullgraph=True, backend=frames)
    for value in (0.5, 1.5, 2.5, 3.5, 4.5):
        scale = torch.tensor(value) if kind == "tensor" else value
        torch.testing.assert_close(compiled(problem.x, scale), layer(problem.x, scale))
    # A number is a constant of the first graph; from the second value on it is an input.
    assert frames.frame_count == (1 if kind == "tensor" else 2)


def test_compiled_training_agrees_with_eager(frames: Any) -> None:
    problem = make_problem(bias=True)
    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b, problem.bias)]

    def layer(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, problem.w, lora_a, lora_b, bias, scale=0.5)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(*leaves), leaves, problem.dy)
    for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves, problem.dy), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_dropout_is_replayed(frames: Any) -> None:
    w = torch.zeros(4, 12)
    lora_a, lora_b = torch.eye(12), torch.ones(4, 12)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, w, lora_a, lora_b, dropout_p=0.5)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    masks = []
    for _ in range(2):
        x = torch.ones(6, 12, requires_grad=True)
        y = compiled(x)
        y[:, 0].sum().backward()
        torch.testing.assert_close(y[:, 0], x.grad.sum(1))
        masks.append(x.grad)
    assert not torch.equal(*masks)


def test_compiled_under_autocast(frames: Any) -> None:
    problem = make_problem(adapter_dtype=torch.float32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lora_linear(x, problem.w, problem.lora_a, problem.lora_b)

    y = torch.compile(layer, fullgraph=True, backend=frames)(problem.x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(problem.x))


def test_inductor(frames: Any) -> None:
    problem = make_problem(bias=True)
    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]

    def layer(x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x * 2, problem.w, lora_a, lora_b, problem.bias, scale=0.5).relu()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about itself
        compiled = torch.compile(layer, fullgraph=True, dynamic=True)
        got = torch.autograd.grad(compiled(*leaves), leaves, problem.dy)
    for actual, expected in zip(got, torch.autograd.grad(layer(*leaves), leaves, problem.dy), strict=True):
        torch.testing.assert_close(actual, expected)


# -- errors --------------------------------------------------------------------------------------------------------

_X, _A, _B = torch.zeros(5, 11), torch.zeros(3, 11), torch.zeros(7, 3)


@pytest.mark.parametrize(
    ("message", "x", "kwargs"),
    [
        (r"last dimension of x must be in_features = 11, got shape \(5, 12\)", torch.zeros(5, 12), {}),
        (r"last dimension of x must be in_features = 11, got shape \(\)", torch.tensor(1.0), {}),
        (r"x must be floating-point, got torch\.int64", torch.zeros(5, 11, dtype=torch.int64), {}),
        (r"x is on meta, the base weight on cpu", torch.zeros(5, 11, device="meta"), {}),
        (r"give both lora_a and lora_b, or neither", _X, {"lora_a": _A}),
        (r"give both lora_a and lora_b, or neither", _X, {"lora_b": _B}),
        (r"\(R, 11\) and lora_b \(7, R\); got \(3, 12\) and", _X, {"lora_a": torch.zeros(3, 12), "lora_b": _B}),
        (r"got \(3, 11\) and \(7, 4\)", _X, {"lora_a": _A, "lora_b": torch.zeros(7, 4)}),
        (r"bias must have shape \(7,\), got \(8,\)", _X, {"bias": torch.zeros(8)}),
        (r"dropout_p must lie in \[0, 1\], got 1\.5", _X, {"dropout_p": 1.5}),
        (r"dropout_p must lie in \[0, 1\], got -0\.1", _X, {"dropout_p": -0.1}),
        (r"scale must be a number or a tensor of one, got shape \(7, 1\)", _X, {"scale": torch.ones(7, 1)}),
        (r"unknown backend 'gpu'; choose from auto, ", _X, {"backend": "gpu"}),
    ],
)  # fmt: skip
def test_errors(message: str, x: torch.Tensor, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        lora_linear(x, make_problem().w, **kwargs)


@pytest.mark.parametrize("shape", [(11,), (2, 7, 11)], ids=str)
def test_a_base_weight_is_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="the base weight must be a matrix"):
        lora_linear(_X, torch.zeros(shape))


@pytest.mark.parametrize("where", ["lora_a", "lora_b", "bias"])
def test_error_names_an_argument_on_another_device(where: str) -> None:
    kwargs = {"lora_a": _A, "lora_b": _B, "bias": torch.zeros(7)}
    kwargs[where] = kwargs[where].to("meta")
    with pytest.raises(ValueError, match=f"{where} is on meta, the base weight on cpu"):
        lora_linear(torch.zeros(5, 11), make_problem().w, **kwargs)


def test_a_named_backend_that_cannot_run_raises() -> None:
    problem = make_problem(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run forward M=5 N=7 K=11 R=3, float64 on cpu"):
        lora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, backend="triton")


def test_for_graphs_reaches_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = backends.select

    def spy(problem: backends.Problem, *args: Any) -> Any:
        asked.append(problem.captured)
        return real(problem, *args)

    monkeypatch.setattr(backends, "select", spy)
    problem = make_problem(3, 5, 7)
    for captured in (False, True):
        node.chosen.cache_clear()
        with tables.for_graphs() if captured else contextlib.nullcontext():
            through_autograd(problem, "auto")
    assert asked == [False, False, True, True]
    node.chosen.cache_clear()
