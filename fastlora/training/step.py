"""How a step is launched: kernel by kernel, compiled, or captured once in a CUDA graph and replayed.

With few tokens a step is bound by the host that launches it. A compiled model launches fewer kernels, a captured one
launches all of them at once.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora import decoded
from fastlora.tables import for_graphs
from fastlora.training.attention import CAUSAL, use_causal_attention

Inputs = dict[str, torch.Tensor]
_WARM_UP = 3
_SHAPES = 4
"""Batch shapes captured at most: every graph keeps its activations."""


def checkpoint_blocks(model: Any, *, random: bool = True, keep: int = 0) -> None:
    """Let a transformers model recompute its blocks in the backward pass.

    random: whether blocks draw random numbers (dropout), which are then drawn again as they were. A captured step
    cannot: nobody may ask for the state of a generator while it is captured.
    keep: the last so many blocks keep what they computed. One costs no memory where the loss takes less than the
    backward pass of a block, since it would be computed again right after the loss.

    Its embeddings are not made to require gradients, as transformers does for a kind of checkpointing that needs it:
    the first block would compute a gradient that nobody uses, and a compiler could not take the model as one graph.
    """
    # transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": random})
    model.disable_input_require_grads()
    lists: list[list[Any]] = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for block in max(lists, key=len, default=[]) if getattr(block, "gradient_checkpointing", False)]
    for block in blocks[len(blocks) - min(keep, len(blocks)) :]:
        block.gradient_checkpointing = False


def compile_model(model: Any, attention: str = "pytorch", **options: Any) -> None:
    """Compile the transformers model inside a PEFT model, in place and as one graph, for batches of one shape each.

    attention: the kernel of `use_causal_attention`. options: what `torch.compile` takes besides.
    """
    inner = model.get_base_model()
    use_causal_attention(inner, attention)
    inner.compile(fullgraph=True, dynamic=False, **options)


class _Captured(NamedTuple):
    """A recorded batch."""

    batch: Inputs
    """What a replay reads."""
    replay: Callable[[], torch.Tensor]
    """Makes the loss, and in place the gradients."""
    grads: dict[nn.Parameter, torch.Tensor]
    copies: list[torch.Tensor]
    """Dense weights that a replay reads, and which must outlive it."""


def _gradients(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, torch.Tensor]:
    """Of those that have one."""
    return {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}


@functools.cache
def capture_stream(index: int) -> torch.cuda.Stream:
    """The one stream of a device for warm-up and capture: autograd returns to the streams of the forward pass, and
    libraries keep a workspace for every stream that they were called on."""
    return torch.cuda.Stream(index)


class CapturedStep:
    """Forward and backward passes as CUDA graphs, one for each shape of batch.

    run: computes the loss of a batch and calls backward; returns the loss without a graph. It must neither look at
    values on the host nor depend on anything but the batch and the parameters.
    parameters: those that learn.

    A call returns the loss and adds to the parameters' gradients, as ``run`` would. The first batch of a shape is used
    to warm up and capture, with the gradients and the random numbers put back afterwards. A batch of one shape more
    than are kept, and every batch after a capture failed, runs without a graph, which a warning says once.
    """

    def __init__(self, run: Callable[[Inputs], torch.Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._run = run
        self._parameters = list(parameters)
        self._graphs: dict[Any, _Captured] = {}
        self._pool: Any = None
        self._said = False
        self.failure: str | None = None
        """Why no batch is captured any more."""

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        key = tuple((name, value.shape, value.dtype) for name, value in sorted(inputs.items()))
        if key not in self._graphs:
            if self.failure is not None:
                return self._run(inputs)
            if len(self._graphs) == _SHAPES:
                self._say_once(f"batches of more than {_SHAPES} shapes: all others are launched kernel by kernel")
                return self._run(inputs)
            batch = {name: value.clone() for name, value in inputs.items()}
            try:
                self._graphs[key] = self._capture(batch)
            except RuntimeError as error:
                self.failure = str(error).strip().split("\n")[0]
                self._say_once(f"the step is launched kernel by kernel: {self.failure}")
                return self._run(inputs)
        captured = self._graphs[key]
        for name, value in inputs.items():
            captured.batch[name].copy_(value)
        # A replay writes its gradients, to where those of an earlier one may still be.
        before = _gradients(captured.grads)
        kept = [torch.empty_like(grad) for grad in before.values()]
        if before:
            torch._foreach_copy_(kept, list(before.values()))
        loss = captured.replay()
        if before:
            torch._foreach_add_([captured.grads[parameter] for parameter in before], kept)
        for parameter, grad in captured.grads.items():
            parameter.grad = grad
        return loss

    def _say_once(self, text: str) -> None:
        if not self._said:
            warnings.warn(text, stacklevel=3)
        self._said = True

    def _capture(self, batch: Inputs) -> _Captured:
        before = [parameter.grad for parameter in self._parameters]
        try:
            with self._unchanged_random_numbers():
                self._forget()
                self._warm_up(batch)
                # Without gradients to add to, the backward pass leaves those that it makes, which every replay makes
                # again in the same place. A parameter that gets none keeps none: the optimizer then leaves it alone.
                self._forget()
                return _Captured(batch, self._record(batch), _gradients(self._parameters), decoded.held())
        finally:
            for parameter, grad in zip(self._parameters, before, strict=True):
                parameter.grad = grad

    def _forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def _unchanged_random_numbers(self) -> Iterator[None]:
        device = self._parameters[0].device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            yield

    def _warm_up(self, batch: Inputs) -> None:
        """Run until nothing is compiled, tuned or allocated for the first time."""
        stream = capture_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), for_graphs():
            for _ in range(_WARM_UP):
                self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self, batch: Inputs) -> Callable[[], torch.Tensor]:
        """The function that runs a batch as it stands in the tensors of ``batch``."""
        torch.cuda.synchronize()
        stream = capture_stream(torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # a collection may free what must not be freed during a capture
        try:
            # Backward passes run on threads of autograd, whose calls are part of the capture as well.
            with (
                for_graphs(),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                loss = self._run(batch)
        finally:
            gc.enable()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss.clone()  # the next replay writes to the same place

        return replay


class StepLauncher:
    """Mix-in of a Trainer that captures its steps where ``captured`` is set, and takes no attention mask where
    ``causal`` is set."""

    captured = causal = False
    _captured_steps: dict[int, CapturedStep] | None = None

    def training_step(self: Any, model: nn.Module, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.causal:
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        if not self.captured:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        # A loss may be divided by it, once and for all replays: the last step of an epoch may accumulate fewer batches.
        accumulated = getattr(self, "current_gradient_accumulation_steps", 1)
        self._captured_steps = self._captured_steps or {}
        if accumulated not in self._captured_steps:
            run = super().training_step  # type: ignore[misc]

            def step(batch: Inputs) -> torch.Tensor:
                rest = dict(batch)
                count = rest.pop("num_items_in_batch", None)
                return run(model, rest, count)

            parameters = (p for p in model.parameters() if p.requires_grad)
            self._captured_steps[accumulated] = CapturedStep(step, parameters)
        batch = dict(self._prepare_inputs(inputs))
        if num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=next(iter(batch.values())).device)
            batch["num_items_in_batch"] = count
        return self._captured_steps[accumulated](batch)


_PADDING = {"labels": -100}
"""What stands for no token, where it is not 0."""
_PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What a collator adds that lays several sequences into one row."""


class OneLength:
    """A data collator whose batches another one makes, padded on the right to a length if there is one."""

    def __init__(self, collate: Callable[[Any], Any], length: int | None) -> None:
        self.collate, self.length = collate, length

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        batch = dict(self.collate(examples))
        shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
        if packed := [name for name in _PACKED if name in batch]:
            raise ValueError(f"a captured step cannot tell packed sequences apart: the data collator made {packed[0]}")
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ValueError("a captured step pads on the right: set tokenizer.padding_side = 'right'")
        if self.length is None:
            return batch
        if shape[1] > self.length:
            raise ValueError(f"a batch of {shape[1]} tokens a row is longer than length={self.length}")
        missing = (0, self.length - shape[1])
        return {
            name: nn.functional.pad(value, missing, value=_PADDING.get(name, 0)) if value.shape == shape else value
            for name, value in batch.items()
        }


def _why_not_captured(trainer: Any, inner: Any) -> str | None:
    """What to change of a trainer whose steps cannot be captured, or None. inner: the transformers model."""
    args, peft = trainer.args, getattr(trainer.model, "active_peft_config", None)
    if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__):
        return "TRL's trainers look at masks and losses in every step: take transformers.Trainer"
    if getattr(peft, "is_prompt_learning", False):
        return "prompts and prefixes change what tokens see: take another method"
    if not any(kind.__name__.endswith("ForCausalLM") for kind in type(inner).__mro__):
        return f"{type(inner).__name__} may need its masks: only causal language models are captured"
    if not inner.config._attn_implementation.startswith(("sdpa", CAUSAL)):
        return f"load the model with attn_implementation='sdpa' instead of {inner.config._attn_implementation!r}"
    if args.n_gpu > 1 or args.world_size > 1:
        return "a graph cannot wait for other processes or GPUs: train on one"
    if args.fp16:
        return "the scale of an fp16 loss follows its gradients: set bf16=True instead of fp16"
    return None


def _check_device(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"capturing steps needs a CUDA GPU: the model is on {device}")


def capture_steps(trainer: Any, length: int | None = None, *, attention: str = "auto") -> None:
    """Let a ``transformers.Trainer`` run forward and backward as CUDA graphs, one for each shape of batch.

    It is for steps of a few thousand tokens, which the host takes longer to launch than the GPU to compute. Call it
    after ``fastlora.accelerate`` and before ``trainer.train()``. Clipping, the optimizer, the schedule, callbacks,
    evaluation and checkpoints stay the trainer's. The model attends without masks from then on, so padding has to be
    on the right, and gradient checkpointing is set up here if the trainer's arguments ask for it. A step that
    cannot be captured after all runs as before, which a warning says once.

    length: tokens a row to which batches are padded; None for batches that have one length already, such as packed
    ones. attention: the kernel of `use_causal_attention`.

    Raises TypeError for what is no Trainer, RuntimeError for a model that is not on a CUDA GPU, and ValueError for a
    set-up whose steps cannot be captured, naming what to change. The collator raises ValueError for padding on the
    left, for packed sequences with positions of their own, and for a batch that is longer than ``length``.
    """
    import transformers

    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    model: Any = trainer.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if (reason := _why_not_captured(trainer, inner)) is not None:
        raise ValueError(f"steps cannot be captured: {reason}")
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers renamed it
    asked = [name for name in names if getattr(trainer.args, name, False)]
    checkpointing = bool(asked) or any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if checkpointing and any(isinstance(module, nn.Dropout) and module.p > 0 for module in inner.modules()):
        raise ValueError("steps cannot be captured: checkpointed blocks cannot repeat dropout: set lora_dropout=0")
    _check_device(next(model.parameters()).device)
    if checkpointing:
        checkpoint_blocks(inner, random=False)
        for name in asked:  # the trainer would turn it on in its own way
            setattr(trainer.args, name, False)
    use_causal_attention(inner, attention)
    trainer.data_collator = OneLength(trainer.data_collator, length)
    kind = type(trainer)
    trainer.__class__ = type(f"Captured{kind.__name__}", (StepLauncher, kind), {"captured": True, "causal": True})
