"""What a checkpointed gated MLP hands from its second forward pass to its backward pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

from fastlora import groups, native, recomputed
from fastlora.blocks import Projection, gated_mlp
from fastlora.nf4 import NF4Weight

K, I = 64, 48  # noqa: E741
REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(autouse=True)
def _stacked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted")
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator")
    monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")


def make(n: int, k: int, device: str, r: int) -> Projection:
    def parameter(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * shape[-1] ** -0.5).to(device, torch.float16).requires_grad_()

    w = NF4Weight.quantize((torch.randn(n, k) * k**-0.5).half()).to(device)
    return Projection(w, parameter(r, k), parameter(n, r), None, 0.7)


class Problem:
    def __init__(self, device: str) -> None:
        self.inner, self.down = [make(I, K, device, 8) for _ in range(2)], make(K, I, device, 4)
        self.x = torch.randn(10, K).to(device, torch.float16).requires_grad_()
        self.dy = torch.randn(10, K).to(device, torch.float16)
        self.leaves = [self.x]
        for p in (*self.inner, self.down):
            self.leaves += [t for t in (p.lora_a, p.lora_b) if t is not None]

    def y(self, x: torch.Tensor) -> torch.Tensor:
        return gated_mlp(x, self.inner, self.down, backend="triton")

    def grads(self, y: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        y.backward(self.dy, **options)
        grads = [t.grad for t in self.leaves]
        for t in self.leaves:
            t.grad = None
        return [y.detach(), *(grad for grad in grads if grad is not None)]

    def checkpointed(self, reentrant: bool, run: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        options = {"use_reentrant": reentrant, "preserve_rng_state": False}
        return torch.utils.checkpoint.checkpoint(run or self.y, self.x, **options)


@pytest.fixture
def problem(device: str) -> Problem:
    return Problem(device)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every base weight that is decoded."""
    stacked, seen = groups.kernels("stacked"), []
    real = stacked.stack

    def stack(weights: Any, *args: Any) -> Any:
        seen.append(sum(w.shape[0] for w in weights))
        return real(weights, *args)

    monkeypatch.setattr(stacked, "stack", stack)
    return seen


@REENTRANT
def test_gate_and_up_are_decoded_once_less(
    reentrant: bool, problem: Problem, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    got = problem.grads(problem.checkpointed(reentrant))
    again = 1 if reentrant else 0  # down is made again, too
    assert decoded.count(2 * I) == 2
    assert decoded.count(K) == 2 + again
    assert not recomputed._held
    decoded.clear()
    monkeypatch.setattr(recomputed, "running", lambda: False)
    want = problem.grads(problem.checkpointed(reentrant))
    assert decoded.count(2 * I) == 3
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_one_projection_for_both(problem: Problem, decoded: list[int]) -> None:
    problem.inner = [make(2 * I, K, problem.x.device.type, 8)]
    problem.leaves[1:5] = [t for t in (problem.inner[0].lora_a, problem.inner[0].lora_b) if t is not None]
    want = problem.grads(problem.y(problem.x))
    decoded.clear()
    got = problem.grads(problem.checkpointed(False))
    assert decoded.count(2 * I) == 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_backward_again(problem: Problem, decoded: list[int]) -> None:
    y = problem.checkpointed(False)
    first = problem.grads(y, retain_graph=True)
    decoded.clear()
    second = problem.grads(y)
    assert decoded.count(2 * I) == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not recomputed._held


def test_nothing_is_handed_over_outside_of_a_backward_pass(problem: Problem, decoded: list[int]) -> None:
    y = problem.y(problem.x)
    assert not recomputed._held
    problem.grads(y)
    assert decoded == [2 * I, K, K, 2 * I]


def test_w_is_gone_once_dx_is_made(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked, left = groups.kernels("stacked"), []
    real = stacked.input_gradient

    def input_gradient(dy: Any, du: Any, weights: Any, adapters: Any) -> Any:
        held = adapters.dense is not None
        dx = real(dy, du, weights, adapters)
        left.append((held, adapters.dense))
        return dx

    monkeypatch.setattr(stacked, "input_gradient", input_gradient)
    problem.grads(problem.checkpointed(False))
    assert left == [(False, None), (True, None)], "of down; of gate and up"


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError


@REENTRANT
@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_backward_pass_that_fails_leaves_nothing(
    where: str, reentrant: bool, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = problem.grads(problem.checkpointed(reentrant))

    def run(x: torch.Tensor) -> torch.Tensor:
        y = problem.y(x)
        return _Fails.apply(y) * y.square() if where == "before" else y

    y = problem.checkpointed(reentrant, run)
    with monkeypatch.context() as patch:
        if where == "inside":
            for module, name in ((groups.kernels("gated"), "gradients"), (native, "gated_gradients")):
                patch.setattr(module, name, Mock(side_effect=ArithmeticError))
        with pytest.raises(ArithmeticError):
            y.backward(problem.dy)
    del y
    gc.collect()
    assert not recomputed._held
    for t in problem.leaves:
        t.grad = None
    for a, b in zip(problem.grads(problem.checkpointed(reentrant)), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_in_a_cuda_graph(problem: Problem, device: str) -> None:
    def run() -> list[torch.Tensor]:
        return list(torch.autograd.grad(problem.checkpointed(False), problem.leaves, problem.dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    assert not recomputed._held
    with torch.no_grad():
        problem.x.mul_(0.5)
        problem.inner[0].lora_a.add_(0.1)
    graph.replay()
    for a, b in zip(got, run(), strict=True):
        assert torch.equal(a, b)


def test_handed_over_once_and_with_its_memory() -> None:
    kept = torch.empty(8)
    recomputed.hand_over(kept, "first")
    recomputed.hand_over(kept[2:], "second")
    assert recomputed.take(kept.detach()) == "second"
    assert recomputed.take(kept) is None
    recomputed.hand_over(kept, "third")
    other = torch.empty(8)
    assert recomputed.take(other) is None
    del kept
    assert not recomputed._held
    assert not recomputed.running()
