"""Models that the tests of the integrations share."""

from __future__ import annotations

from collections.abc import Callable
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
