"""The persistent product of a dense 16-bit weight, with the LoRA term in its accumulator."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from grids import HAS_CUDA, product
from tolerance import assert_close

from fastlora.kernels.gemm import gemm, projecting_gemm, projects, unaligned

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(
        HAS_CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs the tensor memory accelerator"
    ),
]

DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
TRANSPOSED = pytest.mark.parametrize("transposed", [True, False], ids=["x W^T", "dy W"])

# M, N, K, R. Tiles are 128 x 256 x 64, and up to 64 of R; columns are a multiple of 8, whose 16 bytes rows must have.
SMALL = [
    (1, 8, 8, 0),
    (5, 16, 24, 5),
    (128, 256, 64, 16),
    (129, 264, 72, 80),
    (300, 776, 136, 16),
    (17, 1032, 200, 1),
]
LARGE = [(1000, 2048, 4096, 16), (4097, 4104, 1032, 80), (16, 14336, 4096, 0), (2048, 1024, 512, 1024)]
SIZES = SMALL + LARGE if HAS_CUDA else SMALL


@dataclasses.dataclass
class Operands:
    """Arguments of ``gemm``; every term has elements of about 1."""

    x: torch.Tensor
    w: torch.Tensor
    narrow: torch.Tensor | None
    adapter: torch.Tensor | None
    bias: torch.Tensor | None
    transposed: bool

    def hold(self, actual: torch.Tensor) -> None:
        """Judge ``actual`` by the tolerance policy."""

        def result(dtype: torch.dtype) -> torch.Tensor:
            terms = [(self.x, self.w)]
            if self.narrow is not None:
                terms.append((self.narrow, self.adapter))
            y = sum(product(left, right.T if self.transposed else right, dtype) for left, right in terms)
            return y if self.bias is None else y + self.bias.to(dtype)

        assert_close(actual, result(actual.dtype), result(torch.float64))


def operands(
    m: int,
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype,
    device: str,
    *,
    transposed: bool,
    bias: torch.dtype | None = None,
) -> Operands:
    def normal(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape) * std).to(device, kind)

    return Operands(
        normal(m, k),
        normal(*((n, k) if transposed else (k, n)), std=k**-0.5),
        normal(m, r) if r else None,
        normal(*((n, r) if transposed else (r, n)), std=r**-0.5) if r else None,
        normal(n, kind=bias) if bias else None,
        transposed,
    )


def run(o: Operands, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return gemm(o.x, o.w, o.narrow, o.adapter, o.bias, transposed=o.transposed, out_dtype=out_dtype)


@DTYPE
@TRANSPOSED
@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "float32"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_truth(
    size: tuple[int, int, int, int], wide: bool, transposed: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    o = operands(*size, dtype, kernel_device, transposed=transposed)
    y = run(o, torch.float32 if wide else None)
    assert y.dtype == (torch.float32 if wide else dtype)
    o.hold(y)


@DTYPE
@pytest.mark.parametrize("r", [0, 16])
@pytest.mark.parametrize("kind", ["same", torch.float32], ids=str)
def test_bias(kind: torch.dtype | str, r: int, dtype: torch.dtype, kernel_device: str) -> None:
    bias = dtype if isinstance(kind, str) else kind
    o = operands(130, 520, 72, r, dtype, kernel_device, transposed=True, bias=bias)
    o.hold(run(o))
    expected, columns = run(o), torch.stack((o.bias, o.bias), 1)
    assert torch.equal(run(dataclasses.replace(o, bias=columns[:, 0])), expected)


def test_the_lora_term_joins_before_the_only_rounding(kernel_device: str) -> None:
    """1 + 2^-9 + 2^-9 is 1 + 2^-8, halfway between two bfloat16 numbers; 2^-20 decides upwards."""
    x, w = torch.zeros(8, 16), torch.zeros(16, 16)
    x[:, 0], x[:, 1], w[:, 0], w[:, 1] = 1.0, 2.0**-9, 1.0, 1.0
    narrow, adapter = torch.zeros(8, 8), torch.ones(16, 8)
    narrow[:, 0], narrow[:, 1] = 2.0**-9, 2.0**-20
    x, w, narrow, adapter = (t.to(kernel_device, torch.bfloat16) for t in (x, w, narrow, adapter))
    y = gemm(x, w, narrow, adapter, transposed=True)
    assert (y == 1.0 + 2.0**-7).all()


@TRANSPOSED
@pytest.mark.parametrize("r", [3, 16])
def test_factors_of_any_strides(r: int, transposed: bool, kernel_device: str) -> None:
    o = operands(33, 264, 40, r, torch.float16, kernel_device, transposed=transposed)
    expected = run(o)
    narrow, adapter = (t.T.contiguous().T for t in (o.narrow, o.adapter))
    assert not narrow.is_contiguous()
    assert not adapter.is_contiguous()
    assert torch.equal(run(dataclasses.replace(o, narrow=narrow, adapter=adapter)), expected)
    wide = torch.full((33, 3 * r), torch.nan, dtype=torch.float16, device=kernel_device)
    wide[:, r : 2 * r] = o.narrow
    assert torch.equal(run(dataclasses.replace(o, narrow=wide[:, r : 2 * r])), expected)


@TRANSPOSED
def test_rows_of_a_wider_buffer(transposed: bool, kernel_device: str) -> None:
    """x and w are read in place; what lies beside them is not."""
    o = operands(130, 264, 72, 16, torch.float16, kernel_device, transposed=transposed)
    expected = run(o)

    def inside(t: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((t.shape[0] + 3, t.shape[1] + 24), torch.nan, dtype=t.dtype, device=t.device)
        view = buffer[1:-2, 8:-16]
        view.copy_(t)
        return view

    x, w = inside(o.x), inside(o.w)
    assert not unaligned(x, w)
    assert torch.equal(run(dataclasses.replace(o, x=x, w=w)), expected)


@TRANSPOSED
def test_zeros_pad_the_rank(transposed: bool, kernel_device: str) -> None:
    o = operands(20, 64, 64, 5, torch.float16, kernel_device, transposed=transposed)
    wide, tall = torch.zeros_like(o.x[:, :8]), torch.full_like(o.w[:, :8] if transposed else o.w[:8], 7.0)
    wide[:, :5] = o.narrow
    (tall[:, :5] if transposed else tall[:5]).copy_(o.adapter)
    assert torch.equal(run(dataclasses.replace(o, narrow=wide, adapter=tall)), run(o))


@pytest.mark.gpu
@DTYPE
@TRANSPOSED
def test_two_runs_give_the_same_bits(transposed: bool, dtype: torch.dtype) -> None:
    o = operands(3000, 2048, 1536, 32, dtype, "cuda", transposed=transposed, bias=dtype)
    first = run(o)
    assert all(torch.equal(run(o), first) for _ in range(5))


PROJECTED = [(1, 8, 8, 8), (128, 256, 64, 16), (129, 264, 72, 32), (300, 776, 136, 24), (17, 1032, 200, 8)]
PROJECTED += [(1000, 2048, 4096, 16), (17100, 520, 264, 16), (40000, 256, 64, 8)] if HAS_CUDA else []


HOPPER = pytest.mark.skipif(
    HAS_CUDA and torch.cuda.get_device_capability()[0] != 9, reason="needs compute capability 9"
)


@HOPPER
@DTYPE
@TRANSPOSED
@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "float32"])
@pytest.mark.parametrize("size", PROJECTED, ids=str)
def test_x_projected_on_the_way(
    size: tuple[int, int, int, int], wide: bool, transposed: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    """u, s = scale u, and y with s in its accumulator, each against the truth; s against the s that y saw."""
    o = operands(*size, dtype, kernel_device, transposed=transposed, bias=dtype)
    k, r = size[2:]
    project = (torch.randn(*((r, k) if transposed else (k, r))) * k**-0.5).to(kernel_device, dtype)
    assert o.adapter is not None
    assert projects(r, o.x, o.w, project, o.adapter)
    done = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    out_dtype = torch.float32 if wide else None
    y, u, s = projecting_gemm(
        o.x, o.w, project, o.adapter, o.bias, -0.75, done, transposed=transposed, out_dtype=out_dtype
    )
    right = project.T if transposed else project
    plain = product(o.x, right, dtype)
    assert_close(u, plain, o.x.double() @ right.double(), "u")
    assert_close(s, plain * -0.75, -0.75 * (o.x.double() @ right.double()), "s")
    assert y.dtype == (out_dtype or dtype)
    dataclasses.replace(o, narrow=s).hold(y)


@HOPPER
def test_columns_beyond_the_first_tile_read_the_stored_projection(kernel_device: str) -> None:
    """A projection of ones and zeros: every column of y is the sum of the same columns of x, whatever its tile."""
    x = torch.randint(-8, 8, (260, 64), device=kernel_device).half()
    w, project = torch.zeros(600, 64, device=kernel_device).half(), torch.zeros(8, 64, device=kernel_device).half()
    project[:, ::2] = 1
    done = torch.zeros(1, dtype=torch.int32, device=kernel_device)
    y, u, s = projecting_gemm(x, w, project, torch.ones_like(w[:, :8]), None, 0.5, done, transposed=True)
    expected = x[:, ::2].sum(1, keepdim=True)
    assert torch.equal(u, expected.expand(-1, 8))
    assert torch.equal(s, 0.5 * u)
    assert torch.equal(y, (4 * expected).expand(-1, 600))


@HOPPER
def test_what_is_projected_on_the_way(kernel_device: str) -> None:
    x, w, a, b = (
        torch.empty(s, dtype=torch.float16, device=kernel_device) for s in ((4, 64), (32, 64), (8, 64), (32, 8))
    )
    assert projects(8, x, w, a, b)
    assert not projects(0, x, w, a, b)
    assert not projects(40, x, w, a, b)
    assert not projects(5, x, w, a[:5], b[:, :5].contiguous())
    assert not projects(8, x, w, a.float(), b)


class TestUnaligned:
    def test_a_plain_matrix_is_aligned(self) -> None:
        assert not unaligned()
        assert not unaligned(torch.empty(3, 8, dtype=torch.float16), torch.empty(5, 4))

    @pytest.mark.parametrize("columns", [1, 4, 7, 12])
    def test_rows_that_are_no_multiple_of_16_bytes(self, columns: int) -> None:
        assert unaligned(torch.empty(3, columns, dtype=torch.float16))

    def test_an_address_that_is_none(self) -> None:
        flat = torch.empty(8 * 4 + 8, dtype=torch.float16)
        for start in range(9):
            assert unaligned(flat[start : start + 32].view(4, 8)) == (start % 8 != 0)

    def test_columns_apart(self) -> None:
        assert unaligned(torch.empty(8, 8, dtype=torch.float16).T)
        assert unaligned(torch.empty(8, 16, dtype=torch.float16)[:, ::2])

    def test_a_wider_buffer(self) -> None:
        buffer = torch.empty(4, 24, dtype=torch.float16)
        assert not unaligned(buffer[:, 8:16])
        assert unaligned(buffer[:, 4:12])
        assert unaligned(torch.empty(4, 20, dtype=torch.float16)[:, 8:16])

    def test_one_of_many(self) -> None:
        good, bad = torch.empty(4, 8, dtype=torch.float16), torch.empty(4, 7, dtype=torch.float16)
        assert unaligned(good, bad)
        assert unaligned(bad, good)
        assert not unaligned(good, good)


def test_adapters_that_start_at_any_address(kernel_device: str) -> None:
    buffer = torch.randn(1 + 24 * 8, device=kernel_device).half()
    adapter = buffer[1:].view(24, 8)
    x, w, narrow = (torch.randn(*shape, device=kernel_device).half() for shape in ((20, 32), (24, 32), (20, 8)))
    assert unaligned(adapter)
    expected = gemm(x, w, narrow, adapter.clone(), transposed=True)
    assert torch.equal(gemm(x, w, narrow, adapter, transposed=True), expected)
