"""The `cpu` backend on every code path of this processor, against the float64 truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tolerance import Results, check, make_problem, truth_and_plain

from fastlora import NF4Weight, native
from fastlora.dropout import Dropout

REASON = native.available("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=native.CAPABILITIES)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(native.CAPABILITY_VARIABLE, raising=False)
    if native.CAPABILITIES.index(request.param) > native.CAPABILITIES.index(native.capability()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(native.CAPABILITY_VARIABLE, request.param)
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Odd sizes, tails of every kind, more than one panel, block of the reduction (512 words) and tile (14 rows at most).
SIZES = (
    (1, 1, 1),
    (2, 3, 5),
    (15, 33, 31),
    (7, 65, 129),
    (29, 64, 96),
    (3, 130, 1088),
    (5, 1090, 64),
    (16, 35, 2081),
    (43, 96, 33),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size(path: str, dtype: torch.dtype, size: tuple[int, int, int], poison_empty: None) -> None:
    for bias in (False, True):
        check(make_problem(*size, 5, dtype, bias=bias), native.forward, native.backward)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
def test_dropout(path: str, dtype: torch.dtype, p: float, size: tuple[int, int, int], poison_empty: None) -> None:
    for adapter_dtype in (dtype, torch.float32, torch.float16):
        problem = make_problem(*size, 5, dtype, bias=True, adapter_dtype=adapter_dtype, dropout_p=p)
        check(problem, native.forward, native.backward)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False,) * 3]
)
def test_dropout_of_only_what_is_needed(dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    check(make_problem(5, 40, 64, 8, dtype, dropout_p=0.3), native.forward, native.backward, needs)
    check(make_problem(5, 40, 64, 0, dtype, dropout_p=0.3), native.forward, native.backward, needs)


def test_dropout_of_an_operator_takes_a_seed_beside_x() -> None:
    problem = make_problem(4, 40, 64, 8)
    for seed, message in (
        (torch.zeros(1), "seed must be a contiguous int64"),
        (torch.zeros(2).long(), "of 1 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            native.forward(problem.x, problem.w, problem.lora_a, problem.lora_b, None, 1.0, Dropout(0.5, seed))


@pytest.mark.parametrize("m", [*range(1, 16), 28, 31])
def test_every_tile(path: str, dtype: torch.dtype, m: int) -> None:
    check(make_problem(m, 64, 64, 4, dtype), native.forward, native.backward)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_every_format(path: str, dtype: torch.dtype, quant_type: str, blocksize: int, nested: bool) -> None:
    # Rows of whole blocks, rows that begin inside of one, and rows that begin in the middle of a byte.
    for k in (256, 96, 77):
        problem = make_problem(6, 70, k, 4, dtype, quant_type=quant_type, blocksize=blocksize, nested=nested)
        check(problem, native.forward, native.backward)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [0, 1, 8, 17, 64])
def test_every_rank(path: str, dtype: torch.dtype, r: int, adapter_dtype: torch.dtype) -> None:
    check(make_problem(20, 48, 72, r, dtype, adapter_dtype=adapter_dtype), native.forward, native.backward)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False), (False,) * 3]
)
def test_only_what_is_needed(dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
    check(make_problem(5, 40, 64, 8, dtype), native.forward, native.backward, needs)


def test_more_rows_than_a_chunk(dtype: torch.dtype) -> None:
    for dropout_p in (0.0, 0.3):
        problem = make_problem(1300, 33, 64, 4, dtype, bias=True, dropout_p=dropout_p)
        check(problem, native.forward, native.backward)


def test_a_wide_result_is_not_rounded(path: str) -> None:
    problem = make_problem(9, 70, 512, 8, torch.bfloat16)
    truth, _ = truth_and_plain(problem)
    args = (problem.x, problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
    wide, narrow = native.forward(*args, torch.float32)[0], native.forward(*args)[0]
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(torch.bfloat16), narrow)
    error = [(y.double() - truth["y"]).norm() for y in (wide, narrow)]
    assert error[0] < 0.75 * error[1]


def test_small_updates_are_not_lost() -> None:
    # The base product is 256 and each update a quarter of its unit in the last place: only their sum is rounded.
    m, n, k = 3, 64, 64
    w = NF4Weight.quantize(torch.full((n, k), 4.0))
    x = torch.ones(m, k, dtype=torch.bfloat16)
    lora_a, lora_b = torch.full((1, k), 1 / k).bfloat16(), torch.ones(n, 1, dtype=torch.bfloat16)
    y, _ = native.forward(x, w, lora_a, lora_b, torch.full((n,), 0.75, dtype=torch.bfloat16), 0.75, None)
    base = w.dequantize(torch.bfloat16).double().sum(1)
    assert torch.equal(y.double(), (base + 1.5).bfloat16().double().expand(m, n))
    assert (y.double() != base).all()


def bits(results: Results) -> dict[str, torch.Tensor]:
    return {name: t.view(torch.int16) for name, t in results.items() if t is not None}


@pytest.mark.parametrize("size", [(1, 256, 192), (40, 130, 96), (300, 33, 1100)], ids=str)
def test_threads_and_runs_give_the_same_bits(
    path: str, dtype: torch.dtype, size: tuple[int, int, int], threads: None
) -> None:
    problem = make_problem(*size, 8, dtype, bias=True, dropout_p=0.2)
    torch.set_num_threads(1)
    expected = bits(problem.run(native.forward, native.backward))
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        for name, value in bits(problem.run(native.forward, native.backward)).items():
            assert torch.equal(value, expected[name]), (name, count)


def test_rows_do_not_depend_on_their_neighbours(path: str, dtype: torch.dtype) -> None:
    problem = make_problem(37, 80, 96, 8, dtype)
    y, u = native.forward(problem.x, problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
    for rows in (slice(0, 1), slice(5, 20), slice(36, 37)):
        part = native.forward(problem.x[rows], problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
        assert torch.equal(part[0], y[rows])
        assert torch.equal(part[1], u[rows])


def test_unaligned_views_and_other_layouts(dtype: torch.dtype) -> None:
    problem = make_problem(6, 40, 64, 8, dtype)
    expected = problem.run(native.forward, native.backward)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    assert problem.lora_a is not None
    other = dataclasses.replace(
        problem, x=shifted(problem.x), dy=shifted(problem.dy), lora_a=problem.lora_a.T.contiguous().T
    )
    for name, value in other.run(native.forward, native.backward).items():
        assert torch.equal(value, expected[name]), name


def test_infinities_and_missing_numbers_arrive(path: str, dtype: torch.dtype) -> None:
    problem = make_problem(4, 70, 96, 4, dtype)
    problem.x[1, 3] = float("inf")
    problem.x[2, 5] = float("nan")
    y, _ = native.forward(problem.x, problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
    finite = y.isfinite()
    assert finite[[0, 3]].all()
    assert not finite[1:3].any()


def call_forward(**changes: object) -> None:
    """The operator itself, since `native.forward` puts some of its arguments right."""
    problem = make_problem(4, 40, 64, 8, torch.bfloat16, bias=True)
    assert isinstance(problem.w, NF4Weight)
    given = {"x": problem.x, "lora_a": problem.lora_a, "lora_b": problem.lora_b, "bias": problem.bias} | changes
    adapters = (given["lora_a"], given["lora_b"], given["bias"], 1.0, False, 0)
    torch.ops.fastlora_native.linear_forward(given["x"], *native.weight_arguments(problem.w), *adapters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 48)}, r"x must be contiguous, of shape \(4, 64\), got \(4, 48\)$"),
        ({"x": torch.zeros(64, 4).T}, r"x must be contiguous, of shape \(4, 64\), got \(4, 64\), not contiguous$"),
        ({"x": torch.zeros(64)}, r"x must have rows, got shape \(64\)$"),
        ({"x": torch.zeros(0, 64)}, r"x must have rows, got shape \(0, 64\)$"),
        ({"x": torch.zeros(4, 64).half()}, "x must be bfloat16 or float32, got float16$"),
        ({"x": torch.zeros(4, 64).long()}, "x must be float32, bfloat16 or float16, got int64$"),
        ({"lora_b": None}, "lora_a and lora_b must be given together, got only lora_a$"),
        ({"lora_a": torch.zeros(64)}, r"lora_a must be \(R, 64\), got \(64\)$"),
        ({"lora_a": torch.zeros(8, 63)}, r"lora_a must be contiguous, of shape \(8, 64\), got \(8, 63\)$"),
        ({"lora_b": torch.zeros(40, 9)}, r"lora_b must be contiguous, of shape \(40, 8\), got \(40, 9\)$"),
        (
            {"lora_a": torch.zeros(8, 64).half()},
            "lora_a must be float32 or bfloat16, the type computed in; got float16$",
        ),
        ({"x": torch.zeros(4, 64)}, "lora_a must be float32, the type computed in; got bfloat16$"),
        ({"lora_b": torch.zeros(40, 8)}, "lora_b must have the type of lora_a, bfloat16, got float32$"),
        ({"bias": torch.zeros(41)}, r"bias must be contiguous, of shape \(40\), got \(41\)$"),
        ({"bias": torch.zeros(40).double()}, "bias must be float32 or bfloat16, the type computed in; got float64$"),
    ],
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_forward(**change)


def test_right_arguments() -> None:
    call_forward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x is missing$"),
        ({"u": None}, "u is missing$"),
        ({"u": torch.zeros(4, 8)}, "u must have the type of dy, bfloat16, got float32$"),
        ({"x": torch.zeros(4, 63).bfloat16()}, r"x must be contiguous, of shape \(4, 64\), got \(4, 63\)$"),
        ({"dy": torch.zeros(4, 41).bfloat16()}, r"dy must be contiguous, of shape \(4, 40\), got \(4, 41\)$"),
    ],
)
def test_wrong_arguments_of_a_gradient(change: dict[str, torch.Tensor | None], message: str) -> None:
    problem = make_problem(4, 40, 64, 8, torch.bfloat16)
    given: dict[str, torch.Tensor | None] = {"dy": problem.dy, "x": problem.x, "u": problem.x[:, :8].contiguous()}
    given |= change
    assert given["dy"] is not None
    adapters = (problem.lora_a, problem.lora_b, 1.0, None)
    with pytest.raises(ValueError, match=message):
        native.backward(given["dy"], given["x"], given["u"], problem.w, *adapters)


def test_only_what_a_gradient_needs_is_asked_for() -> None:
    problem = make_problem(4, 40, 64, 8)
    adapters = (problem.lora_a, problem.lora_b, 1.0, None)
    dx, da, db = native.backward(problem.dy, None, None, problem.w, *adapters, (True, False, False))
    assert dx is not None
    assert da is None
    assert db is None


def test_too_capable_a_path() -> None:
    problem = make_problem(4, 40, 64, 0)
    assert isinstance(problem.w, NF4Weight)
    arguments = (problem.x, *native.weight_arguments(problem.w), None, None, None, 1.0, False, len(native.CAPABILITIES))
    with pytest.raises(ValueError, match="capability must be from 0 to"):
        torch.ops.fastlora_native.linear_forward(*arguments)
