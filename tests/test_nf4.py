"""The 4-bit format: against golden vectors made with bitsandbytes, and against bitsandbytes itself where installed.

The oracle of dequantization is bitsandbytes' portable implementation, run in eager mode: it is exact for every shape
and block size. Its CPU kernel is not used: it misplaces statistics where blocks straddle rows (K % blocksize != 0).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_golden import GOLDEN, dequantize
from safetensors.torch import load_file
from tolerance import DTYPES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastlora import nf4
from fastlora.nf4 import BLOCKSIZES, QUANT_TYPES, NF4Weight, absmax_code_table, code_table

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="compares with bitsandbytes, which is not installed"
)


def cases(count: int) -> settings:
    # Derandomized, so that a failure repeats; no deadline, because machines are shared.
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )


def elements(w: NF4Weight) -> torch.Tensor:
    """The nibbles of ``w``, one an element."""
    return torch.stack((w.w_packed >> 4, w.w_packed & 15), dim=1).reshape(-1)[: w.numel()].long()


def definition(w: NF4Weight, index: torch.Tensor) -> torch.Tensor:
    """The elements of the flattened matrix at ``index`` in float32, straight from the format's definition."""
    byte = w.w_packed[index // 2]
    nibble = torch.where(index % 2 == 0, byte >> 4, byte & 15).long()
    block = index // w.blocksize
    if w.absmax is not None:
        absmax = w.absmax[block]
    else:
        assert w.absmax_q is not None
        assert w.absmax_code is not None
        assert w.absmax_scale is not None
        assert w.absmax_offset is not None
        absmax = w.absmax_code[w.absmax_q[block].long()] * w.absmax_scale[block // 256] + w.absmax_offset
    return code_table(w.quant_type)[nibble] * absmax


def assert_same(a: NF4Weight, b: NF4Weight) -> None:
    assert (a.shape, a.blocksize, a.quant_type, a.dtype) == (b.shape, b.blocksize, b.quant_type, b.dtype)
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor.reshape(-1), right[name].reshape(-1)), name


def assert_quantized_like(mine: NF4Weight, theirs: NF4Weight, w: torch.Tensor) -> None:
    """``mine`` is what bitsandbytes made of ``w``, up to where bitsandbytes is not exact itself."""
    assert (mine.shape, mine.blocksize, mine.quant_type, mine.dtype, mine.nested) == (
        theirs.shape,
        theirs.blocksize,
        theirs.quant_type,
        theirs.dtype,
        theirs.nested,
    )
    flat = NF4Weight.quantize(w, blocksize=mine.blocksize, quant_type=mine.quant_type, nested=False)
    _assert_same_elements(flat, theirs, w)
    if mine.nested:
        _assert_same_nested(mine, theirs, flat)
    else:
        assert theirs.absmax is not None
        # bitsandbytes stores the statistic of a short last block of zeros as 1e-38.
        assert torch.equal(mine.absmax, torch.where(theirs.absmax == 1e-38, 0.0, theirs.absmax))


def _assert_same_elements(mine: NF4Weight, theirs: NF4Weight, w: torch.Tensor) -> None:
    if torch.equal(mine.w_packed, theirs.w_packed):
        return
    # A short last block is divided by its statistic there, multiplied by the reciprocal here: ties may part.
    a, b = elements(mine), elements(theirs)
    where = (a != b).nonzero()[:, 0]
    assert where.min() >= w.numel() - w.numel() % mine.blocksize, "a whole block differs"
    assert mine.absmax is not None
    scaled = w.reshape(-1)[where].double() / mine.absmax[-1].double()
    code = code_table(mine.quant_type).double()
    distance_mine, distance_theirs = (code[a[where]] - scaled).abs(), (code[b[where]] - scaled).abs()
    assert (distance_mine - distance_theirs).abs().max() <= 4 * torch.finfo(torch.float32).eps


def _assert_same_nested(mine: NF4Weight, theirs: NF4Weight, flat: NF4Weight) -> None:
    assert torch.equal(mine.absmax_code, theirs.absmax_code)
    for name in ("absmax_scale", "absmax_offset"):  # equal, but for the 1e-38 of a short last block of zeros
        difference = getattr(mine, name).reshape(-1) - getattr(theirs, name).reshape(-1)
        assert difference.abs().max() <= 1e-38, name
    assert mine.absmax_q is not None
    assert theirs.absmax_q is not None
    assert mine.absmax_scale is not None
    differs = mine.absmax_q != theirs.absmax_q
    differs &= mine.absmax_scale[torch.arange(mine.blocks) // 256] > 1e-37  # without a scale every code means zero
    where = differs.nonzero()[:, 0]
    if not len(where):
        return
    # On a CPU bitsandbytes finds 8-bit codes by a table of 2^16 buckets of [-1, 1]: near a tie it misses the nearest
    # code by up to one bucket. The nearest is taken here.
    assert flat.absmax is not None
    assert mine.absmax_offset is not None
    scaled = (flat.absmax - mine.absmax_offset)[where].double() / mine.absmax_scale[where // 256].double()
    code = absmax_code_table().double()
    distance_mine = (code[mine.absmax_q[where].long()] - scaled).abs()
    distance_theirs = (code[theirs.absmax_q[where].long()] - scaled).abs()
    assert (distance_mine <= distance_theirs + torch.finfo(torch.float32).eps).all(), "not the nearest code"
    assert (distance_theirs <= distance_mine + 2.0**-15).all()


# --- golden vectors ---------------------------------------------------------------------------------------------------


@functools.cache
def golden() -> dict[str, dict[str, Any]]:
    """Case name to ``w``, ``w_packed``, ``state`` and ``dequantized``, as make_golden.py describes them."""
    out: dict[str, dict[str, Any]] = {}
    for key, tensor in load_file(GOLDEN).items():
        name, kind, *leaf = key.split("/")
        case = out.setdefault(name, {"state": {}, "dequantized": {}})
        if leaf:
            case[kind][leaf[0]] = tensor
        else:
            case[kind] = tensor
    return out


def golden_weight(name: str) -> NF4Weight:
    case = golden()[name]
    return NF4Weight.from_state_dict(case["w_packed"], case["state"]).check()


GOLDEN_NAMES = sorted(golden())


def test_golden_vectors_cover_the_format() -> None:
    assert len(GOLDEN_NAMES) == 27
    weights = [golden_weight(name) for name in GOLDEN_NAMES]
    assert {(w.quant_type, w.nested) for w in weights} == {(q, n) for q in QUANT_TYPES for n in (False, True)}
    assert {w.blocksize for w in weights} >= {32, 64, 128, 256, 4096}
    assert {w.dtype for w in weights} == set(DTYPES)
    assert any(w.shape[1] % 2 and w.numel() % w.blocksize for w in weights)
    assert any(w.nested and w.blocks > 256 for w in weights)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_dequantize_golden(name: str) -> None:
    w, expected = golden_weight(name), golden()[name]["dequantized"]
    for dtype, dense in expected.items():
        assert torch.equal(w.dequantize(getattr(torch, dtype)), dense), dtype
    assert torch.equal(w.dequantize(), expected.get(str(w.dtype).removeprefix("torch.")))
    assert torch.equal(w.flatten().dequantize(), w.dequantize())


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_quantize_golden(name: str) -> None:
    theirs, w = golden_weight(name), golden()[name]["w"]
    mine = NF4Weight.quantize(w, blocksize=theirs.blocksize, quant_type=theirs.quant_type, nested=theirs.nested)
    assert_quantized_like(mine.check(), theirs, w)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_state_dict_golden(name: str) -> None:
    mine, theirs = golden_weight(name).state_dict(), golden()[name]["state"]
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert mine[key].dtype == tensor.dtype
        if key.startswith("quant_state."):
            assert json.loads(bytes(mine[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(mine[key], tensor), key


# --- the format itself ------------------------------------------------------------------------------------------------


@st.composite
def packed_weights(draw: st.DrawFn) -> NF4Weight:
    """Any bytes with any statistics: every nibble occurs, which quantized normal weights rarely show."""
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 150))
    blocksize, quant_type = draw(st.sampled_from(BLOCKSIZES[:6])), draw(st.sampled_from(QUANT_TYPES))
    nested, seed = draw(st.booleans()), draw(st.integers(0, 2**32))
    g = torch.Generator().manual_seed(seed)
    w = NF4Weight.empty((n, k), blocksize=blocksize, quant_type=quant_type, nested=nested, device="cpu")
    w.w_packed.random_(0, 256, generator=g)
    if nested:
        assert w.absmax_q is not None
        assert w.absmax_scale is not None
        assert w.absmax_code is not None
        assert w.absmax_offset is not None
        w.absmax_q.random_(0, 256, generator=g)
        w.absmax_scale.uniform_(0, 0.02, generator=g)
        w.absmax_code.copy_(absmax_code_table())
        w.absmax_offset.fill_(draw(st.floats(0, 2, width=32)))
    else:
        assert w.absmax is not None
        w.absmax.uniform_(0, draw(st.sampled_from((1e-6, 1.0, 3e4))), generator=g)
    return w.check()


@cases(400)
@given(packed_weights())
def test_dequantize_is_the_definition(w: NF4Weight) -> None:
    dense = definition(w, torch.arange(w.numel())).view(w.shape)
    for dtype in (*DTYPES, torch.float64):
        assert torch.equal(w.dequantize(dtype), dense.to(dtype))


@cases(300)
@given(packed_weights(), st.data())
def test_rows_are_slices(w: NF4Weight, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, w.shape[0]))
    last = data.draw(st.integers(first, w.shape[0]))
    assert torch.equal(w.dequantize(rows=(first, last)), w.dequantize()[first:last])


@pytest.mark.parametrize("rows", [(-1, 1), (2, 1), (0, 9)])
def test_rows_outside_the_matrix(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 8\]"):
        NF4Weight.quantize(torch.randn(8, 4)).dequantize(rows=rows)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = torch.randn(9, 201)
    whole = NF4Weight.quantize(dense, blocksize=32)
    monkeypatch.setattr(nf4, "_CHUNK", 64)
    parts = NF4Weight.quantize(dense, blocksize=32)
    assert_same(parts, whole)
    values = parts.dequantize()
    rows = parts.dequantize(rows=(4, 7))
    monkeypatch.undo()
    assert torch.equal(values, whole.dequantize())
    assert torch.equal(rows, whole.dequantize()[4:7])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 256])
def test_quantize_takes_the_nearest_value(quant_type: str, nested: bool, blocksize: int) -> None:
    dense = torch.randn(7, 301) * 0.02
    w = NF4Weight.quantize(dense, blocksize=blocksize, quant_type=quant_type, nested=False)
    assert w.absmax is not None
    block = torch.arange(w.numel()) // blocksize
    peaks = torch.zeros(w.blocks).scatter_reduce(0, block, dense.abs().view(-1), "amax")
    assert torch.equal(w.absmax, peaks)
    scaled = (dense.view(-1) / w.absmax[block]).double()
    code = code_table(quant_type).double()
    distance = (scaled[:, None] - code).abs()
    chosen = distance.gather(1, elements(w)[:, None])[:, 0]
    assert (chosen <= distance.amin(dim=1) + 1e-6).all()
    if nested:
        # 8-bit statistics are within half a step (1/128 of the largest deviation at most) of the flat ones.
        flat = w.nest().flat_absmax()
        assert (flat - w.absmax).abs().max() <= (w.absmax - w.absmax.mean()).abs().max() / 128


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_values_of_the_format_survive(quant_type: str) -> None:
    """A matrix made of representable values is reproduced exactly."""
    code = code_table(quant_type)
    dense = torch.stack([code[torch.randperm(16)] for _ in range(10)]).view(5, 32) * 0.75
    w = NF4Weight.quantize(dense, blocksize=32, quant_type=quant_type, nested=False)
    assert torch.equal(w.dequantize(), dense)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_zeros(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    dense = torch.zeros(3, 75, dtype=dtype)  # with a short last block
    w = NF4Weight.quantize(dense, quant_type=quant_type, nested=nested)
    assert torch.equal(w.dequantize(), dense)
    dense[0, :32] = 1  # the other blocks of 32 stay zero
    w = NF4Weight.quantize(dense, blocksize=32, quant_type=quant_type, nested=nested)
    assert not w.dequantize().view(-1)[32:].any()
    assert w.dequantize().isfinite().all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_code_tables(name: str) -> None:
    code = code_table(name)
    assert code.dtype == torch.float32
    assert code.shape == (16,)
    assert code.abs().max() == 1
    if name == "nf4":
        assert torch.equal(code, code.sort().values)
    else:  # the sign is the highest bit, so zero occurs twice, without a sign
        assert torch.equal(code[8:], -code[:8])
        assert not code[[0, 8]].signbit().any()


def test_absmax_code_table() -> None:
    code = absmax_code_table()
    assert code.shape == (256,)
    assert torch.equal(code, code.sort().values)
    assert len(code.unique()) == 256
    assert code[-1] == 1
    assert (code == 0).sum() == 1


@pytest.mark.parametrize("default", ["float64", "meta"])
def test_tables_do_not_depend_on_defaults(default: str) -> None:
    expected = absmax_code_table()
    make = absmax_code_table.__wrapped__  # type: ignore[attr-defined]
    if default == "float64":
        torch.set_default_dtype(torch.float64)
        try:
            table = make()
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with torch.device(default):
            table = make()
    assert table.dtype == torch.float32
    assert torch.equal(table, expected)


def test_tables_of_a_mode_stay_in_it() -> None:
    device = torch.device("cpu", 0)  # another key than that of any other test
    for _ in range(2):  # before a table of real numbers is known, and after
        with FakeTensorMode():
            assert type(code_table("nf4", device)) is FakeTensor
            assert type(NF4Weight.quantize(torch.randn(4, 64)).dequantize()) is FakeTensor
        assert type(code_table("nf4", device)) is torch.Tensor
        assert type(NF4Weight.quantize(torch.randn(4, 64)).dequantize()) is torch.Tensor


def test_nest_and_flatten() -> None:
    flat = NF4Weight.quantize(torch.randn(40, 300), blocksize=32, nested=False)
    nested = flat.nest().check()
    assert nested.blocks > 256
    assert nested.nested
    assert not flat.nested
    assert nested.w_packed is flat.w_packed
    assert nested.nest() is nested
    assert flat.flatten() is flat
    again = nested.flatten().check()
    assert not again.nested
    assert torch.equal(again.dequantize(), nested.dequantize())
    assert nested.nbytes < flat.nbytes
    assert_same(NF4Weight.quantize(torch.ones(2, 3)), NF4Weight.quantize(torch.ones(2, 3), nested=False).nest())


@pytest.mark.parametrize("nested", [False, True])
def test_properties(nested: bool) -> None:
    w = NF4Weight.quantize(torch.randn(5, 33, dtype=torch.float16), blocksize=32, nested=nested)
    assert (w.numel(), w.blocks, w.dtype, w.device) == (165, 6, torch.float16, torch.device("cpu"))
    assert w.w_packed.shape == (83,)
    assert w.nbytes == 83 + (6 + 4 + 256 * 4 + 4 if nested else 6 * 4)
    assert torch.equal(w.code, code_table("nf4"))


def test_to_and_copies() -> None:
    w = NF4Weight.quantize(torch.randn(5, 33))
    assert_same(w.to("cpu"), w)
    assert all(t.device.type == "meta" for t in w.to("meta").tensors().values())
    copied = copy.deepcopy(w)
    assert_same(copied, w)
    assert copied.w_packed.data_ptr() != w.w_packed.data_ptr()
    assert_same(pickle.loads(pickle.dumps(w)), w)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_gpu_gives_the_same_bits(nested: bool, quant_type: str) -> None:
    dense = torch.randn(37, 301)
    w = NF4Weight.quantize(dense, blocksize=32, quant_type=quant_type, nested=nested)
    for dtype in DTYPES:
        assert torch.equal(w.to("cuda").dequantize(dtype).cpu(), w.dequantize(dtype))
    flat = NF4Weight.quantize(dense, blocksize=32, quant_type=quant_type, nested=False)
    assert_same(NF4Weight.quantize(dense.cuda(), blocksize=32, quant_type=quant_type, nested=False).to("cpu"), flat)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_empty(nested: bool, device: str) -> None:
    w = NF4Weight.empty((5, 33), blocksize=32, nested=nested, device=device, dtype=torch.float16)
    filled = NF4Weight.quantize(torch.randn(5, 33).half(), blocksize=32, nested=nested)
    assert w.device.type == device
    assert w.dtype == torch.float16
    for name, tensor in filled.tensors().items():
        assert (w.tensors()[name].shape, w.tensors()[name].dtype) == (tensor.shape, tensor.dtype), name


def test_more_than_2_to_the_31_elements() -> None:
    """Only the last rows are touched, so the gibibyte of bytes before them costs no memory."""
    n, k, blocksize = 523_909, 4099, 4096
    assert n * k > 2**31
    w = NF4Weight.empty((n, k), blocksize=blocksize, nested=False, device="cpu", dtype=torch.float32)
    assert w.absmax is not None
    w.absmax.uniform_(0.5, 1)
    w.w_packed[-4 * k :].random_(0, 256)
    index = torch.arange((n - 3) * k, n * k)
    assert index[0] > 2**31
    for weight in (w, w.nest()):
        expected = definition(weight, index).view(3, k)
        assert torch.equal(weight.dequantize(rows=(n - 3, n)), expected)
        assert torch.equal(weight.dequantize(rows=(n - 2, n - 1)), expected[1:2])


# --- errors -----------------------------------------------------------------------------------------------------------


def _set(**fields: Any) -> Any:
    return lambda w: dataclasses.replace(w, **fields)


def _map(name: str, change: Any) -> Any:
    return lambda w: dataclasses.replace(w, **{name: change(getattr(w, name))})


NESTED_FIELDS = ("w_packed", "absmax_q", "absmax_scale", "absmax_code", "absmax_offset")


@pytest.mark.parametrize("nested", [False, True])
def test_check_returns_the_weight(nested: bool) -> None:
    w = NF4Weight.quantize(torch.randn(5, 33), nested=nested)
    assert w.check() is w


@pytest.mark.parametrize(
    ("nested", "change", "message"),
    [
        (False, _set(quant_type="int4"), "quant_type must be one of .*got 'int4'"),
        (False, _set(blocksize=48), "blocksize must be one of .*got 48"),
        (False, _set(absmax=None), "absmax is missing"),
        (True, _set(absmax=torch.zeros(1)), "not both"),
        *((True, _set(**{name: None}), f"{name} is missing") for name in NESTED_FIELDS[2:]),
        *((True, _map(name, lambda t: t.to(torch.int32)), rf"^{name} must be .*int32") for name in NESTED_FIELDS),
        *(
            (True, _map(name, lambda t: torch.cat((t.reshape(-1), t.reshape(-1)[:1]))), rf"^{name} must be")
            for name in NESTED_FIELDS
        ),
        *((True, _map(name, lambda t: t.to("meta")), rf"^{name} must be .*meta") for name in NESTED_FIELDS[1:]),
        (False, _map("absmax", lambda t: t.half()), r"^absmax must be .*float16"),
        (False, _map("absmax", lambda t: t[:-1]), r"^absmax must be a contiguous torch.float32 tensor of 33 elements"),
        (False, _map("absmax", lambda t: t.repeat_interleave(2)[::2]), "^absmax must be a contiguous"),
        (False, _map("w_packed", lambda t: t.repeat_interleave(2)[::2]), "^w_packed must be a contiguous"),
        (False, _set(shape=(64, 35)), "for a 64 x 35 weight with blocksize 64"),
    ],
)
def test_check_names_the_field(nested: bool, change: Any, message: str) -> None:
    w = change(NF4Weight.quantize(torch.randn(64, 33), nested=nested))
    with pytest.raises(ValueError, match=message):
        w.check()


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.zeros(3), {}, r"matrix \(N, K\)"),
        (torch.zeros(3, 3, 3), {}, r"matrix \(N, K\)"),
        (torch.zeros(3, 3, dtype=torch.int32), {}, "floating-point"),
        (torch.zeros(0, 3), {}, "no elements"),
        (torch.zeros(3, 3), {"blocksize": 63}, "blocksize must be one of"),
        (torch.zeros(3, 3), {"quant_type": "nf3"}, "quant_type must be one of"),
    ],
)
def test_quantize_refuses(w: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NF4Weight.quantize(w, **options)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_round_trip(nested: bool, quant_type: str, dtype: torch.dtype) -> None:
    w = NF4Weight.quantize(torch.randn(7, 35).to(dtype), quant_type=quant_type, nested=nested)
    assert_same(NF4Weight.from_state_dict(w.w_packed, w.state_dict()).check(), w)


def test_from_state_dict_refuses() -> None:
    w = NF4Weight.quantize(torch.randn(7, 35))
    state = w.state_dict()
    for key in ("absmax", "quant_state.bitsandbytes__nf4"):
        with pytest.raises(ValueError, match="not the state of one 4-bit weight"):
            NF4Weight.from_state_dict(w.w_packed, {name: t for name, t in state.items() if name != key})
    both = state | NF4Weight.quantize(torch.randn(7, 35), quant_type="fp4").state_dict()
    with pytest.raises(ValueError, match=r"quant_state.bitsandbytes__fp4.*quant_state.bitsandbytes__nf4"):
        NF4Weight.from_state_dict(w.w_packed, both)


@pytest.mark.parametrize(
    "change", [{"dtype": "float99"}, {"dtype": "load"}, {"dtype": None}, {"shape": [7, 5, 7]}, {"shape": None}], ids=str
)
def test_from_state_dict_refuses_what_is_no_type_or_shape(change: dict[str, Any]) -> None:
    w = NF4Weight.quantize(torch.randn(7, 35))
    state = w.state_dict()
    key = "quant_state.bitsandbytes__nf4"
    meta = json.loads(bytes(state[key].tolist())) | change
    state[key] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a 4-bit weight has a shape \(N, K\) and a type"):
        NF4Weight.from_state_dict(w.w_packed, state)


# --- bitsandbytes itself ----------------------------------------------------------------------------------------------


@st.composite
def dense_weights(draw: st.DrawFn) -> torch.Tensor:
    """Normal weights, weights full of ties, blocks of zeros, outliers, and extreme magnitudes."""
    n, k, seed = draw(st.integers(1, 12)), draw(st.integers(1, 200)), draw(st.integers(0, 2**32))
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g)
    kind = draw(st.sampled_from(("normal", "ties", "zeros", "outliers", "constant")))
    if kind == "ties":
        w = torch.randint(-24, 25, (n, k), generator=g) / 24
    elif kind == "zeros":
        w = torch.where(torch.rand(n, 1, generator=g) < 0.7, 0.0, w)
    elif kind == "outliers":
        w = torch.where(torch.rand(n, k, generator=g) < 0.01, 50 * w, w)
    elif kind == "constant":
        w = torch.full((n, k), -0.3)
    scale = draw(st.sampled_from((1e-6, 0.02, 1.0, 700.0)))
    return (w * scale).clamp(-60000, 60000).to(draw(st.sampled_from(DTYPES)))


options = {"quant_type": st.sampled_from(QUANT_TYPES), "blocksize": st.sampled_from(BLOCKSIZES)}


@needs_bitsandbytes
@cases(1500)
@given(dense_weights(), st.booleans(), st.fixed_dictionaries(options))
def test_quantize_is_bitsandbytes(w: torch.Tensor, nested: bool, options: dict[str, Any]) -> None:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(w, compress_statistics=nested, **options)
    theirs = NF4Weight.from_bitsandbytes(packed, state).check()
    assert_quantized_like(NF4Weight.quantize(w, nested=nested, **options).check(), theirs, w)


@needs_bitsandbytes
@cases(1500)
@given(packed_weights())
def test_dequantize_is_bitsandbytes(w: NF4Weight) -> None:
    parameter = w.to_bitsandbytes()
    for dtype in DTYPES:
        assert torch.equal(w.dequantize(dtype), dequantize(parameter.data, parameter.quant_state, dtype))


@needs_bitsandbytes
@cases(300)
@given(dense_weights(), st.booleans(), st.fixed_dictionaries(options))
def test_round_trip_shares_the_bytes(dense: torch.Tensor, nested: bool, options: dict[str, Any]) -> None:
    w = NF4Weight.quantize(dense, nested=nested, **options)
    parameter = w.to_bitsandbytes()
    again = NF4Weight.from_bitsandbytes(parameter).check()
    assert_same(again, w)
    for name, tensor in w.tensors().items():
        assert again.tensors()[name].data_ptr() == tensor.data_ptr(), name
    assert parameter.data_ptr() == w.w_packed.data_ptr()
    assert not parameter.requires_grad


@needs_bitsandbytes
@cases(300)
@given(dense_weights(), st.booleans(), st.fixed_dictionaries(options))
def test_state_dicts_are_exchanged_with_bitsandbytes(
    dense: torch.Tensor, nested: bool, options: dict[str, Any]
) -> None:
    from bitsandbytes.functional import QuantState, quantize_4bit

    packed, state = quantize_4bit(dense, compress_statistics=nested, **options)
    theirs = NF4Weight.from_bitsandbytes(packed, state)
    assert_same(NF4Weight.from_state_dict(packed, state.as_dict(packed=True)).check(), theirs)
    back = QuantState.from_dict(theirs.state_dict(), device=torch.device("cpu"))
    assert_same(NF4Weight.from_bitsandbytes(packed, back).check(), theirs)


@needs_bitsandbytes
@pytest.mark.parametrize("quant_storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_linear4bit(quant_storage: torch.dtype, nested: bool, quant_type: str) -> None:
    from bitsandbytes.nn import Linear4bit

    dense = torch.randn(32, 64)
    layer = Linear4bit(
        64, 32, bias=False, compress_statistics=nested, quant_type=quant_type, quant_storage=quant_storage
    )
    layer.support_avx512bf16_for_cpu = False
    layer.load_state_dict({"weight": dense})
    layer.to("cpu")
    w = NF4Weight.from_bitsandbytes(layer.weight).check()
    assert w.w_packed.data_ptr() == layer.weight.data_ptr()
    assert_quantized_like(NF4Weight.quantize(dense, quant_type=quant_type, nested=nested), w, dense)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, w.dequantize(torch.float32)))

    parameter = w.to_bitsandbytes(quant_storage)
    assert (parameter.shape, parameter.dtype) == (layer.weight.shape, quant_storage)
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "weight": parameter}
    assert torch.equal(other(x), layer(x))
    saved, expected = other.state_dict(), layer.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key].view(torch.uint8), expected[key].view(torch.uint8)) for key in expected)


@needs_bitsandbytes
def test_to_bitsandbytes_refuses_a_storage_that_the_bytes_do_not_fill() -> None:
    w = NF4Weight.quantize(torch.randn(3, 3))
    with pytest.raises(ValueError, match=r"5 packed bytes do not fill torch.float16 elements"):
        w.to_bitsandbytes(torch.float16)


@needs_bitsandbytes
def test_from_bitsandbytes_refuses() -> None:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    with pytest.raises(ValueError, match="carries no quant_state"):
        NF4Weight.from_bitsandbytes(Params4bit(torch.randn(3, 3)))
    packed, state = quantize_4bit(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="only matrices"):
        NF4Weight.from_bitsandbytes(packed, state)
    packed, state = quantize_4bit(torch.randn(8, 16), compress_statistics=True)
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu = False"):
        NF4Weight.from_bitsandbytes(packed, state)
    state.packing_format_for_cpu = False
    state.state2.blocksize = 128
    with pytest.raises(ValueError, match="blocks of 256, got 128"):
        NF4Weight.from_bitsandbytes(packed, state)


@needs_bitsandbytes
@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES[1:])
def test_dequantize_is_bitsandbytes_on_the_gpu(nested: bool, quant_type: str, blocksize: int) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dense = torch.randn(37, 302, device="cuda")
    packed, state = quantize_4bit(dense, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    w = NF4Weight.from_bitsandbytes(packed, state).check()
    for dtype in DTYPES:
        state.dtype = dtype
        assert torch.equal(w.dequantize(dtype), dequantize_4bit(packed, state))
