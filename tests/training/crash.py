"""Training runs in processes of their own that die by SIGKILL at a chosen place.

Imported by the server that they fork from.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (so that no process that forks off imports it again)
import datasets
import peft  # noqa: F401
import torch
import transformers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

from fastlora.integrations import peft as _peft  # noqa: F401
from fastlora.training.callbacks import Meter  # noqa: F401
from fastlora.training.config import load
from fastlora.training.saving import SafeCheckpoints
from fastlora.training.train import train

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"})
"""What Python reports to audit hooks between two of which a checkpoint may be cut short."""

Kill = tuple[str, int, float]
"""("step", n, seconds after the n-th training step begins), or ("write", n-th checkpoint of the process, event)."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Writes:
    """Counts the events within each checkpoint, and dies at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.at = kill[1:] if kill is not None and kill[0] == "write" else None
        self.counts: list[int] = []
        self.inside = False
        sys.addaudithook(self.event)
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            self.event("open", ())
            sync(descriptor)

        os.fsync = fsync
        save = SafeCheckpoints._save_checkpoint

        def save_checkpoint(trainer: Any, model: Any, trial: Any) -> None:
            self.counts.append(0)
            self.inside = True
            try:
                save(trainer, model, trial)
            finally:
                self.inside = False

        SafeCheckpoints._save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def event(self, name: str, arguments: Any) -> None:
        if self.inside and name in FILE_EVENTS:
            self.counts[-1] += 1
            if self.at == (len(self.counts), self.counts[-1]):
                die()


def _die_in_step(number: int, seconds: float) -> None:
    step, calls = transformers.Trainer.training_step, 0

    def sleep_and_die() -> None:
        time.sleep(seconds)
        die()

    def training_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            threading.Thread(target=sleep_and_die, daemon=True).start()
        return step(*args, **kwargs)

    transformers.Trainer.training_step = training_step


def _child(options: dict[str, Any], kill: Kill | None, counts: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    writes = _Writes(kill)
    if kill is not None and kill[0] == "step":
        _die_in_step(kill[1], kill[2])
    train(load(None, options))
    counts.put(writes.counts)


def run(options: dict[str, Any], kill: Kill | None = None) -> tuple[int, list[int]]:
    """The exit code of a run, negative for a signal, and the events of each checkpoint where it ended by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash"])
    folder = str(Path(__file__).parent)
    if folder not in os.environ.get("PYTHONPATH", ""):  # where the server looks for what it loads
        os.environ["PYTHONPATH"] = os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))
    counts = context.SimpleQueue()
    process = context.Process(target=_child, args=(options, kill, counts))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise TimeoutError("the run neither ended nor died")
    assert process.exitcode is not None
    return process.exitcode, [] if counts.empty() else counts.get()


def weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(output_dir) / "adapter" / "adapter_model.safetensors")
