"""DoRA against its definition in float64 on the same packed bytes."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from tolerance import DTYPES, Problem, assert_close, make_problem

from fastlora import dora, reference
from fastlora.nf4 import NF4Weight, Weight


def definition(problem: Problem, magnitude: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The output and every gradient, by plain autograd in the type of x; mask: of the dropout, gain included."""
    p = problem
    leaves = [
        t.detach().clone().requires_grad_() for t in (p.x, p.lora_a, p.lora_b, magnitude, p.bias) if t is not None
    ]
    x, a, b, m, *rest = leaves
    w = reference.dense(p.w, x.dtype)
    delta = p.scale * (b.to(x.dtype) @ a.to(x.dtype))
    gain = (m / (w + delta).norm(dim=1).detach()).to(x.dtype)
    inner = x if mask is None else x * mask.to(x.dtype)
    bias = rest[0].to(x.dtype) if rest else 0
    lora = p.scale * (inner @ a.to(x.dtype).T @ b.to(x.dtype).T)
    if mask is None:  # as PEFT, which takes the bias off the rounded output of the base layer
        y = gain * (inner @ w.T + bias - bias + lora) + bias
    else:
        y = gain * (inner @ w.T + lora) + (x @ w.T - inner @ w.T) + bias
    y.backward(p.dy)
    return {"y": y.detach(), **{name: t.grad for name, t in zip(("dx", "da", "db", "dm", "dbias"), leaves)}}  # noqa: B905


def fused(problem: Problem, magnitude: torch.Tensor, p: float = 0.0) -> dict[str, torch.Tensor]:
    parts = (problem.x, problem.lora_a, problem.lora_b, magnitude, problem.bias)
    leaves: list[Any] = [None if t is None else t.detach().clone().requires_grad_() for t in parts]
    x, a, b, m, bias = leaves
    y = dora.dora_linear(x, problem.w, a, b, m, bias, problem.scale, p)
    y.backward(problem.dy)
    names = ("dx", "da", "db", "dm", "dbias")
    return {"y": y.detach(), **{name: t.grad for name, t in zip(names, leaves, strict=True) if t is not None}}


def lengths(problem: Problem) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(problem.w.shape[0], generator=generator) + 0.5


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("base", ["nf4", "nf4 flat", "fp4", "dense", "straddling"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(dtype: torch.dtype, base: str, bias: bool, dropout_p: float) -> None:
    kind = {"dense": None, "fp4": "fp4"}.get(base, "nf4")
    k = 40 if base == "straddling" else 128
    problem = make_problem(6, 24, k, 5, dtype, quant_type=kind, nested=base != "nf4 flat", bias=bias, scale=0.75)
    magnitude, mask = lengths(problem), None
    if dropout_p:
        torch.manual_seed(11)
        mask = F.dropout(torch.ones_like(problem.x), dropout_p)
        torch.manual_seed(11)
    actual = fused(problem, magnitude, dropout_p)
    plain = definition(problem, magnitude, mask)
    truth = definition(problem.to(torch.float64), magnitude.double(), mask)
    assert actual.keys() == truth.keys()
    for name, want in truth.items():
        assert_close(actual[name], plain[name], want, name)


@pytest.mark.parametrize(
    ("shape", "blocksize", "quant_type", "nested"),
    [
        ((24, 128), 64, "nf4", True),
        ((24, 128), 32, "fp4", False),
        ((5, 33), 64, "nf4", False),
        ((300, 256), 256, "nf4", True),
    ],
)
def test_row_norms(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], blocksize: int, quant_type: str, nested: bool
) -> None:
    w = NF4Weight.quantize(torch.randn(shape), blocksize=blocksize, quant_type=quant_type, nested=nested)
    expected = w.dequantize(torch.float64).norm(dim=1)
    torch.testing.assert_close(dora.row_norms(w).double(), expected, rtol=1e-6, atol=0)
    monkeypatch.setattr(dora, "_CHUNK", 200)  # many chunks
    torch.testing.assert_close(dora.row_norms(w).double(), expected, rtol=1e-6, atol=0)
    torch.library.opcheck(torch.ops.fastlora.row_norms.default, dora.ops.weight_args(w))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_weight_norm(packed: bool, scale: Any) -> None:
    problem = make_problem(1, 64, 128, 8, quant_type="nf4" if packed else None)
    w: Weight = problem.w
    assert problem.lora_a is not None
    assert problem.lora_b is not None
    dense = reference.dense(w, torch.float64)
    expected = (dense + 0.5 * problem.lora_b.double() @ problem.lora_a.double()).norm(dim=1)
    norm = dora.weight_norm(w, problem.lora_a, problem.lora_b, scale, torch.float32)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    assert not norm.requires_grad


def test_rows_that_the_adapter_cancels() -> None:
    """The square of their norm may come out below zero by rounding; the norm must not be NaN."""
    a = torch.randn(2, 64)
    b = torch.randn(16, 2)
    norm = dora.weight_norm(-(b @ a), a, b, 1.0, torch.float32)
    assert norm.isfinite().all()
    assert (norm < 1e-2).all()


def test_neither_w_nor_the_update_is_made_for_the_norm() -> None:
    problem = make_problem(1, 512, 4096, 2)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    norms = dora.row_norms(problem.w)
    with Watch():
        dora.weight_norm(problem.w, problem.lora_a, problem.lora_b, 1.0, torch.float32, norms=norms)
    assert largest <= 2 * 4096


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_an_untrained_adapter_changes_nothing(bias: bool) -> None:
    problem = make_problem(10, 1000, 1000, 8, quant_type=None, bias=bias)
    assert problem.lora_b is not None
    w, b = problem.w, torch.zeros_like(problem.lora_b)
    assert isinstance(w, torch.Tensor)
    magnitude = torch.linalg.norm(w, dim=1)
    y = dora.dora_linear(problem.x, w, problem.lora_a, b, magnitude, problem.bias, 2.0)
    assert torch.equal(y, F.linear(problem.x, w, problem.bias))


@pytest.mark.parametrize("bias", [False, True], ids=["folded", "not folded"])
def test_inference_mode(bias: bool) -> None:
    p = make_problem(3, 8, 64, 2, bias=bias)
    magnitude = lengths(p).requires_grad_()
    want = dora.dora_linear(p.x, p.w, p.lora_a, p.lora_b, magnitude, p.bias)
    with torch.inference_mode():
        assert torch.equal(dora.dora_linear(p.x, p.w, p.lora_a, p.lora_b, magnitude, p.bias), want)


def test_only_the_magnitude_learns() -> None:
    problem = make_problem(3, 8, 64, 2)
    magnitude = lengths(problem).requires_grad_()
    dora.dora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, magnitude).sum().backward()
    assert magnitude.grad is not None
    frozen = magnitude.detach()
    x = problem.x.clone().requires_grad_()
    dora.dora_linear(x, problem.w, problem.lora_a, problem.lora_b, frozen).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["plain", "reentrant", "not reentrant", "offloaded"])
@pytest.mark.parametrize("bias", [False, True], ids=["folded", "not folded"])
def test_the_output_may_be_changed_in_place(bias: bool, kind: str) -> None:
    problem = make_problem(3, 8, 64, 2, bias=bias)
    magnitude = lengths(problem).requires_grad_()
    inputs = problem.x.clone().requires_grad_()

    def run(x: torch.Tensor, change: bool) -> torch.Tensor:
        y = dora.dora_linear(x, problem.w, problem.lora_a, problem.lora_b, magnitude, problem.bias)
        y = y.mul_(2) if change else y * 2
        return y.square()  # saved after the change, so that a recomputation gets there

    grads = []
    for change in (False, True):
        if "reentrant" in kind:
            y = torch.utils.checkpoint.checkpoint(run, inputs, change, use_reentrant=kind == "reentrant")
        else:
            with torch.autograd.graph.save_on_cpu() if kind == "offloaded" else contextlib.nullcontext():
                y = run(inputs, change)
        grads.append(torch.autograd.grad(y.sum(), magnitude) if kind != "reentrant" else _grad(y, magnitude))
    assert torch.equal(grads[0][0], grads[1][0])


def _grad(y: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor]:
    t.grad = None
    y.sum().backward()
    assert t.grad is not None
    return (t.grad,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_no_length_learn_one_and_may_point_back(dtype: torch.dtype) -> None:
    problem = make_problem(6, 24, 128, 5, dtype, scale=0.75)
    magnitude = lengths(problem)
    magnitude[3], magnitude[7] = 0, -magnitude[7]
    actual = fused(problem, magnitude)
    plain = definition(problem, magnitude, None)
    truth = definition(problem.to(torch.float64), magnitude.double(), None)
    assert truth["dm"][3] != 0
    for name, want in truth.items():
        assert_close(actual[name], plain[name], want, name)
    assert_close(actual["dm"][3:4], plain["dm"][3:4], truth["dm"][3:4], "dm of the row without length")


def test_the_backward_pass_keeps_nothing_of_the_size_of_the_output_but_the_output() -> None:
    problem = make_problem(64, 512, 128, 2)
    magnitude = lengths(problem).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = dora.dora_linear(problem.x, problem.w, problem.lora_a, problem.lora_b, magnitude)
    large = {t.data_ptr() for t in kept if t.numel() >= y.numel()}
    assert large == {y.data_ptr()}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiles_without_graph_breaks(dropout_p: float) -> None:
    problem = make_problem(3, 16, 64, 2, bias=True)
    magnitude = lengths(problem).requires_grad_()
    lora_b = problem.lora_b.requires_grad_()
    arguments = (problem.x, problem.w, problem.lora_a, lora_b, magnitude, problem.bias, 0.5, dropout_p)
    torch._dynamo.reset()
    compiled = torch.compile(dora.dora_linear, fullgraph=True, backend="aot_eager")
    results = []
    for run in (dora.dora_linear, compiled):
        torch.manual_seed(0)
        y = run(*arguments)
        results.append((y, *torch.autograd.grad(y.square().sum(), (magnitude, lora_b))))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()
