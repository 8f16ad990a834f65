"""The extension's kernels of the gated activation, against products of what they store and the float64 truth."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from fastlora import activation as plain
from fastlora import native
from fastlora.activation import ACTIVATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.available("cuda") is not None, reason=str(native.available("cuda"))),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="taken on compute capability 9.0",
    ),
]

ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = pytest.mark.parametrize(
    ("m", "n", "r", "rd"),
    [
        (1, 8, 16, 16),
        (17, 136, 16, 16),
        (70, 520, 32, 16),
        (33, 1000, 16, 32),
        (260, 1032, 32, 32),
        (129, 2064, 16, 16),
        (2048, 14336, 16, 16),
    ],
)


def operands(m: int, n: int, dtype: torch.dtype, apart: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate and up, side by side or with ``apart`` columns between and after them, and dh."""
    both = (torch.randn(m, 2 * (n + apart), device="cuda") * 2).to(dtype)
    both[0, :2] = torch.tensor([20.0, -20.0])
    gate, up = (part[:, :n] for part in both.chunk(2, 1))
    return gate, up, torch.randn(m, n, device="cuda").to(dtype)


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def hold(actual: dict[str, torch.Tensor], gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, name: str) -> None:
    """What is elementwise."""

    def results(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        values = plain.backward(*(t.to(dtype) for t in (gate, up, dh)), name)
        return dict(zip(("dgate", "dup", "h"), values, strict=True))

    rounded, truth = results(gate.dtype), results(torch.float64)
    for key, value in actual.items():
        assert_close(value, rounded[key], truth[key], key)


def hold_product(actual: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, name: str) -> None:
    """``actual`` is scale * left right, summed in float32 and rounded once."""
    truth = scale * (left.double() @ right.double())
    assert_close(actual, (scale * (left.float() @ right.float())).to(actual.dtype), truth, name)


@SIZES
@DTYPE
@ACTIVATION
@pytest.mark.parametrize("apart", [0, 24])
def test_forward(m: int, n: int, r: int, rd: int, dtype: torch.dtype, activation: str, apart: int) -> None:
    gate, up, dh = operands(m, n, dtype, apart)
    lora_a = normal(rd, n, dtype=dtype)
    assert native.gates(gate, up, rd)
    h, u = native.gated_forward(gate, up, activation, lora_a)
    hold({"h": h}, gate, up, dh, activation)
    hold_product(u, h, lora_a.T, 1.0, "u")


@SIZES
@DTYPE
@ACTIVATION
@pytest.mark.parametrize("shared", [False, True], ids=["two u", "one u"])
@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
def test_gradients(
    m: int, n: int, r: int, rd: int, dtype: torch.dtype, activation: str, shared: bool, in_place: bool
) -> None:
    gate, up, dh = operands(m, n, dtype, 0 if in_place else 24)
    kept = [t.clone() for t in (gate, up, dh)]
    u, du_down = normal(m, r if shared else 2 * r, dtype=dtype), normal(m, rd, dtype=dtype)
    lora_b, scales, kinds = (
        torch.zeros(2 * n, u.shape[1], device="cuda", dtype=dtype),
        (0.5, 2.0),
        (torch.float32, dtype),
    )
    of_up = slice(0 if shared else r, None)
    lora_b[:n, :r], lora_b[n:, of_up] = normal(n, r, dtype=dtype), normal(n, r, dtype=dtype)
    assert native.gates(gate, up, r, rd)
    d, du, db, da = native.gated_gradients(
        gate, up, dh, activation, u, scales, du_down, lora_b, kinds, shared=shared, in_place=in_place
    )
    assert torch.equal(dh, kept[2])
    assert (d.data_ptr() == gate.data_ptr()) == in_place
    assert (db.dtype, da.dtype) == kinds
    dgate, dup = d.chunk(2, 1)
    hold({"dgate": dgate, "dup": dup}, *kept, activation)
    hold_product(du, d, lora_b, 1.0, "du")
    hold_product(db[:n], dgate.T, u[:, :r], scales[0], "dB of gate")
    hold_product(db[n:], dup.T, u[:, of_up], scales[1], "dB of up")
    h, _ = native.gated_forward(kept[0], kept[1], activation, normal(16, n, dtype=dtype))
    hold_product(da, du_down.T, h, 1.0, "dA of down")


@pytest.mark.parametrize(("m", "n", "r"), [(100, 4096, 32), (2048, 4096, 16), (8200, 4096, 16), (16384, 14336, 16)])
def test_many_runs_give_the_same_bits(m: int, n: int, r: int) -> None:
    """The largest fills the memory's queues, behind which what is read has to wait and must not be overwritten."""
    dtype = torch.bfloat16
    gate, up, dh = operands(m, n, dtype)
    u, du_down, lora_b = normal(m, 2 * r, dtype=dtype), normal(m, r, dtype=dtype), normal(2 * n, 2 * r, dtype=dtype)

    def run() -> list[torch.Tensor]:
        gradients = native.gated_gradients(gate, up, dh, "silu", u, (1.0, 1.0), du_down, lora_b, (dtype, dtype))
        return [*native.gated_forward(gate, up, "silu", lora_b.view(-1)[: r * n].view(r, n)), *gradients]

    first = run()
    for _ in range(40):
        assert all(torch.equal(again, once) for again, once in zip(run(), first, strict=True))
    for rows in range(0, m, 2048):
        part = slice(rows, rows + 2048)
        dgate, dup = first[2][part].chunk(2, 1)
        hold({"h": first[0][part], "dgate": dgate, "dup": dup}, gate[part], up[part], dh[part], "silu")


def test_what_is_not_taken() -> None:
    gate, up, _ = operands(4, 64, torch.bfloat16)
    assert native.gates(gate, up, 16, 32)
    assert not native.gates(gate, up, 64)
    assert not native.gates(gate, up, 0)
    assert not native.gates(gate.float(), up.float(), 16)
    assert not native.gates(gate.cpu(), up.cpu(), 16)
    assert not native.gates(gate[:, 1:33], up[:, 1:33], 16)
    assert not native.gates(gate[:, :33], up[:, :33], 16)
    assert not native.gates(gate.T, up.T, 16)
    assert not native.gates(gate, up.clone(), 16)
    assert not native.gates(gate[:0], up[:0], 16)


def test_messages() -> None:
    gate, up, dh = operands(4, 64, torch.bfloat16)
    narrow, lora_b = normal(4, 32, dtype=torch.bfloat16), normal(128, 32, dtype=torch.bfloat16)
    kinds = (torch.bfloat16, torch.bfloat16)

    def gradients(**changed: torch.Tensor) -> None:
        given = {"dh": dh, "u": narrow, "du_down": narrow[:, :16].contiguous(), "lora_b": lora_b} | changed
        native.gated_gradients(
            gate, up, given["dh"], "silu", given["u"], (1.0, 1.0), given["du_down"], given["lora_b"], kinds
        )

    with pytest.raises(ValueError, match=r"dh must have shape \(4, 64\), got \(4, 56\)"):
        gradients(dh=dh[:, :56])
    with pytest.raises(ValueError, match="the rank of gate and up must be 16 or 32, got 8"):
        gradients(u=narrow[:, :16].contiguous())
    with pytest.raises(ValueError, match="lora_b must be a contiguous bfloat16 tensor of 4096 elements"):
        gradients(lora_b=lora_b.float())
    with pytest.raises(ValueError, match="the rank of down must be 16 or 32, got 4"):
        native.gated_forward(gate, up, "silu", narrow.T[:4, :4].contiguous())
    with pytest.raises(ValueError, match="gate must be bfloat16 or float16, got float32"):
        native.gated_forward(gate.float(), up.float(), "silu", narrow)
    with pytest.raises(ValueError, match="up must be bfloat16, got float32"):
        native.gated_forward(gate, up.float(), "silu", narrow)
