"""``accelerate(model, loss=True)`` against the model's own forward, for every architecture."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import architectures
from architectures import ARCHITECTURES

from fastlora.integrations.peft import accelerate, restore
from fastlora.integrations.peft.loss import FusedLoss

pytestmark = pytest.mark.filterwarnings("ignore")


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **kwargs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**{**batch(), **kwargs}).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_and_every_gradient(name: str) -> None:
    model = architectures.make(name).train()
    counted = {"num_items_in_batch": torch.tensor(9)}
    expected = [step(model), step(model, **counted)]
    kind = type(model.get_base_model())
    report = accelerate(model, "torch", loss=True)
    assert report.blocks[-1].reason is None
    assert "head and loss" in str(report)
    assert isinstance(model.get_base_model(), FusedLoss)
    assert type(model.get_base_model()).__name__ == kind.__name__
    assert model(**batch()).logits is None
    assert_same(step(model), expected[0])
    assert_same(step(model, **counted), expected[1])
    restore(model)
    assert type(model.get_base_model()) is kind


def test_a_trainer_finds_its_columns(tmp_path: Path) -> None:
    """Trainer drops the columns of a data set that the signature of the model's forward does not name."""
    transformers = pytest.importorskip("transformers")
    rows = [{"input_ids": ids, "labels": ids, "text": "dropped"} for ids in batch()["input_ids"]]
    losses = []
    for fused in (False, True):
        model = architectures.make("llama")
        base = model.get_base_model()
        taken = inspect.signature(base.forward)
        if fused:
            accelerate(model, "torch", loss=True)
        assert inspect.signature(base.forward) == taken
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True
        )
        trainer = transformers.Trainer(model, args, train_dataset=rows)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_cap_of_the_logits_counts() -> None:
    model = architectures.make("gemma2").train()
    model.get_base_model().config.final_logit_softcapping = 0.5
    expected = step(model)
    accelerate(model, "torch", loss=True)
    assert_same(step(model), expected)
    model.get_base_model().config.final_logit_softcapping = 0.25
    assert (step(model)[0] - expected[0]).abs() > 1e-3


def test_a_head_that_learns() -> None:
    model = architectures.make("llama").train()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    expected = step(model)
    accelerate(model, "torch", loss=True)
    assert_same(step(model), expected)


def test_what_the_model_computes_itself() -> None:
    model = architectures.make("llama")
    data = batch()
    accelerate(model, "torch", loss=True)
    assert model.eval()(**data).logits is not None
    model.train()
    assert model(input_ids=data["input_ids"]).logits is not None
    kept = {"input_ids": data["input_ids"], "labels": data["labels"][:, -4:]}
    assert model(**kept, logits_to_keep=4).logits.shape[1] == 4
    assert model.get_base_model()(**data, return_dict=False)[1].shape[-1] == 128
    seen = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *args: seen.append(1))
    assert model(**data).logits is not None
    handle.remove()
    assert seen
    assert model.get_base_model()(data["input_ids"], labels=data["labels"]).logits is None


def test_labels_that_are_shifted_already() -> None:
    model = architectures.make("llama").train()
    shifted = nn.functional.pad(batch()["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    expected = step(model, shift_labels=shifted)
    accelerate(model, "torch", loss=True)
    assert_same(step(model, shift_labels=shifted), expected)


def test_copies_and_pickles_stay_fused() -> None:
    model = architectures.make("llama").train()
    accelerate(model, "torch", loss=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.get_base_model(), FusedLoss)
        assert_same(step(other), step(model))


def test_a_forward_that_does_more_is_left_alone() -> None:
    model = architectures.make("llama")
    base = model.get_base_model()

    class Scaled(type(base)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.loss = 2 * out.loss
            return out

    class Sharper(type(base)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids)
            logits = 2 * self.lm_head(outputs.last_hidden_state)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=128)
            from transformers.modeling_outputs import CausalLMOutputWithPast

            return CausalLMOutputWithPast(loss=loss, logits=logits)

    stock = base.__class__
    for kind, words in ((Scaled, "is another|adds to its loss"), (Sharper, "changes its logits")):
        base.__class__ = kind
        report = accelerate(model, "torch", loss=True)
        assert not isinstance(base, FusedLoss)
        assert report.blocks[-1].reason is not None
        assert re.search(words, report.blocks[-1].reason)
    base.__class__ = stock
    base.loss_function = lambda **kwargs: kwargs["logits"].sum()
    report = accelerate(model, "torch", loss=True)
    assert report.blocks[-1].reason == "its loss function is not the one of causal models"
    del base._loss_function
    base.lm_head = nn.Sequential(base.lm_head)
    assert accelerate(model, "torch", loss=True).blocks[-1].reason == "lm_head is no plain linear layer"
