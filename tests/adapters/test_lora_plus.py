"""LoRA+: the groups against PEFT's, and the step."""

from __future__ import annotations

import pytest
import torch
from small import loss_of, peft_mlp, stack, train
from torch import nn

from fastlora.adapters import lora_plus


def names_of(model: nn.Module, groups: list[dict]) -> dict[tuple[float, float], set[str]]:
    """(lr, weight decay) to the names of the parameters that have it."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    found: dict[tuple[float, float], set[str]] = {}
    for group in groups:
        for p in group["params"]:
            found.setdefault((group["lr"], group["weight_decay"]), set()).add(by_id[id(p)])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["lora", "dora", "norm", "lora_bias", "bias"])
def test_groups_are_those_of_peft(form: str) -> None:
    pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    fields = {
        "lora": {},
        "dora": {"use_dora": True},
        "norm": {"modules_to_save": ["norm"]},
        "lora_bias": {"lora_bias": True},
        "bias": {"bias": "all"},
    }
    model = peft_mlp(base="dense", **fields[form])
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-4
    )
    ours = lora_plus.parameter_groups(model, 0.01, 8, weight_decay=0.1, embedding_lr=1e-4)
    assert names_of(model, ours) == names_of(model, theirs.param_groups)
    assert len(names_of(model, ours)) > 1


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 64)
        self.up = nn.Linear(64, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.up(self.words(ids))


def test_embeddings_learn_at_their_own_rate() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    model = peft.get_peft_model(Embedded(), peft.LoraConfig(r=2, target_modules=["words", "up"]))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8, loraplus_lr_embedding=3e-4
    )
    ours = names_of(model, lora_plus.parameter_groups(model, 0.01, 8, embedding_lr=3e-4))
    assert ours == names_of(model, theirs.param_groups)
    assert {name.split(".")[-2] for name in ours[3e-4, 0.0]} == {"lora_embedding_A", "lora_embedding_B"} or ours[
        3e-4, 0
    ]


def test_steps_are_those_of_peft() -> None:
    pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    one, other = peft_mlp(base="dense"), peft_mlp(base="dense")
    ours = lora_plus.optimizer(one, torch.optim.AdamW, 1e-3, 16, weight_decay=0.01, eps=1e-6)
    theirs = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.01, eps=1e-6
    )
    assert train(one, ours, 5, torch.float32) == train(other, theirs, 5, torch.float32)


def test_b_moves_ratio_times_as_far_as_a() -> None:
    model = stack()
    optimizer = lora_plus.optimizer(model, torch.optim.SGD, 1e-3, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if "lora_" in name:
            rate = 16e-3 if "lora_B" in name else 1e-3
            torch.testing.assert_close(p, before[name] - rate * p.grad)


def test_any_optimizer_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    optimizer = lora_plus.optimizer(stack(dtype=torch.float32), bnb.optim.AdamW8bit, 1e-3, 4, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]
    assert all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_moments_in_8_bits_move_b_faster(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = stack(r=64, dtype=torch.float32)  # bitsandbytes leaves small moments as they are
    optimizer = lora_plus.optimizer(model, getattr(bnb.optim, name), 1e-4, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, optimizer, 1, torch.float32)
    moved = {name: (p - before[name]).abs().amax().item() for name, p in model.named_parameters() if p.requires_grad}
    for key, distance in moved.items():
        assert distance == pytest.approx(8e-4 if "lora_B" in key else 1e-4, rel=0.05), key
    states = [state["state1"].dtype for state in optimizer.state.values()]
    assert states == [torch.uint8] * 4
    losses += train(model, optimizer, 6, torch.float32)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("values", [(0.0, 16.0), (1e-3, 0.0), (1e-3, -1.0)])
def test_rates_must_be_positive(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        lora_plus.parameter_groups(stack(), *values)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="add an adapter"):
        lora_plus.parameter_groups(stack().requires_grad_(False), 1e-3)
