"""The choice of tiles: valid for every size and device, and blind to M within a range."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels import config
from fastlora.kernels.config import (
    Device,
    TileConfig,
    buffer_gemm,
    epilogue,
    gemm,
    gradient,
    invalid,
    one_pass,
    project,
    split,
    split_product,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = [
    Device(capability, 132) for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (99, 0))
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: str(d.capability))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_choice_exists_for_every_problem(dtype: torch.dtype, device: Device) -> None:
    for r in (0, 1, 3, 16, 33, 64, 200, 1024):
        for m in (1, 16, 17, 64, 65, 100_000):
            for k in (1, 33, 96, 4096):
                for blocksize in (None, 32, 64, 4096):
                    gemm(m, k, r, dtype, device, blocksize=blocksize)
            if r:
                project(m, r, dtype, device)
                epilogue(m, r, dtype, device)
        if r:
            gradient(r, dtype, device)
            one_pass(r, dtype, device)


@pytest.mark.parametrize(
    "device", [d for d in DEVICES if (9, 0) <= d.capability < (11, 0)], ids=lambda d: str(d.capability)
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_the_persistent_product_overlaps_loads_with_products(wide: bool, dtype: torch.dtype, device: Device) -> None:
    for r in (0, 1, 3, 16, 33, 64, 200, 1024):
        out_dtype = torch.float32 if wide else dtype
        assert buffer_gemm(8192, 4096, 4096, r, "forward", dtype, out_dtype, device).num_stages >= 2


def test_one_pass_where_it_moves_fewer_bytes() -> None:
    older, newer = Device((8, 0), 108), Device((9, 0), 132)
    for dtype in DTYPES:
        assert one_pass(16, dtype, older) is not None
        assert one_pass(128, dtype, older) is None
        assert one_pass(16, dtype, newer) is None


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: str(d.capability))
@pytest.mark.parametrize("transposed", [True, False])
def test_few_rows_are_covered_once(transposed: bool, device: Device) -> None:
    for m in (1, 17, 64, 128, 1000):
        for n, k in ((1, 32), (33, 4096), (4096, 4096), (1024, 28672), (128256, 4096)):
            for r in (0, 1, 16, 200):
                division = split_product(m, n, k, r, device, transposed=transposed)
                block, reduced = (division.tiles.block_k, k) if transposed else (division.tiles.block_n, n)
                for steps, parts in (
                    (division.steps, division.parts), (division.narrow_steps, division.narrow_parts),
                ):  # fmt: skip
                    assert parts <= 16
                    assert (parts - 1) * steps * block < reduced <= parts * steps * block


def test_m_enters_by_its_range_only() -> None:
    device = Device((9, 0), 132)
    for transposed in (True, False):
        for low, high in ((1, 16), (17, 32), (33, 64), (65, 999)):
            divisions = {split_product(m, 4096, 4096, 16, device, transposed=transposed) for m in range(low, high + 1)}
            assert len(divisions) == 1
    for low, high in ((1, 16), (17, 64), (65, 9999)):
        assert len({gemm(m, 4096, 16, torch.bfloat16, device, blocksize=64) for m in range(low, high + 1)}) == 1
    for low, high in ((1, 16), (17, 9999)):
        assert len({epilogue(m, 16, torch.bfloat16, device) for m in range(low, high + 1)}) == 1
    # As many rows as 132 programs have of 16, of 32, and more.
    for low, high in ((1, 2112), (2113, 4224), (4225, 9999)):
        assert len({project(m, 16, torch.bfloat16, device) for m in range(low, high + 1)}) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block_m": 8}, "block_m must be a power of two of at least 16"),
        ({"block_n": 48}, "block_n must be a power of two"),
        ({"num_warps": 3}, "num_warps"),
        ({"num_stages": 0}, "num_stages"),
        ({"group_m": 0}, "group_m"),
        ({"num_stages": 9}, "shared memory"),
        ({"num_warps": 1}, "accumulator registers"),
    ],
)
def test_says_why_a_config_is_invalid(change: dict[str, int], why: str) -> None:
    good = TileConfig(128, 128, 64, 16)
    assert invalid(good, 128 * 128, 32768, Device((9, 0))) is None
    reason = invalid(dataclasses.replace(good, **change), 128 * 128, 32768, Device((9, 0)))
    assert reason is not None
    assert why in reason


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 8192])
@pytest.mark.parametrize("tiles", [1, 7, 1000])
def test_split_covers_everything_once(size: int, tiles: int) -> None:
    part = split(size, 64, tiles, Device((9, 0), 132))
    assert part % 64 == 0
    parts = -(-size // part)
    assert (parts - 1) * part < size <= parts * part
    assert parts == 1 or (parts - 1) * tiles < 2 * 132


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "library"), ((9, 0), "persistent"), ((10, 0), "persistent"), ((12, 0), "library")],
)
def test_the_persistent_product_runs_where_its_tiles_fit(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.Device, "of", lambda _: Device(capability, 100))
    assert config.form(4096, 4096, 4096, torch.bfloat16, torch.device("cuda")) == expected
    assert config.form(512, 4096, 4096, torch.bfloat16, torch.device("cuda")) == "library"
    assert config.form(64, 4096, 4096, torch.bfloat16, torch.device("cuda")) == "split"
    assert config.form(4096, 4096, 4096, torch.float32, torch.device("cuda")) == "decode"
    assert config.form(4096, 4096, 4096, torch.bfloat16, torch.device("cpu")) == "decode"
