"""Ranks that change: functions kept, moments turned, the controller's decisions."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import batch, loss_of, peft_mlp, stack, train, trained
from torch import nn

from fastlora.adapters import delta, rank
from fastlora.adapters.rank import RankController
from fastlora.adapters.variant import lora_layers


def product(layer: Any) -> torch.Tensor:
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


def test_growing_keeps_the_function_and_the_course() -> None:
    model, plain = stack(), stack()
    optimizer, other = (torch.optim.AdamW(trained(m), lr=0.01) for m in (model, plain))
    train(model, optimizer, 3)
    train(plain, other, 3)
    assert rank.resize(model, 7, optimizer) == 2
    assert [layer.lora_A["default"].weight.shape[0] for layer in model] == [7, 7]
    assert torch.allclose(model(batch()[0]), plain(batch()[0]), rtol=1e-12)
    for layer, old in zip(model, plain, strict=True):
        assert layer.scaling == old.scaling
        assert layer.lora_alpha["default"] == pytest.approx(layer.scaling["default"] * 7)
        for part in ("lora_A", "lora_B"):
            new = optimizer.state[getattr(layer, part)["default"].weight]["exp_avg_sq"]
            before = other.state[getattr(old, part)["default"].weight]["exp_avg_sq"]
            kept = new[:4] if part == "lora_A" else new[:, :4]
            assert torch.equal(kept, before)
            assert new.abs().sum() == before.abs().sum()
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0]
    assert all(layer.lora_B["default"].weight[:, 4:].any() for layer in model)


def test_shrinking_keeps_the_best_approximation() -> None:
    model = stack(r=6)
    train(model, torch.optim.AdamW(trained(model), lr=0.01), 3)
    before = [product(layer).detach() for layer in model]
    rank.resize(model, 3)
    for layer, full in zip(model, before, strict=True):
        u, s, v = torch.linalg.svd(full)
        best = u[:, :3] @ s[:3].diag() @ v[:3]
        torch.testing.assert_close(product(layer), best, rtol=1e-8, atol=1e-10)


def test_shrinking_to_the_rank_that_is_used_keeps_the_function() -> None:
    model = stack(r=6)
    with torch.no_grad():
        for layer in model:
            b = layer.lora_B["default"].weight
            b[:, 3:] = b[:, :3] @ torch.randn(3, 3, dtype=b.dtype)
            a = layer.lora_A["default"].weight
            a[3:] = torch.randn(3, 3, dtype=a.dtype) @ a[:3]
    want = model(batch()[0]).detach()
    rank.resize(model, 3)
    torch.testing.assert_close(model(batch()[0]), want, rtol=1e-8, atol=1e-10)


def test_moments_turn_as_the_gradients_do() -> None:
    """A first moment that is a gradient becomes the gradient of the resized factors, where nothing is lost."""
    model = stack(r=4)
    with torch.no_grad():
        for layer in model:
            b = layer.lora_B["default"].weight
            b[:, 2:] = b[:, :2] @ torch.randn(2, 2, dtype=b.dtype)
    optimizer = torch.optim.Adam(trained(model), lr=0.0, betas=(0.0, 0.0))
    loss_of(model).backward()
    optimizer.step()
    rank.resize(model, 2, optimizer)
    model.zero_grad()
    loss_of(model).backward()
    for layer in model:
        for part in ("lora_A", "lora_B"):
            p = getattr(layer, part)["default"].weight
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], p.grad, rtol=1e-6, atol=1e-10)
            assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()
            assert optimizer.state[p]["step"] == 1


def test_shrinking_what_has_not_learned_stays_trainable() -> None:
    model = stack(learned=False)
    rank.resize(model, 2)
    assert all(layer.lora_A["default"].weight.any() for layer in model)
    losses = train(model, torch.optim.AdamW(trained(model), lr=0.02), 10)
    assert losses[-1] < losses[0]


def test_directions_without_content_stay_trainable() -> None:
    model = stack(r=6)
    with torch.no_grad():
        for layer in model:
            layer.lora_B["default"].weight[:, 1:] = 0
    want = [product(layer).detach() for layer in model]
    rank.resize(model, 4)
    for layer, full in zip(model, want, strict=True):
        torch.testing.assert_close(product(layer), full, rtol=1e-8, atol=1e-10)
        alive = (layer.lora_A["default"].weight.norm(dim=1) > 0.01) | (
            layer.lora_B["default"].weight.norm(dim=0) > 0.01
        )
        assert alive.all()


def test_parameters_are_truly_smaller_and_groups_follow() -> None:
    model = stack(r=8)
    a = [p for name, p in model.named_parameters() if "lora_A" in name]
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.AdamW([{"params": a, "lr": 1e-3}, {"params": b, "lr": 1e-2}])
    train(model, optimizer, 2)
    rank.resize(model, 2, optimizer)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    for i, part in enumerate(("lora_A", "lora_B")):
        assert groups[i] == {id(getattr(layer, part)["default"].weight) for layer in model}
    assert sum(p.numel() for p in trained(model)) == 2 * 2 * (64 + 128)
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    assert kept == 2 * 2 * 2 * (64 + 128)
    assert len(optimizer.state) == 4


_TORCH = ["Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "SGD", "Adamax", "Rprop", "ASGD"]
OPTIMIZERS = [("torch", name) for name in _TORCH]
OPTIMIZERS += [("bitsandbytes", name) for name in ("Adam", "AdamW", "Adagrad", "RMSprop", "SGD", "Lion")]


@pytest.mark.parametrize(("package", "name"), OPTIMIZERS)
def test_every_optimizer_goes_on(package: str, name: str) -> None:
    """With moments that turn, or from the start: squares that turned as moments do would be below zero."""
    module: Any = pytest.importorskip(f"{package}.optim")
    model = stack(r=4, dtype=torch.float32)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(module, name)(trained(model), lr=1e-3, **options)
    losses = train(model, optimizer, 2, torch.float32)
    for r in (2, 6):
        rank.resize(model, r, optimizer)
        losses += train(model, optimizer, 2, torch.float32)
    assert all(math.isfinite(loss) for loss in losses)
    kept = ("Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "SGD", "Lion")
    rank.resize(model, 3, optimizer)
    assert bool(optimizer.state) == (name in kept)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "RMSprop"])
def test_moments_of_bitsandbytes_turn_as_those_of_pytorch(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    names = {"AdamW": {"state1": "exp_avg", "state2": "exp_avg_sq"}, "Adagrad": {"state1": "sum"}}.get(
        name, {"state1": "square_avg"}
    )
    states: list[dict[str, torch.Tensor]] = []
    for module in (torch.optim, bnb.optim):
        model = stack(r=4, dtype=torch.float32)
        optimizer = getattr(module, name)(trained(model), lr=1e-3)
        loss_of(model, torch.float32).backward()
        generator = torch.Generator().manual_seed(0)
        for p in trained(model):
            optimizer.state[p] = {"step": torch.tensor(1.0)}
            for own, other in names.items():
                values = torch.rand(p.shape, generator=generator)
                optimizer.state[p][other if module is torch.optim else own] = values
        rank.resize(model, 2, optimizer)
        states += [optimizer.state[p] for p in trained(model)]
    for one, other in zip(states[:4], states[4:], strict=True):
        for key, value in names.items():
            torch.testing.assert_close(other[key], one[value], rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_quantizes_starts_anew() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = stack(dtype=torch.float32)
    optimizer = bnb.optim.AdamW8bit(trained(model), lr=1e-2)
    for p in trained(model):
        optimizer.state[p] = {"step": 3, "state1": torch.zeros(p.shape, dtype=torch.uint8), "absmax1": torch.zeros(1)}
    rank.resize(model, 2, optimizer)
    assert not optimizer.state
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in trained(model)}


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_a_resized_adapter_are_pefts(rslora: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_mlp(use_rslora=rslora)
    rank.resize(model, 9)
    x = batch(torch.float32)[0]
    want = model(x).detach()
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path))
    torch.testing.assert_close(loaded(x), want, rtol=1e-5, atol=1e-6)
    assert loaded.peft_config["default"].r == 9
    assert not loaded.peft_config["default"].rank_pattern


@pytest.mark.filterwarnings("ignore")
def test_fused_layers_follow() -> None:
    import fastlora

    model = peft_mlp()
    fastlora.accelerate(model)
    x = batch(torch.float32)[0]
    want = model(x).detach()
    rank.resize(model, 6)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert {layer.rank for layer in fastlora.accelerate(model).replaced} == {6}


def test_what_cannot_be_resized() -> None:
    model = stack()
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        rank.resize(model, 0)
    with pytest.raises(ValueError, match="no LoRA linear layer"):
        rank.resize(nn.Linear(2, 2), 4)
    delta.enable(model)
    with pytest.raises(ValueError, match="DeltaLoRA cannot change its rank"):
        rank.resize(model, 8)


def feed(controller: RankController, losses: list[float]) -> list[int | None]:
    return [controller.update(loss) for loss in losses]


def test_a_plateau_grows_the_rank() -> None:
    controller = RankController(8, 2, 64, patience=2)
    assert feed(controller, [2.0, 1.98, 1.979, 1.9785]) == [None, None, None, 16]
    assert controller.rank == 16


def test_an_easy_descent_shrinks_it() -> None:
    controller = RankController(8, 2, 64, patience=2)
    assert feed(controller, [2.0, 1.8, 1.6]) == [None, None, 4]


def test_between_the_two_nothing_happens() -> None:
    controller = RankController(8, 2, 64, grow_below=0.002, shrink_above=0.02, patience=1)
    assert feed(controller, [2.0 * 0.99**i for i in range(30)]) == [None] * 30


def test_one_odd_evaluation_changes_nothing() -> None:
    controller = RankController(8, 2, 64, patience=2)
    assert feed(controller, [2.0, 1.8, 1.79, 1.6, 1.59, 1.589, 1.575]) == [None] * 7


def test_a_rank_that_was_too_small_is_undone_and_not_tried_again() -> None:
    controller = RankController(8, 2, 64, patience=2)
    assert feed(controller, [2.0, 1.8, 1.6]) == [None, None, 4]
    assert feed(controller, [1.7, 1.65]) == [None, 8]
    assert feed(controller, [1.4, 1.2, 1.0, 0.8, 0.6]) == [None] * 5
    assert controller.rank == 8


def test_a_rank_that_brings_nothing_is_the_last() -> None:
    controller = RankController(8, 2, 1024, patience=2)
    decisions = feed(controller, [1.0] * 40)
    assert [d for d in decisions if d is not None] == [16]
    assert controller.rank == 16


def test_more_rank_that_helps_is_followed_by_more() -> None:
    controller = RankController(8, 2, 64, patience=2)
    assert feed(controller, [1.0, 1.0, 1.0]) == [None, None, 16]
    assert feed(controller, [0.99, 0.98, 0.98, 0.98])[-1] == 32


def test_ranks_stay_in_their_limits() -> None:
    controller = RankController(4, 3, 6, patience=1)
    assert feed(controller, [2.0, 1.0, 0.5, 0.25]) == [None, 3, None, None]
    controller = RankController(4, 3, 6, patience=1)
    assert feed(controller, [2.0, 2.0]) == [None, 6]


def test_state_goes_on() -> None:
    one = RankController(8, 2, 64)
    feed(one, [2.0, 1.8])
    other = RankController(8, 2, 64)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert other.update(1.6) == one.update(1.6) == 4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 8, "min_rank": 0}, "1 <= min_rank"),
        ({"rank": 8, "max_rank": 4}, "1 <= min_rank"),
        ({"rank": 8, "grow_below": 0.1, "shrink_above": 0.1}, "grow_below must be less"),
        ({"rank": 8, "patience": 0}, "patience"),
        ({"rank": 8, "factor": 1}, "factor"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RankController(**values)


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="lower the learning rate"):
        RankController(8).update(float("nan"))


def test_layers_are_found_by_adapter() -> None:
    assert [name for name, _ in lora_layers(stack())] == ["0", "1"]
    assert not list(lora_layers(stack(), "other"))
