"""What happens around a training step: measuring, showing, stopping."""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sized
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.training import checkpoints, durable
from fastlora.training.data import IGNORED
from fastlora.training.distributed import any_process
from fastlora.training.errors import UserError

LOG_NAME = "log.jsonl"
"""Every log of a run, a line each, in its output folder."""


class Meter(TrainerCallback):
    """Measures each optimizer step: wall time, tokens without padding, memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step_seconds: list[float] = []
        self.tokens = 0
        self.peak_memory = 0
        """Bytes: the most that PyTorch held on the GPU, or the largest resident set seen on the CPU."""
        self._started = 0.0
        self._tokens_seen = 0
        self._logged = (0, 0)
        self._held = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens_seen = int(state.num_input_tokens_seen)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._synchronize()
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._synchronize()
        self.step_seconds.append(time.perf_counter() - self._started)
        self.tokens += int(state.num_input_tokens_seen) - self._tokens_seen
        self._tokens_seen = int(state.num_input_tokens_seen)
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_allocated(self.device)
        else:
            held = psutil.Process().memory_info().rss
        self._held = max(self._held, held)
        self.peak_memory = max(self.peak_memory, held)

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a step, without the first, which warms up; NaN before any step."""
        steps = self.step_seconds[1:] or self.step_seconds
        return 1e3 * statistics.median(steps) if steps else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all steps; NaN before any step."""
        return self.tokens / sum(self.step_seconds) if self.step_seconds else math.nan

    def since_last_log(self) -> dict[str, float]:
        """``tokens_per_second`` and ``memory_gib``, the most held, since the last call; empty without a step."""
        steps, tokens = len(self.step_seconds), self.tokens
        last_steps, last_tokens = self._logged
        if steps == last_steps:
            return {}
        self._logged = (steps, tokens)
        rate = (tokens - last_tokens) / sum(self.step_seconds[last_steps:])
        held, self._held = self._held, 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return {"tokens_per_second": round(rate, 1), "memory_gib": round(held / 2**30, 4)}


class MeteredLog:
    """Mix-in of a Trainer: every log, TensorBoard's too, carries the meter's numbers."""

    meter: Meter | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.meter is not None and "loss" in logs:
            logs = {**logs, **self.meter.since_last_log()}
        super().log(logs, start_time)  # type: ignore[misc]


class LearnedMean:
    """Mix-in of a Trainer: the loss of an evaluation is the mean over all that is learned, however it lies in batches.

    The trainer's own is a mean over batches, in which the tokens of a short answer count more than those of a long one.
    """

    shifted = True
    """Whether each label belongs to the token before it, as in a language model."""

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._learned = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        total, count = self.accelerator.reduce(self._learned, "sum").tolist()
        key = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if count and key in output.metrics:
            output.metrics[key] = total / count
        return output

    def prediction_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"][..., 1:] if self.shifted else inputs["labels"]
        found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        count = (labels != IGNORED).sum().to(self._learned)
        loss = torch.where(count > 0, found[0].to(self._learned), 0.0)  # a mean over nothing is no number
        self._learned += torch.stack([loss * count, count])
        return found


class LogFile(TrainerCallback):
    """Keeps every log in a file of the output folder from the moment it is made, for runs that do not end well too.

    A resumed run begins with what its checkpoint knows, so that no step is there twice.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOG_NAME

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            durable.write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**(logs or {}), "step": state.global_step}) + "\n")


class Reporter(TrainerCallback):
    """Shows loss, tokens a second and memory: progress bars on a terminal, else one line a log.

    A context manager: the bars are taken down however the run ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False)
        self._progress: Progress | None = None
        self._training: Any = None
        self._evaluation: Any = None

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[what]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._training = self._evaluation = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._training = self._progress.add_task(
                "", what="training", completed=state.global_step, total=state.max_steps
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._training, completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._progress is not None:
            if self._evaluation is None:
                batches = len(eval_dataloader) if isinstance(eval_dataloader, Sized) else None
                self._evaluation = self._progress.add_task("", what="evaluation", total=batches)
            self._progress.advance(self._evaluation)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is not None and self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}  evaluation loss {float(logs['eval_loss']):.4f}")
        if "loss" not in logs:
            return
        parts = [f"loss {float(logs['loss']):.4f}"]
        if "tokens_per_second" in logs:
            parts += [f"{logs['tokens_per_second']:,.0f} tokens/s", f"{logs['memory_gib']:.2f} GiB"]
        if self._progress is not None:
            self._progress.update(self._training, description="  ".join(parts))
        else:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {'  '.join(parts)}")


class FiniteLoss(TrainerCallback):
    """Ends a run whose loss is no number any more, before it overwrites its last good checkpoint."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            advice = checkpoints.after_divergence(args.learning_rate, Path(str(args.output_dir)))
            raise UserError(f"the loss is {loss} at step {state.global_step}: {advice}")


class NoStepsLeft(Exception):
    """The checkpoint that a run resumes from is its last one."""


class Complete(TrainerCallback):
    """Ends a resumed run that has no step left before the trainer, which looks after a step only, takes one more."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise NoStepsLeft


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C and SIGTERM into a checkpoint at the end of the running step, after which training stops.

    A second signal stops at once, without a checkpoint. A context manager: the handlers before it come back. Handlers
    belong to the main thread; in another one, signals do what they did.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The processes of a run stop at one and the same step, whichever of them were told to.
        self.requested = any_process(self.requested)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
