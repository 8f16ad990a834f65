"""DyLoRA: every rank is an adapter, only its rows are computed and learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import batch, loss_of, peft_mlp, stack, train, trained

from fastlora import FastLoRALinear
from fastlora.adapters import dylora
from fastlora.adapters.variant import factors_of
from fastlora.linear import base_weight
from fastlora.reference import dense


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_against_the_formula(b: int, rslora: bool) -> None:
    model = stack(use_rslora=rslora)[:1]
    nested = dylora.enable(model)
    nested.rank = b
    layer = model[0]
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x, _ = batch()
    w = dense(base_weight(layer.base_layer), torch.float64)
    scale = 3 / b**0.5 if rslora else 3 / b
    want = x @ w.T + scale * (x @ lora_a[:b].T) @ lora_b[:, :b].T + layer.base_layer.bias
    torch.testing.assert_close(model.train()(x), want)
    nested.use(b)
    nested.rank = 4
    torch.testing.assert_close(model.eval()(x), want)


@pytest.mark.parametrize("frozen", [False, True])
def test_only_active_rows_learn(frozen: bool) -> None:
    model = stack()
    dylora.enable(model, frozen=frozen).rank = 3
    loss_of(model).backward()
    learned = [2] if frozen else [0, 1, 2]
    for layer in model:
        ga, gb = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        assert ga.abs().sum(1).nonzero().flatten().tolist() == learned
        assert gb.abs().sum(0).nonzero().flatten().tolist() == learned


def test_frozen_computes_the_same() -> None:
    one, other = stack(), stack()
    dylora.enable(one).rank = dylora.enable(other, frozen=True).rank = 3
    assert torch.equal(one(batch()[0]), other(batch()[0]))


def test_only_the_active_rank_is_computed() -> None:
    model = stack()
    dylora.enable(model).rank = 2
    lora_a, lora_b, _ = factors_of(model[0], "default")
    assert (lora_a.shape[0], lora_b.shape[1]) == (2, 2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("multiple", [2, 3, 8])
def test_padded_ranks_compute_the_same(multiple: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the rank is rounded up; 3 of 4 rows lie between what is used and what there is."""
    results = []
    for padded in (False, True):
        if padded:
            monkeypatch.setattr(
                dylora, "computed", lambda rank, full, device: min(full, -(-rank // multiple) * multiple)
            )
        for b in (1, 2, 3, 4):
            model = stack()
            nested = dylora.enable(model, frozen=frozen)
            nested.rank = b
            x = batch()[0].requires_grad_()
            y = model(x)
            y.square().sum().backward()
            results.append([y.detach(), x.grad, *(p.grad for p in trained(model))])
    for want, got in zip(results[:4], results[4:], strict=True):
        for a, t in zip(got, want, strict=True):
            torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-10)


def test_rounded_ranks() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [dylora.computed(b, 20, cpu) for b in (1, 7, 20)] == [1, 7, 20]
    assert [dylora.computed(b, 20, gpu) for b in (1, 8, 9, 17, 20)] == [8, 8, 16, 20, 20]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_gradcheck(size: int, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dylora, "computed", lambda rank, full, device: size)
    layer = stack()[0]
    dylora.enable(layer, frozen=frozen).rank = 2
    x = batch()[0][:2].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradcheck_of_the_factors(size: int) -> None:
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (5, 4)))

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        part_a, part_b = dylora._Nested.apply(a, b, 0, 2, size)
        return part_b @ part_a

    assert torch.autograd.gradcheck(run, (a, b))


def test_every_rank_is_usable_after_training() -> None:
    torch.manual_seed(3)
    model = stack(learned=False)
    before = loss_of(model).item()
    nested = dylora.enable(model, seed=1)
    optimizer = torch.optim.AdamW(trained(model), lr=0.02)
    train(model, optimizer, 60, before=lambda step: nested.sample())
    model.eval()
    losses = []
    for rank in (1, 2, 3, 4):
        nested.use(rank)
        losses.append(loss_of(model).item())
    assert losses[0] < 0.9 * before
    assert losses == sorted(losses, reverse=True)


def test_ranks_are_drawn_from_all_and_from_the_seed() -> None:
    drawn = [dylora.enable(stack(), 2, seed=seed) for seed in (1, 1, 2)]
    ranks = [[nested.sample() for _ in range(40)] for nested in drawn]
    assert set(ranks[0]) == {2, 3, 4}
    assert ranks[0] == ranks[1] != ranks[2]
    saved = drawn[0].state_dict()
    ahead = [drawn[0].sample() for _ in range(9)]
    drawn[2].load_state_dict(saved)
    assert [drawn[2].sample() for _ in range(9)] == ahead


@pytest.mark.parametrize("rank", [1, 3])
def test_truncate_gives_plain_lora(rank: int, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft_mlp()
    nested = dylora.enable(model)
    nested.use(rank)
    x = batch(torch.float32)[0]
    want = model.eval()(x).detach()
    dylora.truncate(model, rank)
    torch.testing.assert_close(model(x), want)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path))
    assert loaded.peft_config["default"].r == rank
    torch.testing.assert_close(loaded.eval()(x), want, rtol=1e-5, atol=1e-6)


def test_what_cannot_be() -> None:
    model = stack()
    with pytest.raises(ValueError, match="no DyLoRA"):
        dylora.truncate(model, 2)
    for bad in (0, 5):
        with pytest.raises(ValueError, match="from 1 to the rank 4"):
            dylora.enable(model, bad)
    nested = dylora.enable(model, 2)
    with pytest.raises(ValueError, match="from 2 to 4, which are trained"):
        nested.use(1)
    with pytest.raises(ValueError, match="from 2 to 4"):
        dylora.truncate(model, 5)
    mixed = torch.nn.Sequential(FastLoRALinear(64, 64, 2), FastLoRALinear(64, 64, 3))
    with pytest.raises(ValueError, match="rank_pattern"):
        dylora.enable(mixed)
