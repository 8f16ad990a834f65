"""Fixtures of the training tests: one tiny model, its data and one finished run, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        import datasets
    except ImportError:
        return  # only tests that need no data run then

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other widths: adapters of `tiny_model` do not fit."""
    from tiny import save_llama

    return save_llama(tmp_path_factory.mktemp("models") / "other", hidden=96)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of plain text."""
    from tiny import text_rows, write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "text.jsonl", text_rows())


@pytest.fixture
def options(tiny_model: Path, text_data: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of four short steps on the CPU."""
    return {
        "model": str(tiny_model),
        "data": str(text_data),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "max_length": 32,
        "max_steps": 4,
        "batch_size": 2,
        "lr": 1e-2,
        "r": 4,
        "lora_dropout": 0.1,
        "eval_fraction": 0.1,
        "tensorboard": False,
    }


@pytest.fixture(scope="session")
def trained(tiny_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of one finished run on `tiny_model`, with every log there is. Not to be changed."""
    from fastlora.training.config import load
    from fastlora.training.train import train

    config = {
        "model": str(tiny_model),
        "data": str(text_data),
        "output_dir": str(tmp_path_factory.mktemp("runs") / "trained"),
        "device": "cpu",
        "max_length": 32,
        "max_steps": 16,
        "batch_size": 4,
        "lr": 3e-2,
        "r": 4,
        "eval_steps": 8,
        "eval_fraction": 0.1,
    }
    return train(load(None, config))
