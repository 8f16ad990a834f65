"""Whole runs on the CPU: what is learned, saved, resumed, refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastlora.training import checkpoints
from fastlora.training import model as models
from fastlora.training.config import load
from fastlora.training.errors import Interrupted, UserError
from fastlora.training.train import TrainResult, train


def run(options: dict[str, Any], callbacks: list[Any] | None = None, **values: Any) -> TrainResult:
    return train(load(None, options | values), callbacks)


def adapter(result: TrainResult | Path) -> dict[str, torch.Tensor]:
    folder = result if isinstance(result, Path) else result.adapter_path
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


class AtStep(TrainerCallback):
    """Calls something when a step ends."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def test_a_run_learns_and_leaves_everything(trained: TrainResult) -> None:
    assert trained.eval_loss_before is not None
    assert trained.eval_loss_after is not None
    assert trained.eval_loss_after < trained.eval_loss_before - 0.5
    assert [step for step, _ in trained.losses] == list(range(1, 17))
    assert trained.layers_replaced == 14
    assert trained.tokens_per_second > 0
    assert trained.step_ms > 0
    assert trained.peak_memory > 0
    assert [log["step"] for log in trained.log_history if "eval_loss" in log] == [0, 8, 16]
    saved = {path.name for path in trained.output_dir.iterdir()}
    assert saved >= {"adapter", "config.yaml", "result.json", "tensorboard", "checkpoint-16"}
    assert json.loads((trained.output_dir / "result.json").read_text())["steps"] == 16
    assert load(trained.output_dir / "config.yaml").lr == 3e-2


def test_tensorboard_has_every_curve(trained: TrainResult) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = event_accumulator.EventAccumulator(str(trained.output_dir / "tensorboard"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert tags >= {"train/loss", "train/tokens_per_second", "train/memory_gib", "eval/loss", "train/learning_rate"}
    assert tags >= {"train/grad_norm"}
    assert [event.step for event in accumulator.Scalars("eval/loss")] == [0, 8, 16]
    losses = [event.value for event in accumulator.Scalars("train/loss")]
    assert losses == pytest.approx([loss for _, loss in trained.losses])


def test_plain_peft_gives_the_same_logits(trained: TrainResult, tiny_model: Path) -> None:
    """The saved adapter on PEFT's own layers, against the fused ones."""
    source = models.find(str(tiny_model))
    ids = torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = []
    for backend in ("peft", "auto"):
        base = models.load_base(source, device=torch.device("cpu"), dtype=torch.float32)
        model = models.load_adapter(base, trained.adapter_path)
        models.accelerate(model, backend)
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
            with model.disable_adapter():
                assert not torch.allclose(logits[-1], model(ids).logits, atol=1e-2)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [{"backend": "peft"}, {"trainer": "trl"}, {"gradient_checkpointing": True}])
def test_other_ways_give_the_same_curve(options: dict[str, Any], tmp_path: Path, values: dict[str, Any]) -> None:
    if values.get("trainer") == "trl":
        pytest.importorskip("trl", reason="trl is missing (extra: trl)")
    options["lora_dropout"] = 0.0
    ours, other = run(options), run(options, output_dir=str(tmp_path / "other"), **values)
    assert other.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in ours.losses]
    assert other.eval_loss_after == pytest.approx(ours.eval_loss_after, rel=1e-4)
    assert ours.losses[0] != ours.losses[-1]
    assert other.layers_replaced == (0 if values.get("backend") == "peft" else 14)


def test_trl_with_checkpointing_and_dropout_runs(options: dict[str, Any]) -> None:
    pytest.importorskip("trl", reason="trl is missing (extra: trl)")
    result = run(options, trainer="trl", gradient_checkpointing=True)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(result).values())


def test_accumulation_is_a_larger_batch(options: dict[str, Any], tmp_path: Path) -> None:
    options["lora_dropout"] = 0.0
    one = run(options, batch_size=4)
    two = run(options, batch_size=2, gradient_accumulation_steps=2, output_dir=str(tmp_path / "two"))
    assert two.losses == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in one.losses]


def test_the_evaluation_is_a_mean_over_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "what is it", "completion": " ".join(["fox"] * (1 if i % 2 else 12))} for i in range(20)]
    rows.append({"prompt": "fox " * 40, "completion": "too far away to be learned"})
    files = {key: str(tiny.write_rows(tmp_path / f"{key}.jsonl", rows)) for key in ("data", "eval_data")}
    options |= {**files, "packing": False, "max_length": 96, "max_steps": 1}
    found = [
        run(options, eval_batch_size=size, output_dir=str(tmp_path / str(size))).eval_loss_before for size in (1, 3, 21)
    ]
    assert found == pytest.approx([found[-1]] * 3, rel=1e-5)


def test_seed_decides(options: dict[str, Any], tmp_path: Path) -> None:
    one, two = run(options), run(options, output_dir=str(tmp_path / "two"))
    other = run(options, output_dir=str(tmp_path / "other"), seed=7)
    assert_same_weights(adapter(one), adapter(two))
    assert one.losses == two.losses != other.losses


def test_bf16_under_autocast(options: dict[str, Any]) -> None:
    result = run(options, bf16=True, max_steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in adapter(result).values())
    assert result.losses[0][1] == pytest.approx(result.eval_loss_before, rel=0.1)


def test_dense_base_and_chosen_layers(options: dict[str, Any]) -> None:
    result = run(options, quantization="none", target_modules="q_proj,v_proj", eval_fraction=0, max_steps=2)
    assert len(adapter(result)) == 2 * 2 * 2
    assert result.eval_loss_before is None
    assert result.eval_loss_after is None
    assert not any("eval_loss" in log for log in result.log_history)


@pytest.mark.parametrize("stop", [3, 7, 11])
def test_interrupted_and_resumed_is_uninterrupted(options: dict[str, Any], tmp_path: Path, stop: int) -> None:
    """Bit for bit, with dropout, inside the first pass over the data, at its end (step 7) and in the second pass."""
    options |= {"max_steps": 13, "max_samples": 14, "packing": False, "eval_data": options["data"], "eval_steps": 5}
    options["max_eval_samples"] = 4
    whole = run(options, output_dir=str(tmp_path / "whole"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"checkpoint-{stop}.*--resume") as error:
        run(options, [AtStep(stop, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert error.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before, "the handler from before the run is back"
    resumed = run(options, resume=True)
    assert_same_weights(adapter(resumed), adapter(whole))
    assert resumed.losses == whole.losses
    assert resumed.eval_loss_before == whole.eval_loss_before
    assert resumed.eval_loss_after == whole.eval_loss_after


@pytest.mark.parametrize("values", [{}, {"max_steps": None, "epochs": 0.1}, {"max_steps": 2}])
def test_a_finished_run_takes_no_further_step(options: dict[str, Any], values: dict[str, Any]) -> None:
    whole = run({**options, **values} if "epochs" in values else options)
    resumed = run({**options, **values}, resume=True)
    assert resumed.steps == whole.steps
    assert resumed.losses == whole.losses
    assert_same_weights(adapter(resumed), adapter(whole))
    assert resumed.eval_loss_after == whole.eval_loss_after
    assert "nan" not in resumed.summary()


def test_a_crash_loses_nothing_since_the_last_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    whole = run(options, output_dir=str(tmp_path / "whole"))

    def crash() -> None:
        # What a kill leaves in the middle of a checkpoint: a folder without the state that is written last.
        half = Path(options["output_dir"]) / "checkpoint-3"
        shutil.copytree(half.with_name("checkpoint-2"), half)
        (half / "trainer_state.json").unlink()
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="checkpoint-2"):
        run(options, [AtStep(3, crash)], save_steps=2)
    assert_same_weights(adapter(run(options, resume=True, save_steps=2)), adapter(whole))


def test_resume_refuses_what_does_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no finished checkpoint"):
        run(options, resume=True)
    run(options, max_steps=1)
    with pytest.raises(UserError, match="--resume to go on, --overwrite"):
        run(options)
    with pytest.raises(UserError, match=r"r was 4 and is 8.*set them back"):
        run(options, resume=True, r=8)
    assert len(run(options, overwrite=True, max_steps=1, r=8).losses) == 1


def test_an_adapter_is_not_replaced_unless_asked(options: dict[str, Any]) -> None:
    result = run(options, max_steps=1)
    shutil.rmtree(result.output_dir / "checkpoint-1")  # to save space
    before = (result.adapter_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds the adapter of a finished run: pass --overwrite"):
        run(options, max_steps=1, lr=1e-3)
    assert (result.adapter_path / "adapter_model.safetensors").read_bytes() == before

    def crash() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(options, [AtStep(1, crash)], overwrite=True, lr=1e-3)
    left = {path.name for path in result.output_dir.iterdir()}
    assert not left & {"adapter", "result.json"}, "they were of another configuration"


def test_disk_that_fills_up_is_one_line(options: dict[str, Any]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"disk of .* is full.*--resume"):
        run(options, [AtStep(1, full)])


def test_too_little_space_is_refused_before_training(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**20))
    monkeypatch.setattr(models, "load_base", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=r"10\.0 MiB free and the run needs about 64\.\d MiB"):
        run(options)


def test_estimate_covers_what_a_run_writes(trained: TrainResult, tiny_model: Path) -> None:
    config = load(trained.output_dir / "config.yaml")
    skeleton = models.skeleton(models.find(str(tiny_model)))
    parameters = models.adapter_parameters(skeleton, config.target_modules, config.r)
    assert parameters == sum(tensor.numel() for tensor in adapter(trained).values())
    written = sum(path.stat().st_size for path in trained.output_dir.rglob("*") if path.is_file())
    assert written <= checkpoints.needed_bytes(config, parameters)


def test_unwritable_output(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_dir: cannot write"):
        run(options, output_dir=str(tmp_path / "file" / "run"))


def test_out_of_memory_gives_advice(options: dict[str, Any]) -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"halve batch_size \(now 2\).*gradient_checkpointing.*max_length \(now 32\)"):
        run(options, [AtStep(1, exhausted)])


def test_loss_that_is_no_number_ends_the_run(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf).*lower lr"):
        run(
            options, lr=1.0, scheduler="constant", warmup=0, max_grad_norm=0, max_steps=40, optim="sgd", lora_alpha=1e38
        )


def test_unknown_optimizer(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="optim: 'adamwx' is no optimizer"):
        run(options, optim="adamwx")


def test_rows_keep_their_meaning(options: dict[str, Any], tmp_path: Path) -> None:
    """Pairs through the chat template, unpacked, so that batches are padded."""
    rows = [{"prompt": line, "completion": tiny.LINES[0]} for line in tiny.LINES * 3]
    path = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    result = run(options, data=str(path), packing=False, max_length=64, max_steps=2)
    assert result.eval_loss_after != result.eval_loss_before


def test_weights_that_stay_decoded_change_nothing(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for gib in (0, 1):
        values = {"backend": "torch", "decoded_memory": gib, "max_steps": 3, "output_dir": str(tmp_path / str(gib))}
        losses.append(train(load(None, options | values)).losses)
        assert ("14 of 14 packed weights kept dense" in capsys.readouterr().out) == bool(gib)
    assert losses[0] == losses[1]
