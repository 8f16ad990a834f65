"""The dense library products of the `torch` backend: what it may leave out, and how often it rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import DTYPES, check, make_problem, truth_and_plain

from fastlora import backends, eager


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [0, 1, 5])
def test_every_result(r: int, bias: bool, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(33, 24, 40, r, dtype, quant_type=None, bias=bias, dropout_p=0.3 if r else 0.0, device=device)
    check(problem, eager.forward, eager.backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["y", "dx"])
def test_the_large_product_is_rounded_once(name: str, dtype: torch.dtype, device: str) -> None:
    """The small term is accumulated onto, so the error is below that of two rounded products and their rounded sum."""
    if name == "dx" and device == "cuda":
        pytest.skip("cuBLAS rounds a product before it adds to it, and dx is not worth float32 sums")
    problem = make_problem(64, 128, 128, 8, dtype, quant_type=None, scale=1.0, device=device)
    truth, plain = truth_and_plain(problem)
    actual = problem.run(eager.forward, eager.backward)
    errors = [(results[name].double() - truth[name]).norm().item() for results in (actual, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_backward_without_what_is_not_needed() -> None:
    problem = make_problem(quant_type=None, dropout_p=0.5)
    expected = problem.run(eager.forward, eager.backward)
    _, u = eager.forward(
        problem.x, problem.w, problem.lora_a, problem.lora_b, problem.bias, problem.scale, problem.dropout
    )
    rest = (problem.lora_a, problem.lora_b, problem.scale, problem.dropout)
    dx, da, db = eager.backward(problem.dy, None, u, problem.w, *rest, (True, False, True))
    assert torch.equal(dx, expected["dx"])
    assert da is None
    assert torch.equal(db, expected["db"])
    dx, da, db = eager.backward(problem.dy, problem.x, u, None, *rest, (False, True, False))
    assert dx is None
    assert torch.equal(da, expected["da"])
    assert db is None


def test_the_weight_is_dequantized_only_for_dx(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = backends.dequantize

    def spy(*args: Any) -> torch.Tensor:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(backends, "dequantize", spy)
    problem, torch_backend = make_problem(), backends.BACKENDS["torch"]
    _, u = torch_backend.forward(
        problem.x, problem.w, problem.lora_a, problem.lora_b, problem.bias, problem.scale, problem.dropout
    )
    assert len(calls) == 1
    rest = (problem.lora_a, problem.lora_b, problem.scale, problem.dropout)
    torch_backend.backward(problem.dy, problem.x, u, problem.w, *rest, (False, True, True))
    assert len(calls) == 1
    torch_backend.backward(problem.dy, problem.x, u, problem.w, *rest, (True, True, True))
    assert len(calls) == 2
