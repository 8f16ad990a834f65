"""kill -9 in a step and within the writing of a checkpoint: the resumed run is the uninterrupted one, bit for bit.

FASTLORA_CRASHES is how many seeds to try (`make crash-tests`: 20); each dies up to three times in one run.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny  # noqa: F401  (skips where the train extra is missing)
import torch

from fastlora.training import checkpoints, durable
from fastlora.training.callbacks import LOG_NAME

CRASHES = int(os.environ.get("FASTLORA_CRASHES", "2"))
METHODS = ("lora", "dylora")
STEPS, SAVE_STEPS = 8, 2
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")


class Whole(NamedTuple):
    """An uninterrupted run."""

    options: dict[str, Any]
    weights: dict[str, torch.Tensor]
    losses: list[Any]
    events: list[int]
    """Of each checkpoint."""


def losses(folder: str | Path) -> list[Any]:
    return json.loads((Path(folder) / "result.json").read_text())["losses"]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    import crash

    found = {}
    for method in METHODS[:CRASHES]:
        options = {
            "model": str(tiny_model),
            "data": str(text_data),
            "output_dir": str(tmp_path_factory.mktemp("whole")),
            "device": "cpu",
            "method": method,
            "max_length": 32,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 1,
            "batch_size": 2,
            "lr": 1e-2,
            "r": 4,
            "lora_dropout": 0.1,
            "eval_fraction": 0.1,
            "tensorboard": False,
        }
        code, events = crash.run(options)
        assert code == 0
        assert len(events) == STEPS // SAVE_STEPS
        folder = options["output_dir"]
        found[method] = Whole(options, crash.weights(folder), losses(folder), events)
    return found


@pytest.mark.parametrize("seed", range(CRASHES))
def test_killed_and_resumed_is_uninterrupted(whole: dict[str, Whole], tmp_path: Path, seed: int) -> None:
    import crash

    chance, run = random.Random(seed), whole[METHODS[seed % len(METHODS)]]
    options = run.options | {"output_dir": str(tmp_path)}
    deaths: list[crash.Kill] = []
    while True:
        # The first death of a seed of the default suite is within a checkpoint, the later ones anywhere.
        in_write = not deaths or chance.random() < 0.5
        kill: crash.Kill | None = None
        if len(deaths) < 3:
            write = chance.randint(1, 2)
            kill = ("step", chance.randint(1, 3), chance.random() * 0.02)
            if in_write:
                kill = ("write", write, chance.randint(1, run.events[write - 1]))
        code, _ = crash.run({**options, "resume": bool(checkpoints.finished(tmp_path))}, kill)
        for checkpoint in tmp_path.glob("checkpoint-*"):
            assert (checkpoint / durable.MANIFEST).is_file(), f"{checkpoint} is there and not complete after {kill}"
            assert durable.damage(checkpoint) is None
        if code == 0:
            break
        assert kill is not None
        assert code == -signal.SIGKILL, kill
        deaths.append(kill)
    assert deaths
    resumed = crash.weights(tmp_path)
    assert resumed.keys() == run.weights.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], run.weights[name])] == [], deaths
    assert losses(tmp_path) == run.losses
    assert not (tmp_path / durable.WRITING).exists()
    steps = [
        log["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines() if "loss" in (log := json.loads(line))
    ]
    assert steps == list(range(1, STEPS + 1)), "no step is missing in the log, and none is there twice"
