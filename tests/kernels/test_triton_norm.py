"""Root mean square norms."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from grids import HAS_CUDA
from tolerance import assert_close

from fastlora.kernels import norm

pytestmark = pytest.mark.usefixtures("poison_empty")

EPS = 1e-5
SIZES = [(1, 8), (7, 130), (5, 600), *([(2048, 4096), (600, 3584), (3, 16384)] if HAS_CUDA else [])]


class Problem:
    def __init__(self, size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(device, dtype)

        self.dtype, (m, k) = dtype, size
        self.x, self.dy, self.weight = normal(m, k), normal(m, k), 1 + 0.3 * normal(k)

    def results(self, dtype: torch.dtype, offset: int, rounded: bool) -> dict[str, torch.Tensor]:
        """In plain PyTorch in ``dtype``, as transformers computes them, and the gradients by formula."""
        x = self.x.to(dtype)
        wide = x.double() if dtype == torch.float64 else x.float()
        weight = self.weight.to(wide.dtype)
        scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)
        n = wide * scale
        y = n.to(dtype) * (offset + self.weight.to(dtype)) if rounded else (n * (offset + weight)).to(dtype)
        dy = self.dy.to(wide.dtype)
        g = dy * (offset + weight)
        dx = ((g - n * (g * n).mean(1, keepdim=True)) * scale).to(dtype)
        return {"y": y, "dx": dx, "dweight": (dy * n).sum(0)}


@pytest.mark.parametrize(("offset", "rounded"), [(0, True), (0, False), (1, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm(size: tuple[int, int], dtype: torch.dtype, offset: int, rounded: bool, kernel_device: str) -> None:
    problem = Problem(size, dtype, kernel_device)
    truth, plain = (problem.results(kind, offset, rounded) for kind in (torch.float64, dtype))
    y, scale = norm.forward(problem.x, problem.weight, EPS, offset=offset, rounded=rounded)
    assert_close(y, plain["y"], truth["y"], "y")
    args = (problem.dy, problem.x, problem.weight, scale)
    dx, none = norm.backward(*args, offset=offset, rounded=rounded)
    assert none is None
    assert_close(dx, plain["dx"], truth["dx"], "dx")
    again, dweight = norm.backward(*args, offset=offset, rounded=rounded, need_dweight=True)
    assert torch.equal(again, dx)
    assert dweight is not None
    assert_close(dweight.to(dtype), plain["dweight"].to(dtype), truth["dweight"], "dweight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_that_of_the_formula(dtype: torch.dtype, kernel_device: str) -> None:
    problem = Problem((64, 256), dtype, kernel_device)
    for rounded in (True, False):
        same, other = (problem.results(dtype, 0, kind)["y"] for kind in (rounded, not rounded))
        y, _ = norm.forward(problem.x, problem.weight, EPS, rounded=rounded)
        assert (y == same).float().mean() > 0.99 > (y == other).float().mean()


def test_rows_apart(kernel_device: str) -> None:
    problem = Problem((6, 72), torch.float16, kernel_device)
    x, dy = torch.cat((problem.x, problem.dy), 1).split(72, 1)
    expected, scale = norm.forward(problem.x, problem.weight, EPS)
    assert torch.equal(norm.forward(x, problem.weight, EPS)[0], expected)
    dx, _ = norm.backward(problem.dy, problem.x, problem.weight, scale)
    assert torch.equal(norm.backward(dy, x, problem.weight, scale)[0], dx)
    columns = norm.forward(problem.x.T.contiguous().T, problem.weight, EPS)[0]
    assert torch.equal(columns, expected)
