"""AdaLoRA against PEFT's own: layers, importance, budget, files; and what PEFT does not do, true ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import batch, peft_mlp, trained
from torch import nn

peft = pytest.importorskip("peft")

import fastlora  # noqa: E402
from fastlora import NF4Weight, lora_linear  # noqa: E402
from fastlora.adapters import adalora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 14
SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": STEPS, "beta1": 0.7}


def made(base: str = "4bit", **fields: Any) -> Any:
    config = peft.AdaLoraConfig(target_modules=["up", "down"], lora_alpha=12, **{**SCHEDULE, **fields})
    model = peft_mlp(config, base)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_E" in name:
                p.copy_(torch.randn_like(p))
    return model


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_layers_of_peft(base: str) -> None:
    stock = made(base)
    fast = copy.deepcopy(stock)
    assert [layer.reason for layer in fastlora.accelerate(fast).layers] == [None, None]
    x, grads = batch(torch.float32)[0].requires_grad_(), []
    for model in (stock, fast):
        x.grad = None
        y = model.base_model.model(x)
        (y * torch.linspace(-1, 1, 64)).sum().backward()
        grads.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in trained(model))])
    assert len(grads[0]) == 8
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_gradcheck() -> None:
    w = NF4Weight.quantize(torch.randn(7, 64))
    shapes = ((3, 64), (2, 64), (2, 1), (7, 2))
    x, a, e, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def run(x: torch.Tensor, a: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        class Layer:
            scaling, ranknum = {"x": 3.0}, {"x": torch.tensor([2.0], dtype=torch.float64)}
            lora_A, lora_E, lora_B = {"x": a}, {"x": e}, {"x": b}

        lora_a, lora_b, scale = adalora.factors(Layer, "x")
        return lora_linear(x, w, lora_a, lora_b, scale=scale)

    assert torch.autograd.gradcheck(run, (x, a, e, b))


def steps(model: Any, count: int, after: Any, first: int = 1, optimizer: Any = None) -> list[float]:
    """Training steps on PEFT's inner model; ``after``: called with the step, before the gradients are cleared."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=0.03)
    inner, losses = model.base_model.model, []
    x, target = batch(torch.float32)
    for step in range(first, first + count):
        loss = (inner(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        after(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_whole_course_is_that_of_peft() -> None:
    """Importance, budget and masks at every step; at the end PEFT masks what is removed here."""
    stock = made()
    fast = copy.deepcopy(stock)
    fastlora.accelerate(fast)
    allocator = adalora.Allocator(fast)
    patterns: dict[str, list[Any]] = {"stock": [], "fast": []}

    def theirs(step: int, _: Any) -> None:
        stock.base_model.update_and_allocate(step)
        patterns["stock"].append(copy.deepcopy(stock.peft_config["default"].rank_pattern))

    def ours(step: int, optimizer: Any) -> None:
        assert allocator.step(step, optimizer) == (step == STEPS - 4)
        patterns["fast"].append(copy.deepcopy(fast.peft_config["default"].rank_pattern))

    losses = [steps(stock, STEPS, theirs), steps(fast, STEPS, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert patterns["fast"] == patterns["stock"]
    kept = [sum(mask) for mask in patterns["stock"][-1].values()]
    assert sum(kept) == 4
    before = {id(p): p for p in trained(stock)}
    assert sum(p.numel() for p in before.values()) == 2 * 6 * (64 + 128 + 1)
    assert sum(p.numel() for p in trained(fast)) == 4 * (64 + 128 + 1)
    x = batch(torch.float32)[0]
    torch.testing.assert_close(fast(x), stock(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_budget_is_that_of_peft(step: int) -> None:
    model = made()
    want, _ = model.base_model.rankallocator.budget_schedule(step)
    assert adalora.Allocator(model).budget(step) == want


def test_importances_are_those_of_peft() -> None:
    stock = made("dense")
    fast = copy.deepcopy(stock)
    allocator, theirs = adalora.Allocator(fast), stock.base_model.rankallocator
    steps(stock, 5, lambda step, _: stock.base_model.update_and_allocate(step))
    steps(fast, 5, allocator.step)
    parts = [f"{layer}.{part}.default" for layer in ("up", "down") for part in ("lora_A", "lora_E", "lora_B")]
    for name, smoothed, uncertainty in zip(parts, allocator.smoothed, allocator.uncertainty, strict=True):
        torch.testing.assert_close(smoothed, theirs.exp_avg_ipt[name], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(uncertainty, theirs.exp_avg_unc[name], rtol=1e-4, atol=1e-8)
    for layer, got in zip(("up", "down"), allocator.importance(), strict=True):
        a, e, b = (theirs._element_score(f"{layer}.{part}.default") for part in ("lora_A", "lora_E", "lora_B"))
        torch.testing.assert_close(got, e.view(-1) + a.mean(1) + b.mean(0), rtol=1e-3, atol=1e-12)


def test_removing_keeps_the_function_and_the_moments() -> None:
    model = made("dense")
    allocator = adalora.Allocator(model)
    optimizer = torch.optim.AdamW(trained(model), lr=0.03)
    steps(model, STEPS - 5, allocator.step, optimizer=optimizer)
    x = batch(torch.float32)[0]
    steps(model, 1, lambda *_: None, STEPS - 4, optimizer)  # the step, without what comes after it
    allocator._mask(allocator.budget(STEPS - 4))
    want = model.base_model.model(x).detach()
    moments = {id(p): optimizer.state[p]["exp_avg"].clone() for p in trained(model)}
    pattern = model.peft_config["default"].rank_pattern
    layers = {n.removeprefix("base_model.model."): layer for n, layer in adalora.layers(model).items()}
    old = {name: layer.lora_B["default"] for name, layer in layers.items()}
    adalora.remove(layers, pattern, "default", optimizer)
    torch.testing.assert_close(model.base_model.model(x), want)
    for name, layer in layers.items():
        keep = torch.tensor(pattern[f"{name}.lora_E.default"])
        new = layer.lora_B["default"]
        assert torch.equal(optimizer.state[new]["exp_avg"], moments[id(old[name])][:, keep])
        assert layer.r["default"] == new.shape[1] == int(keep.sum())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in trained(model)}


def test_a_layer_without_budget_keeps_an_empty_triplet() -> None:
    model = made("dense")
    layers = {n.removeprefix("base_model.model."): layer for n, layer in adalora.layers(model).items()}
    with torch.no_grad():
        layers["up"].lora_E["default"].zero_()
    x = batch(torch.float32)[0]
    want = model.base_model.model(x).detach()
    pattern = {"up.lora_E.default": [False] * 6, "down.lora_E.default": [True] * 6}
    adalora.remove(layers, pattern)
    assert layers["up"].lora_A["default"].shape[0] == 1
    torch.testing.assert_close(model.base_model.model(x), want)


@pytest.mark.parametrize("last", [STEPS - 6, STEPS])
def test_files_are_pefts(last: int, tmp_path: Path) -> None:
    """In the middle of the schedule, where triplets are masked, and after it, where they are gone."""
    model = made()
    fastlora.accelerate(model)
    allocator = adalora.Allocator(model)
    steps(model, last, allocator.step)
    x = batch(torch.float32)[0]
    want = model.base_model.model(x).detach()
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path))
    torch.testing.assert_close(loaded.base_model.model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [5, STEPS - 3])
def test_state_goes_on(stop: int) -> None:
    def fresh() -> tuple[Any, Any, Any]:
        model = made("dense")
        optimizer = torch.optim.SGD(trained(model), lr=0.3)  # whose state is the parameters alone
        return model, adalora.Allocator(model), optimizer

    model, allocator, optimizer = fresh()
    steps(model, stop, allocator.step, optimizer=optimizer)
    saved = copy.deepcopy(allocator.state_dict())
    other, resumed, _ = fresh()
    resumed.load_state_dict(saved)
    optimizers = [optimizer, torch.optim.SGD(trained(other), lr=0.3)]
    for m, a, o in ((model, allocator, optimizers[0]), (other, resumed, optimizers[1])):
        steps(m, STEPS - stop, a.step, stop + 1, o)
    for p, q in zip(trained(model), trained(other), strict=True):
        assert torch.equal(p, q)


def test_orthogonality_is_in_the_loss_of_a_fused_model() -> None:
    """The penalty is PEFT's forward of the whole model, which runs on fused layers as on its own."""
    from types import SimpleNamespace

    model = made("dense", orth_reg_weight=0.5)
    fastlora.accelerate(model)

    class Out(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(loss=x.sum() * 0)

    expected = []
    for layer in adalora.layers(model).values():
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        expected += [(a @ a.T - torch.eye(6)).norm(), (b.T @ b - torch.eye(6)).norm()]
    model.base_model.model.forward = Out().forward
    want = 0.5 * sum(expected) / 4
    torch.testing.assert_close(model.base_model(torch.ones(1)).loss, want)
    torch.testing.assert_close(0.5 * adalora.penalty(model), want)
    adalora.penalize(model)
    torch.testing.assert_close(model.train().base_model(torch.ones(1)).loss, want)
    assert model.eval().base_model(torch.ones(1)).loss == 0


def test_gradients_of_the_penalty_are_those_of_peft() -> None:
    model = made("dense")
    a, b = (getattr(model.base_model.model.up, part)["default"] for part in ("lora_A", "lora_B"))
    adalora.penalty(model).backward()
    got = a.grad.clone(), b.grad.clone()
    model.zero_grad()
    (((a @ a.T - torch.eye(6)).norm() + (b.T @ b - torch.eye(6)).norm()) / 4).backward()
    torch.testing.assert_close(got, (a.grad, b.grad))


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_merging(base: str) -> None:
    model = made(base)
    fastlora.accelerate(model)
    x = batch(torch.float32)[0]
    want = model.base_model.model(x).detach()
    torch.testing.assert_close(fastlora.merge(model, "dense")(x), want, rtol=1e-4, atol=1e-4)


def test_schedule_without_room() -> None:
    model = made("dense")
    model.peft_config["default"].tfinal = STEPS
    with pytest.raises(ValueError, match="leaves no step"):
        adalora.Allocator(model)
    model = made("dense")
    model.peft_config["default"].target_r = 9
    with pytest.raises(ValueError, match="target_r must be from 1"):
        adalora.Allocator(model)
    with pytest.raises(ValueError, match=r"peft\.AdaLoraConfig"):
        adalora.Allocator(peft_mlp())


def test_gradients_must_be_there() -> None:
    with pytest.raises(ValueError, match="before the gradients are cleared"):
        adalora.Allocator(made("dense")).step(1)
