"""PiSSA, OLoRA and LoftQ: PEFT's where it has them, and literal decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import batch, peft_mlp, stack, train, trained

from fastlora import NF4Weight
from fastlora.adapters import starts
from fastlora.backends import dense
from fastlora.linear import base_weight

pytestmark = pytest.mark.filterwarnings("ignore")


def whole(layer: Any) -> torch.Tensor:
    """W + scale * B A."""
    w = dense(base_weight(layer.base_layer), torch.float64)
    return w + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_dense_starts_are_those_of_peft(start: str) -> None:
    stock = peft_mlp(base="dense", init_lora_weights=start)
    fast = peft_mlp(base="dense")
    plain = [layer.base_layer.weight.clone() for layer in layers(fast)]
    starts.apply(fast, start, niter=None)
    for ours, theirs, before in zip(layers(fast), layers(stock), plain, strict=True):
        torch.testing.assert_close(ours.base_layer.weight, theirs.base_layer.weight, rtol=1e-4, atol=1e-5)
        product, other = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in (ours, theirs))
        torch.testing.assert_close(product, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole(ours).float(), before, rtol=1e-5, atol=1e-6)


def test_pissa_is_the_best_approximation() -> None:
    w = torch.randn(30, 20, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(w)
    a, b = starts.pissa(w, 5, 2.5)
    torch.testing.assert_close(2.5 * b @ a, u[:, :5] @ s[:5].diag() @ vt[:5])
    torch.testing.assert_close(b.T @ b, a @ a.T)  # the values are shared


def test_randomized_is_near() -> None:
    w = torch.randn(60, 4, dtype=torch.float64) @ torch.randn(4, 50, dtype=torch.float64)
    w += 0.01 * torch.randn_like(w)
    (a, b), (c, d) = starts.pissa(w, 4, 1.0), starts.pissa(w, 4, 1.0, niter=4)
    torch.testing.assert_close(d @ c, b @ a, rtol=1e-3, atol=1e-3)


def test_olora_is_orthonormal() -> None:
    w = torch.randn(30, 20, dtype=torch.float64)
    a, b = starts.olora(w, 5)
    torch.testing.assert_close(b.T @ b, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(b.T @ w, a)


def originals() -> dict[str, torch.Tensor]:
    """The weights of `peft_mlp` before quantization."""
    model = peft_mlp(base="dense").unload()
    return {name: getattr(model, name).weight.detach() for name in ("up", "down")}


def quantize(w: torch.Tensor) -> NF4Weight:
    return NF4Weight.quantize(w.float())


def test_loftq_is_the_literal_loop_and_falls() -> None:
    w, scale = torch.randn(48, 64) @ torch.randn(64, 64) / 8, 1.5
    errors, a, b = [], torch.zeros(8, 64), torch.zeros(48, 8)
    for _ in range(4):
        q = quantize(w - scale * b @ a).dequantize(torch.float32)
        u, s, vt = torch.linalg.svd((w - q) / scale)
        a, b = s[:8, None].sqrt() * vt[:8], u[:, :8] * s[:8].sqrt()
        errors.append((w - q - scale * b @ a).norm())
    a, b, q4 = starts.loftq(w, 8, scale, quantize, rounds=4)
    error = (w - q4.dequantize(torch.float32) - scale * b @ a).norm()
    torch.testing.assert_close(error, min(errors), rtol=1e-4, atol=1e-6)
    assert error < 0.9 * (w - quantize(w).dequantize(torch.float32)).norm()


@pytest.mark.parametrize("start", starts.STARTS)
@pytest.mark.parametrize("standalone", [False, True])
def test_on_4_bit_bases(start: str, standalone: bool) -> None:
    """With the original weights, the start is nearer to them than the quantized base alone."""
    if standalone:
        model: Any = stack(r=8, dtype=torch.float32)
        weights = {str(i): torch.randn(layer.out_features, layer.in_features) for i, layer in enumerate(model)}
        for i, layer in enumerate(model):
            starts.set_base_weight(layer.base_layer, quantize(weights[str(i)]))
    else:
        model = peft_mlp(r=8)
        weights = originals()
    plain = [dense(base_weight(layer.base_layer), torch.float64) for layer in layers(model)]
    formats = [(base_weight(layer.base_layer).nested, base_weight(layer.base_layer).dtype) for layer in layers(model)]
    starts.apply(model, start, weights, niter=None)
    assert formats == [
        (base_weight(layer.base_layer).nested, base_weight(layer.base_layer).dtype) for layer in layers(model)
    ]
    for layer, before, w in zip(layers(model), plain, weights.values(), strict=True):
        error, quantized = (whole(layer) - w).norm(), (before - w).norm()
        assert error < (quantized if start != "olora" else 1.2 * quantized)
        assert not torch.equal(dense(base_weight(layer.base_layer), torch.float64), before)
    losses = train(model, torch.optim.AdamW(trained(model), lr=1e-3), 10, torch.float32)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("start", starts.STARTS)
def test_save_and_load_the_base(start: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import fastlora

    model = peft_mlp()
    fastlora.accelerate(model)
    starts.apply(model, start, originals())
    train(model, torch.optim.AdamW(trained(model), lr=1e-3), 3, torch.float32)
    want = model(batch(torch.float32)[0])
    model.save_pretrained(str(tmp_path))
    starts.save_base(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path))
    assert not torch.allclose(loaded(batch(torch.float32)[0]), want, rtol=1e-3, atol=1e-3)
    starts.load_base(loaded, tmp_path)
    torch.testing.assert_close(loaded(batch(torch.float32)[0]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_export_on_a_dense_base_is_plain_lora(start: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_mlp(base="dense")
    starts.apply(model, start)
    first = starts.factors(model)
    train(model, torch.optim.AdamW(trained(model), lr=1e-3), 3, torch.float32)
    want = model(batch(torch.float32)[0]).detach()
    starts.export(model, first)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(peft_mlp(base="dense").unload(), str(tmp_path))
    torch.testing.assert_close(loaded(batch(torch.float32)[0]), want, rtol=1e-4, atol=1e-5)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="unknown start"):
        starts.apply(stack(), "eva")
    with pytest.raises(ValueError, match="choose pissa or olora"):
        starts.apply(stack(quant_type=None), "loftq")
    with pytest.raises(ValueError, match="as it was before"):
        starts.apply(stack(), "loftq")
    with pytest.raises(ValueError, match="has no rank 80: lower r"):
        starts.apply(stack(r=80), "pissa")
    with pytest.raises(ValueError, match="export the adapter"):
        starts.save_base(stack(quant_type=None), ".")
