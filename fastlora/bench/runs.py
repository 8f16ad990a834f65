"""Whole training runs beside PEFT's: ``fastlora bench --suite runs``.

transformers' Trainer and TRL's SFTTrainer train the same model from the same seed with PEFT's layers and with fused
ones, with what users switch on: dropout, DoRA, rsLoRA, two adapters at once. The curves are kept, and how far they are
apart. With dropout the masks differ, so PEFT runs once more from another seed, which says how far apart that is. PEFT
in float32 says which of two bfloat16 curves is nearer to what both mean.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import tempfile
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora.bench import models as random_models
from fastlora.bench import real
from fastlora.bench.record import Row
from fastlora.training import model as models

Curves = dict[str, dict[str, list[float]]]
"""Loss at every step, by case and by who computed it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of every provider."""

    name: str
    trainer: str = "Trainer"
    model: str = "smollm2"
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of LoraConfig."""
    adapters: int = 1
    exact: bool = False
    """Whether PEFT runs in float32, too, on real weights: random ones are others in another type."""


CASES = (
    Case("dropout 0.1", fields={"lora_dropout": 0.1}),
    Case("DoRA", fields={"use_dora": True}),
    Case("SFTTrainer", trainer="SFTTrainer", exact=True),
    Case("rsLoRA", fields={"use_rslora": True}, exact=True),
    Case("two adapters", adapters=2, exact=True),
    Case("Llama-3-8B layers", model="llama-3-8b"),
    Case("SFTTrainer, DoRA, dropout 0.1", trainer="SFTTrainer", fields={"use_dora": True, "lora_dropout": 0.1}),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much work is done."""

    steps: int = 40
    batch_size: int = 8
    lr: float = 5e-4
    rank: int = 16
    llama_layers: int = 4
    """Of the 32 that Llama-3-8B has."""
    seconds: float = 120.0
    """No case is begun later than this."""


FULL = Plan()

_SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
}  # fmt: skip


def _random_text(count: int, length: int = 64) -> real.Rows:
    """Rows in which each token follows from the one before by one of a few rules."""
    generator = torch.Generator().manual_seed(1)
    rules = torch.randint(3, 200, (count, 2), generator=generator) % torch.tensor([5, 11]) + 1
    first = torch.randint(3, 200, (count,), generator=generator)
    columns = [first]
    for _ in range(length - 1):
        columns.append((columns[-1] * rules[:, 0] + rules[:, 1]) % 199 + 3)
    return [{"input_ids": row, "labels": row} for row in torch.stack(columns, 1).tolist()]


def _prepare(
    model: str, device: torch.device, plan: Plan, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, real.Rows, Any, str]:
    """A base model, rows to learn, a tokenizer, and what they are."""
    if model == "smollm2" and not real.missing():
        base, tokenizer = real.load(device, dtype)
        return base, real.text(tokenizer, 32)[0], tokenizer, real.NAME
    shape = dict(_SHAPES[model])
    if model == "llama-3-8b":
        shape["num_hidden_layers"] = plan.llama_layers
    name = f"{shape['num_hidden_layers']} layers of hidden size {shape['hidden_size']}, random weights"
    config = models.transformers().LlamaConfig(**shape)
    return random_models.base(config, device), _random_text(plan.steps * plan.batch_size), _any_tokenizer(), name


def _any_tokenizer() -> Any:
    """One that can be saved and pads: rows of numbers need no words."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    words = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w1"))
    return models.transformers().PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def losses(
    base: Any, rows: real.Rows, tokenizer: Any, case: Case, plan: Plan, device: torch.device, *, fused: bool, seed: int
) -> tuple[list[float], float]:
    """The loss at every step, in the type of the base, and the mean seconds of a step without the first five."""
    import peft

    hf = models.transformers()
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=plan.rank, lora_alpha=plan.rank, target_modules="all-linear", task_type="CAUSAL_LM", **case.fields
    )
    model = peft.get_peft_model(model, config)
    for i in range(1, case.adapters):
        model.add_adapter(f"adapter {i}", copy.deepcopy(config))
    if case.adapters > 1:
        model.base_model.set_adapter(["default", *(f"adapter {i}" for i in range(1, case.adapters))])
    if fused:
        report = fastlora.accelerate(model)
        if report.skipped:
            raise RuntimeError(f"not every layer is fused:\n{report}")
    times: list[float] = []

    def tick(*args: Any, **kwargs: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    clock = type("Clock", (hf.TrainerCallback,), {"on_step_end": tick})()
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": plan.steps,
            "per_device_train_batch_size": plan.batch_size,
            "learning_rate": plan.lr,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "bf16": base.dtype == torch.bfloat16,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            "seed": seed,
            "data_seed": 0,
        }
        if case.trainer == "SFTTrainer":
            import datasets
            import trl

            plain = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
            settings = trl.SFTConfig(**common | {"remove_unused_columns": True})
            trainer: Any = trl.SFTTrainer(model, settings, train_dataset=plain, processing_class=tokenizer)
        else:
            cpu = torch.device("cpu")
            trainer = hf.Trainer(
                model,
                hf.TrainingArguments(**common),
                train_dataset=rows,
                data_collator=lambda chosen: real.batch(chosen, cpu),
            )
        trainer.add_callback(clock)
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    warm = min(5, len(times) - 2)
    return found, (times[-1] - times[warm]) / (len(times) - 1 - warm)


def distance(one: list[float], other: list[float]) -> float:
    """Root of the mean squared difference."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


def _rows_of(case: Case, what: str, curves: dict[str, list[float]], step: dict[str, float]) -> list[Row]:
    name = f"{case.name} ({case.trainer}, {what})"
    ours, theirs = curves["fastlora"], curves["peft"]
    last = max(1, len(ours) // 8)

    def mean(curve: list[float]) -> float:
        return sum(curve[-last:]) / last

    found = [
        Row(name, "first loss", ours[0], note=f"PEFT {theirs[0]:.4f}"),
        Row(name, f"mean of the last {last} losses", mean(ours), note=f"PEFT {mean(theirs):.4f}"),
        Row(name, "rms distance from PEFT's curve", distance(ours, theirs)),
        Row(name, "speed-up of a step over PEFT", step["peft"] / step["fastlora"], note=f"{step['fastlora']:.4f} s"),
    ]
    if (again := curves.get("peft, another seed")) is not None:
        found.append(Row(name, "rms distance of PEFT from itself with other masks", distance(again, theirs)))
    if (exact := curves.get("peft, float32")) is not None:
        found.append(Row(name, "rms distance from PEFT's curve in float32", distance(ours, exact)))
        found.append(Row(name, "rms distance of PEFT from itself in float32", distance(theirs, exact)))
    return found


def measure(device: torch.device, plan: Plan = FULL, cases: Iterable[Case] = CASES) -> tuple[list[Row], Curves]:
    """The rows and the curves of ``cases``; a row without a value says why a case has none."""
    begin = time.monotonic()
    rows: list[Row] = []
    curves: Curves = {}
    bases: dict[str, Any] = {}
    for case in cases:
        if time.monotonic() - begin > plan.seconds:
            rows.append(Row(case.name, "first loss", None, note="no time was left"))
            continue
        if case.trainer == "SFTTrainer" and importlib.util.find_spec("trl") is None:
            rows.append(Row(case.name, "first loss", None, note="trl is not installed"))
            continue
        if case.model not in bases:
            bases = {case.model: _prepare(case.model, device, plan)} | bases
        base, data, tokenizer, what = bases[case.model]
        providers = {"peft": (False, 0), "fastlora": (True, 0)}
        if case.fields.get("lora_dropout"):
            providers["peft, another seed"] = (False, 1)
        found: dict[str, list[float]] = {}
        steps: dict[str, float] = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for provider, (fused, seed) in providers.items():
                    found[provider], steps[provider] = losses(
                        base, data, tokenizer, case, plan, device, fused=fused, seed=seed
                    )
                if case.exact and what == real.NAME:
                    exact = _prepare(case.model, device, plan, torch.float32)[0]
                    found["peft, float32"], _ = losses(exact, data, tokenizer, case, plan, device, fused=False, seed=0)
        except Exception as error:  # one case must not take the others with it
            rows.append(
                Row(case.name, "first loss", None, note=f"{type(error).__name__}: {error}".split("\n")[0][:150])
            )
            continue
        curves[f"{case.name} ({case.trainer}, {what})"] = found
        rows += _rows_of(case, what, found, steps)
    return rows, curves


def plot(curves: Curves, title: str, stem: Path) -> None:
    """The loss curves of every case, PEFT's and fastlora's over each other, as PNG and SVG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    styles = {
        "peft": ("C1", "-", 3.0),
        "fastlora": ("C0", "--", 1.5),
        "peft, another seed": ("0.6", ":", 1.2),
        "peft, float32": ("k", ":", 1.2),
    }
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    # The same record gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fastlora", "font.size": 8}):
        size = (4 * columns, 2.6 * lines)
        figure, grid = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for axes in grid.flat[len(curves) :]:
            axes.set_visible(False)
        for axes, (name, found) in zip(grid.flat, curves.items(), strict=False):
            for provider, losses_ in found.items():
                color, style, width = styles[provider]
                axes.plot(range(1, len(losses_) + 1), losses_, style, color=color, linewidth=width, label=provider)
            head, _, rest = name.partition(" (")
            axes.set(xlabel="step", ylabel="loss", title=f"{head}\n{rest.removesuffix(')')}")
            axes.grid(True, alpha=0.2)
            axes.legend(fontsize=7)
        figure.suptitle(title)
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.svg", metadata={"Date": None})
        figure.savefig(f"{stem}.png", dpi=120, metadata={"Software": None})
        pyplot.close(figure)
