"""fastlora.native: the compiled dequantizer against NF4Weight.dequantize, bit for bit, on every CPU path."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastlora import native, tables
from fastlora.dropout import Dropout
from fastlora.nf4 import BLOCKSIZES, CODES, NF4Weight

REASON = native.available("cpu")
built = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of odd length start in the middle of a byte; the others leave tails of every kind behind the vector loops.
SHAPES = ((1, 1), (3, 7), (1, 64), (5, 33), (16, 48), (7, 129), (2, 4100), (33, 95))


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def make(shape: tuple[int, int], seed: int = 0, **options: object) -> NF4Weight:
    generator = torch.Generator().manual_seed(seed)
    return NF4Weight.quantize(torch.randn(shape, generator=generator), **options)  # type: ignore[arg-type]


@pytest.fixture(params=native.CAPABILITIES)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(native.CAPABILITY_VARIABLE, raising=False)
    best = native.capability()
    if native.CAPABILITIES.index(request.param) > native.CAPABILITIES.index(best):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(native.CAPABILITY_VARIABLE, request.param)
    assert native.capability() == request.param
    return request.param


@built
class TestBits:
    @pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_shapes(self, path: str, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
        for seed, shape in enumerate(SHAPES):
            for blocksize in (32, 64):
                w = make(shape, seed, blocksize=blocksize, quant_type=quant_type, nested=nested)
                got = native.dequantize(w, dtype)
                assert got.shape == shape
                assert got.dtype == dtype
                assert torch.equal(bits(got), bits(w.dequantize(dtype))), (shape, blocksize)

    @pytest.mark.parametrize("blocksize", BLOCKSIZES)
    def test_blocksizes(self, path: str, blocksize: int) -> None:
        # More than 256 blocks of the smallest size, so that a second nested scale is in use.
        w = make((3, 5 * 4096 + 17), blocksize=blocksize)
        for dtype in DTYPES:
            assert torch.equal(bits(native.dequantize(w, dtype)), bits(w.dequantize(dtype)))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("k", [64, 37])
    def test_out_strided(self, path: str, dtype: torch.dtype, k: int) -> None:
        w = make((9, k))
        buffer = torch.full((9, k + 11), 77.0, dtype=dtype)
        out = buffer[:, 5 : 5 + k]
        assert native.dequantize(w, dtype, out) is out
        assert torch.equal(bits(out), bits(w.dequantize(dtype)))
        outside = torch.cat((buffer[:, :5], buffer[:, 5 + k :]), dim=1)
        assert (outside == 77.0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_rounding_at_the_edges_of_the_type(self, path: str, dtype: torch.dtype) -> None:
        # Ties, subnormals of every type, overflow to infinity, infinite and missing statistics.
        powers = [2.0**e for e in range(-149, 128)]
        special = [65504.0, 65519.99, 65520.0, 3.3961e38, 3.4028e38, float("inf"), float("nan"), 0.0, 1.00390625]
        generator = torch.Generator().manual_seed(1)
        random = torch.randint(0, 0x7F800000, (4096,), generator=generator, dtype=torch.int32).view(torch.float32)
        absmax = torch.cat((torch.tensor(powers + special), random))
        packed = torch.arange(16, dtype=torch.uint8).repeat(2 * absmax.numel() // 2)
        packed = torch.stack((packed * 16 + packed.flip(0), packed), 1).reshape(-1)[: absmax.numel() * 16]
        for quant_type in CODES:
            w = NF4Weight(packed, (absmax.numel(), 32), 32, quant_type, absmax=absmax).check()
            got, want = native.dequantize(w, dtype), w.dequantize(dtype)
            number = ~want.isnan()
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(bits(got)[number], bits(want)[number])

    def test_large_output_bypasses_the_caches(self, path: str) -> None:
        w = make((2049, 2051), blocksize=64)
        assert torch.equal(bits(native.dequantize(w, torch.bfloat16)), bits(w.dequantize(torch.bfloat16)))
        buffer = torch.empty(2049, 2080, dtype=torch.float32)
        got = native.dequantize(w, torch.float32, buffer[:, 3:2054])
        assert torch.equal(bits(got), bits(w.dequantize(torch.float32)))

    @pytest.mark.parametrize("shape", [(0, 64), (8, 0)])
    def test_no_elements(self, path: str, shape: tuple[int, int]) -> None:
        w = NF4Weight.empty(shape, nested=False, device="cpu")
        assert native.dequantize(w, torch.bfloat16).shape == shape

    def test_threads_give_the_same_bits(self) -> None:
        w = make((300, 1000))
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = native.dequantize(w, torch.bfloat16)
            torch.set_num_threads(3)
            assert torch.equal(bits(native.dequantize(w, torch.bfloat16)), bits(one))
        finally:
            torch.set_num_threads(threads)

    def test_default_type(self) -> None:
        w = NF4Weight.quantize(torch.randn(4, 64).half())
        assert native.dequantize(w).dtype == torch.float16


@built
class TestMessages:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"w_packed": torch.zeros(3, dtype=torch.uint8)}, r"w_packed .* 128 elements, got uint8 of shape \(3\)"),
            ({"w_packed": torch.zeros(128, dtype=torch.float32)}, r"w_packed .* uint8 .* got float32"),
            ({"absmax_q": torch.zeros(5, dtype=torch.uint8)}, r"absmax_q .* 4 elements, got uint8 of shape \(5\)"),
            ({"absmax_scale": torch.zeros(1, dtype=torch.float64)}, "absmax_scale .* float32 .* got float64"),
            ({"absmax_code": torch.zeros(512)[::2]}, "absmax_code .* not contiguous"),
            ({"absmax_offset": None}, "absmax_offset is missing"),
            ({"absmax": torch.zeros(4)}, "exactly one of absmax"),
            ({"blocksize": 48}, "blocksize must be a power of two from 32 to 4096, got 48"),
        ],
    )
    def test_weight(self, change: dict[str, object], message: str) -> None:
        w = dataclasses.replace(make((4, 64)), **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            native.dequantize(w, torch.bfloat16)

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            (torch.empty(4, 63), r"out must have shape \(4, 64\), got \(4, 63\)"),
            (torch.empty(256), r"out must have shape \(4, 64\), got \(256\)"),
            (torch.empty(64, 4).T, "last dimension of out must be contiguous, got stride 4"),
            (torch.empty(64).expand(4, 64), "rows of out must not overlap: stride 0"),
            (torch.empty(4, 64, dtype=torch.bfloat16), "out must be torch.float32, got torch.bfloat16"),
        ],
    )
    def test_out(self, out: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            native.dequantize(make((4, 64)), torch.float32, out)

    def test_type(self) -> None:
        with pytest.raises(ValueError, match="out must be float32, bfloat16 or float16, got float64"):
            native.dequantize(make((4, 64)), torch.float64)

    def test_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(native.CAPABILITY_VARIABLE, "sse9")
        with pytest.raises(ValueError, match=r"FASTLORA_CPU_CAPABILITY must be one of .* got 'sse9'"):
            native.dequantize(make((4, 64)))


def test_device_without_code() -> None:
    reason = native.available("xpu")
    assert reason is not None
    assert "xpu" in reason or reason == REASON


def test_reason_of_a_missing_extension() -> None:
    """A fresh interpreter in which fastlora._C cannot be found reports it and raises nothing at import."""
    code = (
        "import sys; sys.modules['fastlora._C'] = None\n"
        "from fastlora import native\n"
        "reason = native.available('cpu')\n"
        "assert reason and 'fastlora._C' in reason, reason\n"
        "assert native.available('cuda') == reason\n"
        "try: native.capability()\n"
        "except RuntimeError as error: assert str(error) == reason\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda")))
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_bits(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    for seed, shape in enumerate((*SHAPES, (1024, 4096))):
        for blocksize in (32, 64, 4096):
            w = make(shape, seed, blocksize=blocksize, quant_type=quant_type, nested=nested)
            want, on_gpu = w.dequantize(dtype), w.to("cuda")
            assert torch.equal(bits(native.dequantize(on_gpu, dtype).cpu()), bits(want)), (shape, blocksize)
            for pad, first in ((8, 0), (16, 8), (5, 3)):
                buffer = torch.full((shape[0], shape[1] + pad), 77.0, dtype=dtype, device="cuda")
                out = buffer[:, first : first + shape[1]]
                native.dequantize(on_gpu, dtype, out)
                assert torch.equal(bits(out.cpu()), bits(want)), (shape, blocksize, pad)
                assert (buffer[:, :first] == 77.0).all()
                assert (buffer[:, first + shape[1] :] == 77.0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda")))
def test_cuda_runs_on_the_current_stream() -> None:
    w = make((1024, 4096)).to("cuda")
    want = native.dequantize(w, torch.bfloat16)
    out = torch.zeros_like(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        native.dequantize(w, torch.bfloat16, out)
    out.zero_()
    graph.replay()
    assert torch.equal(bits(out), bits(want))


@pytest.mark.parametrize(
    ("capability", "m", "sizes", "direction", "form"),
    [
        ((9, 0), 1, (4096, 4096, 16), "forward", "few_rows"),
        ((9, 0), 16, (4096, 4096, 16), "forward", "few_rows"),
        ((9, 0), 17, (4096, 4096, 16), "forward", "tile"),
        ((9, 0), 512, (4096, 4096, 16), "backward", "tile"),
        ((9, 0), 513, (4096, 4096, 16), "forward", "tile"),  # 96 tiles for 100 multiprocessors
        ((9, 0), 1024, (4096, 4096, 16), "forward", "library"),  # 128: a second wave would be almost empty
        ((9, 0), 1500, (1024, 4096, 16), "backward", "tile"),  # 192: dx has in_features
        ((9, 0), 1500, (1024, 4096, 16), "forward", "library"),  # 48
        ((9, 0), 2049, (14336, 4096, 16), "forward", "library"),
        ((9, 0), 64, (4096, 4064, 16), "forward", "few_rows"),  # in_features is no multiple of 64
        ((9, 0), 100, (4096, 4096, 7), "forward", "tile"),
        ((9, 0), 100, (4096, 4096, 7), "backward", "library"),  # du has no aligned rows
        ((9, 0), 4, (4095, 4096, 16), "forward", "library"),
        ((8, 0), 32, (4096, 4096, 16), "forward", "few_rows"),
        ((8, 6), 32, (4096, 4096, 16), "forward", "library"),
        ((10, 0), 65, (4096, 4096, 16), "forward", "library"),
    ],
)
def test_the_form_without_a_table(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    m: int,
    sizes: tuple[int, int, int],
    direction: str,
    form: str,
) -> None:
    n, k, r = sizes
    device = tables.Device("cuda", "A GPU", ".".join(map(str, capability)), 100)
    monkeypatch.setattr(native, "gpu", lambda index: (capability, device))
    with tables.use(tables.Tables()):
        assert native.chosen_form(m, n, k, 64, torch.bfloat16, 0, r, direction, False) == form


@pytest.mark.parametrize(("cuda", "hopper", "taken"), [(1, 1, True), (1, 0, False), (0, 0, True)])
def test_a_build_without_code_for_hopper_is_not_asked_for_it(
    cuda: int, hopper: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without CUDA says nothing about the machine that is asked about."""
    monkeypatch.setattr(native, "_load", lambda: (SimpleNamespace(WITH_CUDA=cuda, WITH_HOPPER=hopper), None))
    assert ("tile" in native.forms(512, 4096, 4096, 16, 64, (9, 0))) == taken
    assert "tile" not in native.forms(512, 4096, 4096, 16, 64, (10, 0))


def test_the_form_by_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    device = tables.Device("cuda", "A GPU", "9.0", 100)
    monkeypatch.setattr(native, "gpu", lambda index: ((9, 0), device))
    kind = tables.Class("forward", "16-bit", "packed", 16)
    times = tables.Times(
        {"torch": 1.0, "cuda:library": 2.0, "cuda:tile": 3.0}, {"cuda:library": 3.0, "cuda:tile": 2.0, "torch": 9.0}
    )
    known = tables.Tables((tables.Table(device, {kind: {(64, 4096, 4096): times}}),))
    with tables.use(known):
        assert native.chosen_form(64, 4096, 4096, 64, torch.bfloat16, 0, 16, "forward", False) == "library"
        assert native.chosen_form(64, 4096, 4096, 64, torch.bfloat16, 0, 16, "forward", True) == "tile"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 7), (5, 64), (33, 1000)])
def test_dropout_is_the_reference_to_the_bit(dtype: torch.dtype, p: float, m: int, k: int, device: str) -> None:
    dropout = Dropout(p, torch.tensor([-(2**62) - 12345], device=device))
    x = torch.randn(m, 2 * k, device=device).to(dtype)[:, ::2]
    x[:, :1] = float("inf")
    dropped = native.drop(x, dropout)
    assert dropped.dtype == dtype
    assert torch.equal(dropped, dropout.apply(x))


@pytest.mark.gpu
@pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda")))
def test_dropout_on_a_gpu() -> None:
    dropout = Dropout(0.1, torch.tensor([2**62 + 99], device="cuda"))
    for m, k in ((70000, 24), (3, 2**20 + 1)):  # many rows, many counters
        x = torch.randn(m, k, device="cuda").bfloat16()
        for t in (x, x.reshape(-1)[1 : 1 + (m - 1) * k].view(m - 1, k)):  # the second is aligned to two bytes
            assert torch.equal(native.drop(t, dropout), dropout.apply(t))


@built
def test_dropout_names_what_is_wrong() -> None:
    x, seed, operator = torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), torch.ops.fastlora_native.dropout
    for arguments, message in (
        ((x.half(), seed, 0, 1.0, x.half()), "x must be float32 or bfloat16"),
        ((x[0], seed, 0, 1.0, x[0]), "two dimensions"),
        ((x, seed.float(), 0, 1.0, x.clone()), "seed must be a contiguous int64"),
        ((x, seed, 0, 1.0, x.clone().to(torch.bfloat16)), "out must be a contiguous float32"),
        ((x.T, seed, 0, 1.0, x.clone().T), "not contiguous"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            operator(*arguments)
