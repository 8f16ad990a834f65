"""Models that the tests of the integrations share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import peft_models
import pytest
import torch


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    """The function that makes the shared tiny model: see ``peft_models.llama``."""
    return peft_models.llama


@pytest.fixture
def ids() -> torch.Tensor:
    """Two sequences of 12 tokens."""
    return torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_model_lives_on() -> Iterator[None]:
    """transformers' rotary embedding is replaced while some model wants it: the next test starts without."""
    yield
    rotary = sys.modules.get("fastlora.integrations.peft.rotary")
    if rotary is not None:
        for name, models in rotary._users.items():
            models.clear()
            rotary._settle(sys.modules[name])
