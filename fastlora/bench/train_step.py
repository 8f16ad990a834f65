"""Whole training steps beside their peers: ``fastlora bench --suite train``.

A step is forward, backward and AdamW on all adapters, in bf16 under autocast, on random tokens and a model with random
weights in nested NF4 (`fastlora.bench.models`). Stacks that change what others run are measured in a process of their
own; every process measures its own product ceiling.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.record import Row

R, ALPHA, LR, VOCABULARY = 16, 32, 2e-4, 32000
WARM_UP, TIMED = 3, 8
"""Steps. The loss that is compared is the one of the last."""


@dataclasses.dataclass(frozen=True)
class Stack:
    """A way to train adapters on a 4-bit model."""

    process: str
    """Stacks of one name are measured in one process, in the order of `STACKS`."""
    fuse: str = ""
    """layers or blocks of `fastlora.accelerate`; nothing for a peer."""
    liger: bool = False
    prepared: bool = False
    """The model went through PEFT's ``prepare_model_for_kbit_training``: norms, embeddings and head are float32, and so
    is what one layer gives to the next."""
    compiled: bool = False
    captured: bool = False
    """The step is replayed as a CUDA graph, as ``fastlora train --step cuda_graphs`` does."""
    offloaded: bool = False
    """Checkpoints wait in the CPU's memory, as they always do in Unsloth."""
    whole: bool = False
    """The head and its loss in chunks, attention without masks by the kernel for the GPU, and of checkpointed blocks
    the last one left out, as ``fastlora train --chunked-loss --attention auto --kept-blocks 1`` does."""
    copies: bool = False
    """Dense copies of all packed weights are kept, as ``fastlora train --decoded-memory`` does where they fit."""


PEFT, PEFT_LIGER, PEFT_COMPILED, UNSLOTH = "HF + PEFT", "HF + PEFT + Liger", "HF + PEFT + torch.compile", "Unsloth"
PEFT_PREPARED = f"{PEFT}, prepared"
LAYERS, BLOCKS, BLOCKS_LIGER = "fastlora layers", "fastlora blocks", "fastlora blocks + Liger"
BLOCKS_LOSS = f"{BLOCKS} + loss"
LOSS_GRAPH = f"{BLOCKS_LOSS}, CUDA graph"
COPIES = f"{LOSS_GRAPH}, W kept"
OFFLOADED, GRAPH = f"{BLOCKS_LIGER}, offloaded", f"{BLOCKS_LIGER}, CUDA graph"
STACKS: dict[str, Stack] = {
    PEFT_PREPARED: Stack("plain", prepared=True),
    f"{LAYERS}, prepared": Stack("plain", "layers", prepared=True),
    f"{BLOCKS}, prepared": Stack("plain", "blocks", prepared=True),
    PEFT: Stack("plain"),
    LAYERS: Stack("plain", "layers"),
    f"{LAYERS}, CUDA graph": Stack("plain", "layers", captured=True),
    BLOCKS: Stack("plain", "blocks"),
    f"{BLOCKS}, CUDA graph": Stack("plain", "blocks", captured=True),
    BLOCKS_LOSS: Stack("plain", "blocks", whole=True),
    LOSS_GRAPH: Stack("plain", "blocks", whole=True, captured=True),
    COPIES: Stack("plain", "blocks", whole=True, captured=True, copies=True),
    f"{BLOCKS_LOSS}, prepared": Stack("plain", "blocks", whole=True, prepared=True),
    # Liger replaces functions of transformers for the whole process: after all that must run without it.
    BLOCKS_LIGER: Stack("plain", "blocks", liger=True, whole=True),
    OFFLOADED: Stack("plain", "blocks", liger=True, whole=True, offloaded=True),
    GRAPH: Stack("plain", "blocks", liger=True, whole=True, captured=True),
    f"{BLOCKS_LIGER}, prepared": Stack("plain", "blocks", liger=True, whole=True, prepared=True),
    PEFT_LIGER: Stack("Liger", liger=True),
    UNSLOTH: Stack("Unsloth"),
    PEFT_COMPILED: Stack("torch.compile", compiled=True),
    f"{LAYERS} + torch.compile": Stack("torch.compile", "layers", compiled=True),
    f"{BLOCKS} + torch.compile": Stack("torch.compile", "blocks", compiled=True),
}
ALIKE = (BLOCKS_LIGER, GRAPH, f"{LAYERS}, CUDA graph", f"{BLOCKS}, CUDA graph")
"""Stacks that take what the one before them in the tables takes, or lie between two others: pictures leave them out."""
CAPTURED_TOKENS = 4096
"""Steps of more tokens are hardly bound by their launches: only the fastest is measured as a CUDA graph."""
FEW_BLOCKS = 8
"""Models of more blocks take longer for a step, fewer of which are timed, and not with the layers alone fused. Those of
fewer have few checkpoints, which are not offloaded."""


def skipped(name: str, case: Case) -> bool:
    """Whether a stack is not measured on a case, to save time."""
    stack = STACKS[name]
    deep = case.blocks > FEW_BLOCKS
    if (stack.offloaded and not (case.checkpointing and deep)) or (stack.copies and deep):
        return True
    return (stack.captured and not stack.whole and case.tokens > CAPTURED_TOKENS) or (stack.fuse == "layers" and deep)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch."""

    model: str
    blocks: int
    batch: int
    length: int
    checkpointing: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    """Sizes of the model's configuration that differ."""
    vocabulary: int = VOCABULARY

    @property
    def title(self) -> str:
        kept = ", checkpointing" if self.checkpointing else ""
        return f"{self.model}, {self.blocks} blocks, {self.batch} x {self.length}{kept}"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The inverse of ``dataclasses.asdict``, also after JSON."""
        return cls(**{**values, "changes": tuple((name, value) for name, value in values["changes"])})

    def config(self) -> Any:
        from fastlora.bench import models

        return models.config(self.model, self.blocks, self.vocabulary, **dict(self.changes))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One stack on one case, or why it was not measured."""

    stack: str
    case: Case
    absent: str | None = None
    ms: float = 0.0
    """Median time of a step."""
    peak_bytes: int | None = None
    """The most that was allocated during a step, weights included; None on a CPU."""
    losses: tuple[float, ...] = ()
    gpu_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    """GPU time of a step by class of kernel."""
    flops_per_second: float | None = None
    """The product ceiling that the process measured."""

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.case.tokens / self.ms

    @property
    def mfu(self) -> float | None:
        """Operations that the step needs over those that the ceiling allows in its time."""
        from fastlora.bench import models

        if self.flops_per_second is None:
            return None
        needed = models.step_operations(self.case.config(), self.case.batch, self.case.length, R)
        return needed / (self.flops_per_second * 1e-3 * self.ms)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Measured:
        values = json.loads(line)
        return cls(**{**values, "case": Case.from_dict(values["case"]), "losses": tuple(values["losses"])})


# What a kernel is, by its name; the first that matches. Products of the rank are told by their sizes, in `breakdown`.
GEMM, SIDE, IDLE = "products", "LoRA side passes", "idle"
_CLASSES = (
    ("communication", r"nccl"),
    ("loss", r"cross_?entropy|nll_loss|rescale|soft_?max|_ce_|chunked"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("optimizer", r"multi_tensor|adam|lpnorm"),
    ("dequantization", r"dequant|nf4"),
    ("activations", r"silu|swiglu|geglu|gelu|gated|activation"),
    (GEMM, r"gemm|nvjet|cutlass|xmma|matmul|linear_kernel|merged_kernel|input_gradient|cublas|split_?k|gemv"),
    (SIDE, r"project_|du_db|gradients?_|pack_kernel|add_parts|lora|few_rows"),
    ("norms, RoPE, elementwise", r"norm|rope|rotary|elementwise|reduce_kernel|triton_|cat_?array"),
)


def kernel_class(name: str) -> str:
    """What a GPU kernel does, by its name."""
    for kind, pattern in _CLASSES:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def breakdown(step: Callable[[], Any], ms: float, rank: int = R, steps: int = 2) -> dict[str, float]:
    """GPU milliseconds of a step by class of kernel; ``ms``, the time of a step, tells what it idles."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            if event.device_time > 0 and not getattr(event, "is_user_annotation", False):
                kind = kernel_class(event.name)
                found[kind] = found.get(kind, 0.0) + event.device_time
            continue
        if is_side_product(event.name, event.input_shapes, rank):
            moved = sum(kernel.duration for kernel in event.kernels if kernel_class(kernel.name) == GEMM)
            found[GEMM] = found.get(GEMM, 0.0) - moved
            found[SIDE] = found.get(SIDE, 0.0) + moved
    times = {kind: 1e-3 * value / steps for kind, value in found.items()}
    return {**times, IDLE: max(0.0, ms - sum(times.values()))}


def is_side_product(name: str, shapes: Any, rank: int) -> bool:
    """Whether a PyTorch operator multiplies with a matrix of the adapter's rank."""
    matrices = [shape for shape in shapes or () if isinstance(shape, list) and len(shape) == 2]
    return name.startswith("aten::") and len(matrices) > 1 and any(rank in shape for shape in matrices)


def missing(stack: Stack) -> str | None:
    """Why a stack cannot be measured here, or None."""
    import fastlora

    packages = {"Unsloth": ["unsloth"]}.get(stack.process, ["peft", "bitsandbytes"])
    for package in (*packages, *(["liger_kernel"] if stack.liger else [])):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if stack.fuse == "blocks" and "blocks" not in inspect.signature(fastlora.accelerate).parameters:
        return "fastlora.accelerate has no blocks"
    if (stack.captured or stack.process == "Unsloth") and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    return None


def _apply_liger(model_type: str) -> None:
    """Let transformers build models of this type with Liger's kernels, the fused loss included."""
    from liger_kernel.transformers import monkey_patch

    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]()


def _model(
    stack: Stack, case: Case, device: torch.device, folder: Path | None = None, base: Callable[..., Any] | None = None
) -> Any:
    """The PEFT model of a case as the stack runs it. base: in place of `models.base`."""
    from fastlora.bench import models

    if stack.process == "Unsloth":
        assert folder is not None
        return _unsloth(case, folder)
    config = case.config()
    if stack.liger and not stack.fuse:
        _apply_liger(config.model_type)
    model = (base or models.base)(config, device)
    if stack.prepared:
        from peft import prepare_model_for_kbit_training

        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = models.adapt(model, r=R, alpha=ALPHA)
    if stack.fuse:
        import fastlora

        options: dict[str, Any] = {"blocks": True, "liger": stack.liger} if stack.fuse == "blocks" else {}
        report = fastlora.accelerate(model, loss=stack.whole, decoded=math.inf if stack.copies else 0, **options)
        for block in report.blocks:
            if block.kind == "head and loss" and block.reason is not None:
                raise RuntimeError(f"the loss is not fused: {block.reason}")
    return model


def folder_of(case: Case, folder: Path) -> Path:
    """Where `export` puts the model of a case."""
    return folder / f"{case.model}-{case.blocks}"


def export(case: Case, device: torch.device, folder: Path) -> None:
    """Save the 4-bit base model of a case, with a tokenizer of the special tokens, for those who load checkpoints."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from fastlora.bench import models

    target = folder_of(case, folder)
    if target.exists():
        return
    models.base(case.config(), device).save_pretrained(target)
    words = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", "word"))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(target)


def _unsloth(case: Case, folder: Path) -> Any:
    """The model of a case from Unsloth's public interface, as its users get it."""
    from unsloth import FastLanguageModel

    checkpointing: Any = "unsloth" if case.checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        str(folder_of(case, folder)),
        max_seq_length=case.length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_exact_model_name=True,
        fix_tokenizer=False,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=R,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.for_training(model, use_gradient_checkpointing=bool(case.checkpointing)) or model


def train_step(
    model: Any, stack: Stack, case: Case, device: torch.device, *, call: Any = None, seed: int = 0
) -> Callable[[], torch.Tensor]:
    """One step of a stack on a case from the start of its adapters: the loss of the batch before it.

    call: what is called with a batch instead of ``model``, such as a wrapper of it. seed: of the tokens.
    """
    from fastlora.bench import models
    from fastlora.training import step as steps
    from fastlora.training.attention import use_causal_attention
    from fastlora.training.offload import offload_checkpoints

    models.restart(model, 0)
    model.train()
    parameters = [parameter for _, parameter in models.adapters(model)]
    for parameter in parameters:
        parameter.grad = None
    if stack.process != "Unsloth":
        models.checkpoint(model, case.checkpointing, captured=stack.captured, keep=int(stack.whole))
    if stack.offloaded:
        offload_checkpoints(model)
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    (ids,) = models.token_batches(case.config(), case.batch, case.length, device, seed, 1)
    forward = model if call is None else call

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=batch["ids"], labels=batch["ids"]).loss
        loss.backward()
        return loss.detach()

    launched: Callable[[dict[str, torch.Tensor]], torch.Tensor] = run
    captured = steps.CapturedStep(run, parameters) if stack.captured else None
    if stack.captured or stack.compiled or stack.whole:
        use_causal_attention(model.get_base_model(), "auto" if stack.whole else "pytorch")
    if captured is not None:
        launched = captured
    if stack.compiled:
        # Its 4-bit layers may break PEFT's graph in pieces; ours are one graph or an error.
        model.get_base_model().compile(fullgraph=bool(stack.fuse), dynamic=False)

    def step() -> torch.Tensor:
        loss = launched({"ids": ids})
        if captured is not None and captured.failure is not None:
            raise RuntimeError(f"the step could not be captured: {captured.failure}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def time_steps(step: Callable[[], torch.Tensor], device: torch.device, steps: int) -> tuple[float, list[torch.Tensor]]:
    """Median milliseconds from the start of a step to that of the next, and their losses."""
    losses = []
    if device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(steps):
            losses.append(step())
            stamps.append(time.perf_counter())
        return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(stamps)), losses
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        losses.append(step())
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)), losses


def measure(
    name: str,
    case: Case,
    model: Any,
    device: torch.device,
    *,
    profile: bool,
    ceiling: float | None,
    call: Any = None,
    seed: int = 0,
) -> Measured:
    """A stack on a case. call, seed: as for `train_step`."""
    step = train_step(model, STACKS[name], case, device, call=call, seed=seed)
    warm_up, timed = (WARM_UP, TIMED) if case.blocks <= FEW_BLOCKS else (2, 4)
    # What a replay writes to was allocated when the graph was captured.
    captured = STACKS[name].captured
    if device.type == "cuda" and captured:
        torch.cuda.reset_peak_memory_stats(device)
    losses = [step() for _ in range(warm_up)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "cuda" and not captured:
        torch.cuda.reset_peak_memory_stats(device)
    ms, more = time_steps(step, device, timed)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    found: dict[str, float] = {}
    if profile and device.type == "cuda":
        try:
            found = breakdown(step, ms)
        except RuntimeError as error:  # the times stand without it
            print(f"{name}: no breakdown: {error}", file=sys.stderr)
    return Measured(
        name, case, None, ms, peak, tuple(float(loss) for loss in (*losses, *more)), found, flops_per_second=ceiling
    )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def here(
    names: Iterable[str],
    cases: Iterable[Case],
    device: torch.device,
    *,
    profile: tuple[Case, ...] = (),
    folder: Path | None = None,
) -> Iterator[Measured]:
    """Stacks on cases, measured in this process, a model for each stack and number of blocks."""
    from fastlora.bench import layer, timing

    cases, ceiling = list(cases), None
    model: Any = None
    key: Any = None
    for name in sorted(names, key=list(STACKS).index):
        stack = STACKS[name]
        reason = missing(stack)
        for case in cases:
            if skipped(name, case):
                continue
            if reason is not None:
                yield Measured(name, case, reason)
                continue
            try:
                # What Unsloth and compilers make of a model is for one length and one way of checkpointing.
                special = stack.process == "Unsloth" or stack.compiled or stack.captured
                kind = (case.model, case.blocks, stack.fuse, stack.liger, stack.prepared, stack.whole, stack.copies)
                wanted = (*kind, *((name, case.title) if special else ()))
                if key != wanted:
                    model, key = None, None
                    _free(device)
                    if stack.compiled:
                        torch._dynamo.reset()
                    model, key = _model(stack, case, device, folder), wanted
                if ceiling is None and device.type == "cuda":
                    ceiling = timing.ceilings(device, rounds=5).flops_per_second
                _free(device)
                yield measure(name, case, model, device, profile=case in profile, ceiling=ceiling)
            except Exception as error:
                model, key = None, None
                yield Measured(name, case, layer.why(error))


def _child(spec: Path) -> None:
    """A process of `apart`: reads what to measure, writes a line for each measurement."""
    request = json.loads(spec.read_text())
    names, folder = request["names"], Path(request["folder"])
    if any(STACKS[name].process == "Unsloth" and missing(STACKS[name]) is None for name in names):
        import unsloth  # noqa: F401  # it asks to be imported before what it changes
    from fastlora.bench.run import device

    cases, profile = (tuple(Case.from_dict(case) for case in request[key]) for key in ("cases", "profile"))
    with Path(request["out"]).open("a") as out:
        if request["export"]:
            for case in cases:
                export(case, device(), folder)
                _free(device())
        for found in here(names, cases, device(), profile=profile, folder=folder):
            out.write(found.to_json() + "\n")
            out.flush()


def apart(
    names: Iterable[str], cases: Iterable[Case], *, profile: tuple[Case, ...] = (), timeout: float = 570
) -> Iterator[Measured]:
    """Stacks on cases, those of one process name in a process of their own, one after another.

    A process that dies or takes longer than ``timeout`` seconds leaves what it has measured; the rest says why not.
    """
    names, cases = list(names), list(cases)
    with tempfile.TemporaryDirectory(dir=_scratch()) as scratch:
        folder = Path(scratch)
        processes = list(dict.fromkeys(STACKS[name].process for name in sorted(names, key=list(STACKS).index)))
        exported = "Unsloth" in processes and missing(STACKS[UNSLOTH]) is None
        if exported and processes[0] == "Unsloth":
            processes.insert(0, "")  # a process that exports and measures nothing
        for i, process in enumerate(processes):
            mine = [name for name in names if STACKS[name].process == process]
            out, spec = folder / f"{i}.jsonl", folder / f"{i}.json"
            out.touch()
            request = {
                "names": mine,
                "cases": [dataclasses.asdict(case) for case in cases],
                "profile": [dataclasses.asdict(case) for case in profile],
                "folder": str(folder / "models"),
                "out": str(out),
                "export": exported and i == 0,
            }
            spec.write_text(json.dumps(request))
            done = set()
            for one in (running := _Child(spec, out, folder / f"{i}.log", timeout)):
                done.add((one.stack, one.case))
                yield one
            reason = running.failure
            for name in mine:
                for case in cases:
                    if (name, case) not in done and not skipped(name, case):
                        yield Measured(name, case, reason or "its process ended without a result")


def _scratch() -> str | None:
    """A folder in memory where there is a large one."""
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2**34:
        return str(shared)
    return None


class _Child:
    """A process that runs `_child`; iterating gives its measurements as they are made."""

    def __init__(self, spec: Path, out: Path, log: Path, timeout: float) -> None:
        self.spec, self.out, self.log, self.timeout = spec, out, log, timeout
        self.failure = ""
        """Why it did not end well, once it has ended."""

    def __iter__(self) -> Iterator[Measured]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(self.out.parent / "unsloth")}
        command = [sys.executable, "-m", "fastlora.bench.train_step", "--child", str(self.spec)]
        end, seen = time.monotonic() + self.timeout, 0
        with self.log.open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            running = True
            while running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                running = process.poll() is None and time.monotonic() < end
                *lines, _ = self.out.read_text().split("\n")  # the last may be half written
                yield from map(Measured.from_json, lines[seen:])
                seen = len(lines)
            if process.poll() is None:
                self.failure = f"its process took longer than {self.timeout:.0f} s"
            elif process.returncode != 0:
                said = [line for line in self.log.read_text().split("\n") if line.strip()]
                self.failure = f"its process ended with {process.returncode}: {said[-1][:200] if said else ''}"
        finally:
            process.kill()
            process.wait()


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the fastest of our stacks is to reach on a case: where memory counts, of those that need no more than
    Unsloth, if there are any."""

    over_unsloth: float
    over_peft: float
    memory: bool = False
    """Whether it must not need more memory than Unsloth."""


def _llama(blocks: int, batch: int, length: int, checkpointing: bool = False) -> Case:
    return Case("llama-3-8b", blocks, batch, length, checkpointing)


GOALS: dict[Case, Goal] = {
    _llama(8, 4, 2048): Goal(1.18, 1.95, memory=True),
    _llama(8, 4, 2048, True): Goal(1.20, 2.0, memory=True),
    _llama(8, 1, 2048): Goal(1.35, 2.8),
    _llama(32, 4, 2048, True): Goal(1.20, 2.0, memory=True),
}


GOAL_PEERS = (UNSLOTH, PEFT_PREPARED, PEFT)
"""The goals over PEFT were set by a model that PEFT prepared; without that PEFT is faster, which is shown as well."""


def goal_rows(case: Case, found: Iterable[Measured], goal: Goal) -> list[Row]:
    """The goals of a case, for one of our stacks: see `Goal`."""
    by_name = {one.stack: one for one in found}
    ours = [one for one in by_name.values() if STACKS[one.stack].fuse and one.absent is None]
    most = by_name[UNSLOTH].peak_bytes if UNSLOTH in by_name else None
    if goal.memory and most is not None:
        ours = [one for one in ours if one.peak_bytes is not None and one.peak_bytes <= most] or ours
    best = max(ours, key=lambda one: one.tokens_per_second, default=None)
    rows = []
    for peer in GOAL_PEERS:
        bound = goal.over_unsloth if peer == UNSLOTH else goal.over_peft
        value, note = None, "none of ours was measured"
        if best is not None:
            theirs = by_name.get(peer)
            note = best.stack
            if theirs is None or theirs.absent is not None:
                note = f"{peer}: {'not measured' if theirs is None else theirs.absent}"
            else:
                value = best.tokens_per_second / theirs.tokens_per_second
        rows.append(Row(case.title, f"tokens/s over {peer}", value, bound, True, note))
    if goal.memory:
        value, note = None, "none of ours was measured"
        if best is not None:
            theirs = by_name.get(UNSLOTH)
            note = best.stack
            if theirs is None or theirs.peak_bytes is None or best.peak_bytes is None:
                note = f"{UNSLOTH}: {'not measured' if theirs is None else theirs.absent or 'not counted on a CPU'}"
            else:
                value = best.peak_bytes / theirs.peak_bytes
        rows.append(Row(case.title, f"peak memory over {UNSLOTH}", value, 1.0, False, note))
    return rows


PREDICTED = "error of the predicted peak memory"
MEMORY_ERROR = 0.1
"""How far the memory that `fastlora explain --model` predicts may be from what is measured, as a share of it."""


@functools.cache
def predicted_peak(case: Case, blocks: bool) -> int:
    """Bytes that a step of ours on a case is said to take."""
    from fastlora.training import memory

    config, kept = case.config(), case.checkpointing
    return memory.predict(config, case.batch, case.length, r=R, checkpointing=kept, blocks=blocks).peak


def memory_row(one: Measured) -> Row | None:
    """How wrong the prediction of a measured peak was; None for stacks that it does not know."""
    if one.stack not in (LAYERS, BLOCKS) or one.peak_bytes is None:
        return None
    error = abs(predicted_peak(one.case, one.stack == BLOCKS) / one.peak_bytes - 1)
    return Row(one.case.title, f"{PREDICTED}, {one.stack}", error, MEMORY_ERROR)


def rows_of(found: Iterable[Measured], *, goals: bool = True) -> Iterator[Row]:
    """What the measurements of one case say: a row for each stack and metric, and first, if there are any and they are
    wanted, the goals of the case."""
    found = list(found)
    case = found[0].case
    if goals and case in GOALS:
        yield from goal_rows(case, found, GOALS[case])
    for one in found:
        if one.absent is not None:
            yield Row(case.title, f"tokens/s, {one.stack}", None, note=one.absent)
            continue
        yield Row(case.title, f"tokens/s, {one.stack}", one.tokens_per_second)
        yield Row(case.title, f"ms a step, {one.stack}", one.ms)
        if one.peak_bytes is not None:
            yield Row(case.title, f"peak memory GiB, {one.stack}", one.peak_bytes / 2**30)
        if (row := memory_row(one)) is not None:
            yield row
        yield Row(case.title, f"loss after {len(one.losses)} steps, {one.stack}", one.losses[-1])
        if one.mfu is not None:
            yield Row(case.title, f"MFU, {one.stack}", one.mfu)
        for kind, ms in sorted(one.gpu_ms.items(), key=lambda item: -item[1]):
            yield Row(case.title, f"GPU ms, {kind}, {one.stack}", ms)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one call measures."""

    names: tuple[str, ...]
    cases: tuple[Case, ...]
    profile: tuple[Case, ...] = ()
    """Cases whose GPU time is broken down."""


def _matrix(model: str, blocks: int = 8) -> Part:
    sizes = ((1, 2048), (4, 2048), (1, 8192))
    cases = tuple(Case(model, blocks, *size, kept) for size in sizes for kept in (False, True))
    return Part((PEFT, LAYERS, BLOCKS, BLOCKS_LOSS, LOSS_GRAPH, COPIES, PEFT_LIGER, UNSLOTH), cases)


_SMALL = tuple(case for case in GOALS if case.blocks == 8)
PREPARED = tuple(name for name, stack in STACKS.items() if stack.prepared)
OURS = tuple(name for name, stack in STACKS.items() if stack.fuse and not stack.compiled and name not in PREPARED)
PARTS: dict[str, Part] = {
    "goals": Part((PEFT_PREPARED, PEFT, *OURS, UNSLOTH), tuple(GOALS), _SMALL[:1]),
    "prepared": Part(PREPARED, _SMALL, _SMALL[:1]),
    "breakdown": Part((PEFT, LAYERS, BLOCKS, BLOCKS_LIGER, UNSLOTH), _SMALL, _SMALL),
    "liger": Part((PEFT_LIGER,), _SMALL, _SMALL[:1]),
    "compile": Part((PEFT_COMPILED, f"{LAYERS} + torch.compile", f"{BLOCKS} + torch.compile"), (_SMALL[0], _SMALL[2])),
    **{name: _matrix(name) for name in ("llama-3-8b", "qwen3-8b", "qwen2.5-7b", "mistral-7b", "gemma-2-9b")},
}
"""What is measured, by name; beside them stands the part `LOSS`."""
LOSS = "loss"
NAMES = (*PARTS, LOSS)
DEFAULT = ("goals",)


def tiny(part: Part) -> Part:
    """The part with models that a CPU runs in seconds; the heads keep their number of groups."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    changes = (*sizes.items(), ("head_dim", 16))

    def shrunk(cases: tuple[Case, ...]) -> tuple[Case, ...]:
        less: dict[str, Any] = {"changes": changes, "vocabulary": 128}
        return tuple(
            dataclasses.replace(case, blocks=max(1, case.blocks // 8), length=case.length // 128, **less)
            for case in cases
        )

    return dataclasses.replace(part, cases=shrunk(part.cases), profile=shrunk(part.profile))


def measure_part(part: Part, *, separate: bool = True) -> Iterator[Measured]:
    """The part's stacks on its cases, in processes of their own unless ``separate`` is False."""
    if separate:
        yield from apart(part.names, part.cases, profile=part.profile)
        return
    from fastlora.bench.run import device

    yield from here(part.names, part.cases, device(), profile=part.profile)


def line(one: Measured) -> str:
    """A measurement in a line."""
    if one.absent is not None:
        return f"{one.case.title}: {one.stack}: {one.absent}"
    memory = "" if one.peak_bytes is None else f", {one.peak_bytes / 2**30:.2f} GiB"
    return f"{one.case.title}: {one.stack}: {one.ms:.1f} ms, {one.tokens_per_second:,.0f} tokens/s{memory}"


def by_case(part: Part, found: Iterable[Measured]) -> Iterator[Row]:
    """The rows of all cases, in the order of the part; the goals of a part that measures all whom they are about."""
    found, goals = list(found), set(GOAL_PEERS) <= set(part.names)
    for case in part.cases:
        if mine := [one for one in found if one.case == case]:
            yield from rows_of(mine, goals=goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NAMES, nargs="*", default=list(DEFAULT))
    parser.add_argument("--stacks", choices=list(STACKS), nargs="*", help="of those that the parts have; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models, which a CPU can run")
    parser.add_argument("--out", type=Path, help="folder of the record; default: bench/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        with contextlib.redirect_stdout(sys.stderr):
            _child(args.child)
        return
    from fastlora.bench import run

    for table, path in run.train(args.only, quick=args.quick, out=args.out, stacks=args.stacks):
        print(table, path, sep="\n")


if __name__ == "__main__":
    main()
