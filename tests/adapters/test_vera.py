"""VeRA: gradients, PEFT's layers and files, shapes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SIZES, batch, peft_mlp, train, trained

import fastlora
from fastlora import NF4Weight
from fastlora.adapters import vera
from fastlora.adapters.lora_fa import saved_bytes

pytestmark = pytest.mark.filterwarnings("ignore")
M, R = 10, 6


def config(**fields: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.VeraConfig(**{"r": R, "target_modules": ["up", "down"], "projection_prng_key": 5, **fields})


def made(base: str = "4bit", **fields: Any) -> Any:
    model = peft_mlp(config(**fields), base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vera_lambda" in name:
                p.copy_(torch.randn_like(p))
    return model


def vectors(n: int = 7, r: int = R) -> tuple[torch.Tensor, torch.Tensor]:
    b, d = torch.randn(n, dtype=torch.float64), torch.randn(r, dtype=torch.float64)
    return b.requires_grad_(), d.requires_grad_()


@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(dense: bool) -> None:
    w: Any = torch.randn(7, 64, dtype=torch.float64) if dense else NF4Weight.quantize(torch.randn(7, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    shared = (torch.randn(R, 80, dtype=torch.float64), torch.randn(9, R, dtype=torch.float64))

    def run(x: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return vera.vera_linear(x, w, b, d, *shared)

    assert torch.autograd.gradcheck(run, (x, *vectors()))


def test_against_the_formula() -> None:
    w, x = NF4Weight.quantize(torch.randn(7, 64)), torch.randn(2, 3, 64, dtype=torch.float64)
    a, big_b = vera.shared_factors(9, 80, R, 3)
    (b, d), bias = vectors(), torch.randn(7, dtype=torch.float64)
    u = d * (x @ a[:, :64].T.double())
    want = x @ w.dequantize(torch.float64).T + b * (u @ big_b[:7].T.double()) + bias
    torch.testing.assert_close(vera.vera_linear(x, w, b, d, a, big_b, bias), want)


def test_factors_are_those_that_peft_draws() -> None:
    model = made(base="dense")
    a, b = vera.shared_factors(128, 128, R, 5)
    assert torch.equal(a, model.base_model.vera_A["default"])
    assert torch.equal(b, model.base_model.vera_B["default"])


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_layers_of_peft(base: str) -> None:
    stock = made(base)
    fast = copy.deepcopy(stock)
    report = fastlora.accelerate(fast)
    assert [layer.reason for layer in report.layers] == [None, None]
    assert [layer.rank for layer in report.layers] == [R, R]
    for name, p in stock.named_parameters():
        assert torch.equal(p, fast.get_parameter(name))
    x = batch(torch.float32)[0].requires_grad_()
    grads = []
    for model in (stock, fast):
        x.grad = None
        y = model(x)
        (y * torch.linspace(-1, 1, 64)).sum().backward()
        grads.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in trained(model))])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    losses = [train(m, torch.optim.AdamW(trained(m), lr=0.01), 5, torch.float32) for m in (stock, fast)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_neither_input_nor_large_products_are_kept() -> None:
    model = made("dense")
    fastlora.accelerate(model)
    layer = model.base_model.model.up
    x = batch(torch.float32)[0].requires_grad_()
    n = SIZES[0][1]
    kept = saved_bytes(lambda: layer(x), model)
    assert kept == 4 * (M * R + n * R)  # u and b * B * d


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_are_pefts(save_projection: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    fast = made(save_projection=save_projection)
    fastlora.accelerate(fast)
    train(fast, torch.optim.AdamW(trained(fast), lr=0.01), 2, torch.float32)
    fast.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path))
    x = batch(torch.float32)[0]
    torch.testing.assert_close(loaded(x), fast(x), rtol=1e-4, atol=1e-5)
    fastlora.accelerate(loaded)
    assert torch.equal(loaded(x), fast(x))
    from safetensors.torch import load_file

    shared = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in key or "vera_B" in key]
    assert len(shared) == (2 if save_projection else 0)


def test_merge_disable_and_restore() -> None:
    model = made("dense")
    x = batch(torch.float32)[0]
    want, kinds = model(x).detach(), [type(m) for m in model.modules()]
    fastlora.accelerate(model)
    assert [type(m) for m in model.modules()] != kinds
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not torch.allclose(model(x), want)
    assert fastlora.restore(model) == 2
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("mode", ["dense", "error-aware"])
def test_merging_into_4_bits(mode: str) -> None:
    model = made()
    fastlora.accelerate(model)
    x = batch(torch.float32)[0]
    want = model(x).detach()
    merged = fastlora.merge(model, mode)(x)
    tolerance = 1e-4 if mode == "dense" else 0.3
    torch.testing.assert_close(merged, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def test_dropout_acts_in_training_only() -> None:
    model = made("dense", vera_dropout=0.5)
    fastlora.accelerate(model)
    x = batch(torch.float32)[0]
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_rank_1024() -> None:
    w, x = NF4Weight.quantize(torch.randn(64, 64)), torch.randn(4, 64)
    a, big_b = vera.shared_factors(64, 64, 1024)
    b, d = torch.randn(64, requires_grad=True), torch.full((1024,), 0.1, requires_grad=True)
    vera.vera_linear(x, w, b, d, a, big_b).sum().backward()
    z = (0.1 * (x @ a.T)) @ big_b.T
    torch.testing.assert_close(b.grad, z.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("a", "big_b", "words"),
    [
        ((R, 60), (7, R), "at least 64 columns"),
        ((R, 64), (6, R), "7 rows"),
        ((R - 1, 64), (7, R), "draw larger"),
        ((R, 64), (7, R - 1), "draw larger"),
    ],
)
def test_shapes_that_do_not_fit_say_what_to_change(a: Any, big_b: Any, words: str) -> None:
    w = torch.randn(7, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match=words):
        vera.vera_linear(torch.randn(2, 64, dtype=torch.float64), w, *vectors(), torch.randn(a), torch.randn(big_b))


def test_wrong_b_and_rank() -> None:
    w = torch.randn(7, 64)
    with pytest.raises(ValueError, match=r"b must have shape \(7,\)"):
        vera.vera_linear(torch.randn(2, 64), w, *vectors(8), torch.randn(R, 64), torch.randn(7, R))
    with pytest.raises(ValueError, match="positive rank"):
        vera.shared_factors(4, 4, 0)
