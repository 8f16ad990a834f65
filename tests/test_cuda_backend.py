"""The `cuda` backend, in both of its forms, against the float64 truth; what needs no GPU is in test_backends.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_factors import KINDS, judge, packed_of
from tolerance import Problem, assert_close, check, make_problem, truth_and_plain

from fastlora import NF4Weight, backends, lora_linear, native
from fastlora.dropout import Dropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda"))),
]

MOST = native.few_rows(torch.cuda.get_device_capability()) if torch.cuda.is_available() else 0
ROWS = [m for m in (1, 2, 3, 8, 9, 16, 17, 32, 33, 64) if m <= MOST]
DTYPES = (torch.bfloat16, torch.float16)
FORMS = ("few_rows", "library")


def passes(form: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward."""
    return functools.partial(native.forward, form=form), functools.partial(native.backward, form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [(8, 32), (72, 96), (136, 1056), (1000, 608), (264, 4128)])
def test_every_size(m: int, n: int, k: int, dtype: torch.dtype, form: str) -> None:
    check(make_problem(m, n, k, 16, dtype, bias=True, device="cuda"), *passes(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [0, 1, 2, 7, 8, 17, 64, 256, 300])
@pytest.mark.parametrize("m", [m for m in (1, 13, 40) if m <= MOST])
def test_every_rank(m: int, r: int, adapter_dtype: torch.dtype, form: str) -> None:
    problem = make_problem(m, 200, 512, r, torch.bfloat16, adapter_dtype=adapter_dtype, device="cuda")
    check(problem, *passes(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "r"), [(8, 32, 1), (72, 96, 16), (1000, 608, 17), (264, 4128, 8)])
@pytest.mark.parametrize("m", [m for m in (1, 13, 40) if m <= MOST])
def test_dropout(m: int, n: int, k: int, r: int, adapter_dtype: torch.dtype, form: str) -> None:
    for dtype in DTYPES:
        problem = make_problem(m, n, k, r, dtype, adapter_dtype=adapter_dtype, bias=True, dropout_p=0.3, device="cuda")
        check(problem, *passes(form))
        for needs in ((True, False, False), (False, True, False), (True, True, False)):
            check(problem, *passes(form), needs)
    check(make_problem(m, n, k, r, torch.bfloat16, dropout_p=1.0, device="cuda"), *passes(form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "r"),
    [(8, 32, 1), (72, 96, 5), (136, 1056, 16), (1000, 608, 33), (264, 4128, 8), (4096, 4096, 64), (8192, 14336, 16)],
)
@pytest.mark.parametrize("m", ROWS)
def test_packed_adapters(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> None:
    problem = make_problem(m, n, k, r, dtype, nested=m % 2 == 0, bias=r % 2 == 0, scale=-1.75, device="cuda")
    for of_a, of_b in itertools.product(KINDS, repeat=2):
        a, b = packed_of(problem.lora_a, of_a), packed_of(problem.lora_b, of_b)
        for out_dtype in (None, torch.float32):
            got = native.packed_forward(problem.x, problem.w, a, b, problem.bias, problem.scale, out_dtype)
            assert got[0].dtype == (out_dtype or dtype)
            judge(problem, a, b, got)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_adapters_that_do_not_fit(kind: str) -> None:
    p = make_problem(4, 136, 512, 8, torch.bfloat16, device="cuda")
    a, b = packed_of(p.lora_a, kind), packed_of(p.lora_b, kind)
    for other, message in (
        (packed_of(torch.randn(8, 480, device="cuda"), kind), "lora_a must be a contiguous u?int8 tensor of"),
        (packed_of(torch.randn(8, 512), kind), "lora_a must be on cuda:0, got cpu$"),
    ):
        with pytest.raises(ValueError, match=message):
            native.packed_forward(p.x, p.w, other, b, None, 1.0)
    scales = (a.scales if kind == "int8" else a.absmax)[1:]
    other = dataclasses.replace(a, **{"scales" if kind == "int8" else "absmax": scales})
    with pytest.raises(ValueError, match="lora_a_scales must be a contiguous float32 tensor of"):
        native.packed_forward(p.x, p.w, other, b, None, 1.0)
    with pytest.raises(ValueError, match="x must have at most 64 rows"):
        native.packed_forward(torch.randn(65, 512, device="cuda").bfloat16(), p.w, a, b, None, 1.0)


def test_the_masks_of_all_backends_are_one() -> None:
    # A is a part of the unit matrix and W zero: u holds columns of the dropped x, dx the mask of those.
    m, k, r = 70, 200, 64
    w = NF4Weight.quantize(torch.zeros(8, k, device="cuda"))
    a = torch.eye(r, k, device="cuda", dtype=torch.bfloat16)
    b = torch.ones(8, r, device="cuda", dtype=torch.bfloat16)
    x, dy = (torch.ones(m, size, device="cuda", dtype=torch.bfloat16) for size in (k, 8))
    dropout = Dropout(0.3, torch.tensor([77], device="cuda"))
    truth = dropout.apply(x)
    for name in ("cuda", "triton", "torch", "reference"):
        backend = backends.BACKENDS[name]
        if backend.unsupported(backends.Problem(m, 8, k, r, dropout=True), backends.this_machine()):
            continue
        _, u = backend.forward(x, w, a, b, None, 1.0, dropout, None)
        dx, da, _ = backend.backward(dy, x, u, w, a, b, 1.0, dropout, (True, True, True))
        assert torch.equal(u, truth[:, :r]), name
        assert torch.equal(dx[:, :r] != 0, truth[:, :r] != 0), name
        assert not dx[:, r:].any(), name
        assert torch.equal(da[:, :r] != 0, (truth[:, :r] != 0).any(0).expand(r, r)), name


def test_each_replay_of_a_graph_draws_a_mask() -> None:
    problem = make_problem(70, 136, 512, 8, torch.bfloat16, device="cuda")
    leaves = [t.requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]

    def step() -> tuple[torch.Tensor, ...]:
        y = lora_linear(leaves[0], problem.w, *leaves[1:], dropout_p=0.5, backend="cuda")
        return (y, *torch.autograd.grad(y, leaves, problem.dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        for _ in range(2):
            graph.replay()
            seen.append([t.clone() for t in captured])
    for first, again in ((0, 2), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(seen[first], seen[again], strict=True))
    for one, other in ((0, 1), (0, 4), (1, 5)):
        assert not any(torch.equal(a, b) for a, b in zip(seen[one], seen[other], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 1024, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_format(quant_type: str, blocksize: int, nested: bool, form: str) -> None:
    # in_features is no multiple of most block sizes: blocks of statistics straddle the rows.
    for m in (2, 12):
        problem = make_problem(
            m, 344, 1056, 8, torch.bfloat16, quant_type=quant_type, blocksize=blocksize, nested=nested, device="cuda"
        )
        check(problem, *passes(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (4096, 14336)])
@pytest.mark.parametrize("m", [m for m in (1, 16, 31, 64) if m <= MOST])
def test_model_shapes(m: int, n: int, k: int, form: str) -> None:
    check(make_problem(m, n, k, 16, torch.bfloat16, device="cuda"), *passes(form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
def test_only_what_is_needed(needs: tuple[bool, bool, bool], form: str) -> None:
    check(make_problem(5, 136, 512, 8, torch.bfloat16, device="cuda"), *passes(form), needs)


def test_odd_out_features_forward() -> None:
    problem = make_problem(4, 77, 512, 8, torch.bfloat16, device="cuda")
    truth, plain = truth_and_plain(problem)
    args = (problem.x, problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
    y, u = native.forward(*args, form="few_rows")
    assert_close(y, plain["y"], truth["y"], "y")
    assert_close(u, plain["u"], truth["u"], "u")


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5), (70, 33, 31), (300, 1000, 513), (4096, 264, 96)])
def test_sizes_that_only_the_library_takes(m: int, n: int, k: int) -> None:
    for dtype in DTYPES:
        for bias in (False, True):
            check(make_problem(m, n, k, 5, dtype, bias=bias, device="cuda"), native.forward, native.backward)
            dropped = make_problem(m, n, k, 5, dtype, bias=bias, dropout_p=0.2, device="cuda")
            check(dropped, native.forward, native.backward)
        check(make_problem(m, n, k, 0, dtype, device="cuda"), native.forward, native.backward)


@pytest.mark.parametrize("form", FORMS)
def test_a_wide_result_is_not_rounded(form: str) -> None:
    problem = make_problem(4, 136, 512, 8, torch.bfloat16, device="cuda")
    truth, _ = truth_and_plain(problem)
    args = (problem.x, problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)
    wide, narrow = native.forward(*args, torch.float32, form)[0], native.forward(*args, form=form)[0]
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(torch.bfloat16), narrow)
    error = [(y.double() - truth["y"]).norm() for y in (wide, narrow)]
    assert error[0] < 0.75 * error[1]


@pytest.mark.parametrize("form", FORMS)
def test_unaligned_views_and_other_layouts(form: str) -> None:
    problem = make_problem(6, 136, 512, 8, torch.bfloat16, device="cuda")
    expected = problem.run(*passes(form))

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)

    other = problem.to(torch.bfloat16)
    object.__setattr__(other, "x", shifted(problem.x))
    object.__setattr__(other, "dy", shifted(problem.dy))
    object.__setattr__(other, "lora_a", problem.lora_a.T.contiguous().T)
    object.__setattr__(other, "lora_b", shifted(problem.lora_b))
    for name, value in other.run(*passes(form)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [m for m in (1, 2, 48) if m <= MOST])
def test_two_runs_give_the_same_bits(m: int, form: str) -> None:
    problem = make_problem(m, 4096, 4096, 16, torch.bfloat16, device="cuda")
    first = problem.run(*passes(form))
    for _ in range(20):
        for name, value in problem.run(*passes(form)).items():
            assert torch.equal(value, first[name]), name


def assert_waits(chain: Callable[[bool], torch.Tensor]) -> torch.Tensor:
    """That a chain of launches gives the same with and without a wait after each, and what it gives."""
    expected = chain(True)
    for _ in range(10):
        assert torch.equal(chain(False), expected)
    return expected


@pytest.mark.parametrize("m", [1, 2, 8])
def test_chained_launches_wait_for_what_they_read(m: int) -> None:
    # Each result feeds the next call while the device is busy: a kernel that started too early would read the old one.
    problem = make_problem(m, 1024, 1024, 16, torch.bfloat16, scale=0.1, device="cuda")
    args = (problem.w, problem.lora_a, problem.lora_b, None, problem.scale, None)

    def chain(wait: bool) -> torch.Tensor:
        x = problem.x
        for _ in range(50):
            x, u = native.forward(x, *args)
            dx, da, _ = native.backward(x, x, u, problem.w, problem.lora_a, problem.lora_b, problem.scale, None)
            x = torch.nn.functional.normalize(x + dx + da.sum(0), dim=-1) * 30
            if wait:
                torch.cuda.synchronize()
        return x

    assert_waits(chain)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("m", [m for m in (1, 2, 5, 16, 40) if m <= MOST])
@pytest.mark.parametrize("size", [1024, 4096])
def test_products_in_a_row_wait_for_each_other(size: int, m: int, kind: str | None) -> None:
    # The kernel that makes u starts beside the product before it, whose result it reads.
    problems = [make_problem(m, size, size, 16, torch.bfloat16, scale=0.1, seed=i, device="cuda") for i in range(4)]
    factors = [
        (p.lora_a, p.lora_b) if kind is None else (packed_of(p.lora_a, kind), packed_of(p.lora_b, kind))
        for p in problems
    ]
    forward = native.forward if kind is None else native.packed_forward

    def chain(wait: bool) -> torch.Tensor:
        x = problems[0].x
        for i in range(40):
            p, (a, b) = problems[i % 4], factors[i % 4]
            x, _ = forward(x, p.w, a, b, None, p.scale, None)
            if i % 3 == 2:
                x = torch.nn.functional.normalize(x, dim=-1) * 30
            if wait:
                torch.cuda.synchronize()
        return x

    expected = assert_waits(chain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(wait=False)
    for _ in range(10):
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("m", [1, 2, 8])
def test_graph_capture_replays_with_new_inputs(m: int) -> None:
    problem = make_problem(m, 1024, 1024, 16, torch.bfloat16, device="cuda")
    problem.run(native.forward, native.backward)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(native.forward, native.backward)
    problem.x.normal_()
    problem.dy.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for name, expected in problem.run(native.forward, native.backward).items():
        assert torch.equal(captured[name], expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (MOST + 1, 512)}, "rows"),
        ({"x": (4, 480)}, "x must be contiguous, of shape"),
        ({"lora_b": (136, 9)}, "lora_b must be contiguous, of shape"),
    ],
)
def test_wrong_arguments(change: dict[str, tuple[int, int]], message: str) -> None:
    problem = make_problem(4, 136, 512, 8, torch.bfloat16, device="cuda")
    for name, shape in change.items():
        object.__setattr__(problem, name, torch.zeros(shape, dtype=torch.bfloat16, device="cuda"))
    with pytest.raises(ValueError, match=message):
        native.forward(problem.x, problem.w, problem.lora_a, problem.lora_b, None, 1.0, None, form="few_rows")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x is missing$"),
        ({"x": torch.zeros(4, 512)}, "x must have the type of dy, bfloat16, got float32$"),
        ({"x": torch.zeros(4, 512).bfloat16()}, "x must be on cuda:0, got cpu$"),
        ({"u": torch.zeros(4, 9).bfloat16()}, r"u must be contiguous, of shape \(4, 8\), got \(4, 9\)$"),
    ],
)
def test_wrong_arguments_of_a_gradient(change: dict[str, Any], message: str, form: str) -> None:
    problem = make_problem(4, 136, 512, 8, torch.bfloat16, device="cuda")
    given: dict[str, Any] = {"x": problem.x, "u": problem.x[:, :8].contiguous()} | change
    with pytest.raises(ValueError, match=message):
        native.backward(
            problem.dy, given["x"], given["u"], problem.w, problem.lora_a, problem.lora_b, 1.0, None, form=form
        )


def check_forward(problem: Problem, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Hold the forward pass of few rows to the policy; returns y."""
    truth, plain = truth_and_plain(problem)
    args = (problem.x, problem.w, problem.lora_a, problem.lora_b, problem.bias, problem.scale, None)
    y, u = native.forward(*args, out_dtype, form="few_rows")
    assert_close(y.to(problem.x.dtype), plain["y"], truth["y"], "y")
    assert_close(u, plain["u"], truth["u"], "u")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("k", [64, 320, 512, 1088, 8704, 14336, 16384, 17408, 33792])
@pytest.mark.parametrize("n", [1, 8, 77, 131, 333, 1031])
def test_one_and_two_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_forward(make_problem(m, n, k, 16, dtype, bias=True, device="cuda"))


@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (32001, 512), (70001, 1088)])
@pytest.mark.parametrize("m", [1, 2])
def test_one_and_two_rows_of_many_outputs(m: int, n: int, k: int) -> None:
    # More than shared memory holds at once, and more than one wave of blocks.
    check_forward(make_problem(m, n, k, 16, torch.bfloat16, bias=True, device="cuda"))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("r", [0, 1, 16, 17, 64, 100])
def test_every_format_and_rank_of_one_and_two_rows(
    r: int, adapter_dtype: torch.dtype | None, quant_type: str, blocksize: int, nested: bool
) -> None:
    for m in (1, 2):
        for dtype in DTYPES:
            problem = make_problem(
                m, 333, 1088, r, dtype, quant_type=quant_type, blocksize=blocksize, nested=nested,
                adapter_dtype=adapter_dtype, device="cuda",
            )  # fmt: skip
            y = check_forward(problem)
            wide = check_forward(problem, torch.float32)
            assert wide.dtype == torch.float32
            assert torch.equal(wide.to(dtype), y)


@pytest.mark.parametrize("m", [1, 2])
def test_one_and_two_rows_of_elements_far_apart(m: int) -> None:
    problem = make_problem(m, 333, 1088, 16, torch.bfloat16, device="cuda")
    for exponents in (torch.linspace(-30, 8, 1088), torch.linspace(-120, -90, 1088), torch.linspace(90, 110, 1088)):
        x = (problem.x.float() * torch.exp2(exponents.to("cuda"))).bfloat16()
        check_forward(Problem(x, problem.dy, problem.w, None, None, None))
        one = torch.zeros_like(x)
        one[:, 700] = x[:, 700]
        check_forward(Problem(one, problem.dy, problem.w, None, None, None))


HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)


def check_tile(problem: Problem) -> None:
    """Hold both passes to the policy, their products decoding W in their tiles where they can."""
    r = 0 if problem.lora_a is None else problem.lora_a.shape[0]
    backward = "tile" if r % 8 == 0 else "library"
    check(problem, passes("tile")[0], passes(backward)[1])


@HOPPER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 17, 32, 33, 64, 65, 128, 129, 257, 700])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (72, 192), (136, 1024), (1000, 576), (264, 4096), (4096, 2048)])
def test_every_size_of_tiles(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    check_tile(make_problem(m, n, k, 16, dtype, bias=True, device="cuda"))
    check_tile(make_problem(m, n, k, 16, dtype, bias=True, dropout_p=0.2, device="cuda"))


@HOPPER
@pytest.mark.parametrize("m", [70, 300, 680, 700, 1000])
def test_tiles_repeat_beside_other_work(m: int) -> None:
    # Copies of the other stream hold up the stores of the tiles, whose buffers must wait for them.
    problem = make_problem(m, 4096, 2048, 16, torch.bfloat16, bias=True, device="cuda")
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target, other = torch.empty_like(source), torch.cuda.Stream()
    first = problem.run(*passes("tile"))
    for _ in range(100):
        with torch.cuda.stream(other):
            target.copy_(source)
        for name, again in problem.run(*passes("tile")).items():
            assert again is None or torch.equal(again, first[name]), name


@HOPPER
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [0, 1, 7, 8, 17, 64, 65, 300])
@pytest.mark.parametrize("m", [13, 100, 400])
def test_every_rank_of_tiles(m: int, r: int, adapter_dtype: torch.dtype) -> None:
    check_tile(make_problem(m, 200, 512, r, torch.bfloat16, adapter_dtype=adapter_dtype, device="cuda"))


@HOPPER
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128, 1024, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_format_of_tiles(quant_type: str, blocksize: int, nested: bool) -> None:
    for m in (20, 90, 300):
        check_tile(
            make_problem(
                m, 344, 960, 8, torch.bfloat16, quant_type=quant_type, blocksize=blocksize, nested=nested, device="cuda"
            )
        )


@HOPPER
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
@pytest.mark.parametrize("r", [0, 5, 16, 72])
@pytest.mark.parametrize(("m", "n", "k"), [(2500, 2056, 1984), (4100, 1032, 1088)])
def test_every_rank_of_tiles_of_many_rows(
    m: int, n: int, k: int, r: int, adapter_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    check_tile(make_problem(m, n, k, r, dtype, adapter_dtype=adapter_dtype, bias=True, device="cuda"))


@HOPPER
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("blocksize", "k"), [(64, 2048), (64, 1984), (128, 1984), (4096, 2048)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_format_of_tiles_of_many_rows(quant_type: str, blocksize: int, k: int, nested: bool) -> None:
    check_tile(
        make_problem(
            2048, 2048, k, 16, torch.bfloat16, quant_type=quant_type, blocksize=blocksize, nested=nested, device="cuda"
        )
    )


@HOPPER
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_many_rows_decode_to_the_same_bits(dtype: torch.dtype, backward: bool) -> None:
    # Each row picks a row or a column of the weight.
    w = make_problem(1, 2048, 2048, 0, dtype, device="cuda").w
    rows = torch.eye(2048, dtype=dtype, device="cuda")
    if backward:
        got, _, _ = native.backward(rows, None, None, w, None, None, 1.0, None, (True, False, False), "tile")
        assert torch.equal(got, w.dequantize(dtype))
    else:
        got, _ = native.forward(rows, w, None, None, None, 1.0, None, form="tile")
        assert torch.equal(got, w.dequantize(dtype).T)


@HOPPER
@pytest.mark.parametrize("m", [32, 64, 256, 2048])
def test_two_runs_of_tiles_give_the_same_bits(m: int) -> None:
    p = make_problem(m, 4096, 4096, 16, torch.bfloat16, device="cuda")
    first = p.run(*passes("tile"))
    for _ in range(20):
        for name, value in p.run(*passes("tile")).items():
            assert torch.equal(value, first[name]), name
    wide = native.forward(p.x, p.w, p.lora_a, p.lora_b, p.bias, p.scale, None, torch.float32, "tile")[0]
    assert torch.equal(wide.bfloat16(), first["y"])
