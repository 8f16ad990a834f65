"""Compiled and captured steps compute what eager ones do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
pytest.importorskip("peft", reason="peft is missing (extra: train)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: train)")

import fastlora
from fastlora.bench import models
from fastlora.integrations.peft import loss as loss_module
from fastlora.training import attention
from fastlora.training import step as steps
from fastlora.training.attention import CAUSAL, KERNELS, fastest, use_causal_attention

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
}


def model_of(name: str) -> Any:
    model = models.adapt(models.base(models.config(name, 2, 97, **SIZES), CPU, dtype=torch.float32), r=4)
    with torch.no_grad():
        for path, parameter in models.adapters(model):
            if "lora_B" in path:
                parameter.normal_(std=0.1)
    fastlora.accelerate(model)
    return model.train()


def gradients(model: Any, ids: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [parameter.grad.clone() for _, parameter in models.adapters(model)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_a_compiled_model_is_one_graph_with_the_same_gradients(name: str, checkpointing: bool) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = model_of(name)
    models.checkpoint(model, checkpointing)
    batches = models.token_batches(model.config, 2, 16, CPU, 0, 2)
    expected = [gradients(model, ids) for ids in batches]
    torch._dynamo.reset()
    steps.compile_model(model, backend=backend)
    for ids, (loss, grads) in zip(batches, expected, strict=True):
        found, found_grads = gradients(model, ids)
        assert found == pytest.approx(loss, rel=1e-6)
        for a, b in zip(found_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b"])
def test_attention_without_masks_still_keeps_to_its_window(name: str) -> None:
    model = model_of(name)
    (ids,) = models.token_batches(model.config, 2, 16, CPU, 0, 1)
    loss, grads = gradients(model, ids)
    use_causal_attention(model.get_base_model())
    assert model.config._attn_implementation.startswith(CAUSAL)
    found, found_grads = gradients(model, ids)
    assert found == pytest.approx(loss, rel=1e-6)
    for a, b in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if name == "mistral-7b":
        model.config.sliding_window = None
        assert abs(gradients(model, ids)[0] - loss) > 1e-5


@pytest.mark.parametrize("name", ["mistral-7b", "llama-3-8b"])
def test_attention_without_masks_asks_for_no_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    def looked(*args: Any) -> None:
        raise AssertionError("values were looked at on the host")

    model = model_of(name)
    (ids,) = models.token_batches(model.config, 2, 16, CPU, 0, 1)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    with pytest.raises(AssertionError, match="looked at"):
        gradients(model, ids)
    for kernel in ("pytorch", "auto"):
        use_causal_attention(model.get_base_model(), kernel)
    gradients(model, ids)
    assert len(model.get_base_model().model._forward_pre_hooks) <= 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_attention_kernel_computes_the_same(kernel: str) -> None:
    model = model_of("llama-3-8b")
    (ids,) = models.token_batches(model.config, 2, 16, CPU, 0, 1)
    loss, grads = gradients(model, ids)
    use_causal_attention(model.get_base_model(), kernel)
    found, found_grads = gradients(model, ids)
    assert found == pytest.approx(loss, rel=1e-6)
    for a, b in zip(found_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_which_attention_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert [fastest(c) for c in (None, (8, 0), (8, 9), (9, 0), (10, 0))] == ["pytorch"] * 3 + ["cudnn"] * 2
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert fastest((9, 0)) == "pytorch"
    with pytest.raises(ValueError, match="unknown attention kernel 'flsh'; choose from auto, pytorch"):
        use_causal_attention(model_of("llama-3-8b").get_base_model(), "flsh")


def test_the_last_blocks_may_keep_what_they_computed() -> None:
    model = model_of("llama-3-8b")
    layers = model.get_base_model().model.layers
    (ids,) = models.token_batches(model.config, 2, 16, CPU, 0, 1)
    expected = gradients(model, ids)
    calls: list[int] = []
    for layer in layers:
        layer.self_attn.register_forward_hook(lambda *args: calls.append(1))
    for keep, flags in ((1, [True, False]), (5, [False, False]), (0, [True, True])):
        steps.checkpoint_blocks(model.get_base_model(), keep=keep)
        assert [layer.gradient_checkpointing for layer in layers] == flags
        calls.clear()
        loss, grads = gradients(model, ids)
        assert len(calls) == 2 + sum(flags)
        assert loss == expected[0]
        for a, b in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(a, b)


class Rerun(steps.CapturedStep):
    """Records nothing: a replay runs the batch in the tensors of the capture again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.captures = 0

    def _warm_up(self, batch: steps.Inputs) -> None:
        self._run(batch)

    def _record(self, batch: steps.Inputs) -> Callable[[], torch.Tensor]:
        self.captures += 1
        self._run(batch)
        made = [(p, p.grad) for p in self._parameters if p.grad is not None]

        def replay() -> torch.Tensor:
            self._forget()
            loss = self._run(batch)
            for parameter, grad in made:
                grad.copy_(parameter.grad)
            return loss.clone()

        return replay


class Toy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout(0.5)

    def run(self, batch: steps.Inputs) -> torch.Tensor:
        loss = self.dropout(self.used(batch["x"])).square().mean()
        loss.backward()
        return loss.detach()


def test_a_captured_step_adds_to_gradients_as_an_eager_one() -> None:
    toy, other = Toy(), Toy()
    other.load_state_dict(toy.state_dict())
    captured = Rerun(toy.run, toy.parameters())
    batches = [{"x": torch.randn(n, 4)} for n in (3, 3, 2, 3, 2)]
    runs: list[list[torch.Tensor]] = []
    for run, module in ((captured, toy), (other.run, other)):
        torch.manual_seed(5)
        seen = []
        for i, batch in enumerate(batches):
            if i in (2, 4):
                module.zero_grad(set_to_none=i == 2)
            seen += [run(batch), module.used.weight.grad.clone()]
        runs.append(seen)
        assert module.unused.weight.grad is None
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    assert captured.captures == 2


def test_gradients_that_wait_survive_a_capture() -> None:
    toy = Toy().eval()
    toy.used.weight.grad = torch.ones(4, 4)
    waiting = toy.used.weight.grad
    x = torch.randn(3, 4)
    expected = torch.ones(4, 4) + torch.autograd.grad(toy.used(x).square().mean(), toy.used.weight)[0]
    Rerun(toy.run, toy.parameters())({"x": x})
    torch.testing.assert_close(toy.used.weight.grad, expected)
    assert torch.equal(waiting, torch.ones(4, 4))


def test_few_shapes_are_captured_and_a_failure_is_said_once() -> None:
    toy = Toy().eval()
    captured = Rerun(toy.run, toy.parameters())
    for n in range(1, 5):
        captured({"x": torch.randn(n, 4)})
    with pytest.warns(UserWarning, match="of more than 4 shapes"):
        captured({"x": torch.randn(5, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured({"x": torch.randn(6, 4)})
    assert captured.captures == 4

    class Fails(Rerun):
        def _record(self, batch: steps.Inputs) -> Callable[[], torch.Tensor]:
            raise RuntimeError("not\nhere")

    failing = Fails(toy.run, toy.parameters())
    toy.zero_grad()
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="kernel by kernel: not"):
        failing({"x": x})
    expected = torch.autograd.grad(toy.used(x).square().mean(), toy.used.weight)[0]
    torch.testing.assert_close(toy.used.weight.grad, expected)
    failing({"x": x})
    torch.testing.assert_close(toy.used.weight.grad, 2 * expected)


def run_of(options: dict[str, Any], output_dir: Path, **values: Any) -> Any:
    from fastlora.training.config import load
    from fastlora.training.train import train

    return train(load(None, options | {"output_dir": str(output_dir)} | values))


@pytest.mark.parametrize("packing", [True, False])
def test_training_compiled_has_the_same_losses(
    options: dict[str, Any], tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"lora_dropout": 0.0, "packing": packing, "max_steps": 3, "gradient_checkpointing": True}
    eager = run_of(options, tmp_path / "eager")
    real = steps.compile_model
    torch._dynamo.reset()
    # The default compiler would need longer than the whole test.
    monkeypatch.setattr(steps, "compile_model", lambda model, kernel: real(model, kernel, backend="aot_eager"))
    compiled = run_of(options, tmp_path / "compiled", step="compile")
    assert [loss for _, loss in compiled.losses] == pytest.approx([loss for _, loss in eager.losses], rel=1e-4)
    assert compiled.eval_loss_after == pytest.approx(eager.eval_loss_after, rel=1e-4)


def test_training_through_captured_steps_has_the_same_losses(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.training import train as training

    options = options | {"packing": False, "gradient_accumulation_steps": 2, "lora_dropout": 0.0}
    eager = run_of(options, tmp_path / "eager")
    captures = []
    monkeypatch.setattr(training, "check_step", lambda config, device: None)
    monkeypatch.setattr(steps, "CapturedStep", lambda *args: captures.append(Rerun(*args)) or captures[-1])
    captured = run_of(options, tmp_path / "captured", step="cuda_graphs")
    assert [loss for _, loss in captured.losses] == pytest.approx([loss for _, loss in eager.losses], rel=1e-4)
    assert captures[0].captures == 1


class Trainers:
    """transformers.Trainer on a tiny model and rows of several lengths, as somebody's own script has it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.options = folder, options

    def make(self, *, kind: Any = None, device: str = "cpu", dropout: float = 0.0, **arguments: Any) -> Any:
        import transformers
        from tiny import make_tokenizer

        tokenizer = make_tokenizer()
        config = models.config("llama-3-8b", 2, 300, **(SIZES | {"head_dim": 64 if device == "cuda" else 16}))
        model = models.base(config, torch.device(device), dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        model = models.adapt(model, r=4)
        for module in model.modules():
            if dropout and hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
        fastlora.accelerate(model, **self.options)
        values = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
        }
        values |= {"learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "use_cpu": device == "cpu", "seed": 0}
        values |= {"label_names": ["labels"], "bf16": device == "cuda", "remove_unused_columns": False, **arguments}
        args = transformers.TrainingArguments(output_dir=str(self.folder), **values)
        args._n_gpu = min(args.n_gpu, 1)
        generator = torch.Generator().manual_seed(3)
        lengths = [9, 12, 12, 5, 7, 11, 12, 6] * 2
        rows = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in lengths]
        collate = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        examples = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in rows]
        return (kind or transformers.Trainer)(model=model, args=args, train_dataset=examples, data_collator=collate)

    @staticmethod
    def losses(trainer: Any) -> list[float]:
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def trainers(tmp_path: Path) -> Trainers:
    return Trainers(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_of_ones_own_captures_its_steps(
    trainers: Trainers, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    import transformers

    expected = trainers.losses(trainers.make())
    captures: list[Rerun] = []
    monkeypatch.setattr(steps, "_check_device", lambda device: None)
    monkeypatch.setattr(steps, "CapturedStep", lambda *args: captures.append(Rerun(*args)) or captures[-1])
    trainer = trainers.make(gradient_checkpointing=checkpointing)
    fastlora.capture_steps(trainer, 16)
    assert isinstance(trainer, transformers.Trainer)
    assert type(trainer).__name__ == "CapturedTrainer"
    shapes = {tuple(value.shape) for batch in trainer.get_train_dataloader() for value in batch.values()}
    assert shapes == {(2, 16)}
    assert trainers.losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert [one.captures for one in captures] == [1]
    inner = trainer.model.get_base_model()
    assert inner.config._attn_implementation.startswith(CAUSAL)
    assert [layer.gradient_checkpointing for layer in inner.model.layers] == [checkpointing] * 2


def test_what_a_trainer_captures_has_one_length_and_padding_on_the_right() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "weight": torch.ones(2)}
    found = steps.OneLength(lambda examples: batch, 5)(None)
    assert found["input_ids"].tolist() == [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert found["labels"].tolist() == [[1, 2, 3, -100, -100], [4, 5, 6, -100, -100]]
    assert found["weight"].shape == (2,)
    assert steps.OneLength(lambda examples: batch, None)(None)["input_ids"] is ids
    for changes, words in (
        ({"attention_mask": mask.flip(1)}, "padding_side = 'right'"),
        ({"position_ids": ids}, "packed sequences apart: the data collator made position_ids"),
    ):
        with pytest.raises(ValueError, match=words):
            steps.OneLength(lambda examples, changes=changes: batch | changes, 5)(None)
    with pytest.raises(ValueError, match="3 tokens a row is longer than length=2"):
        steps.OneLength(lambda examples: batch, 2)(None)


def test_what_a_trainer_cannot_capture_says_what_to_change(trainers: Trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    with pytest.raises(TypeError, match=r"transformers\.Trainer, got list"):
        fastlora.capture_steps([])
    trainer = trainers.make()
    with pytest.raises(RuntimeError, match="needs a CUDA GPU: the model is on cpu"):
        fastlora.capture_steps(trainer)
    assert type(trainer) is transformers.Trainer

    def refused(words: str, trainer: Any) -> None:
        with pytest.raises(ValueError, match=f"steps cannot be captured: .*{words}"):
            fastlora.capture_steps(trainer)

    refused("set lora_dropout=0", trainers.make(dropout=0.1, gradient_checkpointing=True))
    refused(
        "take transformers.Trainer", trainers.make(kind=type("Sub", (transformers.Trainer,), {"__module__": "trl.x"}))
    )
    for name, value, words in (("fp16", True, "bf16=True"), ("_n_gpu", 2, "train on one")):
        trainer = trainers.make()
        monkeypatch.setattr(trainer.args, name, value)
        refused(words, trainer)
    trainer = trainers.make()
    trainer.model.get_base_model().config._attn_implementation = "eager"
    refused("attn_implementation='sdpa' instead of 'eager'", trainer)
    trainer = trainers.make()
    monkeypatch.setattr(type(trainer.model.active_peft_config), "is_prompt_learning", True)
    refused("take another method", trainer)
    monkeypatch.undo()
    trainer = trainers.make()
    trainer.model = trainer.model.get_base_model().model
    refused("LlamaModel may need its masks", trainer)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_of_ones_own_replays_graphs(tmp_path: Path, checkpointing: bool) -> None:
    trainers = Trainers(tmp_path, blocks=True, loss=True)
    expected = trainers.losses(trainers.make(device="cuda"))
    trainer = trainers.make(device="cuda", gradient_checkpointing=checkpointing)
    fastlora.capture_steps(trainer, 16)
    assert trainers.losses(trainer) == pytest.approx(expected, rel=5e-3)
    (captured,) = trainer._captured_steps.values()
    assert captured.failure is None
    assert len(captured._graphs) == 1
    fastlora.restore(trainer.model)


@pytest.mark.parametrize("packing", [True, False])
def test_training_with_a_chunked_loss_and_no_masks_has_the_same_losses(
    options: dict[str, Any], tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"lora_dropout": 0.0, "packing": packing, "gradient_accumulation_steps": 2}
    eager = run_of(options, tmp_path / "eager", blocks=False, chunked_loss=False)
    calls: list[Any] = []
    real = loss_module.linear_cross_entropy
    monkeypatch.setattr(loss_module, "linear_cross_entropy", lambda *a, **k: calls.append(k["count"]) or real(*a, **k))
    values = {"chunked_loss": True, "attention": "auto", "blocks": True, "gradient_checkpointing": True}
    found = run_of(options, tmp_path / "found", kept_blocks=1, **values)
    assert [loss for _, loss in found.losses] == pytest.approx([loss for _, loss in eager.losses], rel=1e-4)
    assert found.eval_loss_after == pytest.approx(eager.eval_loss_after, rel=1e-4)
    assert calls
    assert all(isinstance(count, torch.Tensor) for count in calls)


@pytest.mark.parametrize(
    ("values", "device", "words"),
    [
        ({"attention": "cudnn", "trainer": "trl"}, "cuda", "set attention stock"),
        ({"chunked_loss": True, "trainer": "trl"}, "cpu", "set chunked_loss false"),
        ({"attention": "auto", "method": "prefix"}, "cpu", "set step eager and attention stock"),
        ({"attention": "auto", "trainer": "auto"}, "cpu", None),
        ({"chunked_loss": True, "trainer": "auto"}, "cpu", None),
        ({"step": "cuda_graphs"}, "cpu", "needs a CUDA GPU"),
        ({"step": "cuda_graphs", "trainer": "trl"}, "cuda", "set trainer transformers"),
        ({"step": "compile", "trainer": "trl"}, "cpu", "set trainer transformers"),
        ({"step": "cuda_graphs", "gradient_checkpointing": True, "lora_dropout": 0.1}, "cuda", "set lora_dropout 0"),
        ({"step": "cuda_graphs", "gradient_checkpointing": True}, "cuda", None),
        ({"step": "cuda_graphs", "lora_dropout": 0.1}, "cuda", None),
        ({"step": "compile", "trainer": "auto"}, "cpu", None),
    ],
)
def test_what_a_step_cannot_be(values: dict[str, Any], device: str, words: str | None) -> None:
    from fastlora.training.config import TrainConfig, uses_trl
    from fastlora.training.errors import UserError
    from fastlora.training.train import check_step

    config = TrainConfig(model="m", data="d", **values)
    if words is None:
        check_step(config, torch.device(device))
        assert not uses_trl(config)
    else:
        with pytest.raises(UserError, match=words):
            check_step(config, torch.device(device))


def test_checkpointed_blocks_repeat_their_random_numbers_unless_told_not_to() -> None:
    model = model_of("llama-3-8b")
    for random in (True, False):
        steps.checkpoint_blocks(model.get_base_model(), random=random)
        functions = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
        kept = {function.keywords["preserve_rng_state"] for function in functions if function is not None}
        assert kept == {random}


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": True}, {"blocks": True, "liger": "captured"}, {"blocks": True, "liger": True, "loss": True}],
    ids=str,
)
def test_a_graph_replays_the_step(options: dict[str, Any], checkpointing: bool) -> None:
    if options.get("liger"):
        pytest.importorskip("liger_kernel.transformers")
    device = torch.device("cuda")
    config = models.config("llama-3-8b", 2, 97, **(SIZES | {"head_dim": 64}))
    results = []
    for kind in ("eager", "captured"):
        model = models.adapt(models.base(config, device), r=4)
        fastlora.accelerate(model, **options)
        models.checkpoint(model.train(), checkpointing, captured=kind == "captured", keep=len(options) - 2)
        use_causal_attention(model.get_base_model(), "auto")
        optimizer = torch.optim.AdamW([p for _, p in models.adapters(model)], lr=1e-2, fused=True)

        def run(batch: steps.Inputs, model: Any = model) -> torch.Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=batch["ids"], labels=batch["ids"]).loss
            loss.backward()
            return loss.detach()

        captured = steps.CapturedStep(run, (p for _, p in models.adapters(model)))
        step = captured if kind == "captured" else run
        losses = []
        for ids in models.token_batches(config, 2, 32, device, 0, 6):
            losses.append(step({"ids": ids}).item())
            optimizer.step()
            optimizer.zero_grad()
        fastlora.restore(model)
        assert captured.failure is None
        assert (len(captured._graphs) == 1) == (kind == "captured")
        results.append(losses)
    assert results[1] == pytest.approx(results[0], rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("liger", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_eager_step_waits_for_nothing(checkpointing: bool, liger: bool) -> None:
    if liger:
        pytest.importorskip("liger_kernel.transformers")
    device = torch.device("cuda")
    config = models.config("llama-3-8b", 2, 97, **(SIZES | {"head_dim": 64}))
    model = models.adapt(models.base(config, device), r=4)
    fastlora.accelerate(model, blocks=True, liger=liger, loss=True)
    models.checkpoint(model.train(), checkpointing, keep=1)
    use_causal_attention(model.get_base_model(), "auto")
    optimizer = torch.optim.AdamW([p for _, p in models.adapters(model)], lr=1e-2, fused=True)
    (ids,) = models.token_batches(config, 2, 32, device, 0, 1)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        fastlora.restore(model)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("length", [64, 200])
def test_attention_kernels_on_grouped_heads(kernel: str, length: int) -> None:
    from tolerance import assert_close
    from torch.profiler import ProfilerActivity, profile

    if kernel == "cudnn" and fastest(torch.cuda.get_device_capability()) != "cudnn":
        pytest.skip("not where cuDNN is chosen")
    batch, heads, groups, width = 2, 8, 2, 128
    # As q, k and v of one product lie: rows of all heads side by side.
    joint = torch.randn(batch, length, (heads + 2 * groups) * width, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(batch, length, heads * width, device="cuda", dtype=torch.bfloat16)

    def results(joint: torch.Tensor, dy: torch.Tensor, name: str) -> list[torch.Tensor]:
        joint = joint.detach().requires_grad_()
        parts = joint.split([heads * width, groups * width, groups * width], -1)
        q, k, v = (part.view(batch, length, -1, width).transpose(1, 2) for part in parts)
        module = torch.nn.Module()
        module.num_key_value_groups = heads // groups
        module.is_causal = True
        y, _ = attention._attend(name)(module, q, k, v, None, scaling=width**-0.5)
        y = y.reshape(dy.shape)
        return [y.detach(), torch.autograd.grad(y, joint, dy)[0]]

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        found = results(joint, dy, kernel)
        torch.cuda.synchronize()
    names = " ".join(event.name for event in profiler.events() or ())
    assert ("cudnn" if kernel == "cudnn" else "flash") in names
    truth = results(joint.double(), dy.double(), "pytorch")
    for actual, base, true in zip(found, results(joint, dy, "pytorch"), truth, strict=True):
        assert_close(actual, base, true)
