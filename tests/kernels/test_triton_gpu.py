"""What only a real GPU can show: determinism, no recompilation, graph capture, sizes above 2^31."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from grids import DTYPES
from tolerance import Problem, Results, assert_close, make_problem
from triton.runtime.jit import JITFunction

from fastlora import kernels
from fastlora.kernels import backward, config, dequantize, forward, lora
from fastlora.nf4 import NF4Weight

pytestmark = pytest.mark.gpu


def run(problem: Problem) -> Results:
    return problem.run(kernels.forward, kernels.backward)


def compiled_variants() -> int:
    """Variants of every kernel in this process."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fastlora.kernels.")]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    return sum(len(cache[0]) for kernel in found for cache in kernel.device_caches.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [16, 128])
def test_two_runs_give_the_same_bits(r: int, dtype: torch.dtype) -> None:
    problem = make_problem(3000, 1024, 1536, r, dtype, dropout_p=0.1, device="cuda")
    first = run(problem)
    for _ in range(5):
        for name, value in run(problem).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("form", ["decode", "library", "persistent", "split"])
def test_m_and_scale_recompile_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "persistent" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator")
    monkeypatch.setattr(config, "form", lambda *args: form)

    def step(m: int, scale: float) -> None:
        run(make_problem(m, 512, 1024, 16, torch.bfloat16, scale=scale, dropout_p=0.1, device="cuda"))

    for m in (1, 2, 16, 17, 64, 65, 128, 1000, 4096, 8192):
        step(m, 1.0)
    before = compiled_variants()
    assert before > 0
    for m in (1, 3, 7, 15, 31, 33, 48, 63, 66, 129, 255, 256, 999, 1024, 2047, 4095, 5000):
        step(m, 0.25 + m)
    assert compiled_variants() == before


@pytest.mark.parametrize("r", [0, 16])
def test_graph_capture_replays_with_new_inputs_and_seeds(r: int) -> None:
    problem = make_problem(300, 512, 768, r, torch.bfloat16, dropout_p=0.3, bias=True, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(problem)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem)
    problem.x.normal_()
    problem.dy.normal_()
    problem.dropout.seed.fill_(987654321)
    graph.replay()
    torch.cuda.synchronize()
    for name, expected in run(problem).items():
        if expected is not None:
            assert torch.equal(captured[name], expected), name


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (make_problem(33, 65, 96, 8, device=f"cuda:{i}") for i in (0, 1))
    with torch.cuda.device(0):
        for name, value in run(there).items():
            assert torch.equal(value.cpu(), run(here)[name].cpu()), name


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_more_elements_than_32_bits_count(nested: bool) -> None:
    n, k = 65537, 32832  # 2.15e9 elements; the last rows lie beyond 2^31
    w = NF4Weight.empty((n, k), nested=nested, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for t in w.tensors().values():
        if t.dtype == torch.uint8:
            t.random_(0, 256, generator=generator)
        else:
            t.copy_(torch.rand(t.shape, generator=generator, device="cuda"))
    out = dequantize(w, torch.bfloat16)
    for rows in ((0, 64), (n // 2, n // 2 + 64), (n - 300, n)):
        assert torch.equal(out[rows[0] : rows[1]], w.dequantize(torch.bfloat16, rows))
    del out
    x = torch.randn(4, k, device="cuda", dtype=torch.bfloat16, generator=generator)
    y, u = forward(x, w, None, None, None, 1.0, None)
    last = w.dequantize(torch.bfloat16, (n - 64, n))
    assert_close(y[:, -64:], x @ last.T, x.double() @ last.double().T, "y")
    dy = torch.zeros(4, n, device="cuda", dtype=torch.bfloat16)
    dy[:, -64:] = torch.randn(4, 64, device="cuda", generator=generator)
    dx, _, _ = backward(dy, None, u, w, None, None, 1.0, None, (True, False, False))
    assert_close(dx, dy[:, -64:] @ last, dy[:, -64:].double() @ last.double(), "dx")


def test_the_rank_side_kernels_refuse_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="need CUDA tensors"):
        lora.project_dy(torch.zeros(2, 4), torch.zeros(4, 3), 1.0)
