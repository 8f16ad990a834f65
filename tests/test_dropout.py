"""Replayed dropout: the random words are Philox's, the statistics are dropout's, and seeds replay."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastlora.dropout import Dropout, draw_seed, philox

MASK32 = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox 4 x 32 with 10 rounds in plain integers, from the definition in the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK32, (product0 >> 32) ^ c3 ^ k1, product0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def seed(value: int, device: str = "cpu") -> torch.Tensor:
    """``value`` modulo 2**64 as the int64 that holds its bits."""
    value &= 2**64 - 1
    return torch.tensor([value - 2**64 if value >= 2**63 else value], device=device)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, words: str) -> None:
    """The vectors of Random123 hold for the plain integers, which judge the tensors below."""
    numbers = [tuple(int(word, 16) for word in text.split()) for text in (counter, key, words)]
    assert philox4x32_10(numbers[0], numbers[1]) == numbers[2]  # type: ignore[arg-type]


def test_known_answer_of_counter_and_key_zero(device: str) -> None:
    assert philox(seed(0, device), 1, 4).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 9), st.integers(1, 40))
def test_words_are_philox(value: int, m: int, k: int) -> None:
    words = philox(seed(value), m, k)
    assert words.shape == (m, k)
    key = (value & MASK32, value >> 32)
    for row in range(m):
        expected = [word for block in range(-(-k // 4)) for word in philox4x32_10((block, row, 0, 0), key)]
        assert words[row].tolist() == expected[:k]


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_far_counters(value: int) -> None:
    """The last element of a wide and of a tall matrix."""
    key = (value & MASK32, value >> 32)
    assert philox(seed(value), 1, 100_003)[0, -1] == philox4x32_10((100_002 // 4, 0, 0, 0), key)[100_002 % 4]
    assert philox(seed(value), 70_001, 1)[-1, 0] == philox4x32_10((0, 70_000, 0, 0), key)[0]


def test_the_mask_of_a_part_is_the_part_of_the_mask(device: str) -> None:
    """An element's fate depends on its place alone, not on the size of the matrix."""
    dropout = Dropout(0.4, seed(77, device))
    whole = dropout.keep(33, 70)
    assert torch.equal(dropout.keep(7, 70), whole[:7])
    assert torch.equal(dropout.keep(33, 9), whole[:, :9])


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_keep_rate(device: str, p: float) -> None:
    count = 400 * 503
    kept = int(Dropout(p, seed(3, device)).keep(400, 503).sum())
    assert abs(kept - (1 - p) * count) < 5 * math.sqrt(count * p * (1 - p))


def test_words_are_uniform() -> None:
    """Chi-square over each byte of the words: 255 degrees of freedom, 5 sigma."""
    words = philox(seed(11), 200, 256)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(((words >> shift) & 255).view(-1), minlength=256).double()
        mean = words.numel() / 256
        chi_square = float(((counts - mean) ** 2 / mean).sum())
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_rows_columns_and_seeds_are_independent() -> None:
    p, m, k = 0.3, 300, 400

    def normalized(value: int) -> torch.Tensor:
        return (Dropout(p, seed(value)).keep(m, k).double() - (1 - p)) / math.sqrt(p * (1 - p))

    mask = normalized(5)
    pairs = {
        "next column": (mask[:, :-1], mask[:, 1:]),
        "next block of four": (mask[:, :-4], mask[:, 4:]),
        "next row": (mask[:-1], mask[1:]),
        "transposed": (mask[:300, :300].triu(1), mask[:300, :300].T.triu(1)),
        "next seed": (mask, normalized(6)),
        "seed of the other half": (mask, normalized(5 << 32)),
    }
    for name, (a, b) in pairs.items():
        samples = int(((a != 0) & (b != 0)).sum())
        assert abs(float((a * b).sum())) < 5 * math.sqrt(samples), name
    for axis in (0, 1):
        sums = mask.sum(dim=axis)
        assert sums.abs().max() < 6 * math.sqrt(mask.shape[axis])


@pytest.mark.parametrize(
    ("p", "threshold", "gain"),
    [
        (0.5, 2**31, 2.0),
        (0.25, 2**30, 4 / 3),
        (0.999999, 4294963001, 1e6),
        (1.0, 2**32 - 1, 0.0),
        (2**-32, 1, 1.0),
        (1e-12, 0, 1.0),
    ],
)
def test_threshold_and_gain(p: float, threshold: int, gain: float) -> None:
    dropout = Dropout(p, seed(0))
    assert dropout.threshold == threshold
    assert dropout.gain == pytest.approx(gain, rel=1e-9)


def test_a_word_equal_to_the_threshold_is_kept() -> None:
    word = 0x6627E8D5  # the first of seed 0
    assert Dropout(word / 2**32, seed(0)).keep(1, 1).item()
    assert not Dropout((word + 1) / 2**32, seed(0)).keep(1, 1).item()


def test_p_of_almost_one() -> None:
    dropout = Dropout(0.999999, seed(1))
    kept = dropout.keep(1000, 1000)
    assert 0 <= int(kept.sum()) <= 10
    x = torch.ones(1000, 1000)
    assert torch.equal(dropout.apply(x), torch.where(kept, torch.tensor(dropout.gain), 0.0))


def test_p_of_one_drops_everything(device: str) -> None:
    dropout = Dropout(1.0, seed(9, device))
    assert not dropout.keep(50, 60).any()
    x = torch.randn(50, 60, device=device)
    assert torch.equal(dropout.apply(x), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_apply_masks_and_scales(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 33, device=device).to(dtype)
    x[0, 0] = math.inf  # a dropped infinity is zero, not NaN
    dropout = next(d for d in (Dropout(0.3, seed(i, device)) for i in range(50)) if not d.keep(1, 1).item())
    keep = dropout.keep(7, 33)
    dropped = dropout.apply(x)
    assert dropped.dtype == dtype
    assert torch.equal(dropped[keep], x[keep] * dropout.gain)
    assert not dropped[~keep].any()


def test_apply_preserves_the_expectation() -> None:
    x = torch.randn(8, 64, dtype=torch.float64) + 2
    p, count = 0.35, 2000
    total = sum(Dropout(p, seed(i)).apply(x) for i in range(count))
    sigma = x.abs() * math.sqrt(p / (1 - p) / count)
    assert ((total / count - x).abs() < 5.5 * sigma).all()


def test_apply_is_its_own_backward() -> None:
    x, dy = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    dropout = Dropout(0.5, seed(4))
    dropout.apply(x).backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad, dropout.apply(dy))


def test_the_same_seed_gives_the_same_mask(device: str) -> None:
    mask = Dropout(0.5, seed(123, device)).keep(20, 30)
    assert torch.equal(Dropout(0.5, seed(123, device)).keep(20, 30), mask)
    assert not torch.equal(Dropout(0.5, seed(124, device)).keep(20, 30), mask)


def test_draw_seed(device: str) -> None:
    torch.manual_seed(5)
    first, second = draw_seed(torch.device(device)), draw_seed(torch.device(device))
    assert (first.shape, first.dtype, first.device.type) == ((1,), torch.int64, device)
    assert first != second
    assert first >= 0
    torch.manual_seed(5)
    assert torch.equal(draw_seed(torch.device(device)), first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_seed(device: str, use_reentrant: bool) -> None:
    drawn: list[int] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        value = draw_seed(x.device)
        drawn.append(int(value))
        return Dropout(0.5, value).apply(x).square()

    x = torch.randn(6, 10, device=device, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    torch.rand(3, device=device)  # the generator has moved on before the recomputation
    y.sum().backward()
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]
    keep = Dropout(0.5, torch.tensor([drawn[0]], device=device)).keep(6, 10)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(keep, 8 * x.detach(), 0.0))


@pytest.mark.gpu
def test_gpu_gives_the_same_words() -> None:
    for value in (0, 1, 2**40 + 17, 2**64 - 1):
        assert torch.equal(philox(seed(value, "cuda"), 57, 301).cpu(), philox(seed(value), 57, 301))
