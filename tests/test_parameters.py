"""The table of a model's layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora import FastLoRALinear, parameters


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False))
        self.same = self.one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))


def test_counts_and_shapes() -> None:
    model = Shared()
    model.one.requires_grad_(False)
    found = {line.name: line for line in parameters.lines(model, torch.zeros(5, 3))}
    assert (found["one"].parameters, found["one"].trainable, found["one"].shape) == (16, 0, (5, 4))
    assert (found["two.1"].parameters, found["two.1"].trainable, found["two.1"].shape) == (8, 8, (5, 2))
    assert found[""].shape == (5, 2)
    assert "same" not in found


def test_looking_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = model[1].running_mean.clone()
    parameters.lines(model, torch.ones(3, 2))
    assert model.training
    assert torch.equal(model[1].running_mean, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    assert sum(line.parameters for line in parameters.lines(model)) == 28


def test_a_tied_weight_beside_an_own_bias_counts_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    assert [line.parameters for line in parameters.lines(model)] == [0, 28, 7]


def test_parts_in_evaluation_mode_stay_in_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()).eval())
    parameters.lines(model, torch.ones(3, 2))
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_table() -> None:
    model = Shared()
    model.one.requires_grad_(False)
    lines = parameters.table(model, torch.zeros(5, 3)).splitlines()
    assert lines[0].split() == ["layer", "output", "shape", "parameters", "trainable"]
    assert lines[3].split() == ["one:", "Linear", "5", "x", "4", "16", "-"]
    assert lines[-1] == "24 parameters, 8 trainable (33.33%)"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_what_is_not_shown_counts_for_what_is_around_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.Linear(2, 1))
    lines = parameters.table(model, depth=1).splitlines()
    assert [line.split()[-2:] for line in lines[3:5]] == [["26", "26"], ["3", "3"]]
    assert lines[-1].startswith("29 parameters")


def test_a_weight_of_four_bits_counts_as_what_it_stands_for() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: train)")
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4")
    layer.weight.data = torch.randn(64, 128)
    layer.to("cpu")
    assert layer.weight.numel() < 64 * 128
    (line,) = parameters.lines(layer)
    assert (line.parameters, line.trainable) == (64 * 128, 0)


def test_a_packed_weight_that_is_a_buffer_counts_too() -> None:
    layer = FastLoRALinear(64, 32, r=4, bias=True)
    counts = {line.name: (line.parameters, line.trainable) for line in parameters.lines(layer)}
    assert counts["base_layer"] == (32 * 64 + 32, 0)
    assert sum(learn for _, learn in counts.values()) == 4 * (32 + 64)
