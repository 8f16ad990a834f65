"""Products of few rows with a packed weight: the reduced side split among programs, W decoded in registers."""

from __future__ import annotations

import dataclasses
import re
import struct
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grids import check
from tolerance import Problem, make_problem

from fastlora import kernels
from fastlora.kernels import config, split
from fastlora.nf4 import BLOCKSIZES, CODES, NF4Weight

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every product takes the form of few rows; the directions of those that ran."""
    ran: list[str] = []
    product = split._product

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran.append("forward" if kwargs["transposed"] else "backward")
        return product(*args, **kwargs)

    monkeypatch.setattr(split, "_product", counted)
    monkeypatch.setattr(config, "form", lambda *args: "split")
    return ran


CASES: dict[str, dict[str, Any]] = {
    "one row": {"m": 1, "n": 70, "k": 64, "r": 8, "bias": True},
    "one group": {"m": 3, "n": 17, "k": 32, "r": 1},
    "rank 70": {"m": 17, "n": 65, "k": 288, "r": 70, "scale": -1.75},
    "blocks that straddle rows": {"m": 5, "n": 50, "k": 96, "r": 5, "blocksize": 64},
    "one block": {"m": 5, "n": 20, "k": 160, "r": 5, "blocksize": 4096, "nested": False, "bias": True},
    "fp4": {"m": 33, "n": 130, "k": 256, "r": 16, "quant_type": "fp4", "blocksize": 128, "dropout_p": 0.3},
    "flat fp4": {"m": 16, "n": 40, "k": 192, "r": 3, "quant_type": "fp4", "nested": False, "blocksize": 32},
    "dropout": {"m": 40, "n": 72, "k": 320, "r": 5, "dropout_p": 0.5, "bias": True},
    "everything dropped": {"m": 4, "n": 33, "k": 64, "r": 8, "dropout_p": 1.0},
    "float32 adapters": {"m": 20, "n": 48, "k": 96, "r": 8, "adapter_dtype": torch.float32, "dropout_p": 0.2},
    "no adapters": {"m": 20, "n": 48, "k": 96, "r": 0, "bias": True},
    "two tiles of rows": {"m": 130, "n": 48, "k": 160, "r": 8, "dropout_p": 0.1},
    "many parts": {"m": 2, "n": 40, "k": 2400, "r": 8, "dropout_p": 0.1},
    "many parts of dx": {"m": 2, "n": 1100, "k": 64, "r": 8, "dropout_p": 0.1},
}


@DTYPE
@pytest.mark.parametrize("case", CASES)
def test_every_result(case: str, dtype: torch.dtype, kernel_device: str, products: list[str]) -> None:
    check(make_problem(dtype=dtype, device=kernel_device, **CASES[case]))
    assert products == ["forward", "backward"]


def test_the_cases_reach_what_they_are_named_for() -> None:
    device = config.Device()
    for case, transposed in (("many parts", True), ("many parts of dx", False)):
        sizes = [CASES[case][side] for side in "mnkr"]
        division = config.split_product(*sizes, device, transposed=transposed)
        assert division.parts > 1
        assert division.narrow_parts > 1
        assert division.steps > 1


@DTYPE
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [BLOCKSIZES[0], 64, BLOCKSIZES[-1]])
def test_w_has_the_bits_of_the_dequantizer(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    """A row of the identity times W^T or W picks a column or a row of W, whose sum with zeros is exact."""
    w = NF4Weight.quantize(torch.randn(40, 96), blocksize=blocksize, quant_type=quant_type, nested=nested)
    w = w.to(kernel_device)
    y, _ = split.linear(torch.eye(96, dtype=dtype, device=kernel_device), w, None, None, None, 1.0, None, torch.float32)
    dx, _ = split.input_gradient(torch.eye(40, dtype=dtype, device=kernel_device), w, None, None, 1.0, None)
    assert torch.equal(y.T, w.dequantize(dtype).float())
    assert torch.equal(dx, w.dequantize(dtype))


def test_strided_arguments(kernel_device: str, products: list[str]) -> None:
    p = make_problem(20, 48, 64, 16, torch.float16, bias=True, device=kernel_device)

    def columns_of_a_wider_buffer(t: torch.Tensor) -> torch.Tensor:
        nothing = torch.full_like(t, torch.nan)
        return torch.cat((nothing, t, nothing), 1)[:, t.shape[1] : 2 * t.shape[1]]

    assert p.lora_a is not None
    assert p.lora_b is not None
    assert p.bias is not None
    x, dy = columns_of_a_wider_buffer(p.x), columns_of_a_wider_buffer(p.dy)
    a, b = p.lora_a.T.contiguous().T, p.lora_b.T.contiguous().T
    strided = Problem(x, dy, p.w, a, b, torch.stack((p.bias, p.bias), 1)[:, 0], p.scale)
    for one, other in zip(check(p).values(), check(strided).values(), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert len(products) == 4


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, False, True)], ids=str)
@pytest.mark.parametrize("r", [0, 3])
def test_only_what_is_needed(needs: tuple[bool, bool, bool], r: int, kernel_device: str, products: list[str]) -> None:
    check(make_problem(18, 33, 64, r, torch.float16, dropout_p=0.2, device=kernel_device), needs)
    assert products == ["forward", "backward"][: 1 + needs[0]]


def test_a_weight_without_whole_groups_is_not_read(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(6, 64)).to(kernel_device)
    assert split.reads(w)
    assert not split.reads(NF4Weight.quantize(torch.randn(6, 48)).to(kernel_device))
    shifted = torch.cat((w.w_packed.new_zeros(1), w.w_packed))[1:]
    assert not split.reads(dataclasses.replace(w, w_packed=shifted))


# -- the bytes of PTX that decode a group, run here ---------------------------------------------------------------


def _prmt(a: int, b: int, selector: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        out.append(0xFF * (byte >> 7) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def run_ptx(source: str, a: torch.Tensor, words: list[int], dtype: torch.dtype) -> list[int]:
    """The 16-bit outputs of `split.permute_source`; knows its instructions only."""
    registers: dict[str, Any] = {"$32": a} | {f"${33 + i}": word for i, word in enumerate(words)}
    outputs: dict[int, int] = {}

    def value(name: str) -> Any:
        if name.startswith("0f"):
            return torch.tensor(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return int(name, 16 if name.startswith("0x") else 10) if name[0].isdigit() else registers[name]

    for line in source.strip("{}\n").splitlines():
        operation, _, rest = line.rstrip(";").partition(" ")
        if operation == ".reg":
            continue
        if operation == "mov.b32":
            low, high, register = re.fullmatch(r"\{\$(\d+), \$(\d+)\}, (\w+)", rest).groups()  # type: ignore[union-attr]
            outputs[int(low)], outputs[int(high)] = registers[register] & 0xFFFF, registers[register] >> 16
            continue
        target, *names = rest.split(", ")
        x = [value(name) for name in names]
        if operation == "mul.rn.f32":
            registers[target] = x[0] * x[1]
        elif operation.startswith("cvt.rn."):
            assert operation == f"cvt.rn.{'bf16' if dtype == torch.bfloat16 else 'f16'}x2.f32"
            high, low = (int(t.to(dtype).view(torch.int16)) & 0xFFFF for t in x)
            registers[target] = high << 16 | low
        elif operation == "prmt.b32":
            registers[target] = _prmt(*x)
        elif operation == "and.b32":
            registers[target] = x[0] & x[1]
        elif operation == "shr.u32":
            registers[target] = x[0] >> x[1]
        else:
            assert operation == "lop3.b32"
            assert x[3] == 0xF0 & 0xCC | 0xAA
            registers[target] = x[0] & x[1] | x[2]
    return [outputs[i] for i in range(32)]


@DTYPE
@pytest.mark.parametrize("quant_type", CODES)
def test_the_permuting_decoder(quant_type: str, dtype: torch.dtype) -> None:
    w = NF4Weight.quantize(torch.randn(24, 32), blocksize=32, quant_type=quant_type, nested=False)
    w.w_packed.random_(0, 256)
    assert w.absmax is not None
    w.absmax[1] *= -1
    source = split.permute_source(quant_type, dtype)
    words = w.w_packed.view(torch.int32).view(24, 4).to(torch.int64) & 0xFFFFFFFF
    expected = w.dequantize(dtype).view(torch.int16).to(torch.int64) & 0xFFFF
    for row in range(24):
        assert run_ptx(source, w.absmax[row], words[row].tolist(), dtype) == expected[row].tolist()


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("m", [1, 3, 16, 33, 64, 200])
def test_a_whole_layer(m: int, dtype: torch.dtype) -> None:
    problem = make_problem(m, 4096, 4096, 16, dtype, device="cuda")
    first = check(problem)
    for _ in range(3):
        for name, value in problem.run(kernels.forward, kernels.backward).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("quant_type", CODES)
@pytest.mark.parametrize("m", [1, 20, 64, 100])
def test_table_and_permutations_give_the_same_bits(
    m: int, quant_type: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(m, 520, 1056, 16, dtype, quant_type=quant_type, device="cuda")
    permuted = problem.run(kernels.forward, kernels.backward)
    monkeypatch.setattr(split, "permute", lambda *args: "")
    for name, value in problem.run(kernels.forward, kernels.backward).items():
        assert torch.equal(value, permuted[name]), name


@pytest.mark.gpu
def test_overlapping_launches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(16, 4096, 4096, 16, torch.bfloat16, bias=True, dropout_p=0.1, device="cuda")
    divide = config.split_product
    monkeypatch.setattr(
        config, "split_product", lambda *args, **kwargs: dataclasses.replace(divide(*args, **kwargs), overlap=False)
    )
    apart = problem.run(kernels.forward, kernels.backward)
    monkeypatch.setattr(config, "split_product", divide)
    for _ in range(20):
        for name, value in problem.run(kernels.forward, kernels.backward).items():
            assert torch.equal(value, apart[name]), name


@pytest.mark.gpu
def test_graphs_and_streams_do_not_meet() -> None:
    """Two streams at once, and a graph that is replayed with other inputs: each call has its own workspace."""
    one, two = (make_problem(m, 1024, 2048, 16, torch.bfloat16, device="cuda", seed=m) for m in (7, 50))
    expected = [p.run(kernels.forward, kernels.backward) for p in (one, two)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, problem in zip(streams, (one, two), strict=True):
            with torch.cuda.stream(stream):
                results.append(problem.run(kernels.forward, kernels.backward))
        torch.cuda.synchronize()
        for got, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one.run(kernels.forward, kernels.backward)
    one.x.normal_()
    one.dy.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for name, value in one.run(kernels.forward, kernels.backward).items():
        assert torch.equal(captured[name], value), name


@pytest.mark.gpu
def test_the_forms_of_the_base_product_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of the sums differs, so the results differ by their last rounding at most."""
    p = make_problem(64, 4096, 4096, 16, torch.bfloat16, device="cuda")
    few = p.run(kernels.forward, kernels.backward)
    monkeypatch.setattr(config, "form", lambda *args: "library")
    assert sys.modules["fastlora.kernels.forward"].is_split(p.x, p.w, r=8, direction="forward") is False
    for name, value in p.run(kernels.forward, kernels.backward).items():
        torch.testing.assert_close(few[name], value, rtol=2**-6, atol=2**-6 * float(value.abs().max()))
