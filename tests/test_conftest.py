"""The conditions that every test relies on."""

from __future__ import annotations

import os

import pytest
import torch

_drawn: list[torch.Tensor] = []


def test_poison_fills_what_is_not_written(poison_empty: None) -> None:
    assert torch.empty(5).isnan().all()
    assert torch.randn(3).new_empty(2, 2).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("time", [1, 2])
def test_every_test_draws_the_same_numbers(time: int) -> None:
    _drawn.append(torch.randn(3))
    assert torch.equal(_drawn[0], _drawn[-1])
    assert not torch.are_deterministic_algorithms_enabled()


def test_offline_and_interpreted_without_a_gpu() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    if not torch.cuda.is_available():
        assert os.environ["TRITON_INTERPRET"] == "1"
