"""DoRA on standalone layers: the formula, PEFT's layers, what cannot be."""

from __future__ import annotations

import pytest
import torch
from small import batch, peft_mlp, stack, train, trained
from torch import nn

from fastlora import FastLoRALinear
from fastlora.adapters import delta, dora
from fastlora.dora import dora_linear
from fastlora.linear import base_weight
from fastlora.reference import dense


def test_against_the_formula() -> None:
    layer = stack()[0]
    x, _ = batch()
    before = layer(x).detach()
    assert dora.enable(layer) == 1
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)  # statistics of the base are float32
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(torch.linspace(0.5, 2, 128))
        layer.lora_B["default"].weight.mul_(2)
    w = dense(base_weight(layer.base_layer), torch.float64)
    w = w + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    want = x @ (w * (m / w.norm(dim=1))[:, None]).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-6, atol=1e-6)


def test_made_and_computed_in_inference_mode() -> None:
    x, _ = batch()
    layers = []
    for scope in (torch.inference_mode, torch.no_grad):
        with scope():
            layers.append(stack()[0])
            assert dora.enable(layers[-1]) == 1
            layers[-1](x)
    with torch.no_grad():
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_gradcheck(quant_type: str | None) -> None:
    """For a norm that is a constant, as the paper has it for the gradients."""
    layer = stack(quant_type=quant_type)[0]
    w = base_weight(layer.base_layer)
    lora_a, lora_b = (part["default"].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
    norm = torch.rand(128, dtype=torch.float64) + 0.5
    inputs = (
        batch()[0][:2],
        lora_a,
        lora_b,
        torch.rand(128, dtype=torch.float64) + 0.5,
        layer.base_layer.bias.detach(),
    )
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda x, a, b, m, bias: dora_linear(x, w, a, b, m, bias, 0.7, norm=norm), leaves, fast_mode=True
    )


def test_it_learns_with_its_magnitude() -> None:
    model = stack(learned=False)
    dora.enable(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "0.lora_magnitude_vector.default.weight" in names
    assert len(names) == 6
    losses = train(model, torch.optim.AdamW(trained(model), lr=0.01), 8)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")
def test_it_is_pefts() -> None:
    model = peft_mlp(use_dora=True)
    stock = model.base_model.model.up
    layer = FastLoRALinear.from_linear(stock.base_layer, 4, 6, quant_type=None)
    layer.lora_A["default"], layer.lora_B["default"] = stock.lora_A["default"], stock.lora_B["default"]
    dora.enable(layer)
    with torch.no_grad():
        for holder in (layer, stock):
            holder.lora_magnitude_vector["default"].weight.mul_(1.3)
    x = batch(torch.float32)[0]
    torch.testing.assert_close(layer(x), stock(x), rtol=1e-4, atol=1e-5)
    key = "lora_magnitude_vector.default.weight"
    torch.testing.assert_close(layer.state_dict()[key], stock.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="use_dora=True"):
        dora.enable(peft_mlp())
    model = stack()
    delta.enable(model)
    with pytest.raises(ValueError, match="cannot be DoRA too"):
        dora.enable(model)
    model = stack()
    dora.enable(model)
    with pytest.raises(ValueError, match="which cannot be a DeltaLoRA too"):
        delta.enable(model)
    empty = stack()
    empty[0].lora_A["default"].weight = nn.Parameter(torch.empty(0, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="rank of 1 or more"):
        dora.enable(empty)
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="DoRA needs a rank"):
        dora_linear(x, torch.randn(6, 8), torch.empty(0, 8), torch.empty(6, 0), torch.ones(6))


def test_the_type_of_the_input_is_kept_where_it_is_asked_for() -> None:
    """On a GPU under autocast PEFT's DoRA returns float32 over a 4-bit base, and so do fused layers unless told."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    import fastlora
    from fastlora.integrations.peft import forward

    model = peft_mlp(peft.LoraConfig(r=4, use_dora=True, target_modules=["up", "down"]))
    fastlora.accelerate(model)
    layer = model.base_model.model.up
    packed, matrix = base_weight(layer.base_layer), torch.empty(128, 64)
    before = torch.is_autocast_enabled()
    try:
        torch.set_autocast_enabled(True)
        assert forward._stays_wide(layer, packed)
        assert not forward._stays_wide(layer, matrix)
        torch.set_autocast_enabled(False)
        assert not forward._stays_wide(layer, packed)
        torch.set_autocast_enabled(True)
        assert dora.keep_type(model) == 2
        assert not forward._stays_wide(layer, packed)
    finally:
        torch.set_autocast_enabled(before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the type differs on a GPU alone")
@pytest.mark.parametrize("kept", [False, True])
def test_types_under_autocast_on_a_gpu(kept: bool) -> None:
    peft = pytest.importorskip("peft")
    import fastlora

    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["up", "down"])
    model = peft_mlp(config, dtype=torch.bfloat16).to("cuda")
    layer, x = model.base_model.model.up, torch.randn(10, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        want = layer(x)
        fastlora.accelerate(model)
        if kept:
            dora.keep_type(model)
        y = layer(x)
    assert want.dtype == torch.float32
    assert y.dtype == (torch.bfloat16 if kept else torch.float32)
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)
