"""The extension's pass over dy for du and dB, against float64 products of the same matrices."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from fastlora import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda"))),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="taken on compute capability 9.0",
    ),
]

DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ROWS = pytest.mark.parametrize("m", [1, 17, 64, 129, 700, 8192])
SIZES = pytest.mark.parametrize(
    "sizes", [(8,), (136,), (4096,), (512, 8), (1032, 64, 520), (4096, 1024, 1024), (16,) * 4]
)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def apart(m: int, sizes: tuple[int, ...], dtype: torch.dtype, gap: int) -> list[torch.Tensor]:
    """Matrices (M, N_i), each with ``gap`` columns of NaN behind it."""
    wide = [torch.full((m, n + gap), float("nan"), device="cuda", dtype=dtype) for n in sizes]
    for t, n in zip(wide, sizes, strict=True):
        t[:, :n] = normal(m, n, dtype=dtype)
    return [t[:, :n] for t, n in zip(wide, sizes, strict=True)]


def block_diagonal(sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.block_diag(*(normal(n, rank, dtype=dtype) for n in sizes))


def hold(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, name: str) -> None:
    """``actual`` is scale * left right, summed in float32 and rounded once."""
    truth = scale * (left.double() @ right.double())
    assert_close(actual, (scale * (left.float() @ right.float())).to(actual.dtype), truth, name)


@ROWS
@SIZES
@DTYPE
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("join", [False, True], ids=["apart", "joined"])
def test_du_and_db(m: int, sizes: tuple[int, ...], dtype: torch.dtype, rank: int, join: bool) -> None:
    dys, scales = apart(m, sizes, dtype, 24), [0.5, 2.0, 1.0, 3.0][: len(sizes)]
    lora_b = torch.block_diag(*(normal(n, rank, dtype=dtype) for n in sizes))
    u, kind = normal(m, rank * len(sizes), dtype=dtype), torch.float32 if join else dtype
    joined = torch.full((m, sum(sizes)), float("nan"), device="cuda", dtype=dtype) if join else None
    assert native.one_pass(dys, rank)
    du, db = native.du_db(dys, u, lora_b, scales, kind, joined)
    assert db.dtype == kind
    whole = torch.cat(dys, 1)
    hold(du, whole, lora_b, 1.0, "du")
    parts = zip(db.split(sizes), dys, u.chunk(len(sizes), 1), scales, strict=True)
    for i, (part, dy, of_dy, scale) in enumerate(parts):
        hold(part, dy.T, of_dy, scale, f"dB {i}")
    if joined is not None:
        assert torch.equal(joined, whole)


@pytest.mark.parametrize(("m", "rank"), [(100, 32), (2048, 16), (8200, 16)])
def test_two_runs_give_the_same_bits(m: int, rank: int) -> None:
    dtype, sizes = torch.bfloat16, (4096, 1024, 1024)
    dys, u = apart(m, sizes, dtype, 8), normal(m, 3 * rank, dtype=dtype)
    lora_b = torch.block_diag(*(normal(n, rank, dtype=dtype) for n in sizes))

    def run() -> list[torch.Tensor]:
        joined = lora_b.new_empty(m, sum(sizes))
        return [*native.du_db(dys, u, lora_b, (1.0, 1.0, 1.0), dtype, joined), joined]

    first = run()
    for _ in range(20):
        assert all(torch.equal(again, once) for again, once in zip(run(), first, strict=True))


def test_what_is_not_taken() -> None:
    dy = normal(4, 64, dtype=torch.bfloat16)
    assert native.one_pass([dy], 16)
    assert native.one_pass([dy] * 4, 32)
    assert not native.one_pass([dy] * 5, 16)
    for rank in (0, 8, 24, 64):
        assert not native.one_pass([dy], rank)
    for other in (dy.half(), dy.float(), dy.cpu(), dy[:, 1:33], dy[:, :33], dy.T, dy[:0], dy[:1].expand(4, 64)):
        assert not native.one_pass([other, dy], 16)


def test_messages() -> None:
    dy, u, lora_b = (normal(*shape, dtype=torch.bfloat16) for shape in ((4, 64), (4, 16), (64, 16)))
    for message, given in (
        ("the rank must be 16 or 32, got 8", {"u": u[:, :8].contiguous()}),
        ("u must be a contiguous bfloat16 tensor", {"u": u.float()}),
        ("lora_b must be a contiguous bfloat16 tensor of 1024 elements", {"lora_b": lora_b[:32]}),
        (r"joined must have shape \(4, 64\), got \(4, 16\)", {"joined": u}),
        (r"dy must have shape \(4, 64\), got \(3, 64\)", {"dys": [dy, dy[:3]]}),
        ("dy must be bfloat16 or float16, got float32", {"dys": [dy.float()]}),
    ):
        arguments = {"dys": [dy], "u": u, "lora_b": lora_b, "scales": [1.0], "dtype": torch.float32} | given
        arguments["scales"] *= len(arguments["dys"])
        with pytest.raises(ValueError, match=message):
            native.du_db(**arguments)
