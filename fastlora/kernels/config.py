"""Tile sizes of every Triton kernel: the one place to tune. Pure functions of sizes, types and the device."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from fastlora import tables
from fastlora.kernels.tuned import fields, tuned

# Bytes of shared memory that one block may use, by compute capability.
_SHARED_MEMORY = {(7, 5): 65536, (8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448}
_SHARED_MEMORY |= {(10, 0): 232448, (10, 3): 232448, (12, 0): 101376, (12, 1): 101376}
_SMALLEST_SHARED_MEMORY = min(_SHARED_MEMORY.values())
_REGISTERS = 255
_MIN_DOT = 16


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice of tiles depends on."""

    capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 8
    reserved: int = 0
    """Bytes of shared memory that something else takes."""
    name: str = ""
    """Of the GPU, by which it finds its table; without one, the built-in choices hold."""

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may use."""
        return _SHARED_MEMORY.get(self.capability, _SMALLEST_SHARED_MEMORY) - self.reserved

    @property
    def described(self) -> tables.Device:
        """The same device in the words of the tables."""
        return tables.Device("cuda", self.name, ".".join(map(str, self.capability)), self.multiprocessors)

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The properties of a CUDA device; of anything else (the interpreter), the defaults."""
        if device.type != "cuda":
            return cls()
        return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count, name=properties.name)


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes along M, N, K and R. A kernel reads those it has."""

    block_m: int = 16
    block_n: int = 16
    block_k: int = 16
    block_r: int = 16
    group_m: int = 8
    """Tiles of M that are walked before the next tile of N, so that both stay in the L2 cache."""
    num_warps: int = 4
    num_stages: int = 3

    def launch(self) -> dict[str, int | bool]:
        """The options of a Triton launch. Nothing is fused: the 4-bit format rounds every product and sum."""
        return self._options

    @functools.cached_property
    def _options(self) -> dict[str, int | bool]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


def shared_memory(config: TileConfig, stage: int, lookups: int = 0) -> int:
    """Bytes that a reduction loop needs; its pipeline stages table lookups too, once it has more than one stage."""
    return config.num_stages * (stage + (lookups if config.num_stages > 1 else 0))


def invalid(config: TileConfig, accumulator: int, stage: int, device: Device, lookups: int = 0) -> str | None:
    """Why ``config`` cannot run, or None when it can.

    ``accumulator``: float32 values that one block keeps in registers. ``stage``: bytes of the operands that one step
    of the reduction loop multiplies. ``lookups``: bytes that it loads to decode them.
    """
    for name in ("block_m", "block_n", "block_k", "block_r"):
        side = getattr(config, name)
        if side < _MIN_DOT or side & (side - 1):
            return f"{name} must be a power of two of at least {_MIN_DOT}, got {side}"
    if config.num_warps not in (1, 2, 4, 8, 16):
        return f"num_warps must be 1, 2, 4, 8 or 16, got {config.num_warps}"
    if config.num_stages < 1:
        return f"num_stages must be at least 1, got {config.num_stages}"
    if config.group_m < 1:
        return f"group_m must be at least 1, got {config.group_m}"
    registers = accumulator / (32 * config.num_warps)
    if registers > _REGISTERS:
        return f"{registers:.0f} accumulator registers a thread, more than {_REGISTERS}"
    shared = shared_memory(config, stage, lookups)
    if shared > device.shared_memory:
        capability = ".".join(map(str, device.capability))
        return f"{shared} bytes of shared memory, more than the {device.shared_memory} of capability {capability}"
    return None


def cdiv(size: int, part: int) -> int:
    """How many parts cover ``size``.

    Triton's function of that name is its compiler's as well: it takes 1 to 1.5 us, five hundred times in an eager
    training step.
    """
    return -(-size // part)


def next_power_of_two(size: int) -> int:
    """The least power of two that holds ``size``, from 1 on."""
    return 1 << max(size - 1, 0).bit_length()


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """The least power of two that holds ``size``, kept within the two bounds."""
    return min(max(next_power_of_two(size), smallest), largest)


def _fit(config: TileConfig, accumulator: int, stage: int, device: Device, lookups: int = 0) -> TileConfig:
    """``config`` with as many of its stages as the device has shared memory for."""
    while config.num_stages > 1 and shared_memory(config, stage, lookups) > device.shared_memory:
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    reason = invalid(config, accumulator, stage, device, lookups)
    if reason is not None:
        raise ValueError(f"{config} cannot run: {reason}")
    return config


def one_statistic_per_row(k: int, blocksize: int, block_k: int) -> bool:
    """Whether each row of a tile of ``block_k`` columns of W (N, K) lies in a single block of statistics."""
    return k % blocksize == 0 and blocksize % block_k == 0


def _lookup_bytes(k: int, blocksize: int | None, block_k: int) -> float:
    """Shared memory per element of W that one stage of the pipeline holds for decoding it.

    The pipeliner stages every load of the loop, so the table lookups count as well as the packed bytes.
    """
    if blocksize is None:
        return 0
    if one_statistic_per_row(k, blocksize, block_k):
        return 4.5
    return 9 if k % 2 == 0 else 14


@tuned(
    fields(16, 32, warps=4, stages=4),
    fields(16, 128, warps=4, stages=3),
    fields(32, 64, warps=4, stages=4),
    fields(64, 128, warps=4, stages=3),
    fields(128, 64, warps=8, stages=3),
)
def gemm(
    m: int, k: int, r: int, dtype: torch.dtype, device: Device, *, blocksize: int | None = None,
    tiles: TileConfig | None = None,
) -> TileConfig:  # fmt: skip
    """Tiles of y = x W^T and of dx = dy W with the LoRA term inside. ``blocksize`` is None for a dense weight.

    By these rules M enters by its range only (up to 16, up to 64, more): three variants at most are ever compiled.
    """
    block_r = power_of_two(max(r, 1), _MIN_DOT, 64)

    def fit(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> TileConfig:
        block_k = min(block_k, blocksize or block_k)
        # y reduces over K and dx over N: the larger of the two bounds both.
        wide, elements = max(block_n, block_k), block_n * block_k
        stage = (block_m * wide + elements) * dtype.itemsize
        lookups = math.ceil(elements * _lookup_bytes(k, blocksize, block_k))
        limit = 32 if dtype == torch.float32 else 64
        config = TileConfig(block_m, block_n, block_k, min(block_r, limit), num_warps=num_warps, num_stages=num_stages)
        return _fit(config, block_m * wide, stage, device, lookups)

    if tiles is not None:
        return fit(tiles.block_m, tiles.block_n, tiles.block_k, tiles.num_warps, tiles.num_stages)
    if dtype == torch.float32:
        return fit(16 if m <= 16 else 64, 64, 32, 4, 2)
    if m <= 16:
        return fit(16, 64, 64, 4, 4)
    if m > 64 and (large := fit(128, 128, 64, 8, 3)).num_stages > 1:
        return large
    return fit(64, 64, 64, 4, 4)


PROJECTED_ROWS = 4096
"""Rows of x from which on enough programs share the first column of tiles for a product to project x as well: at 8192
rows it was measured to be faster on an H200, at 2048 slower."""


def forms(m: int, dtype: torch.dtype, device: torch.device, packed: bool = True) -> tuple[str, ...]:
    """The ways to compute a product with a weight that `form` chooses from.

    "split": few rows, tiles decoded inside a product whose reduced side is split among programs; "persistent": decoded
    into a buffer, then `buffer_gemm`; "library": decoded into a buffer, then a library product; "decode": tiles are
    decoded inside the product, the only form for float32, and what the interpreter runs unless told otherwise.
    """
    if dtype == torch.float32 or device.type != "cuda":
        return ("decode",)
    few = ("split",) if packed and m < tables.SPLIT_ROWS.stop else ()
    # Its tiles fit in the shared memory of 9.x and 10.x only.
    fits = (9, 0) <= Device.of(device).capability < (11, 0)
    return (*few, "persistent", "library", "decode") if fits else (*few, "library", "decode")


def form(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, r: int = 16, direction: str = "forward",
    packed: bool = True,
) -> str:  # fmt: skip
    """The one of `forms` that the tables call the fastest; without a measurement, that of the built-in rule."""
    if tables.forced_forms and "triton" in tables.forced_forms:
        return tables.forced_forms["triton"]
    return _form(m, n, k, dtype, device, r, direction, packed, tables.captured())


@tables.cached(maxsize=4096)
def _form(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    r: int,
    direction: str,
    packed: bool,
    captured: bool,
) -> str:
    able = forms(m, dtype, device, packed)
    if len(able) > 1 and (here := Device.of(device)).name:
        weight = "packed" if packed else "dense"
        kind = tables.Class(direction, tables.dtype_class(dtype, "cuda"), weight, r)
        if measured := tables.fastest_form("triton", able, here.described, kind, m, n, k, captured):
            return measured
    if "split" in able:
        return "split"
    if "persistent" in able and m * n * k >= tables.PERSISTENT:
        return "persistent"
    return "library" if "library" in able else "decode"


@dataclasses.dataclass(frozen=True)
class Split:
    """How a product of few rows is divided. ``tiles`` are those of W, and ``block_m`` rows of x."""

    tiles: TileConfig
    finish: TileConfig
    """Tiles of the pass that adds the parts."""
    permute: bool
    """Whether W is decoded by byte permutations rather than table lookups; the bits are the same."""
    weight_first: bool
    """Whether W is the left operand of the products, whose instructions want 64 rows there and at least 8 beside."""
    overlap: bool
    """Whether the second launch starts before the first has ended (programmatic dependent launch)."""
    steps: int
    """Tiles of W along the reduced side that one program multiplies."""
    parts: int
    narrow_steps: int
    narrow_parts: int


_SPLIT_PROGRAMS = {16: 4, 32: 4, 64: 2, 128: 1}
"""Programs per multiprocessor, by rows of a tile: as many as keep the memory busy, fewer where partials are large."""
_SPLIT_PARTS = 16
"""The pass that adds the parts is unrolled over them."""


def split_tiles(m: int, *, transposed: bool) -> tuple[TileConfig, bool, bool]:
    """(tiles, weight_first, permute) of a product of few rows, see `Split`. M enters by its range only."""
    block_m = power_of_two(m, _MIN_DOT, 128)
    if block_m <= 32:
        return TileConfig(block_m, 64, 128, num_warps=4, num_stages=1), True, True
    return TileConfig(block_m, 128 if transposed else 64, 128, num_warps=8, num_stages=1), False, True


@functools.lru_cache(maxsize=1024)
def split_product(m: int, n: int, k: int, r: int, device: Device, *, transposed: bool) -> Split:
    """The division of y = x W^T (transposed) or dx = dy W among programs, for a packed w (N, K) and few rows M."""
    tiles, weight_first, permute = split_tiles(m, transposed=transposed)
    block_r = power_of_two(max(r, 1), _MIN_DOT, 64)
    tile, block = (tiles.block_n, tiles.block_k) if transposed else (tiles.block_k, tiles.block_n)
    side, reduced = (n, k) if transposed else (k, n)
    stage = 2 * (tiles.block_m * block + max(tile, block_r) * block)
    tiles = _fit(dataclasses.replace(tiles, block_r=block_r), tiles.block_m * tile, stage, device)
    all_steps = cdiv(reduced, block)
    parts = cdiv(_SPLIT_PROGRAMS[tiles.block_m] * device.multiprocessors, cdiv(side, tile))
    steps = cdiv(all_steps, min(all_steps, _SPLIT_PARTS, parts))
    # A part of the narrow product is about 512 columns of x.
    narrow_steps = max(512 // block, cdiv(all_steps, _SPLIT_PARTS))
    finish = TileConfig(16, 32, 16, block_r, num_warps=4, num_stages=1)
    parts, narrow_parts = cdiv(all_steps, steps), cdiv(all_steps, narrow_steps)
    overlap = device.capability >= (9, 0)
    return Split(tiles, finish, permute, weight_first, overlap, steps, parts, narrow_steps, narrow_parts)


@tuned(fields(32, 128), fields(16, 256), fields(32, 256, warps=8), fields(64, 256, warps=8), fields(64, 64))
def epilogue(m: int, r: int, dtype: torch.dtype, device: Device, tiles: TileConfig | None = None) -> TileConfig:
    """Tiles of the pass that adds the LoRA term to float32 sums and rounds them."""
    block_r = power_of_two(r, _MIN_DOT, 32 if dtype == torch.float32 else 64)
    config = tiles or TileConfig(16 if m <= 16 else 64, 128, 16, block_r, num_warps=4, num_stages=1)
    stage = (config.block_m + config.block_n) * block_r * 4
    return _fit(config, config.block_m * config.block_n, stage, device)


@tuned(fields(128, 128, 64, warps=8, stages=4), fields(256, 128, 64, warps=8, stages=3))
def buffer_gemm(
    m: int, n: int, k: int, r: int, direction: str, dtype: torch.dtype, out_dtype: torch.dtype, device: Device,
    tiles: TileConfig | None = None,
) -> TileConfig:  # fmt: skip
    """Tiles of the persistent product of a dense weight: (M, N) from a reduced side of K, forward or backward (whose N
    and K are those of dx). Measured on an H200: see docs/performance.md."""
    block_r = power_of_two(max(r, 1), _MIN_DOT, 64)
    config = tiles or TileConfig(128, 256, 64, block_r, num_warps=8, num_stages=3)
    # In a stage, the tiles of x and W, and of the adapter that x may be projected by.
    stage = (config.block_m + config.block_n + (block_r if block_r <= 32 else 0)) * config.block_k * dtype.itemsize
    # The halves of the result pass through shared memory, beside the tiles of the LoRA factors.
    beside = config.block_m * config.block_n // 2 * out_dtype.itemsize
    beside += (config.block_m + config.block_n) * block_r * dtype.itemsize
    budget = dataclasses.replace(device, reserved=beside)
    return _fit(config, config.block_m * config.block_n, stage, budget)


@tuned(
    fields(16, block_k=128),
    fields(16, block_k=256),
    fields(32, block_k=128),
    fields(64, block_k=64),
    fields(64, block_k=128, warps=8),
    fields(128, block_k=64, stages=3),
)
def project(m: int, r: int, dtype: torch.dtype, device: Device, tiles: TileConfig | None = None) -> TileConfig:
    """Tiles of the narrow products u = x A^T and du = dy B; the reduced side is ``block_k``. m: rows of all of them."""
    block_r = power_of_two(r, _MIN_DOT, 64 if dtype == torch.float32 else 128)
    if dtype == torch.float32:
        own = TileConfig(16 if m <= 16 else 64, 16, 64, block_r, num_warps=4, num_stages=4)
    else:
        # A program walks all of the reduced side: as few rows as leave every multiprocessor one program.
        block_m = next((rows for rows in (16, 32) if cdiv(m, rows) <= device.multiprocessors), 64)
        block_k = min(128 if block_m == 64 else 512, 8192 // block_r)
        own = TileConfig(
            block_m, 16, block_k, block_r, num_warps=2 if block_k < 512 and block_m < 64 else 4, num_stages=5
        )
    config = tiles or own
    # The adapter may be float32 whatever the type of x.
    stage = config.block_m * config.block_k * dtype.itemsize + config.block_k * block_r * 4
    return _fit(config, config.block_m * block_r, stage, device)


@tuned(fields(32, 128), fields(64, 64), fields(64, 256, warps=8), fields(128, 64), fields(128, 128, stages=2))
def gradient(r: int, dtype: torch.dtype, device: Device, tiles: TileConfig | None = None) -> TileConfig:
    """Tiles of dA and dB: ``block_n`` of the wide side times ``block_r``, reduced over ``block_m`` rows."""
    small = dtype == torch.float32
    block_r = power_of_two(r, _MIN_DOT, 64)
    config = tiles or TileConfig(32 if small else 64, 64 if small else 128, 16, block_r, num_stages=3)
    stage = config.block_m * (config.block_n + config.block_r) * dtype.itemsize
    return _fit(config, config.block_n * config.block_r, stage, device)


@tuned(fields(64, 64), fields(128, 32), fields(128, 64, warps=8), fields(256, 64, warps=8))
def one_pass(r: int, dtype: torch.dtype, device: Device, tiles: TileConfig | None = None) -> TileConfig | None:
    """Tiles of the kernel that makes du and dB from one read of dy; None where two kernels move fewer bytes.

    Every ``block_m`` rows leave a float32 partial of dB that is written and read once; that must be less than
    another read of dy, and du and dB must fit in the registers together.
    """
    block_m = 64 if dtype == torch.float32 else 128
    config = tiles or TileConfig(block_m, 64, 16, power_of_two(r, _MIN_DOT, 1024), num_stages=2)
    if device.capability >= (9, 0):  # measured on an H200: 91 us, where two kernels take 43
        return None
    if config.block_r > 128 or 2 * 4 * r > config.block_m * dtype.itemsize:
        return None
    stage = (config.block_m * config.block_n) * dtype.itemsize + config.block_n * config.block_r * 4
    return _fit(config, (config.block_m + config.block_n) * config.block_r, stage, device)


@functools.cache
def dequantize(blocksize: int) -> TileConfig:
    """Elements that one block of the dequantizer decodes, as ``block_n`` statistics of ``block_k`` elements."""
    return TileConfig(block_n=max(4096 // blocksize, 1), block_k=blocksize, num_warps=4)


def dropout() -> TileConfig:
    """Tiles of the pass that drops elements of a whole matrix."""
    return _DROPOUT


def columns() -> TileConfig:
    """Tiles of the passes that scale the columns of a whole matrix."""
    return _COLUMNS


@functools.lru_cache(maxsize=1024)
def column_sums(m: int, n: int, device: Device) -> tuple[TileConfig, int]:
    """Tiles of the sums over the rows of each column of (M, N), and the rows that one program adds up: as many as leave
    enough programs, because the partial sums of a strip are written and read once more."""
    tiles, wanted = _COLUMN_SUMS, _PROGRAMS_OF_SUMS * device.multiprocessors
    columns = cdiv(n, tiles.block_n)
    strips = (strip for strip in _COLUMN_STRIPS if columns * cdiv(m, strip) >= wanted)
    return tiles, next(strips, _SHORTEST_STRIP)


def finished() -> TileConfig:
    """Tiles of what follows the sums of columns: ``block_m`` strips at once."""
    return _FINISHED


@functools.lru_cache(maxsize=1024)
def folded(n: int, r: int, device: Device) -> TileConfig:
    """Rows of W (N, K) of one program that makes their norms beside an adapter of rank r, and columns of a step.

    Every program reads all of A: programs of more rows read it less often, as long as each multiprocessor has one.
    """
    block_n = 2 * _MIN_DOT if cdiv(n, 2 * _MIN_DOT) >= 0.9 * device.multiprocessors else _MIN_DOT
    block_r = power_of_two(r, _MIN_DOT, FOLDED_RANK)
    return TileConfig(16, block_n, max(64, min(256, 8192 // block_r)), block_r, num_warps=4, num_stages=1)


def dequantize_words() -> TileConfig:
    """32-bit words that one block of the fast dequantizer decodes (``block_n``), two a thread."""
    return _DEQUANTIZE_WORDS


_DROPOUT = TileConfig(block_m=16, block_k=256, num_warps=4)
_COLUMNS = TileConfig(block_m=16, block_n=256, num_warps=4)
_COLUMN_SUMS = TileConfig(block_m=16, block_n=128, num_warps=4)
_COLUMN_STRIPS = (512, 256, 128)
_SHORTEST_STRIP = 64
_PROGRAMS_OF_SUMS = 6
"""A multiprocessor has at least so many before strips get longer."""
_FINISHED = TileConfig(block_m=32, block_n=32, num_warps=4)
ROW_NORMS = 32
"""Rows whose norms one program makes."""
FOLDED_RANK = 64
"""The largest rank whose A A^T, in float32, one program keeps beside its other sums."""
_DEQUANTIZE_WORDS = TileConfig(block_n=512, num_warps=8, num_stages=1)


@functools.cache
def merged(r: int, blocksize: int) -> TileConfig:
    """Tiles of W + scale * (B A)."""
    return TileConfig(16, 64, min(64, blocksize), power_of_two(max(r, 1), _MIN_DOT, 32), num_stages=1)


@functools.cache
def pack(block_r: int) -> TileConfig:
    """Tiles of the pass that packs the adapters of several projections: of A (R, K), and of B (N, R)."""
    return TileConfig(block_n=max(16, 2048 // block_r), block_k=max(16, 4096 // block_r), block_r=block_r, num_stages=1)


def gated() -> TileConfig:
    """Tiles of a gated activation."""
    return _GATED


_GATED = TileConfig(block_m=16, block_n=256, num_warps=4, num_stages=1)


@functools.cache
def gated_gradients(width: int, dtype: torch.dtype, device: Device) -> TileConfig:
    """Tiles of the gradients of a gated activation and of the adapters beside it, whose factors have ``width`` columns
    together: ``block_m`` rows of ``block_n`` columns in each step down the columns."""
    config = TileConfig(16, 64, num_warps=4, num_stages=3)
    # Three tiles of a stage, and as many that are multiplied.
    stage = (3 * config.block_n + width) * config.block_m * dtype.itemsize
    beside = 3 * config.block_n * config.block_m * dtype.itemsize
    return _fit(config, config.block_n * 2 * width, stage, dataclasses.replace(device, reserved=beside))


@functools.cache
def rotary(width: int) -> TileConfig:
    """Of the rotary embedding: a program has all heads of a token, ``width`` elements of q."""
    return TileConfig(num_warps=power_of_two(max(width // 1024, 1), 1, 8), num_stages=1)


@functools.cache
def norm(k: int) -> TileConfig:
    """Of the norm: a program has rows of ``k`` elements, as many as make `_NORM`; a thread at most 16 elements while
    there are warps."""
    block = next_power_of_two(k)
    rows = max(1, _NORM // block)
    return TileConfig(rows, block, num_warps=power_of_two(rows * block // 512, 1, 16), num_stages=1)


_NORM = 2048


def cross_entropy(v: int) -> TileConfig:
    """Columns of a row of V logits that a program takes at once."""
    block = power_of_two(v, 256, 4096)
    return TileConfig(block_n=block, num_warps=max(1, block // 512), num_stages=1)


def rescale() -> TileConfig:
    """Elements that a program scales."""
    return _RESCALE


_RESCALE = TileConfig(block_n=2048, num_warps=4, num_stages=1)


def split(size: int, block: int, tiles: int, device: Device) -> int:
    """How much of ``size``, in multiples of ``block``, one program reduces when there are ``tiles`` of output.

    The parts are as many as it takes to give every multiprocessor two programs, never more than the blocks.
    """
    blocks = cdiv(size, block)
    parts = min(blocks, max(1, cdiv(2 * device.multiprocessors, tiles)))
    return cdiv(blocks, parts) * block


def add_parts() -> TileConfig:
    """The second stage of a reduction: ``block_n`` elements a program."""
    return TileConfig(block_n=1024, num_warps=4, num_stages=2)
