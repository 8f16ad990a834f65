"""What a model is trained for: the next token, a label for a text, a label for each word.

One class a task: which transformers class it needs, how rows become examples, how batches are joined, what is measured.
Everything else of a run is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlora.training import data
from fastlora.training.config import TrainConfig
from fastlora.training.errors import UserError, first_line
from fastlora.training.model import HEADS

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

OUTSIDE = "O"
"""The label of words that nothing is to be said about; an F1 over words leaves it out."""
MAX_LABELS = 1000
Metrics = Callable[[Any], dict[str, float]]


class Task:
    """Causal language modelling, and what the other tasks change of it."""

    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    heads: tuple[str, ...] = ()
    """Layers that learn in full and are not quantized."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> data.TokenizedData:
        """The examples of the run. Raises UserError for data that does not fit the task."""
        return data.prepare(self.config, tokenizer)

    def model_options(self, examples: data.TokenizedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What ``from_pretrained`` is told besides."""
        return {}

    def collator(self, tokenizer: PreTrainedTokenizerBase, **padding: Any) -> Any:
        """What joins examples to a batch."""
        import transformers

        return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=data.IGNORED, **padding)

    def metrics(self, labels: tuple[str, ...]) -> Metrics | None:
        """What an evaluation computes beside the loss."""
        return None


class SequenceClassification(Task):
    """One of the labels for a text."""

    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    heads = HEADS
    columns: tuple[tuple[str, ...], ...] = (("text",), ("label", "labels"))

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> data.TokenizedData:
        config = self.config
        parts = data.read_splits(config)
        limits = (config.max_samples, config.max_eval_samples)
        chosen = [
            rows if rows is None or limit is None else rows.select(range(min(limit, len(rows))))
            for rows, limit in zip(parts, limits, strict=True)
        ]
        train, evaluation = chosen
        assert train is not None
        text = self._column(train, config.text_column, "text_column", self.columns[0])
        label = self._column(train, config.label_column, "label_column", self.columns[1])
        for name in (text, label):
            if evaluation is not None and name not in evaluation.column_names:
                raise UserError(f"eval data: no column {name!r}; columns: {', '.join(evaluation.column_names)}")
        read = _reader(train, label)
        labels = self._labels((rows[label] for rows in (train, evaluation) if rows is not None), read)
        tokenized = [
            None if rows is None else self._tokenize(rows, text, label, labels, read, tokenizer)
            for rows in (train, evaluation)
        ]
        assert tokenized[0] is not None
        tokens = sum(sum(mask) for mask in tokenized[0]["attention_mask"])
        return data.TokenizedData(train=tokenized[0], evaluation=tokenized[1], tokens=tokens, labels=labels)

    @staticmethod
    def _column(rows: Dataset, named: str | None, key: str, usual: tuple[str, ...]) -> str:
        found = [named] if named is not None else [name for name in usual if name in rows.column_names]
        if not found or found[0] not in rows.column_names:
            missing = f"no column {named!r}" if named is not None else f"no column is called {' or '.join(usual)}"
            raise UserError(f"{key}: {missing}: set {key}; columns: {', '.join(rows.column_names)}")
        return found[0]

    def _labels(self, columns: Iterable[Iterable[Any]], read: Callable[[Any], str]) -> tuple[str, ...]:
        found = {read(value) for column in columns for value in self._values(column)}
        whole = all(name.lstrip("-").isdecimal() for name in found)
        labels = tuple(sorted(found, key=lambda name: (int(name), name) if whole else (0, name)))
        if not 2 <= len(labels) <= MAX_LABELS:
            raise UserError(f"label_column: {len(labels)} different labels, where 2 to {MAX_LABELS} can be learned")
        return labels

    def _values(self, column: Iterable[Any]) -> Iterable[Any]:
        return column

    def _tokenize(
        self,
        rows: Dataset,
        text: str,
        label: str,
        labels: tuple[str, ...],
        read: Callable[[Any], str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Dataset:
        numbers = {name: i for i, name in enumerate(labels)}

        def batch(columns: dict[str, list[Any]]) -> dict[str, Any]:
            texts = [data.as_text(value, text) for value in columns[text]]
            encoded = tokenizer(texts, truncation=True, max_length=self.config.max_length)
            return _learnable(encoded, [numbers[read(value)] for value in columns[label]])

        return self._map(rows, batch)

    @staticmethod
    def _map(rows: Dataset, batch: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> Dataset:
        found = rows.map(batch, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
        if len(found) == 0:
            raise UserError("text_column: every row is empty: check the column that it reads")
        return found

    def model_options(self, examples: data.TokenizedData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(examples.labels)),
            "label2id": {name: i for i, name in enumerate(examples.labels)},
            "pad_token_id": tokenizer.pad_token_id,
        }

    def collator(self, tokenizer: PreTrainedTokenizerBase, **padding: Any) -> Any:
        import transformers

        return transformers.DataCollatorWithPadding(tokenizer, **padding)

    def metrics(self, labels: tuple[str, ...]) -> Metrics | None:
        def compute(prediction: Any) -> dict[str, float]:
            return scores(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), range(len(labels)))

        return compute


class TokenClassification(SequenceClassification):
    """A label for each word of a list of words. A word's first token carries it, the others are not learned."""

    auto_class = "AutoModelForTokenClassification"
    peft_type = "TOKEN_CLS"
    columns = (("tokens", "words"), ("labels", "tags", "ner_tags"))

    def _values(self, column: Iterable[Any]) -> Iterable[Any]:
        for row in column:
            if not isinstance(row, list):
                raise UserError(f"label_column: a row holds {row!r}, where a list of labels, one a word, is wanted")
            yield from row

    def _tokenize(
        self,
        rows: Dataset,
        text: str,
        label: str,
        labels: tuple[str, ...],
        read: Callable[[Any], str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Dataset:
        numbers = {name: i for i, name in enumerate(labels)}
        if not tokenizer.is_fast:
            raise UserError("task: this model's tokenizer cannot tell which word a token is of: choose another model")

        def batch(columns: dict[str, list[Any]]) -> dict[str, Any]:
            for words, tags in zip(columns[text], columns[label], strict=True):
                if not isinstance(words, list) or len(words) != len(tags):
                    raise UserError(f"text_column: {words!r} is not a list of {len(tags)} words, as many as labels")
            try:
                encoded = tokenizer(
                    columns[text], is_split_into_words=True, truncation=True, max_length=self.config.max_length
                )
            except (AssertionError, ValueError) as error:
                raise UserError(f"task: the tokenizer takes no lists of words ({first_line(error)})") from error
            learned = []
            for i, tags in enumerate(columns[label]):
                words = encoded.word_ids(i)
                learned.append(
                    [
                        data.IGNORED if word is None or word == before else numbers[read(tags[word])]
                        for word, before in zip(words, [None, *words], strict=False)
                    ]
                )
            return _learnable(encoded, learned)

        return self._map(rows, batch)

    def collator(self, tokenizer: PreTrainedTokenizerBase, **padding: Any) -> Any:
        import transformers

        return transformers.DataCollatorForTokenClassification(tokenizer, **padding)

    def metrics(self, labels: tuple[str, ...]) -> Metrics | None:
        counted = [i for i, name in enumerate(labels) if name != OUTSIDE]

        def compute(prediction: Any) -> dict[str, float]:
            truth = np.asarray(prediction.label_ids)
            kept = truth != data.IGNORED
            return scores(np.asarray(prediction.predictions)[kept], truth[kept], counted)

        return compute


TASKS: dict[str, type[Task]] = {
    "causal-lm": Task,
    "sequence-classification": SequenceClassification,
    "token-classification": TokenClassification,
}
"""The class of each ``task`` of a configuration."""


def make(config: TrainConfig) -> Task:
    """The task of a configuration."""
    return TASKS[config.task](config)


def heads(model: nn.Module) -> list[str]:
    """Names of the layers of ``model`` that score labels; empty for a language model."""
    return [name for name, _ in model.named_children() if name in HEADS]


def _reader(rows: Dataset, column: str) -> Callable[[Any], str]:
    """How a value of the label column is named: by the data set's own names, where it has them."""
    feature = rows.features[column]
    feature = getattr(feature, "feature", feature)  # of a list of labels
    names = getattr(feature, "names", None)

    def read(value: Any) -> str:
        if isinstance(value, float) and value.is_integer():  # pandas makes them of whole numbers in a column with gaps
            value = int(value)
        if value is None or value == "" or isinstance(value, float | list | dict):
            raise UserError(f"label_column: {value!r} in {column!r} is no label: labels are texts or whole numbers")
        return str(names[value]) if names is not None and isinstance(value, int) else str(value)

    return read


def _learnable(encoded: Any, labels: list[Any]) -> dict[str, list[Any]]:
    """The examples that have a token, and of labels for words one that is learned: a loss over nothing is no number."""

    def learns(ids: list[int], label: Any) -> bool:
        return bool(ids) and (not isinstance(label, list) or any(one != data.IGNORED for one in label))

    kept = [i for i, (ids, label) in enumerate(zip(encoded["input_ids"], labels, strict=True)) if learns(ids, label)]
    columns = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
    return {name: [values[i] for i in kept] for name, values in columns.items()}


def best_labels(logits: Any, labels: Any) -> Any:
    """The most likely label of each score vector: all that an evaluation has to keep."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def scores(predicted: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], labels: Iterable[int]) -> dict[str, float]:
    """``accuracy``, and ``f1``: the mean over ``labels`` of the F1 of each.

    predicted, truth: (n,) numbers of labels. A label that is neither there nor predicted does not count.
    """
    found = []
    for label in labels:
        hits = int(((predicted == label) & (truth == label)).sum())
        there = int((predicted == label).sum()) + int((truth == label).sum())
        if there:
            found.append(2 * hits / there)
    accuracy = float((predicted == truth).mean()) if truth.size else 0.0
    return {"accuracy": accuracy, "f1": float(np.mean(found)) if found else 0.0}


def check(config: TrainConfig) -> None:
    """Raises UserError when the settings of ``config`` do not go with its task."""
    if config.task == "causal-lm":
        return
    if config.step != "eager":
        raise UserError(f"step: {config.step} is for causal-lm: set step eager")
    if config.method in ("prompt", "prefix"):
        raise UserError(f"method: {config.method} is for causal-lm: set another method")
    if config.trainer == "trl":
        raise UserError(f"trainer: TRL's SFTTrainer has no {config.task}: set trainer transformers")
