"""Adapters in 8 bits and NF4: both from one launch, and in 8 bits read by the product of few rows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from packed_factors import KINDS, exact, judge, packed_of
from tolerance import DTYPES, Problem, assert_close, make_problem

from fastlora import FastLoRALinear, backends, native, ops, packed, reference, tables
from fastlora.adapters.quantized import QuantizedFactor
from fastlora.int8 import Int8Matrix
from fastlora.kernels import config, split
from fastlora.kernels.dequantize import dequantize_pair
from fastlora.nf4 import NF4Weight
from fastlora.packed import Factor

pytestmark = pytest.mark.usefixtures("poison_empty")

KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    "case",
    [
        {"m": 20, "n": 136, "k": 192, "r": 16, "bias": True, "scale": -1.75},
        {"m": 1, "n": 40, "k": 64, "r": 8},
        {"m": 37, "n": 72, "k": 64, "r": 5, "dropout_p": 0.3},
        {"m": 3, "n": 33, "k": 96, "r": 80, "quant_type": "fp4", "nested": False},
    ],
    ids=lambda case: f"{case['m']}x{case['n']} r{case['r']}",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_read_8_bits(dtype: torch.dtype, case: dict[str, Any], kernel_device: str) -> None:
    p = make_problem(dtype=dtype, device=kernel_device, **case)
    a, b = packed_of(p.lora_a, "int8"), packed_of(p.lora_b, "int8")
    judge(p, a, b, split.linear(p.x, p.w, a, b, p.bias, p.scale, p.dropout))
    of_a = split.linear(p.x, p.w, a, p.lora_b, p.bias, p.scale, p.dropout)
    want = split.linear(p.x, p.w, a.dequantize(dtype), p.lora_b, p.bias, p.scale, p.dropout)
    for got, one in zip(of_a, want, strict=True):
        torch.testing.assert_close(got, one, rtol=0.03, atol=0.03 * float(one.abs().max()))


def test_the_scales_are_not_rounded(kernel_device: str) -> None:
    """Neither to 16 bits nor times a value: with u and its product exact, y has the error of its last rounding."""
    x = torch.zeros(1, 64, device=kernel_device).half()
    x[0, 0] = 1
    scales = torch.full((16, 1), 1 + 2.0**-13, device=kernel_device)
    a = Int8Matrix(torch.zeros(16, 64, dtype=torch.int8, device=kernel_device), scales)
    a.values[0, 0] = 64
    b = Int8Matrix(torch.ones(32, 16, dtype=torch.int8, device=kernel_device), scales[:1].expand(32, 1).contiguous())
    w = NF4Weight.quantize(torch.zeros(32, 64, device=kernel_device))
    y, u = split.linear(x, w, a, b, None, 1.0, None, torch.float32)
    assert u[0, 0] == 64
    assert torch.equal(y, torch.full_like(y, 64 * (1 + 2.0**-13)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_from_one_launch(dtype: torch.dtype, kernel_device: str) -> None:
    """Every kind beside every other gives the bits that each gives alone."""
    small, tall = torch.randn(16, 300).to(kernel_device), torch.randn(700, 8).to(kernel_device)
    odd, wide = torch.randn(3, 67).to(kernel_device), torch.randn(2, 5000).to(kernel_device)
    given = [packed_of(t, "int8") for t in (small, tall, odd)] + [packed_of(t, "nf4") for t in (small, tall)]
    given += [packed_of(wide, "int8"), NF4Weight.quantize(wide, nested=False, blocksize=128)]
    for first in given:
        for second in given:
            made = dequantize_pair(first, second, dtype)
            assert made is not None
            for got, factor in zip(made, (first, second), strict=True):
                assert torch.equal(got, factor.dequantize(dtype))
    for other in (packed_of(odd, "nf4"), NF4Weight.quantize(small)):
        assert dequantize_pair(given[0], other, dtype) is None
        assert dequantize_pair(other, given[0], dtype) is None


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


def test_layers_read_them_without_gradients(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("int8", 72, 64, 4, kernel_device, backend="triton")
    x = torch.randn(3, 5, 64, device=kernel_device).bfloat16()
    whole = layer(x.clone().requires_grad_()).detach()
    judge_layer(layer, x.view(15, 64), whole.view(15, 72))

    def refuse(self: Any, dtype: Any = None) -> Any:
        raise AssertionError("a factor was decoded")

    monkeypatch.setattr(config, "form", lambda *args: "split")
    monkeypatch.setattr(Int8Matrix, "dequantize", refuse)
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


@KIND
@pytest.mark.parametrize("form", ["decode", "split"])
def test_layers_of_every_kind(form: str, kind: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "form", lambda *args: form)
    layer = layer_of(kind, 72, 64, 4, kernel_device, backend="triton")
    x = torch.randn(15, 64, device=kernel_device).bfloat16()
    for scope in (contextlib.nullcontext(), tables.for_graphs()):
        with scope, torch.no_grad():
            judge_layer(layer, x, layer(x))


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


def test_who_reads(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of few rows: the extension's factors of every kind, Triton's those in 8 bits."""
    names, forms = iter(()), iter(())
    monkeypatch.setattr(ops, "select", lambda *args: backends.BACKENDS[next(names)])
    monkeypatch.setattr(config, "form", lambda *args: next(forms))
    monkeypatch.setattr(native, "form_for", lambda *args: next(forms))
    monkeypatch.setattr(native, "packed_forward", lambda x, *args, **options: (x, x))
    w, x = NF4Weight.quantize(torch.randn(64, 64)).to(kernel_device), torch.randn(8, 64, device=kernel_device).half()
    of_a, of_b = torch.randn(4, 64, device=kernel_device), torch.randn(64, 4, device=kernel_device)
    a, b = packed_of(of_a, "int8"), packed_of(of_b, "int8")

    def reads(name: str, form: str = "split", w: Any = w, a: Factor = a, b: Factor = b) -> bool:
        nonlocal names, forms
        names, forms = iter((name,)), iter((form,))
        return packed.read(x, w, a, b, None, 1.0, None, "auto") is not None

    assert reads("triton")
    assert not reads("torch")
    assert not any(reads("triton", form) for form in ("decode", "library", "persistent"))
    assert not reads("triton", w=torch.randn(64, 64, device=kernel_device))
    assert not reads("triton", a=packed_of(of_a, "nf4"))
    assert not reads("triton", b=packed_of(of_b, "nf4"))
    for kinds in itertools.product(KINDS, repeat=2):
        assert reads("cuda", "few_rows", a=packed_of(of_a, kinds[0]), b=packed_of(of_b, kinds[1]))
    assert not any(reads("cuda", form) for form in ("tile", "library"))
    for other in (NF4Weight.quantize(of_a), NF4Weight.quantize(of_a, quant_type="fp4", nested=False)):
        assert not reads("cuda", "few_rows", a=other)
    assert not reads("cuda", "few_rows", b=NF4Weight.quantize(of_b, nested=False, blocksize=128))


def test_one_launch_only_where_the_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (packed_of(torch.randn(8, 64), kind) for kind in ("int8", "nf4"))
    want = packed.both(a, b, torch.bfloat16)
    calls: list[str] = []

    class OnGPU:
        """Says that it is on a GPU, and is not."""

        def __init__(self, factor: Any) -> None:
            self.factor = factor

        def __getattr__(self, name: str) -> Any:
            return torch.device("cuda") if name == "device" else getattr(self.factor, name)

    machine = dataclasses.replace(backends.this_machine(), triton=None, native_cuda=None)
    monkeypatch.setattr(backends, "this_machine", lambda: machine)
    module = sys.modules["fastlora.kernels.dequantize"]
    monkeypatch.setattr(module, "dequantize_pair", lambda *args: (calls.append("pair"), want)[1])
    monkeypatch.setattr(packed, "_dense", lambda *args: (calls.append("one"), want[0])[1])
    moved: Any = OnGPU(a)
    packed.both(moved, b, torch.bfloat16)
    assert calls == ["one", "one"]
    calls.clear()
    with tables.for_graphs():
        packed.both(moved, b, torch.bfloat16)
        packed.both(moved, b, torch.float64)
        packed.both(a, b, torch.bfloat16)
    assert calls == ["pair", *["one"] * 4]


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
