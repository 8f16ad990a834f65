"""The model that an adapter method wraps."""

from __future__ import annotations

from typing import Any


def inner_model(model: Any) -> Any:
    """The model inside of a PEFT model; any other is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
