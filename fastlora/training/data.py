"""Text to training examples: read, format, tokenize, hold out an evaluation part, pack.

An example is ``input_ids``, ``attention_mask`` and ``labels`` of at most ``max_length`` tokens; a label of -100 is not
learned (prompts unless ``prompt_loss``, padding always). Every step is a function of the data and the seed.
"""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.training.config import TrainConfig, near_files
from fastlora.training.errors import UserError, first_line, is_disk_full, near, require

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}


@dataclasses.dataclass(frozen=True)
class Example:
    """A formatted text and its parts that are learned, as half-open ranges of characters."""

    text: str
    learned: list[tuple[int, int]]
    special_tokens: bool
    """Whether the tokenizer adds its own begin and end; a chat template has them in its text."""


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """What the trainers get: the same tokenized rows for each of them."""

    train: Dataset
    evaluation: Dataset | None
    tokens: int
    """Tokens of one pass over ``train``, without padding."""
    labels: tuple[str, ...] = ()
    """Of a classification, in the order of the model's scores."""


def is_file(source: str) -> bool:
    """Whether ``source`` means a file (by its ending or because it is there), not a data set of the hub."""
    path = Path(source).expanduser()
    return path.suffix.lower() in READERS or path.exists() or source.startswith((".", "/", "~"))


def check_source(source: str, key: str) -> None:
    """Raises UserError when ``source``, the value of the configuration's ``key``, is a file that cannot be read."""
    if not is_file(source):
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{key}: no such file: {source}; {near_files(path)}")
    if path.is_dir():
        raise UserError(f"{key}: {source} is a folder: name a file in it ({', '.join(READERS)})")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{key}: cannot read {path.suffix or 'a file without ending'}: use one of {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: {source} is empty: put at least one example into it")


def read(source: str, key: str, config: TrainConfig, split: str) -> Dataset:
    """The rows of a local file, or of one split of a data set of the hub."""
    check_source(source, key)
    rows = _read_file(Path(source).expanduser(), config) if is_file(source) else _read_hub(source, key, config, split)
    if len(rows) == 0:
        raise UserError(f"{key}: {source} has no rows: put at least one example into it")
    return rows


def _read_file(path: Path, config: TrainConfig) -> Dataset:
    datasets = require("datasets")
    _check_encoding(path)
    options: dict[str, Any] = {}
    if READERS[path.suffix.lower()] == "text":
        options["sample_by"] = config.text_split
    elif READERS[path.suffix.lower()] == "csv":
        # Only an empty field is missing: None, NA and null are words, and labels.
        options |= {"sep": _separator(path), "keep_default_na": False, "na_values": [""]}
    try:
        return datasets.load_dataset(
            READERS[path.suffix.lower()], data_files={"train": str(path)}, split="train", **options
        )
    except Exception as error:
        if is_disk_full(error):
            raise UserError("the disk of the data set cache is full: free space or set HF_DATASETS_CACHE") from error
        if "corresponds to no data" in str(error):
            raise UserError(f"{path} has no rows: put at least one example into it") from error
        raise UserError(f"cannot read {path}: {_bad_line(path) or first_line(error.__cause__ or error)}") from error


def _check_encoding(path: Path) -> None:
    """Raises UserError for what is not UTF-8, which the readers notice late or not at all."""
    try:
        with path.open(encoding="utf-8") as file:
            while file.read(2**20):
                pass
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text ({error.reason}): convert it") from error


def _separator(path: Path) -> str:
    """What stands between the fields of a CSV or TSV file: a semicolon where the names of the columns have no comma."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding="utf-8") as file:
        names = file.readline()
    return ";" if ";" in names and "," not in names else ","


def _bad_line(path: Path) -> str | None:
    """What is wrong with the first bad line of a text file, in words that name the line."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if path.suffix.lower() == ".jsonl" and line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object: mend or remove it"
        if path.suffix.lower() == ".json":
            number = 0
            json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = number if path.suffix.lower() == ".jsonl" else error.lineno
        return f"line {where} is not valid JSON ({error.msg}): mend or remove it"
    return None


def _read_hub(source: str, key: str, config: TrainConfig, split: str) -> Dataset:
    datasets = require("datasets")
    try:
        return datasets.load_dataset(source, config.data_config, split=split)
    except Exception as error:
        if "Unknown split" in str(error):
            raise UserError(f"{key}: {source} has no split {split!r}: {first_line(error)}") from error
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise UserError(f"{key}: set data_config for {source}: {' '.join(str(error).split())}") from error
        raise UserError(
            f"{key}: {source!r} is neither a file here nor a data set that the hub gives ({first_line(error)}): "
            "check the name and the network, or name a file"
        ) from error


def _column(name: str, rows: Dataset, key: str) -> str:
    if name not in rows.column_names:
        hint = near(name, rows.column_names)
        raise UserError(f"{key}: no column {name!r}; {hint + ' ' if hint else ''}columns: {_names(rows)}")
    return name


def _names(rows: Dataset) -> str:
    return ", ".join(rows.column_names)


Formatter = Callable[[dict[str, Any]], "Example | None"]
"""Row to example; None for a row with nothing to learn."""


def formatter(rows: Dataset, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Formatter:
    """How a row of these columns becomes an example. Raises UserError for a column or template that does not fit."""
    if config.template not in ("auto", "chat", "plain"):
        return _by_format_string(rows, config.template)
    kind, columns = _find_columns(rows, config)
    chat = config.template == "chat" or (
        config.template == "auto" and (kind == "messages" or (kind == "prompt" and bool(tokenizer.chat_template)))
    )
    if kind == "messages" and not chat:
        raise UserError(f"template: plain cannot format the messages in {columns[0]!r}: use chat, or a text column")
    if chat and kind == "text":
        raise UserError(
            f"template: chat needs messages, or prompts and completions, not the text in {columns[0]!r}: set "
            "messages_column, or prompt_column and completion_column, or template plain"
        )
    if chat and not tokenizer.chat_template:
        raise UserError("template: this model has no chat template: use template plain or a format with {column}")
    if kind == "text":
        return _plain_text(columns[0])
    if not chat:
        return _plain_pair(*columns)
    return _chat(tokenizer, _messages_of(columns[0]) if kind == "messages" else _messages_of_pair(*columns))


def _find_columns(rows: Dataset, config: TrainConfig) -> tuple[str, list[str]]:
    """The kind of the rows (messages, prompt or text) and the columns that hold them, named or found."""
    if config.messages_column:
        return "messages", [_column(config.messages_column, rows, "messages_column")]
    if config.prompt_column and config.completion_column:
        prompt = _column(config.prompt_column, rows, "prompt_column")
        return "prompt", [prompt, _column(config.completion_column, rows, "completion_column")]
    if config.text_column:
        return "text", [_column(config.text_column, rows, "text_column")]
    if "messages" in rows.column_names:
        return "messages", ["messages"]
    if {"prompt", "completion"} <= set(rows.column_names):
        return "prompt", ["prompt", "completion"]
    if "text" in rows.column_names:
        return "text", ["text"]
    raise UserError(
        "no column is called text, messages, or prompt and completion: set text_column, messages_column or "
        f"prompt_column and completion_column; columns: {_names(rows)}"
    )


def as_text(value: Any, column: str) -> str:
    """A value of a column as text. Raises UserError for a list or a mapping, whose text nobody wants to learn."""
    if isinstance(value, list | dict):
        raise UserError(
            f"{column}: a row holds {_short(value)}, where a text is wanted: name a column of texts, or put "
            "conversations into a column called messages, each content a text"
        )
    return "" if value is None else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain_text(column: str) -> Formatter:
    def example(row: dict[str, Any]) -> Example | None:
        text = as_text(row[column], column)
        return Example(text, [(0, len(text))], True) if text.strip() else None

    return example


def _plain_pair(prompt: str, completion: str) -> Formatter:
    def example(row: dict[str, Any]) -> Example | None:
        before, after = as_text(row[prompt], prompt), as_text(row[completion], completion)
        return Example(before + after, [(len(before), len(before + after))], True) if after.strip() else None

    return example


def _by_format_string(rows: Dataset, template: str) -> Formatter:
    """A format string; what its last column fills is learned, what stands before it is the prompt."""
    try:
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"template: {error} in {template!r}: double a brace that is not a column") from error
    columns = [_column(name, rows, "template") for _, name in parts if name is not None]
    if not columns:
        raise UserError(f"template: {template!r} names no column; columns: {_names(rows)}")

    def example(row: dict[str, Any]) -> Example | None:
        text, start = "", 0
        for literal, name in parts:
            text += literal
            if name is not None:
                start = len(text)
                text += as_text(row[name], name)
        return Example(text, [(start if len(columns) > 1 else 0, len(text))], True) if text[start:].strip() else None

    return example


Messages = Callable[[dict[str, Any]], "list[dict[str, str]]"]


def _messages_of(column: str) -> Messages:
    def messages(row: dict[str, Any]) -> list[dict[str, str]]:
        turns = row[column]
        if turns is None:
            return []
        if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= set(t) for t in turns):
            raise UserError(f"messages_column: {column!r} does not hold lists of messages with role and content")
        if any(t.get("tool_calls") for t in turns):
            raise UserError(
                f"messages_column: {column!r} has calls of tools, which are not learned: write them as content"
            )
        return [{part: as_text(t[part], f"{column}, {part}") for part in ("role", "content")} for t in turns]

    return messages


def _messages_of_pair(prompt: str, completion: str) -> Messages:
    def messages(row: dict[str, Any]) -> list[dict[str, str]]:
        if not as_text(row[completion], completion).strip():
            return []
        return [
            {"role": "user", "content": as_text(row[prompt], prompt)},
            {"role": "assistant", "content": as_text(row[completion], completion)},
        ]

    return messages


def _chat(tokenizer: PreTrainedTokenizerBase, messages_of: Messages) -> Formatter:
    def render(messages: list[dict[str, str]], prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    def example(row: dict[str, Any]) -> Example | None:
        messages = messages_of(row)
        if not any(message["role"] == "assistant" for message in messages):
            return None
        try:
            text = render(messages)
            learned = []
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before, until = render(messages[:i], prompt=True), render(messages[: i + 1])
                if not (text.startswith(until) and until.startswith(before)):
                    raise UserError(
                        "template: this chat template rewrites earlier turns, so prompts cannot be told from "
                        "completions: set template plain with prompt and completion columns, or a format string"
                    )
                learned.append((len(before), len(until)))
        except UserError:
            raise
        except Exception as error:  # jinja raises what the template's author chose
            raise UserError(
                f"template: the chat template refuses a row ({first_line(error)}): mend its roles"
            ) from error
        return Example(text, learned, False)

    return example


def tokenize(example: Example, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> dict[str, list[int]]:
    """Token ids and labels of one example; plain text ends with the end-of-text token, which is learned."""
    whole = config.prompt_loss or example.learned == [(0, len(example.text))]
    encoded = tokenizer(
        example.text, add_special_tokens=example.special_tokens, return_offsets_mapping=not whole, verbose=False
    )
    ids = list(encoded["input_ids"])
    if whole:
        labels = list(ids)
    else:
        spans = example.learned
        labels = [
            # A token across the border, such as the space before an answer, belongs to the answer.
            token if start < stop and any(start < end and begin < stop for begin, end in spans) else IGNORED
            for token, (start, stop) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
    eos = tokenizer.eos_token_id
    if example.special_tokens and eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
        labels.append(eos)
    return {"input_ids": ids, "labels": labels}


def _learns(labels: list[int]) -> bool:
    """Whether a block has a label that some token before it predicts."""
    return any(label != IGNORED for label in labels[1:])


def pack(rows: Iterator[dict[str, list[int]]], length: int, pad: int) -> Iterator[dict[str, list[int]]]:
    """Joins examples end to end and cuts them into blocks of ``length``; the last block is padded.

    A block without a label, of nothing but a long prompt, is left out: a mean over no label is no number.
    """
    ids: list[int] = []
    labels: list[int] = []
    for row in rows:
        ids += row["input_ids"]
        # The first token of an example does not follow from the example before it.
        labels += [IGNORED, *row["labels"][1:]]
        while len(ids) >= length:
            if _learns(labels[:length]):
                yield {"input_ids": ids[:length], "attention_mask": [1] * length, "labels": labels[:length]}
            ids, labels = ids[length:], labels[length:]
    if _learns(labels):
        padding = length - len(ids)
        yield {
            "input_ids": ids + [pad] * padding,
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": labels + [IGNORED] * padding,
        }


def _prepare(rows: Dataset, key: str, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> Dataset:
    datasets = require("datasets")
    to_example = formatter(rows, config, tokenizer)
    if not tokenizer.is_fast and not config.prompt_loss:
        raise UserError(
            "prompt_loss: this model's tokenizer cannot tell prompts from completions: set prompt_loss true"
        )

    def batch(columns: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        examples = (to_example(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
        tokenized = [tokenize(example, tokenizer, config) for example in examples if example is not None]
        return {name: [row[name] for row in tokenized] for name in ("input_ids", "labels")}

    try:
        rows = rows.map(
            batch, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {key}", load_from_cache_file=False
        )
    except Exception as error:
        if is_disk_full(error):
            raise UserError("the disk of the data set cache is full: free space or set HF_DATASETS_CACHE") from error
        raise
    if len(rows) == 0:
        raise UserError(f"{key}: every row is empty or has no answer to learn: check the column that it reads")

    def finished() -> Iterator[dict[str, list[int]]]:
        if config.packing:
            yield from pack(iter(rows), config.max_length, tokenizer.pad_token_id)
            return
        for row in rows:
            row = {name: values[: config.max_length] for name, values in row.items()}
            if _learns(row["labels"]):
                yield {"attention_mask": [1] * len(row["input_ids"]), **row}

    if next(finished(), None) is None:
        raise UserError(f"{key}: no answer begins within max_length {config.max_length}: raise max_length")
    return datasets.Dataset.from_generator(finished)


def prepare(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedData:
    """Reads, splits and tokenizes the data of a run.

    Raises UserError for a missing or empty file, a bad column, a template that does not fit.
    """
    train, evaluation = read_splits(config)
    if config.max_samples is not None:
        train = train.select(range(min(config.max_samples, len(train))))
    if evaluation is not None and config.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(config.max_eval_samples, len(evaluation))))
    blocks = _prepare(train, "data", tokenizer, config)
    return TokenizedData(
        train=blocks,
        evaluation=None if evaluation is None else _prepare(evaluation, "eval data", tokenizer, config),
        tokens=sum(sum(mask) for mask in blocks["attention_mask"]),
    )


def read_splits(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and the rows to evaluate on, before tokenization."""
    if is_file(config.data):
        for key in ("split", "data_config"):
            if key in config.model_fields_set and getattr(config, key) not in (None, "train"):
                raise UserError(
                    f"{key}: a file has no splits or configurations, only a data set of the hub: leave it out"
                )
    train = read(config.data, "data", config, config.split)
    if config.eval_data is not None:
        return train, read(config.eval_data, "eval_data", config, config.eval_split or config.split)
    if config.eval_split is not None:
        if is_file(config.data):
            raise UserError("eval_split: a file has no splits: set eval_data or eval_fraction")
        return train, read(config.data, "eval_split", config, config.eval_split)
    if config.eval_fraction == 0:
        return train, None
    held_out = max(1, round(config.eval_fraction * len(train)))
    if held_out >= len(train):
        raise UserError(
            f"data: {config.data} has {len(train)} example, too few to hold some out: "
            "add examples, or set eval_data or eval_fraction 0"
        )
    parts = train.train_test_split(test_size=held_out, seed=config.seed)
    return parts["train"], parts["test"]
