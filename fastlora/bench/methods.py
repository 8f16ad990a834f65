"""The methods of `fastlora.adapters` side by side: on one real task, and in the shape of a large model.

task    SmolLM2-135M learns to answer as the demo's corpus does, once by each method: parameters, loss, step, memory
shape   blocks as wide as Llama-3-8B's: the time and the memory of a training step against plain LoRA and against PEFT
modes   what adapters do beside learning: see `fastlora.bench.modes`
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastlora.bench import modes, timing
from fastlora.bench.modes import LLAMA_8B, SMALL, Shape, base_model
from fastlora.bench.record import Row
from fastlora.training.config import TrainConfig
from fastlora.training.errors import UserError, first_line
from fastlora.training.methods import make

PLAIN = "lora"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One method: what its configuration has besides, and what it is held to."""

    options: dict[str, Any]
    in_peft: bool = True
    """Whether it runs on PEFT's layers (or bitsandbytes' alone), to compare with."""
    bound: float = 1.15
    """Times a step of plain LoRA of the same rank that a step may take."""


# Rates: of the order that each method's authors use beside LoRA's.
PLANS: dict[str, Plan] = {
    "lora": Plan({}),
    "rslora": Plan({"method": "lora", "use_rslora": True, "lr": 0.5}),
    "pissa": Plan({"method": "lora", "init": "pissa", "lr": 0.2}),
    "olora": Plan({"method": "lora", "init": "olora", "lr": 0.2}),
    "loftq": Plan({"method": "lora", "init": "loftq"}),
    "lora-fa": Plan({}),
    "lora-plus": Plan({"lora_plus_ratio": 4.0}),
    "dora": Plan({}),
    "vera": Plan({"r": 256, "lr": 10.0}, bound=1.3),
    "delta-lora": Plan({"delta_start": 2, "delta_weight": 0.5}, in_peft=False),
    "adalora": Plan({"lr": 2.0}),
    "dylora": Plan({"min_r": 2}, in_peft=False),
    "dynamic-rank": Plan({}, in_peft=False),
    "prompt": Plan({"lr": 10.0}),
    "prefix": Plan({"lr": 10.0}),
    "bottleneck": Plan({}),
    "layers": Plan({"trained_layers": r".*\.layers\.0\..*(q|k|v|o)_proj", "lr": 0.25}),
}
"""``lr`` here is a multiple of plain LoRA's."""
_SAME_STEP = ("rslora", "pissa", "olora", "loftq", "dynamic-rank")
"""Methods whose step is that of plain LoRA."""


def _options(name: str, lr: float, r: int) -> dict[str, Any]:
    plan = PLANS[name].options
    return {"method": name, "r": r, **plan, "lr": lr * plan.get("lr", 1.0)}


# --- one real task


@dataclasses.dataclass(frozen=True)
class Task:
    """How much is trained."""

    steps: int
    batch_size: int
    eval_pairs: int
    lr: float
    r: int = 8


CPU_TASK, GPU_TASK = Task(10, 4, 8, 2e-3), Task(100, 32, 64, 5e-4, 16)
DEMO = Path("examples/demo.py")


def _demo() -> Any:
    """The demo's script, which knows where model and data are."""
    if not DEMO.is_file():
        raise UserError(f"{DEMO} is not here: run this in a checkout of the project")
    spec = importlib.util.spec_from_file_location("fastlora_demo", DEMO)
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    sys.modules["fastlora_demo"] = demo  # dataclasses look their module up
    spec.loader.exec_module(demo)
    return demo


def task(device: torch.device, task: Task | None = None, names: tuple[str, ...] = ()) -> Iterator[list[Row]]:
    """The rows of each method in turn. names: of `PLANS`, by default all."""
    demo = _demo()
    try:
        demo.check_packages()
    except demo.Missing as error:
        raise UserError(str(error)) from error
    demo.set_environment()
    demo.be_quiet()
    plan = task or (GPU_TASK if device.type == "cuda" else CPU_TASK)
    folder = Path(tempfile.gettempdir()) / "fastlora-methods"
    pairs = demo.distinct(demo.read_pairs(demo.package_folder("chatterbot_corpus") / "data" / "english"))
    training, evaluation = demo.split(pairs, plan.eval_pairs)
    demo.write_pairs(training, folder / "train.jsonl")
    demo.write_pairs(evaluation, folder / "eval.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        base = demo.prepare_base(folder / "base")
    for name in names or tuple(PLANS):
        yield _trained(name, plan, device, base, folder)
    shutil.rmtree(folder / "run", ignore_errors=True)


def _trained(name: str, plan: Task, device: torch.device, base: Path, folder: Path) -> list[Row]:
    from transformers import TrainerCallback

    from fastlora.training.train import train

    tested: dict[str, float] = {}

    class Test(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            tested.update(_tested(model, list(kwargs["eval_dataloader"]), device))

    config = TrainConfig(
        model=str(base),
        data=str(folder / "train.jsonl"),
        eval_data=str(folder / "eval.jsonl"),
        packing=False,
        max_length=128,
        batch_size=plan.batch_size,
        max_steps=plan.steps,
        save_steps=10 * plan.steps,
        eval_steps=max(1, plan.steps // 4) if name == "dynamic-rank" else None,
        warmup=2,
        seed=7,
        device=device.type,  # type: ignore[arg-type]
        overwrite=True,
        tensorboard=False,
        output_dir=folder / "run",
        **_options(name, plan.lr, plan.r),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(config, [Test()])
    case = f"{name}, SmolLM2-135M"
    note = f"r = {config.r}, lr = {config.lr:g}, {plan.steps} steps of {plan.batch_size}"
    values = {
        "trained parameters (1000)": result.parameters / 1e3,
        "step ms": result.step_ms,
        "training s": result.seconds,
        **tested,
        "peak memory MiB": result.peak_memory / 2**20,
        "loss before": result.eval_loss_before,
        "loss after": result.eval_loss_after,
    }
    return [Row(case, metric, value, note=note) for metric, value in values.items()]


@torch.no_grad()
def _tested(model: Any, batches: list[Any], device: torch.device) -> dict[str, float]:
    """The time of a forward pass over a batch of the evaluation data, and the score: its learned tokens, guessed right.

    Both in evaluation mode, over all batches; the first is run once more before, to warm up.
    """
    training = model.training
    model.eval()
    seconds, right, asked = [], 0, 0
    for i, batch in enumerate((batches[0], *batches)):
        inputs = {key: value.to(device) for key, value in batch.items()}
        began = timing.now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**inputs).logits
        seconds.append(timing.now(device) - began)
        if i:
            labels = inputs["labels"][:, 1:]
            guesses = logits[:, -inputs["labels"].shape[1] :][:, :-1].argmax(-1)  # virtual tokens stand before
            learned = labels != -100
            right += int((guesses[learned] == labels[learned]).sum())
            asked += int(learned.sum())
    model.train(training)
    median = sorted(seconds[1:])[len(batches) // 2]
    return {"inference ms": 1e3 * median, "score %": 100 * right / max(1, asked)}


# --- the shape of a large model


class Stepper:
    """One method on a copy of a base model, and its training step."""

    def __init__(self, name: str, base: Any, shape: Shape, device: torch.device, r: int | None = None) -> None:
        config = TrainConfig(model="-", data="-", **_options(name, 1e-4, shape.r) | ({"r": r} if r else {}))
        self.device, self.method = device, make(config)
        self.model = self.method.adapt(copy.deepcopy(base)).train()
        self.fused(True)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in parameters)
        groups = self.method.groups(self.model) or parameters
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device.type == "cuda")
        self.method.begins(self.model, 10**6)
        self.method.optimized(self.model, self.optimizer)
        self.ids = torch.randint(1, shape.vocab, (1, shape.tokens), device=device)
        self.steps = 0

    def fused(self, on: bool) -> None:
        """Fuse the layers, or give PEFT's and bitsandbytes' back."""
        import fastlora

        if on:
            with contextlib.redirect_stdout(io.StringIO()):
                self.method.accelerate(self.model)
            return
        fastlora.restore(self.model)
        from fastlora.integrations import bitsandbytes, prefix

        bitsandbytes.unfuse(self.model)
        prefix.disable(self.model)

    def __call__(self, _: int = 0) -> None:
        self.method.step_begins(self.model, self.steps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.method.stepped(self.model, self.steps, self.optimizer)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self, _: int = 0) -> None:
        """A forward pass in evaluation mode."""
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            self.model(input_ids=self.ids)
        self.model.train()


def shape(device: torch.device, shape: Shape | None = None, names: tuple[str, ...] = ()) -> Iterator[list[Row]]:
    """The rows of each method in turn, against plain LoRA in the same rounds. names: of `PLANS`, by default all."""
    size = shape or (LLAMA_8B if device.type == "cuda" else SMALL)
    base = base_model(size, device)
    plain = Stepper(PLAIN, base, size, device)
    for name in names or tuple(name for name in PLANS if name not in _SAME_STEP):
        yield _stepped(name, base, plain, size, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _stepped(name: str, base: Any, plain: Stepper, size: Shape, device: torch.device) -> list[Row]:
    plan, case = PLANS[name], f"{name}, {size.name}"
    try:
        this = plain if name == PLAIN else Stepper(name, base, size, device)
        other = plain
        if this.method.config.r != size.r:  # plain LoRA of the same rank
            other = Stepper(PLAIN, base, size, device, this.method.config.r)
        variants: dict[str, timing.Call] = {"this": this}
        if other is not this:
            variants["plain"] = other
        times = timing.measure(variants, device, rounds=size.rounds, budget_ms=size.budget_ms)
        inference = timing.measure({"this": this.infer}, device, rounds=size.rounds, budget_ms=size.budget_ms)["this"]
        peak = timing.peak_memory(this, device)
    except torch.OutOfMemoryError as error:
        return [Row(case, "step ms", None, note=first_line(error))]
    rows = [
        Row(case, "trained parameters (1000)", this.parameters / 1e3),
        Row(case, "step ms", times["this"].p50 / 1e3),
        Row(case, "inference ms", inference.p50 / 1e3),
    ]
    if "plain" in times:
        share = times["this"].p50 / times["plain"].p50
        note = f"plain LoRA, r = {other.method.config.r}: {times['plain'].p50 / 1e3:.1f} ms"
        rows.append(Row(case, "times plain LoRA", share, plan.bound, note=note))
    if peak is not None:
        rows.append(Row(case, "peak memory MiB", peak / 2**20, note="of one step, beside weights and optimizer"))
    return rows + (_against_peft(case, this, size, device) if plan.in_peft else [])


def _against_peft(case: str, this: Stepper, size: Shape, device: torch.device) -> list[Row]:
    """The speed-up over PEFT's layers, in turns with them, and the memory that they need."""
    fast: list[float] = []
    stock: list[float] = []
    for _ in range(size.rounds):
        for on, samples in ((True, fast), (False, stock)):
            this.fused(on)
            this()  # what layers keep from step to step is made anew by their first
            samples.append(timing._wall(this, 1, device))
    peak = timing.peak_memory(this, device)  # PEFT's layers are there now
    this.fused(True)
    fast.sort()
    stock.sort()
    ratio = stock[len(stock) // 2] / fast[len(fast) // 2]
    rows = [Row(case, "speed-up over PEFT", ratio, 1.0, True, note=f"PEFT: {stock[len(stock) // 2] / 1e3:.1f} ms")]
    if peak is not None:
        rows.append(Row(case, "peak memory MiB of PEFT", peak / 2**20))
    return rows


PARTS: dict[str, Callable[..., Iterator[list[Row]]]] = {"task": task, "shape": shape, "modes": modes.rows}
QUICK: dict[str, Any] = {"task": Task(2, 1, 4, 2e-3), "shape": SMALL, "modes": modes.SMALL}


Cells = list[tuple[str, ...]]


def cells(groups: dict[str, list[Row]]) -> tuple[tuple[str, ...], Cells]:
    """A head, and a line for each method with columns for the metrics of each group; a missed goal between asterisks.

    groups: by what stands before their columns' names, if anything.
    """
    columns: list[tuple[str, str]] = []
    by_method: dict[str, dict[tuple[str, str], Row]] = {}
    for label, rows in groups.items():
        columns += [(label, metric) for metric in dict.fromkeys(row.metric for row in rows)]
        for row in rows:
            by_method.setdefault(row.case.split(",")[0], {})[label, row.metric] = row
    body = []
    for method in [name for name in PLANS if name in by_method] + [name for name in by_method if name not in PLANS]:
        found = by_method[method]
        there = {label for label, _ in found}
        # Of these plain LoRA's step was measured, which is theirs.
        same = {label for label in groups if label not in there and method in _SAME_STEP and PLAIN in by_method}
        texts = ["as lora" if label in same else _cell(found.get((label, metric))) for label, metric in columns]
        body.append((method, *texts))
    return ("method", *(f"{label} {metric}".strip() for label, metric in columns)), body


def table(groups: dict[str, list[Row]]) -> str:
    """The lines of `cells` as a Markdown table; a missed goal in bold."""
    head, body = cells(groups)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *body))


def write_tables(rows: list[Row], record: Path) -> list[Path]:
    """Write the tables beside their record, as Markdown and as an HTML page. Returns the files."""
    from fastlora.report.page import tables

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case.partition(", ")[2], []).append(row)
    markdown = "\n\n".join(f"## {setting}\n\n{table({'': group})}" for setting, group in groups.items())
    page = tables("Methods side by side", [(setting, *cells({"": group})) for setting, group in groups.items()])
    paths = [record.with_suffix(suffix) for suffix in (".md", ".html")]
    for path, text in zip(paths, (f"# Methods side by side\n\n{markdown}\n", page), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def _cell(row: Row | None) -> str:
    if row is None or row.value is None:
        return "-"
    text = f"{row.value:,.0f}" if abs(row.value) >= 1000 else f"{row.value:.4g}"
    return text if row.ok else f"**{text}**"
