"""Blocks, Liger and checkpoints on the CPU, as a training run has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny  # noqa: F401  (skips this module where the train extra is missing)
import torch

from fastlora.training import model as models
from fastlora.training.config import load
from fastlora.training.errors import UserError
from fastlora.training.offload import OffloadCheckpoints, offload_checkpoints
from fastlora.training.train import train

CHECKPOINTS = {"gradient_checkpointing": True, "offload_checkpoints": True}


@pytest.mark.parametrize("values", [{"blocks": True}, {"blocks": True, **CHECKPOINTS}])
def test_the_curve_stays(options: dict[str, Any], tmp_path: Path, values: dict[str, Any]) -> None:
    options["lora_dropout"] = 0.0
    ours = train(load(None, options))
    other = train(load(None, {**options, "output_dir": str(tmp_path / "other"), **values}))
    assert other.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in ours.losses]
    assert ours.losses[0] != ours.losses[-1]


def test_only_the_inputs_of_checkpoints_go(tiny_model: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One hidden state for each layer, and the gradients are those of plain checkpointing."""
    gone: list[torch.Size] = []

    class Watched(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(t: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
                gone.append(t.shape)
                return t.device, t.cpu().clone()

            super().__init__(pack, lambda packed: packed[1].to(packed[0]))

    source = models.find(str(tiny_model))
    model: Any = models.load_base(source, quantization="none", device=torch.device(device), dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 300, (2, 16), device=device)

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = grads()
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    assert offload_checkpoints(model) == offload_checkpoints(model) >= 2
    for a, b in zip(grads(), want, strict=True):
        assert torch.equal(a, b)
    assert [shape for shape in gone if shape == (2, 16, 64)] == [(2, 16, 64)] * 2
    assert all(shape.numel() <= 2 * 16 * 64 for shape in gone)


def test_nothing_to_offload() -> None:
    with pytest.raises(RuntimeError, match="nothing to offload"):
        OffloadCheckpoints().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload_checkpoints": True}, "offload_checkpoints needs gradient_checkpointing"),
        ({"blocks": True, "backend": "peft"}, "backend peft has neither"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(None, options | values)


def test_liger_that_is_missing_is_one_line(
    tiny_model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(UserError, match=r"^liger: liger=True needs Liger kernels: pip install") as caught:
        train(load(None, {**options, "liger": True}))
    assert "\n" not in str(caught.value)
