"""Each form of a product with the base weight: decoded inside of it, or into a buffer for a library or for `gemm`."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grids import HAS_CUDA, check, product
from tolerance import Problem, assert_close, make_problem

from fastlora import kernels, reference
from fastlora.kernels import config

pytestmark = pytest.mark.usefixtures("poison_empty")

FORMS = ("decode", "library", "persistent", "split")
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
HAS_ACCELERATOR = not HAS_CUDA or torch.cuda.get_device_capability() >= (9, 0)


def _wide_product_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch offers ``out_dtype`` on CUDA only."""
    mm = torch.mm

    def wide(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return mm(a, b) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    if not HAS_CUDA:
        monkeypatch.setattr(torch, "mm", wide)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every product take one form, whatever its size and device."""

    def choose(form: str) -> None:
        if form == "persistent" and not HAS_ACCELERATOR:
            pytest.skip("needs the tensor memory accelerator")
        _wide_product_on_cpu(monkeypatch)
        monkeypatch.setattr(config, "form", lambda *args: form)
        monkeypatch.setattr(config, "PROJECTED_ROWS", 1)

    return choose


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each form's own function ran."""
    count: collections.Counter[str] = collections.Counter()

    def spy(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    products = ("gemm", "projecting_gemm")
    for module, names in (("forward", ("linear", "finish", *products)), ("backward", ("input_gradient", *products))):
        for name in names:
            spy(sys.modules[f"fastlora.kernels.{module}"], name)
    return count


def check_wide(problem: Problem) -> None:
    """Hold a float32 y to the policy: the plain result rounds u and B to 16 bits, and nothing else."""
    p, dtype = problem, problem.x.dtype
    y, u = kernels.forward(p.x, p.w, p.lora_a, p.lora_b, p.bias, p.scale, p.dropout, torch.float32)
    plain = product(p.x, reference.dense(p.w, dtype).T, torch.float32)
    if p.lora_a is not None and p.lora_b is not None:
        plain_u = (p.dropout.apply(p.x) if p.dropout else p.x) @ p.lora_a.to(dtype).T
        plain += p.scale * product(plain_u, p.lora_b.to(dtype).T, torch.float32)
    plain = plain if p.bias is None else plain + p.bias.float()
    truth = p.to(torch.float64).run(needs=(False, False, False))["y"]
    assert truth is not None
    assert_close(y, plain, truth, "y")
    assert u.dtype == dtype


CASES: dict[str, dict[str, Any]] = {
    "ragged": {"m": 133, "n": 264, "k": 136, "r": 16},
    "one row": {"m": 1, "n": 40, "k": 64, "r": 8, "bias": True},
    "rank 1": {"m": 20, "n": 48, "k": 64, "r": 1},
    "rank 80": {"m": 40, "n": 72, "k": 64, "r": 80, "bias": True},
    "dropout": {"m": 40, "n": 72, "k": 200, "r": 5, "dropout_p": 0.3},
    "everything": {"m": 40, "n": 72, "k": 200, "r": 16, "dropout_p": 0.3, "bias": True, "scale": -1.75},
    "float32 adapters": {"m": 40, "n": 72, "k": 96, "r": 8, "adapter_dtype": torch.float32, "dropout_p": 0.2},
    "no adapters": {"m": 40, "n": 72, "k": 96, "r": 0},
    "no adapters, bias": {"m": 40, "n": 72, "k": 96, "r": 0, "bias": True},
    "flat fp4": {"m": 40, "n": 72, "k": 96, "r": 8, "quant_type": "fp4", "nested": False},
    "dense": {"m": 40, "n": 72, "k": 96, "r": 8, "quant_type": None, "bias": True},
    "rows that are no multiple of 16 bytes": {"m": 20, "n": 33, "k": 70, "r": 3, "bias": True, "dropout_p": 0.1},
}


@DTYPE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_every_result(
    case: str, form: str, dtype: torch.dtype, kernel_device: str, force: Callable[[str], None]
) -> None:
    force(form)
    check(make_problem(dtype=dtype, device=kernel_device, **CASES[case]))


@DTYPE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_float32_results(
    case: str, form: str, dtype: torch.dtype, kernel_device: str, force: Callable[[str], None]
) -> None:
    force(form)
    check_wide(make_problem(dtype=dtype, device=kernel_device, **CASES[case]))


@pytest.mark.parametrize(
    ("form", "options", "forward", "backward"),
    [
        ("decode", {}, {"linear": 1}, {"input_gradient": 1}),
        ("decode", {"r": 0}, {"linear": 1}, {"input_gradient": 1}),
        ("library", {}, {"finish": 1}, {}),
        ("library", {"r": 0}, {}, {}),
        ("split", {}, {}, {}),
        # No whole groups in a row, and a dense weight: what a library can do.
        ("split", {"k": 48}, {"finish": 1}, {}),
        ("split", {"quant_type": None}, {"finish": 1}, {}),
        ("persistent", {}, {"projecting_gemm": 1}, {"projecting_gemm": 1}),
        ("persistent", {"r": 5}, {"gemm": 1}, {"gemm": 1}),
        ("persistent", {"r": 40}, {"gemm": 1}, {"gemm": 1}),
        ("persistent", {"r": 0}, {"gemm": 1}, {"gemm": 1}),
        # The mask applies to the LoRA term alone, which therefore cannot join the accumulator of dx.
        ("persistent", {"dropout_p": 0.5}, {"gemm": 1}, {}),
        ("persistent", {"n": 36}, {"finish": 1}, {}),
        ("persistent", {"k": 36}, {"finish": 1}, {}),
    ],
)
def test_a_form_is_what_runs(
    form: str,
    options: dict[str, Any],
    forward: dict[str, int],
    backward: dict[str, int],
    kernel_device: str,
    force: Callable[[str], None],
    calls: collections.Counter[str],
) -> None:
    if "projecting_gemm" in forward and HAS_CUDA and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9")
    force(form)
    p = make_problem(**({"m": 8, "n": 32, "k": 32, "r": 8} | options), dtype=torch.float16, device=kernel_device)
    _, u = kernels.forward(p.x, p.w, p.lora_a, p.lora_b, p.bias, p.scale, p.dropout)
    assert calls == forward
    calls.clear()
    kernels.backward(p.dy, p.x, u, p.w, p.lora_a, p.lora_b, p.scale, p.dropout)
    assert calls == backward


@pytest.mark.parametrize("form", FORMS)
def test_x_at_an_odd_address(form: str, kernel_device: str, force: Callable[[str], None]) -> None:
    """A contiguous view that the tensor memory accelerator cannot read gives the same results by another way."""
    p = make_problem(20, 48, 64, 8, torch.float16, device=kernel_device)
    x, dy = (torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t) for t in (p.x, p.dy))
    assert x.data_ptr() % 16
    force(form)
    check(Problem(x, dy, p.w, p.lora_a, p.lora_b, p.bias, p.scale))


def test_cpu_tensors_and_float32_are_decoded_inside_the_product() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert config.form(4096, 4096, 4096, dtype, torch.device("cpu")) == "decode"
    assert config.form(4096, 4096, 4096, torch.float32, torch.device("cuda")) == "decode"


@pytest.mark.parametrize(
    ("capability", "m", "form"),
    [((9, 0), 1024, "persistent"), ((9, 0), 1023, "library"), ((10, 0), 9999, "persistent"), ((8, 0), 9999, "library")],
)
def test_long_products_are_persistent_where_the_hardware_is(
    capability: tuple[int, int], m: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.Device, "of", classmethod(lambda cls, device: cls(capability)))
    for dtype in (torch.float16, torch.bfloat16):
        assert config.form(m, 4096, 4096, dtype, torch.device("cuda")) == form


# -- at the sizes that select a form -------------------------------------------------------------------------------

NATURAL: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "float32": ("decode", torch.float32, {"m": 300, "n": 512, "k": 768, "r": 16}),
    "few rows": ("split", torch.bfloat16, {"m": 100, "n": 1024, "k": 2048, "r": 16}),
    "few rows, float16": ("split", torch.float16, {"m": 5, "n": 1030, "k": 2080, "r": 17}),
    "short": ("library", torch.bfloat16, {"m": 300, "n": 1024, "k": 2048, "r": 16}),
    "short, float16": ("library", torch.float16, {"m": 300, "n": 1030, "k": 2050, "r": 17}),
    "long": ("persistent", torch.bfloat16, {"m": 4096, "n": 4096, "k": 4096, "r": 16}),
    "long, float16": ("persistent", torch.float16, {"m": 4133, "n": 4104, "k": 4112, "r": 80}),
    "long, unaligned": ("persistent", torch.bfloat16, {"m": 4133, "n": 4100, "k": 4112, "r": 16}),
}


def natural(name: str, **options: Any) -> Problem:
    """A problem on the GPU whose size selects its form."""
    form, dtype, sizes = NATURAL[name]
    if form == "persistent" and not HAS_ACCELERATOR:
        pytest.skip("needs the tensor memory accelerator")
    sizes = sizes | options
    assert config.form(sizes["m"], sizes["n"], sizes["k"], dtype, torch.device("cuda")) == form
    return make_problem(dtype=dtype, device="cuda", **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"r": 0, "bias": True}, {"dropout_p": 0.1, "bias": True}, {"adapter_dtype": torch.float32}],
    ids=str,
)
@pytest.mark.parametrize("name", NATURAL)
def test_sizes_that_select_a_form(name: str, options: dict[str, Any]) -> None:
    problem = natural(name, **options)
    check(problem)
    if problem.x.dtype != torch.float32:
        check_wide(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("name", NATURAL)
def test_two_runs_give_the_same_bits(name: str, dropout_p: float) -> None:
    problem = natural(name, dropout_p=dropout_p, bias=True)
    first = problem.run(kernels.forward, kernels.backward)
    for _ in range(3):
        for key, value in problem.run(kernels.forward, kernels.backward).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"r": 0}, {"dropout_p": 0.3, "bias": True}], ids=str)
@pytest.mark.parametrize("name", NATURAL)
def test_graph_capture_replays_with_new_inputs_and_seeds(name: str, options: dict[str, Any]) -> None:
    problem = natural(name, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run(kernels.forward, kernels.backward)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(kernels.forward, kernels.backward)
    problem.x.normal_()
    problem.dy.normal_()
    if problem.dropout:
        problem.dropout.seed.fill_(987654321)
    graph.replay()
    torch.cuda.synchronize()
    for key, expected in problem.run(kernels.forward, kernels.backward).items():
        if expected is not None:
            assert torch.equal(captured[key], expected), key
