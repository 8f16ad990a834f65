"""A tiny random Llama and its data. A test module that imports this is skipped where the train extra is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
pytest.importorskip("peft", reason="peft is missing (extra: train)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: train)")
pytest.importorskip("datasets", reason="datasets is missing (extra: train)")
pytest.importorskip("accelerate", reason="accelerate is missing (extra: train)")
pytest.importorskip("pydantic", reason="pydantic is missing (extra: train)")
pytest.importorskip("yaml", reason="yaml is missing (extra: train)")
pytest.importorskip("typer", reason="typer is missing (extra: train)")
pytest.importorskip("rich", reason="rich is missing (extra: train)")

import datasets
import tokenizers
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "a small model learns a small text by heart",
    "adapters are low rank and the base is frozen",
    "what is the colour of the sky",
    "the sky is blue and the grass is green",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_llama(folder: Path, hidden: int = 64) -> Path:
    """Saves a random Llama of two layers, with its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough for the adapters to move the loss
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_rows(count: int = 64) -> list[dict[str, Any]]:
    return [{"text": f"{LINES[i % len(LINES)]} {LINES[(i + 2) % len(LINES)]}"} for i in range(count)]


def rows_of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def save_bert(folder: Path, hidden: int = 64) -> Path:
    """Saves a random BERT of two layers, with its tokenizer."""
    tokenizer = make_tokenizer(None)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder
