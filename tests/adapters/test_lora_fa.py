"""LoRA-FA: gradients, what is kept for the backward pass, the corrected gradient."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small import batch, loss_of, peft_mlp, stack, train, trained
from torch import nn

from fastlora import NF4Weight, lora_linear
from fastlora.adapters import lora_fa

M, R = 10, 4


def test_gradcheck() -> None:
    w = NF4Weight.quantize(torch.randn(7, 64))
    x, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 64), (7, 2)))
    a = torch.randn(2, 64, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, b: lora_linear(x, w, a, b, scale=0.7), (x, b))


def test_a_stays_and_b_learns() -> None:
    model = stack()
    assert lora_fa.freeze(model) == R * (128 + 64)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, torch.optim.AdamW(trained(model), lr=0.01), 3)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0.lora_B.default.weight", "1.lora_B.default.weight"}


def test_gradient_of_b_is_that_of_lora() -> None:
    model, plain = stack(), stack()
    lora_fa.freeze(model)
    loss_of(model).backward()
    loss_of(plain).backward()
    for layer, other in zip(model, plain, strict=True):
        assert layer.lora_A["default"].weight.grad is None
        torch.testing.assert_close(layer.lora_B["default"].weight.grad, other.lora_B["default"].weight.grad)


def test_only_u_is_kept() -> None:
    """LoRA keeps both inputs besides; no other byte differs."""
    x, _ = batch()

    def kept(model: nn.Module) -> int:
        return lora_fa.saved_bytes(lambda: model(x.clone().requires_grad_()), model)

    plain, frozen = stack(), stack()
    lora_fa.freeze(frozen)
    u = 2 * M * R * 8
    assert kept(frozen) == u
    assert kept(plain) == u + M * (64 + 128) * 8


def test_only_u_is_kept_with_dropout() -> None:
    model = stack(lora_dropout=0.5)
    lora_fa.freeze(model)
    x, _ = batch()
    seeds = 2 * 8
    assert lora_fa.saved_bytes(lambda: model(x.clone().requires_grad_()), model) == 2 * M * R * 8 + seeds


def test_saved_bytes_counts_a_storage_once() -> None:
    x = torch.randn(6, 6, requires_grad=True)
    y = x * 1  # keeps nothing
    assert lora_fa.saved_bytes(lambda: (y @ y).relu() @ y, nn.Module()) == 2 * 36 * 4


def test_correction_is_the_least_squares_solution() -> None:
    """The step g that makes scale * g A closest to the gradient of the whole weight, projected as LoRA-FA's is."""
    model = stack()
    lora_fa.freeze(model)
    correct = lora_fa.Correction(model)
    loss_of(model).backward()
    layer = model[0]
    a, db = layer.lora_A["default"].weight, layer.lora_B["default"].weight.grad.clone()
    correct()
    g, scale = layer.lora_B["default"].weight.grad, layer.scaling["default"]
    full = db / scale @ torch.linalg.pinv(a).T  # the gradient of W, projected on the rows of A
    best = torch.linalg.lstsq((scale * a).T, full.T).solution.T
    torch.testing.assert_close(g, best, rtol=1e-5, atol=1e-9)


def test_correction_wants_a_frozen() -> None:
    with pytest.raises(ValueError, match="freeze"):
        lora_fa.Correction(stack())


@pytest.mark.filterwarnings("ignore")
def test_trajectory_is_that_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer, lorafa

    import fastlora

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round the product to bfloat16
    stock = peft_mlp()
    fast = copy.deepcopy(stock)
    fastlora.accelerate(fast)
    lora_fa.freeze(fast)
    optimizer = torch.optim.AdamW(trained(fast), lr=1e-2, eps=1e-12, weight_decay=0)
    lora_fa.Correction(fast).attach(optimizer)
    theirs = create_lorafa_optimizer(stock, r=4, lora_alpha=6, lr=1e-2)
    theirs.param_groups[0]["eps"] = 1e-12
    ours = train(fast, optimizer, 6, torch.float32)
    torch.testing.assert_close(ours, train(stock, theirs, 6, torch.float32), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(fast.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_pefts_optimizer_works_on_fused_layers() -> None:
    pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer

    import fastlora

    model = peft_mlp()
    fastlora.accelerate(model)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = train(model, optimizer, 8, torch.float32)
    assert losses[-1] < losses[0]
