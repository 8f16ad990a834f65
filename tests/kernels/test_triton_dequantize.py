"""The dequantizer against NF4Weight.dequantize, bit for bit."""

from __future__ import annotations

import dataclasses
import pickle
import sys
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tolerance import assert_close

from fastlora import kernels
from fastlora.kernels import config
from fastlora.kernels.dequantize import dequantize, dequantize_merged, dequantize_stacked
from fastlora.nf4 import BLOCKSIZES, NF4Weight

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 48), (33, 33), (65, 130), (64, 128), (3, 4097)], ids=str)
def test_bits(shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype, kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(shape) * 3, quant_type=quant_type, nested=nested).to(kernel_device)
    assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(blocksize: int, nested: bool, kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(37, 301), blocksize=blocksize, nested=nested).to(kernel_device)
    for dtype in DTYPES:
        assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


def test_more_blocks_than_one_group_of_nested_statistics(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(70, 32 * 9), blocksize=32).to(kernel_device)
    assert w.absmax_scale.numel() > 2
    assert torch.equal(kernels.dequantize(w, torch.float32), w.dequantize(torch.float32))


def allow_only(monkeypatch: pytest.MonkeyPatch, *, words: bool) -> None:
    """Make the other of the two kernels fail: whole 32-bit words, or bytes in any number and at any address."""

    class Forbidden:
        def __getitem__(self, grid: Any) -> Any:
            raise AssertionError("launched the other kernel")

    module = sys.modules["fastlora.kernels.dequantize"]
    monkeypatch.setattr(module, "dequantize_kernel" if words else "dequantize_words_kernel", Forbidden())


FORMATS = pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WORDS = pytest.mark.parametrize("words", [True, False], ids=["words", "bytes"])


def misaligned(w: NF4Weight) -> NF4Weight:
    """The same weight one byte into a larger buffer, as it lies in a file that was mapped."""
    buffer = torch.full((w.w_packed.numel() + 1,), 255, dtype=torch.uint8, device=w.device)
    buffer[1:] = w.w_packed
    assert buffer[1:].data_ptr() % 4
    return dataclasses.replace(w, w_packed=buffer[1:]).check()


@TYPES
@FORMATS
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@WORDS
def test_either_kernel_gives_the_same_bits(
    words: bool, blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, kernel_device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two full programs of words and a part of a third; rows end in the middle of blocks."""
    n, k = 17, 8 * 61
    assert 2 * config.dequantize_words().block_n < n * k // 8 < 3 * config.dequantize_words().block_n
    w = NF4Weight.quantize(torch.randn(n, k) * 3, blocksize=blocksize, quant_type=quant_type, nested=nested)
    w = w.to(kernel_device)
    allow_only(monkeypatch, words=words)
    assert torch.equal(kernels.dequantize(w if words else misaligned(w), dtype), w.dequantize(dtype))


@TYPES
@WORDS
def test_every_nibble_at_every_place_of_a_word(
    words: bool, dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = NF4Weight.quantize(torch.randn(32, 64), nested=False).to(kernel_device)
    w.w_packed.copy_(torch.arange(1024).to(torch.uint8))
    w.w_packed[::2] = w.w_packed[::2].flip(0)
    w = dataclasses.replace(w, absmax=torch.arange(1.0, 33.0, device=kernel_device))
    allow_only(monkeypatch, words=words)
    assert torch.equal(kernels.dequantize(w if words else misaligned(w), dtype), w.dequantize(dtype))


@FORMATS
@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (2, 4), (24, 7), (3, 8 * 4096), (1, 8 * 512), (1, 8 * 513)], ids=str)
def test_whole_words_of_any_shape(
    shape: tuple[int, int], nested: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = NF4Weight.quantize(torch.randn(shape), nested=nested).to(kernel_device)
    allow_only(monkeypatch, words=True)
    for dtype in DTYPES:
        assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


@FORMATS
@pytest.mark.parametrize("shape", [(1, 7), (9, 1), (3, 12), (5, 20), (33, 65), (1, 8 * 512 + 4)], ids=str)
def test_sizes_that_end_within_a_word(
    shape: tuple[int, int], nested: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = NF4Weight.quantize(torch.randn(shape), nested=nested).to(kernel_device)
    allow_only(monkeypatch, words=False)
    for dtype in DTYPES:
        assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


def test_seven_nibbles_do_not_make_a_word(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their four bytes do; an eighth value would be written beyond the end."""
    w = NF4Weight.quantize(torch.randn(1, 7), nested=False).to(kernel_device)
    assert w.w_packed.numel() == 4
    allow_only(monkeypatch, words=False)
    buffer = torch.full((8,), 7.0, device=kernel_device)
    kernels.dequantize(w, torch.float32, buffer[:7].view(1, 7))
    assert torch.equal(buffer[:7].view(1, 7), w.dequantize(torch.float32))
    assert buffer[7] == 7.0


@TYPES
@pytest.mark.parametrize("shape", [(20, 40), (5, 8 * 513)], ids=str)
def test_out_is_written_by_words_and_nothing_beside_it(
    shape: tuple[int, int], dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a larger buffer are contiguous at any address, and the store may not assume one."""
    w = NF4Weight.quantize(torch.randn(shape)).to(kernel_device)
    allow_only(monkeypatch, words=True)
    for start in (0, 1, 8):
        buffer = torch.full((start + w.numel() + 9,), 7.0, dtype=dtype, device=kernel_device)
        out = buffer[start : start + w.numel()].view(shape)
        assert kernels.dequantize(w, dtype, out) is out
        assert torch.equal(out, w.dequantize(dtype))
        out.fill_(7.0)
        assert (buffer == 7.0).all()


@TYPES
def test_out_with_rows_apart(dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = NF4Weight.quantize(torch.randn(16, 72)).to(kernel_device)
    allow_only(monkeypatch, words=False)
    buffer = torch.full((18, 90), 7.0, dtype=dtype, device=kernel_device)
    out = buffer[1:17, 8:80]
    assert kernels.dequantize(w, dtype, out) is out
    assert torch.equal(out, w.dequantize(dtype))
    out.fill_(7.0)
    assert (buffer == 7.0).all()


def test_out_is_written_in_place_and_nothing_beside_it(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(20, 33)).to(kernel_device)
    buffer = torch.full((22, 40), 7.0, device=kernel_device)
    out = buffer[1:21, 3:36]
    assert kernels.dequantize(w, torch.float32, out) is out
    assert torch.equal(out, w.dequantize(torch.float32))
    out.fill_(7.0)
    assert (buffer == 7.0).all()
    stacked = torch.full((40, 33), 7.0, device=kernel_device)
    kernels.dequantize(w, torch.float32, stacked[20:])
    assert torch.equal(stacked[20:], w.dequantize(torch.float32))
    assert (stacked[:20] == 7.0).all()


def test_refuses_an_out_that_does_not_fit(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(8, 6)).to(kernel_device)
    for out in (
        torch.empty(8, 7, device=kernel_device),
        torch.empty(8, 6, dtype=torch.float16, device=kernel_device),
        torch.empty(6, 8, device=kernel_device).T,
    ):
        with pytest.raises(ValueError, match="out must be"):
            kernels.dequantize(w, torch.float32, out)
    with pytest.raises(TypeError, match="float64"):
        kernels.dequantize(w, torch.float64)


def stack(ns: list[int], k: int, device: str, **options: Any) -> list[NF4Weight]:
    return [NF4Weight.quantize(torch.randn(n, k) * 3, **options).to(device) for n in ns]


@TYPES
@FORMATS
@pytest.mark.parametrize("ns", [[3], [24, 8], [9, 1, 65], [16, 40, 8, 72], [8, 16, 8, 8, 24, 8]], ids=str)
@pytest.mark.parametrize("k", [64, 8 * 61])
def test_several_weights_one_below_the_other(
    k: int, ns: list[int], nested: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    weights = stack(ns, k, kernel_device, nested=nested)
    expected = torch.cat([w.dequantize(dtype) for w in weights])
    assert torch.equal(dequantize_stacked(weights, dtype), expected)
    buffer = torch.full((sum(ns) + 2, k), 7.0, dtype=dtype, device=kernel_device)
    out = buffer[1:-1]
    assert dequantize_stacked(weights, dtype, out) is out
    assert torch.equal(out, expected)
    assert (buffer[[0, -1]] == 7.0).all()


@pytest.mark.parametrize(
    "options", [({"blocksize": 32}, {"blocksize": 64}), ({}, {"quant_type": "fp4"}), ({}, {"nested": False})], ids=str
)
def test_stacked_weights_of_different_kinds(options: tuple[dict[str, Any], ...], kernel_device: str) -> None:
    weights = [w for o in options for w in stack([16], 64, kernel_device, **o)]
    expected = torch.cat([w.dequantize(torch.float32) for w in weights])
    assert torch.equal(dequantize_stacked(weights, torch.float32), expected)


def test_stacked_weights_that_are_no_whole_words_or_lie_apart(kernel_device: str) -> None:
    odd = stack([3, 5], 33, kernel_device)
    assert torch.equal(dequantize_stacked(odd, torch.float32), torch.cat([w.dequantize(torch.float32) for w in odd]))
    weights = stack([16, 8], 64, kernel_device)
    buffer = torch.full((24, 80), 7.0, device=kernel_device)
    dequantize_stacked(weights, torch.float32, buffer[:, 8:72])
    assert torch.equal(buffer[:, 8:72], torch.cat([w.dequantize(torch.float32) for w in weights]))
    assert (buffer[:, :8] == 7.0).all()
    assert (buffer[:, 72:] == 7.0).all()


def test_what_is_kept_of_a_stack_is_that_of_its_weights(kernel_device: str) -> None:
    first, second, third = stack([16, 8, 8], 64, kernel_device)
    for weights in ([first, second], [first, third], [first, second, third], [first, third]):
        expected = torch.cat([w.dequantize(torch.float32) for w in weights])
        for _ in range(2):
            assert torch.equal(dequantize_stacked(weights, torch.float32), expected)
    assert pickle.loads(pickle.dumps(first)).__dict__.keys() == {field.name for field in dataclasses.fields(first)}
    gone = weakref.ref(first)
    del first, weights
    assert gone() is None, "it keeps itself alive"


def test_a_stack_sees_bytes_that_were_written_anew(kernel_device: str) -> None:
    """As FSDP does: a storage is emptied, and filled again for the next pass, wherever it then lies."""
    first, second = stack([16, 8], 64, kernel_device)
    before = dequantize_stacked([first, second], torch.float32)
    bytes_, storage = second.w_packed.clone(), second.w_packed.untyped_storage()
    size = storage.size()
    storage.resize_(0)
    others = [torch.empty(size, dtype=torch.uint8, device=kernel_device) for _ in range(8)]
    storage.resize_(size)
    second.w_packed.copy_(bytes_.flip(0))
    expected = torch.cat([first.dequantize(torch.float32), second.dequantize(torch.float32)])
    assert torch.equal(dequantize_stacked([first, second], torch.float32), expected)
    assert not torch.equal(before, expected)
    del others


def test_refuses_what_does_not_stack(kernel_device: str) -> None:
    with pytest.raises(ValueError, match="one K"):
        dequantize_stacked([], torch.float32)
    with pytest.raises(ValueError, match="one K"):
        dequantize_stacked(stack([8], 64, kernel_device) + stack([8], 72, kernel_device), torch.float32)
    with pytest.raises(ValueError, match="out must be"):
        dequantize_stacked(stack([8], 64, kernel_device), torch.float32, torch.empty(9, 64, device=kernel_device))


@TYPES
@FORMATS
@pytest.mark.parametrize("size", [(17, 48, 3), (33, 33, 16), (40, 130, 40)], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float16], ids=str)
def test_merged(
    adapter_dtype: torch.dtype, size: tuple[int, int, int], nested: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    n, k, r = size
    (w,) = stack([n], k, kernel_device, nested=nested)
    a, b = (torch.randn(*shape).to(kernel_device, adapter_dtype) for shape in ((r, k), (n, r)))
    merged = dequantize_merged(w, a, b, -0.5, dtype)
    truth = w.dequantize(torch.float32).double() - 0.5 * (b.double() @ a.double())
    assert_close(merged, truth.to(dtype), truth)
    assert torch.equal(dequantize_merged(w, a, torch.zeros_like(b), 1.0, dtype), w.dequantize(dtype))
    with pytest.raises(TypeError, match="one type"):
        dequantize_merged(w, a.double(), b, 1.0, dtype)


def test_a_merged_term_is_added_before_the_rounding(kernel_device: str) -> None:
    """Weights are 1 + 2^-8 halfway between two bfloat16 numbers once 2^-8 is added; 2^-20 decides upwards."""
    w = dataclasses.replace(NF4Weight.quantize(torch.ones(16, 64), nested=False), absmax=torch.ones(16)).to(
        kernel_device
    )
    assert (w.dequantize(torch.float32) == 1).all()
    a, b = torch.zeros(2, 64, device=kernel_device), torch.ones(16, 2, device=kernel_device)
    a[0], a[1] = 2.0**-8, 2.0**-20
    assert (dequantize_merged(w, a, b, 1.0, torch.bfloat16) == 1.0 + 2.0**-7).all()


@WORDS
def test_a_counter_becomes_zero_on_the_way(words: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (w,) = stack([40], 8 * 61, kernel_device)
    allow_only(monkeypatch, words=words)
    counters = torch.full((3,), 9, dtype=torch.int32, device=kernel_device)
    out = dequantize(w if words else misaligned(w), torch.float32, zero=counters[1:2])
    assert torch.equal(out, w.dequantize(torch.float32))
    assert counters.tolist() == [9, 0, 9]
