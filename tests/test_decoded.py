"""Dense copies of packed weights: what finds them, what they outlive, and that products read them."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from fastlora import backends, decoded, groups, ops
from fastlora.blocks import Projection
from fastlora.nf4 import NF4Weight

K = 64
SIZES = (48, 16, 32)


@pytest.fixture(autouse=True)
def _none_live_on() -> Iterator[None]:
    gc.collect()
    assert not decoded._copies
    yield
    gc.collect()
    assert not decoded._copies


def weights(nested: bool = True, device: str = "cpu", k: int = K) -> list[NF4Weight]:
    torch.manual_seed(0)
    return [NF4Weight.quantize(torch.randn(n, k).bfloat16(), nested=nested).to(device) for n in SIZES]


def stacked(ws: list[NF4Weight], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.cat([w.dequantize(dtype) for w in ws])


def test_copies_are_found_alone_and_in_their_order_alone() -> None:
    ws = weights()
    whole = stacked(ws)
    assert decoded.find(ws, torch.bfloat16) is None
    decoded.keep(ws, whole)
    assert decoded.find(ws, torch.bfloat16) is whole
    for w in ws:
        one = decoded.find([w], torch.bfloat16)
        assert one is not None
        assert one.is_contiguous()
        assert torch.equal(one, w.dequantize(torch.bfloat16))
    part = decoded.find(ws[1:], torch.bfloat16)
    assert part is not None
    assert torch.equal(part, whole[SIZES[0] :])
    assert decoded.find(ws[::-1], torch.bfloat16) is None
    assert decoded.find([ws[0], ws[2]], torch.bfloat16) is None
    assert decoded.find(ws, torch.float16) is None
    assert decoded.find([*ws, weights()[0]], torch.bfloat16) is None
    assert [t.data_ptr() for t in decoded.held()] == [whole.data_ptr()]
    decoded.drop(ws[:1])
    assert decoded.find(ws, torch.bfloat16) is None
    assert decoded.find(ws[1:], torch.bfloat16) is not None


def test_another_view_of_the_same_bytes_finds_the_copy() -> None:
    ws = weights()
    decoded.keep(ws, stacked(ws))
    again = [dataclasses.replace(w, w_packed=w.w_packed.detach()) for w in ws]
    assert decoded.find(again, torch.bfloat16) is not None


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", ["bytes", "statistics", "other statistics"])
def test_what_has_changed_is_decoded_again(change: str, nested: bool) -> None:
    ws = weights(nested)
    decoded.keep(ws, stacked(ws))
    w = ws[1]
    name = "absmax_q" if nested else "absmax"
    statistics = getattr(w, name)
    if change == "bytes":
        w.w_packed.bitwise_xor_(255)
    elif change == "statistics":
        statistics.mul_(2)
    else:
        w = ws[1] = dataclasses.replace(w, **{name: statistics.clone()})
    assert decoded.find([w], torch.bfloat16) is None
    assert decoded.find(ws, torch.bfloat16) is None
    assert decoded.find(ws[:1], torch.bfloat16) is not None
    assert torch.equal(backends.multiplier(ws, torch.bfloat16), stacked(ws))


def test_a_copy_lives_as_long_as_the_packed_bytes() -> None:
    ws = weights()
    whole = stacked(ws)
    gone = weakref.ref(whole)
    decoded.keep(ws, whole)
    decoded.keep(ws, whole)  # a second time adds nothing that stays
    del whole
    first = ws.pop(0)
    del ws
    gc.collect()
    assert len(decoded._copies) == 1
    assert decoded.find([first], torch.bfloat16) is not None
    del first
    gc.collect()
    assert not decoded._copies
    assert gone() is None


def test_the_operator_gives_memory_of_its_own() -> None:
    (w, *_) = weights()
    decoded.keep([w], stacked([w]))
    dense = torch.ops.fastlora.dequantize(*ops.weight_args(w), torch.bfloat16)
    dense.zero_()
    assert torch.equal(backends.multiplier([w], torch.bfloat16), w.dequantize(torch.bfloat16))


def _zeros(ws: list[NF4Weight], dtype: torch.dtype) -> None:
    """A copy that is no copy: what reads it shows."""
    decoded.keep(ws, torch.zeros(sum(w.shape[0] for w in ws), ws[0].shape[1], dtype=dtype, device=ws[0].device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_layer_reads_the_copy(
    backend: str, direction: str, rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("Triton is compiled, not interpreted")
        if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs the tensor memory accelerator")
        monkeypatch.setattr(groups.kernels("config"), "form", lambda *args: "persistent")
    w = weights(device=device)[0]
    n, k = w.shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    a, b = (torch.randn(*shape, device=device).to(dtype) if rank else None for shape in ((rank, k), (n, rank)))
    x, dy = (torch.randn(40, columns, device=device).to(dtype) for columns in (k, n))

    def run() -> torch.Tensor:
        if direction == "forward":
            return ops.forward(x, w, a, b, None, None, 0.5, 0.0, None, backend)[0]
        u = x.new_zeros(40, rank)
        dx = ops.backward(dy, x, u, w, a, b, 0.5, 0.0, None, backend, (True, False, False))[0]
        assert dx is not None
        return dx

    before = run()
    decoded.keep([w], w.dequantize(dtype))
    assert torch.equal(run(), before)
    _zeros([w], dtype)
    without = run()
    assert not torch.equal(without, before)
    if not rank:
        assert not without.any()


@pytest.mark.parametrize("form", [groups.Library, groups.Stacked])
def test_a_group_reads_the_copy(form: type, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form is groups.Stacked:
        pytest.importorskip("triton")
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("Triton is compiled, not interpreted")
        if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs the tensor memory accelerator")
    ws = weights(device=device)
    projections = [Projection(w) for w in ws]
    x = torch.randn(40, K, device=device).half()
    dys = [torch.randn(40, n, device=device).half() for n in SIZES]
    needs = groups.Needs(True, (False,) * 3, (False,) * 3)

    def run() -> list[torch.Tensor]:
        ys, kept = form().forward(x, projections, None)
        dx, _, _ = form().backward(dys, x, kept, projections, needs, torch.float16)
        return [*(y.clone() for y in ys), dx]

    before = run()
    decoded.keep(ws, stacked(ws, torch.float16))
    assert all(torch.equal(now, then) for now, then in zip(run(), before, strict=True))
    _zeros(ws, torch.float16)
    assert not any(now.any() for now in run())
