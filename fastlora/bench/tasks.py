"""The tasks of ``examples/``, on real data, before and after: ``fastlora bench --suite tasks``.

sentiment   a label for a sentence: LoRA on NF4 beside full fine-tuning and two linear probes
words       a label for each word
chat        SmolLM2 learns to answer: perplexity of unseen answers
gpt2        a GPT-2 trained from nothing, then adapted to other text
vision      digits that look otherwise
search      the best of a search against the settings that it began with, on data that the search has not seen
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.record import Row
from fastlora.training.config import load
from fastlora.training.errors import UserError, require
from fastlora.training.train import TrainResult, perplexity

EXAMPLES = Path("examples")
QUICK: dict[str, Any] = {"max_steps": 2, "max_samples": 16, "max_eval_samples": 16, "max_length": 32, "warmup": 0}


def script(name: str) -> Any:
    """A script of ``examples/``. Raises UserError outside of a checkout."""
    if not (EXAMPLES / f"{name}.py").is_file():
        raise UserError(f"{EXAMPLES}/{name}.py is not here: run this in a checkout of the project")
    sys.path.insert(0, str(EXAMPLES.resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def prepared(task: str, folder: Path) -> dict[str, str]:
    """Where the data of ``task`` is, as a configuration names it. Raises UserError without the package it is in."""
    prepare = script("prepare")
    try:
        prepare.prepare(task, folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is not there: {prepare.DOWNLOAD}") from error
    except prepare.demo.Missing as error:
        raise UserError(str(error)) from error
    return {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "test.jsonl")}


def _train(example: str, quick: bool, folder: Path, **values: Any) -> TrainResult:
    from fastlora.training.train import train

    values = {"tensorboard": False, "output_dir": folder / "run", "overwrite": True, "save_steps": 10**6, **values}
    config = load(EXAMPLES / f"{example}.yaml", values | (QUICK if quick else {}))
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config)


def _scores(case: str, result: TrainResult, note: str) -> list[Row]:
    rows = [
        Row(case, f"{name} {when}", values[name], note=note)
        for name in ("accuracy", "f1")
        for when, values in (("before", result.metrics_before), ("after", result.metrics_after))
    ]
    return [*rows, Row(case, "step ms", result.step_ms)]


def _perplexities(case: str, result: TrainResult, note: str) -> list[Row]:
    assert result.eval_loss_before is not None and result.eval_loss_after is not None
    before, after = perplexity(result.eval_loss_before), perplexity(result.eval_loss_after)
    return [
        Row(case, "perplexity before", before, note=note),
        Row(case, "perplexity after", after, before, note=note),
        Row(case, "step ms", result.step_ms),
    ]


RIVALS: dict[str, dict[str, Any]] = {
    "LoRA on NF4": {},
    "full fine-tuning": {"method": "full", "quantization": "none", "lr": 5e-5, "lora_dropout": 0.0},
    "linear probe": {"method": "head", "quantization": "none", "lr": 5e-3},
}


def sentiment(quick: bool) -> Iterator[list[Row]]:
    """Goals: LoRA beats both linear probes."""
    reached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        data = prepared("sentiment", Path(name))
        for rival, options in RIVALS.items():
            result = _train("sentiment", quick, Path(name), **data, **options)
            reached[rival] = result.metrics_after["accuracy"]
            yield _scores(f"sentiment, {rival}", result, f"{result.steps} steps")
        strong = probe_of_means(load(EXAMPLES / "sentiment.yaml", data | (QUICK if quick else {})))
    case = "sentiment, linear probe of mean states"
    yield [Row(case, "accuracy after", strong, note="logistic regression, the means of the last layer's states")]
    bounds = {"linear probe": reached["linear probe"], "linear probe of mean states": strong}
    yield [
        Row("sentiment, LoRA on NF4", f"accuracy over the {probe}", reached["LoRA on NF4"] - bound, 0.0, True)
        for probe, bound in bounds.items()
    ]


@torch.no_grad()
def _means(model: Any, rows: Any, tokenizer: Any) -> torch.Tensor:
    found = []
    for i in range(0, len(rows), 64):
        batch = tokenizer.pad(
            {key: rows[key][i : i + 64] for key in ("input_ids", "attention_mask")}, return_tensors="pt"
        )
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def probe_of_means(config: Any, decay: float = 1e-3) -> float:
    """The accuracy of a logistic regression on what the encoder was trained to give: the mean of its last states."""
    from fastlora.training import model as models
    from fastlora.training import tasks

    source = models.find(config.model)
    tokenizer = models.load_tokenizer(source)
    examples = tasks.make(config).prepare(tokenizer)
    assert examples.evaluation is not None
    model: Any = models.load_base(
        source, quantization="none", device=torch.device("cpu"), dtype=torch.float32, auto_class="AutoModel"
    ).eval()
    x, held_out = (_means(model, rows, tokenizer) for rows in (examples.train, examples.evaluation))
    y = torch.tensor(examples.train["labels"][:])
    layer = torch.nn.Linear(x.shape[1], len(examples.labels))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    scale = x.std(0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(layer(x / scale), y) + decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    right = layer(held_out / scale).argmax(-1) == torch.tensor(examples.evaluation["labels"][:])
    return right.float().mean().item()


def words(quick: bool) -> Iterator[list[Row]]:
    with tempfile.TemporaryDirectory() as name:
        data = prepared("words", Path(name))
        result = _train("words", quick, Path(name), **data)
    yield _scores("words, LoRA on NF4", result, f"{result.steps} steps; f1: mean over POS and NEG")


def chat(quick: bool) -> Iterator[list[Row]]:
    with tempfile.TemporaryDirectory() as name:
        data = prepared("chat", Path(name))
        result = _train("chat", quick, Path(name), **data)
    yield _perplexities("chat, SmolLM2-135M", result, f"{result.steps} steps; of answers alone")


def gpt2(quick: bool) -> Iterator[list[Row]]:
    with tempfile.TemporaryDirectory() as name:
        size = {"steps": 2, "width": 32, "layers": 1, "batch": 2, "length": 64} if quick else {}
        with contextlib.redirect_stdout(io.StringIO()):
            loss = script("gpt2").make(Path(name) / "base", **size)
        yield [
            Row("gpt2, trained from nothing", "perplexity after", perplexity(loss), note="Python's manual, held out")
        ]
        data = prepared("reviews", Path(name) / "reviews")
        result = _train("gpt2", quick, Path(name), model=str(Path(name) / "base"), **data)
    yield _perplexities("gpt2, LoRA on film reviews", result, f"{result.steps} steps")


def vision(quick: bool) -> Iterator[list[Row]]:
    for net in ("mlp", "cnn"):
        found = script("vision").run(net, epochs=1 if quick else 15, show=False)
        bound = None if quick else found["shifted, linear probe"]
        rows = [Row(f"vision, {net}", name, value) for name, value in found.items() if name != "shifted, LoRA"]
        yield [*rows, Row(f"vision, {net}", "shifted, LoRA", found["shifted, LoRA"], bound, True)]


SEARCHED = 320
"""Sentences that the trials of the search learn from and are judged by; half as many are kept for the end."""


def search(quick: bool) -> Iterator[list[Row]]:
    """Goal: the best settings have a lower loss than the defaults on data that no trial saw."""
    require("optuna", "search")
    from fastlora.search import results, space, study

    with tempfile.TemporaryDirectory() as name:
        data = prepared("sentiment", Path(name))
        values = {
            "task": "sequence-classification",
            "model": load(EXAMPLES / "sentiment.yaml").model,
            **data,
            "max_length": 64,
            "batch_size": 16,
            "max_samples": SEARCHED,
            "max_eval_samples": SEARCHED // 2,
            "output_dir": str(Path(name) / "run"),
            **(QUICK | {"batch_size": 4} if quick else {}),
        }
        config = load(None, values)
        settings = space.SearchConfig.model_validate({"trials": 2 if quick else 10, "startup": 4, "validation": 0.2})
        found = study.search(config, settings, Path(name) / "search", say=lambda line: print(line, file=sys.stderr))
    states = [row["state"] for row in found.rows]
    note = f"{len(states)} trials, {states.count('stopped')} of them stopped; {SEARCHED} sentences"
    case = "search, sentiment"
    default, best = found.held_out["default"], found.held_out["best"]
    tried = [key for key in found.best if key in type(config).model_fields]
    chosen = ", ".join(f"{key} {results.short(found.best[key])}" for key in tried)
    yield [
        Row(case, "held-out loss, default", default["loss"], note=note),
        Row(case, "held-out loss, best", best["loss"], None if quick else default["loss"], note=chosen),
        Row(case, "held-out accuracy, default", default["accuracy"]),
        Row(case, "held-out accuracy, best", best["accuracy"]),
    ]


PARTS: dict[str, Callable[[bool], Iterator[list[Row]]]] = {
    "sentiment": sentiment,
    "words": words,
    "chat": chat,
    "gpt2": gpt2,
    "vision": vision,
    "search": search,
}
