"""Delta-LoRA against the literal update of a float64 base weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import batch, peft_mlp, stack, train, trained
from torch import nn

from fastlora.adapters import delta
from fastlora.adapters.variant import factors_of
from fastlora.linear import base_weight
from fastlora.reference import dense

WEIGHT = 0.7


class Literal(nn.Module):
    """The paper's algorithm as it is written: a base weight that is changed after every step."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.w = dense(base_weight(layer.base_layer), torch.float64).clone()
        self.a = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
        self.b = nn.Parameter(layer.lora_B["default"].weight.detach().clone())
        self.scale, self.bias = layer.scaling["default"], layer.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.T + self.scale * (x @ self.a.T) @ self.b.T + self.bias

    def product(self) -> torch.Tensor:
        return (self.b @ self.a).detach()


def literal(model: nn.Sequential, start: int, steps: int, lr: float) -> tuple[nn.Sequential, list[float]]:
    copies = nn.Sequential(*(Literal(layer) for layer in model))
    optimizer = torch.optim.AdamW(trained(copies), lr=lr)
    losses = []
    for step in range(steps):
        before = [layer.product() for layer in copies]
        losses += train(copies, optimizer, 1)
        if step >= start:
            for layer, product in zip(copies, before, strict=True):
                layer.w = layer.w + WEIGHT * (layer.product() - product)
    return copies, losses


@pytest.mark.parametrize("quant_type", ["nf4", None])
@pytest.mark.parametrize("learned", [True, False], ids=["B learned", "B zero"])
@pytest.mark.parametrize("start", [0, 3])
def test_trajectory_is_that_of_the_literal_update(start: int, learned: bool, quant_type: str | None) -> None:
    model = stack(learned=learned, quant_type=quant_type)
    copies, want = literal(model, start, 8, 0.02)
    delta.enable(model, WEIGHT)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    got = train(model, optimizer, 8, before=lambda step: delta.begin(model) if step == start else None)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for layer, other in zip(model, copies, strict=True):
        torch.testing.assert_close(layer.lora_A["default"].weight, other.a, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(layer.lora_B["default"].weight, other.b, rtol=1e-8, atol=1e-10)
        merged = dense(base_weight(layer.base_layer), torch.float64) + layer.lora_variant["default"].delta_weight(
            layer, "default"
        )
        torch.testing.assert_close(
            merged, other.w + other.scale * other.product(), rtol=1e-5, atol=1e-5
        )  # formed in float32


def test_the_base_has_moved() -> None:
    """Without the updates the losses differ, so that the test above can fail."""
    model, plain = stack(), stack()
    delta.enable(model, WEIGHT)
    delta.begin(model)
    losses = [train(m, torch.optim.AdamW(trained(m), lr=0.02), 8) for m in (model, plain)]
    assert losses[0][:1] == pytest.approx(losses[1][:1], rel=1e-12)
    assert abs(losses[0][-1] - losses[1][-1]) > 1e-3


def test_gradient_of_x_is_of_all_terms() -> None:
    model = stack()[:1]
    delta.enable(model, WEIGHT)
    delta.begin(model)
    layer = model[0]
    with torch.no_grad():
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.add_(torch.randn_like(part["default"].weight))
    x = batch()[0].requires_grad_()
    y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    lora_a, lora_b, scale = factors_of(layer, "default")
    w = dense(base_weight(layer.base_layer), torch.float64) + scale * lora_b @ lora_a
    torch.testing.assert_close(x.grad, dy @ w.detach())
    assert lora_a.shape[0] == 8


def test_a_layer_with_a_variant_is_not_given_away_as_plain_lora() -> None:
    pytest.importorskip("peft")
    layer = stack()[0]
    delta.enable(layer, WEIGHT)
    with pytest.raises(ValueError, match="DeltaLoRA, not plain LoRA"):
        layer.to_peft()


def test_no_product_is_added_where_b_was_zero() -> None:
    model = stack(learned=False)
    delta.enable(model, WEIGHT)
    delta.begin(model)
    assert all(factors_of(layer, "default")[0].shape[0] == 4 for layer in model)


def test_begin_once() -> None:
    model = stack()
    with pytest.raises(ValueError, match="call enable first"):
        delta.begin(model)
    delta.enable(model, WEIGHT)
    delta.begin(model)
    with pytest.raises(ValueError, match="begun already"):
        delta.begin(model)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weight_must_be_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="positive number"):
        delta.enable(stack(), weight)


def test_save_and_load(tmp_path: Path) -> None:
    model = stack()
    delta.enable(model, WEIGHT)
    delta.begin(model)
    train(model, torch.optim.AdamW(trained(model), lr=0.02), 3)
    delta.save(model, tmp_path)
    other = stack()
    delta.enable(other, 0.1)
    other.load_state_dict(model.state_dict())
    delta.load(other, tmp_path)
    x, _ = batch()
    assert torch.equal(other(x), model(x))
    wrong = nn.ModuleDict({"x": stack()})
    delta.enable(wrong, 0.1)
    with pytest.raises(ValueError, match="the model lacks"):
        delta.load(wrong, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_peft_layers_fused_and_not(base: str, tmp_path: Path) -> None:
    import fastlora

    stock = peft_mlp(base=base)
    fast = copy.deepcopy(stock)
    assert fastlora.accelerate(fast).replaced
    results = []
    for model in (stock, fast):
        delta.enable(model, WEIGHT)
        delta.begin(model)
        # PEFT's own forward sees the same variant; LoRA's scale alone is in the gradients of both.
        results.append(train(model, torch.optim.AdamW(trained(model), lr=0.02), 6, torch.float32))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not fastlora.accelerate(fast).skipped


@pytest.mark.filterwarnings("ignore")
def test_merging_gives_the_moved_weight_once() -> None:
    import fastlora

    model = peft_mlp()
    fastlora.accelerate(model)
    delta.enable(model, WEIGHT)
    delta.begin(model)
    train(model, torch.optim.AdamW(trained(model), lr=0.02), 6, torch.float32)
    x = batch(torch.float32)[0]
    want = model(x).detach()
    torch.testing.assert_close(fastlora.merge(copy.deepcopy(model), "dense")(x), want, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        fastlora.merge(model)
    dense_model = peft_mlp(base="dense")
    delta.enable(dense_model, WEIGHT)
    delta.begin(dense_model)
    train(dense_model, torch.optim.AdamW(trained(dense_model), lr=0.02), 6, torch.float32)
    want = dense_model(x).detach()
    torch.testing.assert_close(fastlora.merge(dense_model, "dense")(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_nobody_takes_its_factors_for_plain_ones() -> None:
    """Whoever computes layers together asks by the function that a situation names."""
    import fastlora
    from fastlora.integrations.peft.situation import situation
    from fastlora.linear import adapter_forward

    model = peft_mlp()
    fastlora.accelerate(model)
    layer = model.base_model.model.up
    assert situation(layer)[0] is adapter_forward
    delta.enable(model, WEIGHT)
    assert situation(layer)[0] is not adapter_forward


@pytest.mark.filterwarnings("ignore")
def test_export_is_plain_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    model = peft_mlp()
    delta.enable(model, WEIGHT)
    train(model, torch.optim.AdamW(trained(model), lr=0.02), 2, torch.float32)
    delta.begin(model)
    train(model, torch.optim.AdamW(trained(model), lr=0.02), 4, torch.float32)
    x = batch(torch.float32)[0]
    want = model(x).detach()
    delta.export(model)
    model.save_pretrained(str(tmp_path))
    base = peft_mlp().unload()
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert loaded.peft_config["default"].r == 8
    torch.testing.assert_close(loaded(x), want, rtol=1e-4, atol=1e-5)
