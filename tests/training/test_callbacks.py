"""Progress and signals, without a trainer."""

from __future__ import annotations

import io
import os
import signal

import pytest

pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
pytest.importorskip("rich", reason="rich is missing (extra: train)")

import torch
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from fastlora.training.callbacks import Meter, Reporter, StopOnSignal

LOGS = {"loss": 1.25, "tokens_per_second": 1234.4, "memory_gib": 0.5}


def state(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=4, is_world_process_zero=True, num_input_tokens_seen=100 * step)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_speed_and_memory(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    args, control = TrainingArguments(report_to="none"), TrainerControl()
    with Reporter(console) as reporter:
        reporter.on_train_begin(args, state(0), control)
        reporter.on_log(args, state(0), control, {"eval_loss": 2.5})
        reporter.on_step_end(args, state(3), control)
        reporter.on_log(args, state(3), control, LOGS)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "evaluation loss 2.5000" in shown
    assert all(part in shown for part in ("3/4", "loss 1.2500", "1,234 tokens/s", "0.50 GiB"))
    assert ("\x1b[" in shown) is terminal


def test_an_evaluation_shows_how_far_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    args, control = TrainingArguments(report_to="none"), TrainerControl()
    for batches, expected in (([0, 1, 2], "2/3"), (iter(()), "2/?")):
        with Reporter(console) as reporter:
            for _ in range(2):
                reporter.on_prediction_step(args, state(0), control, eval_dataloader=batches)
            reporter._progress.refresh()  # type: ignore[union-attr]
            reporter.on_evaluate(args, state(0), control)
            reporter._progress.refresh()  # type: ignore[union-attr]
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "evaluation" in shown
        assert expected in shown
        assert "evaluation" not in shown.splitlines()[-1], "its bar goes when it ends"


def test_meter_counts_only_its_own_steps() -> None:
    args, control, meter = TrainingArguments(report_to="none"), TrainerControl(), Meter(torch.device("cpu"))
    assert meter.since_last_log() == {}
    meter.on_train_begin(args, state(5), control)
    for step in (6, 7):
        meter.on_step_begin(args, state(step), control)
        meter.on_step_end(args, state(step), control)
    assert meter.tokens == 200
    assert meter.tokens_per_second == pytest.approx(200 / sum(meter.step_seconds))
    assert meter.step_ms == pytest.approx(1e3 * meter.step_seconds[1])
    assert meter.since_last_log()["memory_gib"] > 0.01
    assert meter.since_last_log() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_saves_and_second_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    control = TrainerControl()
    with StopOnSignal() as stop:
        stop.on_step_end(TrainingArguments(report_to="none"), state(1), control)
        assert not control.should_save
        os.kill(os.getpid(), number)
        stop.on_step_end(TrainingArguments(report_to="none"), state(2), control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
