"""A process that trains one trial after the other, as the search tells it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Pruned(Exception):
    """The search has seen enough of a trial."""


def main(connection: Connection, threads: int, gpu: int | None) -> None:
    """Train what comes through ``connection`` until it closes.

    In comes ``(values of a configuration, evaluations)``. Out go ``("evaluated", number of the evaluation, metrics)``,
    each answered by whether to stop, and at the end ``("done", metrics)``, ``("pruned", None)`` or
    ``("failed", message)``. threads: of PyTorch. gpu: the one to use.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):  # the search is gone
        while (job := connection.recv()) is not None:
            connection.send(train(connection, *job))


def train(connection: Connection, values: dict[str, Any], evaluations: int) -> tuple[str, Any]:
    """Train one configuration; what is said at its end. Its folder keeps the log and the adapter, no checkpoints."""
    from fastlora.training.config import load
    from fastlora.training.errors import UserError, first_line

    folder = Path(values["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            return "done", _train(load(None, values), connection, evaluations)
        except Pruned:
            return "pruned", None
        except UserError as error:
            return "failed", str(error)
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            traceback.print_exc(file=log)
            return "failed", f"{type(error).__name__}: {first_line(error)}"
        finally:
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)


def _train(config: Any, connection: Connection, evaluations: int) -> dict[str, float]:
    from fastlora.training.train import train as run

    result = run(config, [_reporter(connection, evaluations)])
    assert result.eval_loss_after is not None
    return {"loss": result.eval_loss_after, **result.metrics_after, "step_ms": result.step_ms, "steps": result.steps}


def _reporter(connection: Connection, evaluations: int) -> Any:
    """A transformers callback that evaluates so many times and asks after each time whether to go on."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            every = math.ceil(state.max_steps / evaluations)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                control.should_evaluate = True

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if not 0 < state.global_step < state.max_steps:
                return
            names = [name for name in ("loss", "accuracy", "f1") if f"eval_{name}" in metrics]
            found = {name: float(metrics[f"eval_{name}"]) for name in names}
            number = round(state.global_step / math.ceil(state.max_steps / evaluations))
            connection.send(("evaluated", number, found))
            if connection.recv():
                raise Pruned

    return Reporter()
