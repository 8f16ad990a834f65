"""Adapters in 8 bits and NF4: read by the products as they are, or decoded by the launch that decodes the base."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grids import HAS_CUDA, wide_product_on_cpu
from tolerance import DTYPES, Problem, assert_close, make_problem

from fastlora import FastLoRALinear, kernels, packed, reference, tables
from fastlora.adapters.quantized import QuantizedFactor
from fastlora.int8 import Factor, Int8Matrix
from fastlora.kernels import config, lora
from fastlora.kernels.dequantize import dequantize_together
from fastlora.kernels.epilogue import finish
from fastlora.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("poison_empty")

KIND = pytest.mark.parametrize("kind", ["int8", "nf4"])
FORMS = ("decode", "library", "persistent", "split")
HAS_ACCELERATOR = not HAS_CUDA or torch.cuda.get_device_capability() >= (9, 0)
MODULE = sys.modules["fastlora.kernels.dequantize"]


Packed = Int8Matrix | NF4Weight


def packed_of(t: torch.Tensor, kind: str) -> Packed:
    if kind == "nf4":
        return NF4Weight.quantize(t, nested=False)
    # Scales far apart, so that one of another row shows.
    return Int8Matrix.quantize(t * (1 + torch.arange(t.shape[0], device=t.device) % 5)[:, None].to(t.dtype))


def exact(factor: Packed) -> torch.Tensor:
    """The matrix that the stored bits stand for, in float64."""
    if isinstance(factor, Int8Matrix):
        return factor.dequantize(torch.float64)
    return factor.dequantize(torch.float32).double()


def judge(
    p: Problem, a: Int8Matrix | NF4Weight, b: Int8Matrix | NF4Weight, got: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Hold y and u to the tolerance policy; the plain result rounds the factors to the type computed in."""
    wide = p.to(torch.float64)
    truth = reference.forward(wide.x, wide.w, exact(a), exact(b), wide.bias, p.scale, p.dropout)
    dtype = p.x.dtype
    plain = reference.forward(p.x, p.w, a.dequantize(dtype), b.dequantize(dtype), p.bias, p.scale, p.dropout)
    for name, *results in zip("yu", got, plain, truth, strict=True):
        assert_close(*results, name)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every product take one form, whatever its size and device."""

    def choose(form: str) -> None:
        if form == "persistent" and not HAS_ACCELERATOR:
            pytest.skip("needs the tensor memory accelerator")
        wide_product_on_cpu(monkeypatch)
        monkeypatch.setattr(config, "form", lambda *args: form)

    return choose


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, count: collections.Counter[str], name: str) -> None:
        self.kernel, self.count, self.name = kernel, count, name

    def __getitem__(self, grid: Any) -> Any:
        self.count[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """Launches of every kernel that decodes to memory."""
    count: collections.Counter[str] = collections.Counter()
    for name in ("dequantize_kernel", "dequantize_words_kernel", "dequantize_together_kernel"):
        monkeypatch.setattr(MODULE, name, Counted(getattr(MODULE, name), count, name.removesuffix("_kernel")))
    return count


CASES: dict[str, dict[str, Any]] = {
    "ragged": {"m": 37, "n": 136, "k": 200, "r": 16, "bias": True, "scale": -1.75},
    "one row": {"m": 1, "n": 40, "k": 64, "r": 8},
    "odd rank": {"m": 20, "n": 48, "k": 64, "r": 5},
    "rank 80": {"m": 20, "n": 72, "k": 64, "r": 80, "bias": True},
    "dropout": {"m": 20, "n": 72, "k": 200, "r": 4, "dropout_p": 0.3},
    "dense base": {"m": 20, "n": 72, "k": 96, "r": 8, "quant_type": None},
    "flat fp4 base": {"m": 20, "n": 72, "k": 96, "r": 8, "quant_type": "fp4", "nested": False},
    "unaligned": {"m": 20, "n": 33, "k": 70, "r": 3},
    "odd columns": {"m": 17, "n": 31, "k": 33, "r": 2},
}


@KIND
@pytest.mark.parametrize(
    ("form", "projected_rows"),
    [("decode", 4096), ("library", 4096), ("library", 1), ("persistent", 4096), ("persistent", 1), ("split", 4096)],
)
@pytest.mark.parametrize("case", CASES)
def test_every_form(
    case: str, form: str, projected_rows: int, kind: str, kernel_device: str, force: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    force(form)
    monkeypatch.setattr(config, "PROJECTED_ROWS", projected_rows)
    dtype = torch.bfloat16 if len(case) % 2 else torch.float16
    p = make_problem(dtype=dtype, device=kernel_device, **CASES[case])
    a, b = packed_of(p.lora_a, kind), packed_of(p.lora_b, kind)
    judge(p, a, b, kernels.forward(p.x, p.w, a, b, p.bias, p.scale, p.dropout))


@KIND
@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, kind: str, kernel_device: str) -> None:
    p = make_problem(dtype=torch.float32, device=kernel_device, **CASES[case])
    a, b = packed_of(p.lora_a, kind), packed_of(p.lora_b, kind)
    judge(p, a, b, kernels.forward(p.x, p.w, a, b, p.bias, p.scale, p.dropout))


def test_one_packed_factor_beside_one_that_is_not(kernel_device: str, force: Callable[[str], None]) -> None:
    p = make_problem(20, 72, 96, 8, torch.float16, device=kernel_device)
    a, b = packed_of(p.lora_a, "int8"), packed_of(p.lora_b, "nf4")
    for form in FORMS:
        force(form)
        for factors in ((a, p.lora_b), (p.lora_a, b), (a, b)):
            dense = [t if isinstance(t, torch.Tensor) else t.dequantize(torch.float16) for t in factors]
            y, _ = kernels.forward(p.x, p.w, *factors, None, 0.5, None)
            want, _ = kernels.forward(p.x, p.w, *dense, None, 0.5, None)
            torch.testing.assert_close(y, want, rtol=2e-3, atol=2e-3)


@KIND
@pytest.mark.parametrize(
    ("form", "rows", "wanted"),
    [
        ("decode", 4096, {}),
        ("split", 4096, {}),
        ("library", 4096, {"dequantize_words": 1}),
        ("library", 1, {"dequantize_words": 1}),
        ("persistent", 4096, {"dequantize_together": 1}),
        ("persistent", 1, {"dequantize_together": 1}),
    ],
)
def test_no_launch_is_added(
    form: str, rows: int, wanted: dict[str, int], kind: str, kernel_device: str, force: Callable[[str], None],
    launches: collections.Counter[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    force(form)
    monkeypatch.setattr(config, "PROJECTED_ROWS", rows)
    p = make_problem(8, 32, 64, 8, torch.float16, device=kernel_device)
    kernels.forward(p.x, p.w, packed_of(p.lora_a, kind), packed_of(p.lora_b, kind), None, 1.0, None)
    assert launches == wanted
    launches.clear()
    kernels.forward(p.x, p.w, p.lora_a, p.lora_b, None, 1.0, None)
    assert sum(launches.values()) == sum(wanted.values())


@KIND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 64, 8), (70, 320, 5), (33, 130, 40), (17, 33, 3)], ids=str)
def test_u(size: tuple[int, int, int], dtype: torch.dtype, kind: str, kernel_device: str) -> None:
    m, k, r = size
    x = torch.randn(m, k).to(kernel_device, dtype)
    a = packed_of(torch.randn(r, k).to(kernel_device), kind)
    u, scaled = lora.project_x(x, a, -0.5, None)
    plain, truth = x @ a.dequantize(dtype).T, x.double() @ exact(a).T
    assert_close(u, plain, truth, "u")
    assert_close(scaled, -0.5 * plain, -0.5 * truth, "scaled")


def test_the_scales_of_int8_are_not_rounded(kernel_device: str) -> None:
    """1/3 in bfloat16 is off by a third of a unit: a product of sums with it is not."""
    a = Int8Matrix(torch.full((1, 64), 96, dtype=torch.int8), torch.full((1, 1), 1 / 3), torch.bfloat16)
    a = Int8Matrix(a.values.to(kernel_device), a.scales.to(kernel_device))
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=kernel_device)
    u, _ = lora.project_x(x, a, 1.0, None)
    assert u.item() == 2048.0
    b = Int8Matrix(a.values[:, :1].contiguous(), a.scales)
    y = finish(torch.zeros(1, 1, device=kernel_device), x[:, :1], b, None, 3.0, torch.float32)
    assert y.item() == pytest.approx(96.0, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("shape", [(96, 192), (48, 40), (7, 3)], ids=str)
def test_decoded_together(shape: tuple[int, int], nested: bool, dtype: torch.dtype, kernel_device: str) -> None:
    """Every kind beside every other, aligned to whole words or not, gives the bits that each gives alone."""
    w = NF4Weight.quantize(torch.randn(shape).to(kernel_device), nested=nested)
    small, odd = torch.randn(16, 300).to(kernel_device), torch.randn(3, 67).to(kernel_device)
    given: list[Factor | None] = [
        packed_of(small, "int8"), packed_of(small, "nf4"), packed_of(odd, "int8"), packed_of(odd, "nf4"), odd, None,
    ]  # fmt: skip
    for base in (w, None):
        for first in given:
            for second in given:
                zero = None if base is None else torch.ones(1, dtype=torch.int32, device=kernel_device)
                dense, made = dequantize_together(base, (first, second), dtype, zero)
                assert (dense is None) == (base is None)
                if dense is not None and zero is not None:
                    assert torch.equal(dense, w.dequantize(dtype))
                    assert zero.item() == 0
                for got, factor in zip(made, (first, second), strict=True):
                    if factor is None or isinstance(factor, torch.Tensor):
                        assert got is factor
                    else:
                        assert isinstance(got, torch.Tensor)
                        assert torch.equal(got, factor.dequantize(dtype))


def test_decoded_together_in_one_launch(kernel_device: str, launches: collections.Counter[str]) -> None:
    w = NF4Weight.quantize(torch.randn(96, 192).to(kernel_device))
    a, b = torch.randn(16, 192).to(kernel_device), torch.randn(96, 16).to(kernel_device)
    for kinds in (("int8", "nf4"), ("nf4", "nf4")):
        for base in (w, None):
            launches.clear()
            dequantize_together(base, (packed_of(a, kinds[0]), packed_of(b, kinds[1])), torch.float16)
            assert launches == {"dequantize_together": 1}
    launches.clear()
    dequantize_together(w, (a, None), torch.float16)
    assert launches == {"dequantize_words": 1}


def test_other_4_bit_formats_are_refused(kernel_device: str) -> None:
    a, x = torch.randn(4, 64).to(kernel_device), torch.randn(2, 64).to(kernel_device)
    for w in (NF4Weight.quantize(a), NF4Weight.quantize(a, nested=False, blocksize=128)):
        with pytest.raises(ValueError, match="flat statistics of 64"):
            lora.project_x(x, w, 1.0, None)


# -- layers --------------------------------------------------------------------------------------------------------


def layer_of(kind: str, n: int, k: int, r: int, device: str, **options: Any) -> FastLoRALinear:
    layer = FastLoRALinear(
        k, n, r, 3, bias=True, dtype=torch.bfloat16, init_lora_weights=False, device=device, **options
    )
    for parts in (layer.lora_A, layer.lora_B):
        parts["default"] = QuantizedFactor(parts["default"].weight, kind)
    return layer.eval()


def judge_layer(layer: FastLoRALinear, x: torch.Tensor, y: torch.Tensor) -> None:
    a, b = layer.lora_A["default"].packed, layer.lora_B["default"].packed
    p = Problem(x, x, layer.base_layer.nf4, None, None, layer.base_layer.bias, layer.scaling["default"])
    wide, dtype = p.to(torch.float64), x.dtype
    truth, _ = reference.forward(wide.x, wide.w, exact(a), exact(b), wide.bias, p.scale, None)
    plain, _ = reference.forward(x, p.w, a.dequantize(dtype), b.dequantize(dtype), p.bias, p.scale, None)
    assert_close(y, plain, truth, "y")


@KIND
def test_layers_read_them_without_gradients(kind: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind, 72, 64, 4, kernel_device, backend="triton")
    x = torch.randn(3, 5, 64, device=kernel_device).bfloat16()
    whole = layer(x.clone().requires_grad_()).detach()
    judge_layer(layer, x.view(15, 64), whole.view(15, 72))

    def refuse(self: Any, dtype: Any = None) -> Any:
        raise AssertionError("a factor was decoded")

    monkeypatch.setattr(Int8Matrix, "dequantize", refuse)
    monkeypatch.setattr(NF4Weight, "dequantize", refuse)
    monkeypatch.setattr(QuantizedFactor, "weight", property(refuse))
    results = []
    with torch.no_grad():
        results.append(layer(x.clone().requires_grad_()))
    results.append(layer(x))
    with torch.inference_mode():
        results.append(layer(x))
    with torch.autocast(kernel_device, torch.bfloat16):
        results.append(layer(x.float()))
    monkeypatch.undo()
    for y in results:
        assert (y.shape, y.dtype, y.requires_grad) == ((3, 5, 72), torch.bfloat16, False)
        judge_layer(layer, x.view(15, 64), y.view(15, 72))
    assert layer(x[:0]).shape == (0, 5, 72)
    with pytest.raises(ValueError, match="in_features = 64"):
        layer(x[..., :63])


def test_gradients_reach_x_and_the_bias(kernel_device: str) -> None:
    layer = layer_of("int8", 72, 64, 4, kernel_device, backend="triton")
    layer.base_layer.bias.requires_grad_()
    x = torch.randn(6, 64, device=kernel_device).bfloat16()
    layer(x).sum().backward()
    assert torch.equal(layer.base_layer.bias.grad, torch.full_like(layer.base_layer.bias, 6))
    x.requires_grad_()
    layer(x).sum().backward()
    w = layer.base_layer.nf4.dequantize(torch.float64)
    a, b = (exact(parts["default"].packed) for parts in (layer.lora_A, layer.lora_B))
    want = (w + layer.scaling["default"] * b @ a).sum(0)
    torch.testing.assert_close(x.grad.double(), want.expand(6, 64), rtol=0.02, atol=0.02 * float(want.abs().max()))


def test_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's backend always; few rows in a graph though C++ is faster alone; nobody else."""
    from fastlora import backends, ops

    names = iter(())
    monkeypatch.setattr(ops, "_select", lambda *args: backends.BACKENDS[next(names)])
    w, x = NF4Weight.quantize(torch.randn(64, 64)), torch.randn(8, 64)

    def reader(name: str, rows: int = 8, backend: str = "auto", base: Any = w) -> str | None:
        nonlocal names
        names = iter((name,))
        found = packed.chosen(x[:1].expand(rows, 64), base, 4, backend)
        return found and found.name

    assert reader("triton") == reader("triton", 500, "triton") == "triton"
    assert reader("cuda") is None
    with tables.for_graphs():
        last = packed.READ_ROWS.stop - 1
        assert reader("cuda") == reader("cuda", 1) == reader("cuda", last) == "triton"
        assert reader("cuda", last + 1) is None
        assert reader("cuda", backend="cuda") is None
        assert reader("cuda", base=torch.randn(64, 64)) is None
        assert reader("cpu") is reader("torch") is None


@pytest.mark.gpu
@KIND
@pytest.mark.parametrize("m", [1, 16, 64, 256, 1024, 8192])
def test_layers_in_graphs_and_out_of_them(m: int, kind: str) -> None:
    layer, x = layer_of(kind, 4096, 4096, 16, "cuda"), torch.randn(m, 4096, device="cuda").bfloat16()
    with torch.no_grad():
        judge_layer(layer, x, layer(x))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with tables.for_graphs(), torch.cuda.stream(side):
            layer(x)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                y = layer(x)
        x.normal_()
        graph.replay()
        torch.cuda.synchronize()
        judge_layer(layer, x, y)
