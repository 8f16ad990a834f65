"""The kernels of several projections of one x, and those of the gated activation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from grids import HAS_CUDA
from tolerance import assert_close

from fastlora import activation as plain
from fastlora.activation import ACTIVATIONS
from fastlora.kernels import config, gated, stacked
from fastlora.kernels.gemm import gemm
from fastlora.nf4 import NF4Weight
from fastlora.stacking import as_one

pytestmark = pytest.mark.usefixtures("poison_empty")

accelerated = pytest.mark.skipif(
    HAS_CUDA and torch.cuda.get_device_capability() < (9, 0), reason="needs the tensor memory accelerator"
)
DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    sizes: tuple[int, ...]
    k: int
    ranks: tuple[int, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.m}x{self.sizes}x{self.k}-r{self.ranks}".replace(" ", "")


SMALL = (
    Case(20, (64, 32, 32), 64, (8, 8, 8)),
    Case(33, (512, 256), 64, (16, 16), {"adapter_dtype": torch.float32}),
    Case(129, (256, 24, 40, 264), 72, (3, 0, 17, 40), {"bias": True}),
    Case(5, (72,), 128, (70,), {"bias": True}),
    Case(70, (32, 48), 64, (0, 0), {"bias": True}),
    Case(40, (48, 16), 64, (5, 16), {"dense": True}),
)
LARGE = (
    Case(2048, (4096, 1024, 1024), 4096, (16, 16, 16)),
    Case(1000, (3584, 512, 512), 3584, (64, 8, 8), {"bias": True}),
    Case(515, (896, 128, 128), 896, (16, 16, 16)),
)
CASES = SMALL + LARGE if HAS_CUDA else SMALL


class Group:
    """Projections of one x. Every term has elements of about 1."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, options = case, dtype, case.options

        def normal(*shape: int, std: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(shape) * std).to(device, kind)

        kind = options.get("adapter_dtype", dtype)
        m, k = case.m, case.k
        self.x = normal(m, k)
        self.weights: list[Any] = [normal(n, k, std=k**-0.5) for n in case.sizes]
        if "dense" not in options:
            self.weights = [NF4Weight.quantize(w) for w in self.weights]
        self.a = [normal(r, k, std=k**-0.5, kind=kind) if r else None for r in case.ranks]
        pairs = zip(case.sizes, case.ranks, strict=True)
        self.b = [normal(n, r, std=r**-0.5, kind=kind) if r else None for n, r in pairs]
        self.scales = [0.5, 2.0, -0.7, 1.25][: len(case.sizes)]
        self.biases = [normal(n) if "bias" in options and i != 1 else None for i, n in enumerate(case.sizes)]
        self.dys = [normal(m, n) for n in case.sizes]
        shapes = [(n, k) for n in case.sizes]
        self.adapters = stacked.Adapters(shapes, self.a, self.b, self.scales, self.x)

    def truth(self, dtype: torch.dtype) -> dict[str, Any]:
        """Every result, in plain PyTorch in ``dtype``."""
        x, dys = self.x.to(dtype), [dy.to(dtype) for dy in self.dys]
        dx: torch.Tensor | float = 0.0
        results: dict[str, Any] = {"y": [], "da": [], "db": []}
        rows = zip(self.weights, self.a, self.b, self.scales, self.biases, dys, strict=True)
        for packed, a, b, scale, bias, dy in rows:
            w = packed.dequantize(self.dtype).to(dtype) if isinstance(packed, NF4Weight) else packed.to(dtype)
            y, dx = x @ w.T, dx + dy @ w
            da = db = None
            if a is not None:
                u, du = x @ a.to(dtype).T, scale * (dy @ b.to(dtype))
                y, dx = y + scale * (u @ b.to(dtype).T), dx + du @ a.to(dtype)
                wide = torch.float64 if dtype == torch.float64 else a.dtype
                da, db = (du.T @ x).to(wide), (scale * (dy.T @ u)).to(wide)
            results["y"].append(y if bias is None else y + bias.to(dtype))
            results["da"].append(da)
            results["db"].append(db)
        return results | {"dx": dx}

    def hold(self, name: str, actual: Any) -> None:
        expected, baseline = self.truth(torch.float64)[name], self.truth(self.dtype)[name]
        if isinstance(expected, torch.Tensor):
            assert_close(actual, baseline, expected, name)
            return
        assert len(actual) == len(expected)
        for i, (got, plain_, true) in enumerate(zip(actual, baseline, expected, strict=True)):
            if true is None:
                assert got is None
            else:
                assert_close(got, plain_, true, f"{name}[{i}]")


@pytest.fixture
def group(request: pytest.FixtureRequest, kernel_device: str) -> Group:
    case, dtype = request.param
    return Group(case, dtype, kernel_device)


def over(*cases: Case, dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)) -> Any:
    both = [(case, dtype) for case in cases for dtype in dtypes]
    return pytest.mark.parametrize("group", both, indirect=True, ids=[f"{case}-{dtype}" for case, dtype in both])


@over(*SMALL)
def test_packed_adapters(group: Group) -> None:
    packed = group.adapters
    if not any(group.case.ranks):
        assert packed.a is None
        assert packed.b is None
        return
    span, row = packed.span, 0
    assert packed.a.shape == (span * len(group.case.sizes), group.case.k)
    assert packed.b.shape == (sum(group.case.sizes), packed.width)
    b = torch.zeros_like(packed.b)
    for i, (n, r) in enumerate(zip(group.case.sizes, group.case.ranks, strict=True)):
        rows = packed.a[i * span : (i + 1) * span]
        assert not rows[r:].any()
        if r:
            assert torch.equal(rows[:r], group.a[i].to(group.dtype))
            scaled = group.b[i].float() * torch.tensor(group.scales[i], dtype=torch.float32)
            b[row : row + n, i * span : i * span + r] = scaled.to(group.dtype)
        row += n
    assert torch.equal(packed.b, b)


@accelerated
@over(*CASES)
def test_forward(group: Group) -> None:
    y, u = stacked.forward(group.x, group.weights, group.adapters, group.biases)
    group.hold("y", list(y.split(group.case.sizes, 1)))
    assert torch.equal(u, stacked.project(group.x, group.adapters))


@accelerated
@over(*SMALL[:3])
def test_forward_wider(group: Group) -> None:
    y, _ = stacked.forward(group.x, group.weights, group.adapters, group.biases, torch.float32)
    assert y.dtype == torch.float32
    rounded, _ = stacked.forward(group.x, group.weights, group.adapters, group.biases)
    assert torch.equal(y.to(group.dtype), rounded)


@accelerated
@pytest.mark.parametrize("joined", [True, False], ids=["one dy", "dy apart"])
@over(*CASES)
def test_backward(group: Group, joined: bool) -> None:
    dys = group.dys
    if joined:
        dys = list(torch.cat(dys, 1).split(group.case.sizes, 1))
    u = stacked.project(group.x, group.adapters)
    kind = next((a.dtype for a in group.a if a is not None), group.dtype)
    dy, du = stacked.project_gradients(dys, group.adapters, group.dtype)
    dx, das, dbs = stacked.backward(dy, du, group.x, u, group.weights, group.adapters, (kind, kind), (True, True, True))
    for name, got in (("dx", dx), ("da", das), ("db", dbs)):
        group.hold(name, got)


@over(*SMALL[:4])
@pytest.mark.parametrize("needs", [(False, True, False), (False, False, True)], ids=["da", "db"])
def test_some_gradients(group: Group, needs: tuple[bool, bool, bool]) -> None:
    u = stacked.project(group.x, group.adapters) if needs[2] else None
    x = group.x if needs[1] else None
    kind = next(a.dtype for a in group.a if a is not None)
    dy, du = stacked.project_gradients(group.dys, group.adapters, group.dtype)
    dx, das, dbs = stacked.backward(dy, du, x, u, group.weights, group.adapters, (kind, kind), needs)
    assert dx is None
    for name, got, need in (("da", das, needs[1]), ("db", dbs, needs[2])):
        if need:
            group.hold(name, got)
        else:
            assert got == [None] * len(group.dys)


@over(SMALL[0], SMALL[2], dtypes=(torch.float16,))
def test_dy_is_copied_only_where_it_lies_apart(group: Group) -> None:
    one = torch.cat(group.dys, 1)
    same, du = stacked.project_gradients(list(one.split(group.case.sizes, 1)), group.adapters, group.dtype)
    assert same.data_ptr() == one.data_ptr()
    assert same.shape == one.shape
    copied, du_again = stacked.project_gradients(group.dys, group.adapters, group.dtype)
    assert torch.equal(copied, one)
    assert torch.equal(du_again, du)
    wide, _ = stacked.project_gradients([dy.float() for dy in group.dys], group.adapters, group.dtype)
    assert torch.equal(wide, one)


def test_parts_of_one_matrix(kernel_device: str) -> None:
    y = torch.randn(6, 24, device=kernel_device)
    assert torch.equal(as_one(y.split((8, 16), 1)), y)
    assert torch.equal(as_one(y[:, 8:].split((8, 8), 1)), y[:, 8:])
    for parts in ((y[:, :8], y[:, 16:]), (y[:, 8:], y[:, :8]), (y[:, :8], y[:, 8:].clone()), (y[:, :8].T, y[:, 8:].T)):
        assert as_one(parts) is None


@accelerated
@DTYPE
def test_only_the_blocks_are_multiplied(dtype: torch.dtype, kernel_device: str) -> None:
    """Where each tile belongs to one projection, the rest of the block-diagonal factor is never read."""
    sizes, span, m, k = (256, 512, 256), 16, 40, 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=kernel_device).to(dtype)

    x, w, u, b = normal(m, k), normal(sum(sizes), k), normal(m, 3 * span), normal(sum(sizes), 3 * span)
    diagonal, poisoned = torch.zeros_like(b), torch.full_like(b, torch.nan)
    row = 0
    for i, n in enumerate(sizes):
        block = (slice(row, row + n), slice(i * span, (i + 1) * span))
        diagonal[block] = poisoned[block] = b[block]
        row += n
    expected = gemm(x, w, u, diagonal, transposed=True)
    device = config.Device.of(x.device)
    assert config.buffer_gemm(m, sum(sizes), k, span, "forward", dtype, dtype, device).block_n == 256
    assert torch.equal(gemm(x, w, u, poisoned, transposed=True, sizes=sizes), expected)


def test_unsupported(kernel_device: str) -> None:
    x = torch.empty(4, 64, dtype=torch.float16, device=kernel_device)
    w = torch.empty(8, 64, dtype=torch.float16, device=kernel_device)
    assert stacked.unsupported(x, [w] * 4) is None
    assert "more than 4" in stacked.unsupported(x, [w] * 5)
    assert "float32" in stacked.unsupported(x.float(), [w])
    assert "multiples of 8" in stacked.unsupported(x, [w, w[:7]])


# -- the gated activation ------------------------------------------------------------------------------------------

SIZES = [(1, 8), (17, 130), (33, 300), *([(2048, 14336)] if HAS_CUDA else [])]


def tiles(m: int, n: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """gate and up, side by side, and dh."""
    both = (torch.randn(m, 2 * n, device=device) * 2).to(dtype)
    both[0, :2] = torch.tensor([20.0, -20.0])
    return *both.chunk(2, 1), torch.randn(m, n, device=device).to(dtype)


def hold(actual: torch.Tensor, name: str, gate: Any, up: Any, dh: Any, activation: str) -> None:
    def results(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        g, u, d = (t.to(dtype) for t in (gate, up, dh))
        values = plain.backward(g, u, d, activation)
        return dict(zip(("dgate", "dup", "h"), values, strict=True))

    assert_close(actual, results(actual.dtype)[name], results(torch.float64)[name], name)


@ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gated(size: tuple[int, int], dtype: torch.dtype, activation: str, kernel_device: str) -> None:
    gate, up, dh = tiles(*size, dtype, kernel_device)
    h = gated.forward(gate, up, activation)
    hold(h, "h", gate, up, dh, activation)
    d, again = gated.backward(gate, up, dh, activation)
    assert torch.equal(again, h)
    for name, part in zip(("dgate", "dup"), d.chunk(2, 1), strict=True):
        hold(part, name, gate, up, dh, activation)


@ACTIVATION
def test_gated_in_place(activation: str, kernel_device: str) -> None:
    gate, up, dh = tiles(17, 40, torch.float16, kernel_device)
    d, h = gated.backward(gate, up, dh, activation)
    got, got_h = gated.backward(gate, up, dh, activation, in_place=True)
    assert torch.equal(got, d)
    assert torch.equal(got_h, h)
    assert torch.equal(torch.cat((gate, up), 1), d)
    assert torch.equal(dh, h)


@ACTIVATION
@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize("shared", [False, True], ids=["two u", "one u"])
@pytest.mark.parametrize(("m", "n", "r", "rd"), [(70, 136, 16, 16), (33, 40, 32, 16)])
def test_gated_with_the_gradients_of_adapters(
    m: int, n: int, r: int, rd: int, shared: bool, in_place: bool, activation: str, kernel_device: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    gate, up, dh = tiles(m, n, torch.float16, kernel_device)
    narrow = torch.randn(m, (1 if shared else 2) * r, generator=generator).to(kernel_device, torch.float16)
    du = torch.randn(m, rd, generator=generator).to(kernel_device, torch.float16)
    scales, given = (0.5, 0.5 if shared else 2.0), dh.clone()
    expected, h = gated.backward(gate, up, dh, activation)
    kinds = torch.float32, torch.float16
    d, db, da = gated.gradients(gate, up, dh, activation, narrow, scales, du, kinds, shared=shared, in_place=in_place)
    # What is multiplied is what is stored, so these are products of known matrices.
    assert torch.equal(d, expected)
    assert torch.equal(torch.cat((gate, up), 1), d) == in_place
    assert torch.equal(dh, given)
    u_gate, u_up = (narrow, narrow) if shared else narrow.chunk(2, 1)
    d_gate, d_up = expected.double().chunk(2, 1)
    exact = torch.cat((scales[0] * d_gate.T @ u_gate.double(), scales[1] * d_up.T @ u_up.double()))
    assert (db.dtype, da.dtype) == kinds
    torch.testing.assert_close(db.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(da.double(), du.double().T @ h.double(), rtol=1e-3, atol=1e-3)
