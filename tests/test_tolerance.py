"""The policy accepts what is right and rejects what is wrong, by little and in one element."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import DTYPES, assert_close, check, make_problem, truth_and_plain

from fastlora import reference

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=DTYPES, ids=str)
def triple(request: pytest.FixtureRequest) -> Triple:
    """(actual, plain, truth) of a product that is summed in another order than the plain one."""
    x, w = torch.randn(33, 129).to(request.param), torch.randn(65, 129).to(request.param)
    truth = x.double() @ w.double().T
    halves = (x[:, :64].float() @ w[:, :64].float().T) + (x[:, 64:].float() @ w[:, 64:].float().T)
    return halves.to(request.param), x @ w.T, truth


def test_accepts_another_order_of_summation(triple: Triple) -> None:
    assert_close(*triple)


def test_accepts_the_plain_result_and_the_rounded_truth(triple: Triple) -> None:
    _, plain, truth = triple
    assert_close(plain, plain, truth)
    assert_close(truth.to(plain.dtype), plain, truth)


def test_rejects_one_wrong_element_and_names_it(triple: Triple) -> None:
    actual, plain, truth = triple
    actual[17, 42] = -actual[17, 42] - 1
    with pytest.raises(AssertionError, match=r"(?s)product .*largest error .*too large.*worst at \(17, 42\)"):
        assert_close(actual, plain, truth, "product")


def test_rejects_a_swapped_pair_of_elements(triple: Triple) -> None:
    actual, plain, truth = triple
    actual[3, [4, 5]] = actual[3, [5, 4]]
    with pytest.raises(AssertionError, match="too large"):
        assert_close(actual, plain, truth)


def test_rejects_a_row_left_at_zero(triple: Triple) -> None:
    actual, plain, truth = triple
    actual[-1] = 0
    with pytest.raises(AssertionError, match="too large"):
        assert_close(actual, plain, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rejects_what_is_not_finite(triple: Triple, value: float) -> None:
    actual, plain, truth = triple
    actual[1, 2] = value
    with pytest.raises(AssertionError, match=r"1 of 2145 elements are not finite, first at \(1, 2\)"):
        assert_close(actual, plain, truth)


def test_rejects_a_scaled_result(triple: Triple) -> None:
    actual, plain, truth = triple
    units = 40 if actual.dtype == torch.float32 else 6
    with pytest.raises(AssertionError, match="too large"):
        assert_close((actual.double() * (1 + units * torch.finfo(actual.dtype).eps)).to(actual.dtype), plain, truth)


def test_accepts_one_float32_accumulator_per_element() -> None:
    """Rounded after each of 4096 terms, beside a sum that is rounded once."""
    x, w = torch.randn(32, 4096), torch.randn(48, 4096)
    truth = x.double() @ w.double().T
    actual = torch.zeros(32, 48)
    for k in range(4096):
        actual += x[:, k, None] * w[None, :, k]
    assert (actual - truth).norm() > 5 * torch.finfo(torch.float32).eps * truth.norm()
    assert_close(actual, truth.float(), truth)


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the 10 bits of mantissa of TF32, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("k", [16, 129, 4096])
@pytest.mark.parametrize("half", ["x", "w", "both"])
def test_rejects_a_tf32_product_in_float32(half: str, k: int) -> None:
    x, w = torch.randn(33, k), torch.randn(65, k)
    truth = x.double() @ w.double().T
    actual = (_tf32(x) if half != "w" else x) @ (_tf32(w) if half != "x" else w).T
    with pytest.raises(AssertionError, match=r"(?s)largest error .*too large.*Frobenius error .*too large"):
        assert_close(actual, x @ w.T, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types_get_one_rounding_and_no_more(dtype: torch.dtype) -> None:
    plain, eps = (torch.rand(40, 40) + 1).to(dtype), torch.finfo(dtype).eps
    truth = plain.double()
    few, every, one = truth.clone(), truth + eps, truth.clone()
    few[:10] += eps
    one[0, 0] += 3 * eps
    assert_close(few.to(dtype), plain, truth)
    with pytest.raises(AssertionError, match=r"Frobenius error .*too large"):
        assert_close(every.to(dtype), plain, truth)
    with pytest.raises(AssertionError, match=r"largest error .*too large"):
        assert_close(one.to(dtype), plain, truth)


def test_rejects_a_small_error_everywhere_by_its_norm() -> None:
    """Eight bits of an 11-bit type were lost: each element looks harmless beside the largest one."""
    truth = torch.randn(64, 64, dtype=torch.float64)
    truth[0, 0] = 100.0
    plain = truth.half()
    actual = truth.bfloat16().half()
    actual[0, 0] = plain[0, 0]
    with pytest.raises(AssertionError, match=r"Frobenius error .*too large"):
        assert_close(actual, plain, truth)


def test_rejects_a_wrong_shape_or_type(triple: Triple) -> None:
    actual, plain, truth = triple
    with pytest.raises(AssertionError, match="shape"):
        assert_close(actual.T.contiguous(), plain, truth)
    with pytest.raises(AssertionError, match="must be"):
        assert_close(actual.double(), plain, truth)


def test_zero_truth_admits_only_zeros() -> None:
    zero = torch.zeros(2, 3)
    assert_close(zero, zero, zero.double())
    with pytest.raises(AssertionError, match="too large"):
        assert_close(zero + 1e-30, zero, zero.double())


def test_refuses_to_judge_by_a_bad_truth(triple: Triple) -> None:
    actual, plain, truth = triple
    with pytest.raises(ValueError, match="must be float64"):
        assert_close(actual, plain, truth.float())
    with pytest.raises(ValueError, match="finite"):
        assert_close(actual, plain, truth / 0)
    with pytest.raises(ValueError, match="plain has shape"):
        assert_close(actual, plain[1:], truth)


def test_empty_results_pass_by_shape_alone() -> None:
    assert_close(torch.empty(3, 0), torch.empty(3, 0), torch.empty(3, 0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
def test_check_accepts_plain_pytorch(dtype: torch.dtype, quant_type: str | None) -> None:
    problem = make_problem(9, 17, 35, 4, dtype, quant_type=quant_type, bias=True, dropout_p=0.3)
    results = check(problem, reference.forward, reference.backward)
    assert all(result is not None for result in results.values())
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        check(problem, reference.forward, reference.backward, needs)


def _ignore(index: int, value: object) -> object:
    def forward(*args: object) -> object:
        return reference.forward(*(value if i == index else arg for i, arg in enumerate(args)))  # type: ignore[arg-type]

    return forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("index", "value"), [(4, None), (5, 0.45), (6, None)], ids=["no bias", "wrong scale", "no dropout"]
)
def test_check_rejects_a_forward_that_ignores_a_term(dtype: torch.dtype, index: int, value: object) -> None:
    problem = make_problem(33, 17, 35, 4, dtype, bias=True, dropout_p=0.1)
    with pytest.raises(AssertionError, match="too large"):
        check(problem, _ignore(index, value), reference.backward)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dx", "da", "db"])
def test_check_rejects_a_gradient_that_lacks_one_row_of_tokens(dtype: torch.dtype, name: str) -> None:
    problem = make_problem(33, 17, 35, 4, dtype)

    def backward(dy: torch.Tensor, *args: object) -> object:
        short = dy.clone()
        short[-1] = 0
        right, wrong = reference.backward(dy, *args), reference.backward(short, *args)  # type: ignore[arg-type]
        return tuple(b if key == name else a for key, a, b in zip(("dx", "da", "db"), right, wrong, strict=True))

    with pytest.raises(AssertionError, match=rf"^{name} "):
        check(problem, reference.forward, backward)


def test_check_rejects_missing_and_unwanted_gradients() -> None:
    problem = make_problem()
    with pytest.raises(AssertionError, match="dx is missing"):
        check(problem, reference.forward, lambda *args: (None, None, None))
    everything = lambda *args: reference.backward(*args[:-1])  # noqa: E731
    with pytest.raises(AssertionError, match="da was not asked for"):
        check(problem, reference.forward, everything, (True, False, False))


def test_problems_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    first, again, other = make_problem(seed=1), make_problem(seed=1), make_problem(seed=2)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.w.w_packed, again.w.w_packed)  # type: ignore[union-attr]
    assert not torch.equal(first.x, other.x)


def test_rank_zero_and_adapters_of_another_type() -> None:
    truth, plain = truth_and_plain(make_problem(r=0))
    assert truth["u"] is not None
    assert truth["u"].shape == (5, 0)
    assert plain["da"] is None
    assert plain["db"] is None
    mixed = make_problem(dtype=torch.bfloat16, adapter_dtype=torch.float32).run()
    assert mixed["y"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert mixed["da"].dtype == mixed["db"].dtype == torch.float32  # type: ignore[union-attr]
