"""From files to labelled blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import LINES, make_tokenizer, rows_of, text_rows, write_rows

from fastlora.training import data
from fastlora.training.config import TrainConfig, load
from fastlora.training.errors import UserError

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.eos_token_id


def configuration(source: Path | str = "x.jsonl", **values: Any) -> TrainConfig:
    return load(None, {"model": "m", "data": str(source), "max_length": 16, **values})


def learned(row: dict[str, list[int]]) -> str:
    return TOKENIZER.decode([label for label in row["labels"] if label != data.IGNORED])


def first(rows: list[dict[str, Any]], tokenizer: Any = TOKENIZER, **values: Any) -> dict[str, list[int]]:
    config = configuration(**values)
    example = data.formatter(rows_of(rows), config, tokenizer)(rows[0])
    assert example is not None
    return data.tokenize(example, tokenizer, config)


def test_plain_text_is_learned_with_its_end() -> None:
    row = first([{"text": LINES[0]}])
    assert row["labels"] == row["input_ids"]
    assert row["input_ids"] == [*TOKENIZER(LINES[0])["input_ids"], EOS]


def test_messages_learn_only_the_answers() -> None:
    turns = [
        ("system", "be short"),
        ("user", "sky?"),
        ("assistant", "it is blue"),
        ("user", "fox?"),
        ("assistant", "ok"),
    ]
    row = first([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    assert learned(row) == " it is blue </s> ok </s>"
    assert TOKENIZER.decode(row["input_ids"]).startswith("<|system|> be short </s><|user|> sky? </s><|assistant|>")


def test_pairs_use_the_chat_template_where_there_is_one() -> None:
    rows = [{"prompt": "sky?", "completion": "blue"}]
    assert TOKENIZER.decode(first(rows)["input_ids"]) == "<|user|> sky? </s><|assistant|> blue </s>"
    plain = first(rows, make_tokenizer(None))
    assert TOKENIZER.decode(plain["input_ids"]) == "sky?blue</s>"
    assert learned(plain) == "blue</s>"


def test_prompt_loss_learns_everything() -> None:
    row = first([{"prompt": "sky?", "completion": "blue"}], prompt_loss=True)
    assert row["labels"] == row["input_ids"]


def test_format_string_learns_its_last_column() -> None:
    row = first([{"q": "the sky", "a": "blue"}], template="Q: {q}\nA: {a} {{end}}")
    assert TOKENIZER.decode(row["input_ids"]) == "Q: the sky\nA: blue {end}</s>"
    assert learned(row) == " blue {end}</s>"


def test_pack_keeps_every_token_and_pads_the_end() -> None:
    rows = [{"input_ids": list(range(10 * i, 10 * i + 7)), "labels": list(range(10 * i, 10 * i + 7))} for i in range(5)]
    blocks = list(data.pack(iter(rows), 16, pad=99))
    assert [len(block["input_ids"]) for block in blocks] == [16, 16, 16]
    ids = [t for block in blocks for t, m in zip(block["input_ids"], block["attention_mask"], strict=True) if m]
    assert ids == [t for row in rows for t in row["input_ids"]]
    for block in blocks:
        for token, mask, label in zip(block["input_ids"], block["attention_mask"], block["labels"], strict=True):
            # Not learned: padding, and the first token of each example.
            assert label == (token if mask and token % 10 else data.IGNORED)
    assert blocks[-1]["input_ids"][-1] == 99


def test_blocks_of_a_prompt_alone_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": LINES[0] * 4, "completion": "yes"}] * 6
    found = data.prepare(configuration(write_rows(tmp_path / "d.jsonl", rows), eval_fraction=0.3), TOKENIZER)
    assert found.evaluation is not None
    for block in (*found.train, *found.evaluation):
        assert any(label != data.IGNORED for label in block["labels"][1:])
    assert any("yes" in learned(block) for block in found.train)


def test_split_is_a_function_of_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [{"text": str(i)} for i in range(50)])
    one, two = (data.read_splits(configuration(path, eval_fraction=0.2, seed=3)) for _ in range(2))
    other = data.read_splits(configuration(path, eval_fraction=0.2, seed=4))
    assert one[1] is not None
    assert two[1] is not None
    assert other[1] is not None
    assert one[1]["text"][:] == two[1]["text"][:] != other[1]["text"][:]
    assert len(one[1]) == 10
    assert sorted(one[0]["text"][:] + one[1]["text"][:]) == sorted(str(i) for i in range(50))


@pytest.mark.parametrize(
    ("name", "text", "values", "count"),
    [
        ("d.txt", "a fox\n\nthe sky\nis blue\n", {}, 2),
        ("d.txt", "a fox\nthe sky\nis blue\n", {"text_split": "line"}, 3),
        ("d.csv", 'q,a\n"x, y",z\n1,2\n', {"template": "{q} {a}"}, 2),
        ("d.csv", 'q;a\n"x, y; w";z\n1;2\n', {"template": "{q} {a}"}, 2),
        ("d.json", '[{"text": "one"}, {"text": "two"}]', {}, 2),
    ],
)
def test_file_kinds(tmp_path: Path, name: str, text: str, values: dict[str, Any], count: int) -> None:
    path = tmp_path / name
    path.write_text(text)
    rows = data.read(str(path), "data", configuration(path, **values), "train")
    assert len(rows) == count


def test_words_of_a_csv_file_are_words(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text,label\nNA,None\nnull,\n")
    rows = data.read(str(path), "data", configuration(path), "train")
    assert rows["text"][:] == ["NA", "null"]
    assert rows["label"][:] == ["None", None]


def test_prepare_gives_blocks_of_one_length(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [*text_rows(20), {"text": ""}, {"text": None}])
    packed = data.prepare(configuration(path), TOKENIZER)
    assert packed.evaluation is not None
    assert {len(ids) for ids in packed.train["input_ids"]} == {16}
    loose = data.prepare(configuration(path, packing=False, max_length=12, eval_data=str(path)), TOKENIZER)
    assert len(loose.train) == 20
    assert max(len(ids) for ids in loose.train["input_ids"]) == 12
    assert loose.tokens == sum(len(ids) for ids in loose.train["input_ids"])


def test_limits_of_samples(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", text_rows(40))
    limited = data.prepare(
        configuration(path, packing=False, max_samples=5, max_eval_samples=2, eval_fraction=0.5), TOKENIZER
    )
    assert limited.evaluation is not None
    assert (len(limited.train), len(limited.evaluation)) == (5, 2)


@pytest.mark.parametrize(
    ("name", "text", "values", "words"),
    [
        ("d.jsonl", "", {}, ["is empty"]),
        ("d.jsonl", '{"text": ""}\n{"text": " "}\n{"text": ""}\n', {}, ["every row is empty"]),
        ("d.jsonl", '{"text": "a"}\n{"text": \n', {}, ["line 2 is not valid JSON"]),
        ("d.jsonl", '{"text": "a"}\n[1]\n', {}, ["line 2 is not a JSON object"]),
        ("d.json", '{"text": \n\n', {}, ["not valid JSON"]),
        (
            "d.jsonl",
            '{"body": "a"}\n{"body": "b"}\n',
            {"text_column": "bodie"},
            ["did you mean body?", "columns: body"],
        ),
        ("d.jsonl", '{"body": "a"}\n{"body": "b"}\n', {}, ["set text_column", "columns: body"]),
        ("d.jsonl", '{"q": "a"}\n{"q": "b"}\n', {"template": "{quest}"}, ["no column 'quest'", "columns: q"]),
        ("d.jsonl", '{"q": "a"}\n{"q": "b"}\n', {"template": "{q"}, ["template"]),
        ("d.jsonl", '{"text": "a"}\n', {}, ["too few to hold some out"]),
        ("d.jsonl", '{"messages": "hi"}\n{"messages": "ho"}\n', {}, ["role and content"]),
        ("d.jsonl", '{"text": "a"}\n{"text": "b"}\n', {"eval_split": "test"}, ["a file has no splits"]),
        ("d.jsonl", '{"text": "a"}\n{"text": "b"}\n', {"eval_data": "gone.jsonl"}, ["eval_data", "no such file"]),
        (
            "d.jsonl",
            '{"prompt": "what is the colour of the sky and the grass and the fox", "completion": "x"}\n' * 2,
            {"packing": False, "max_length": 8},
            ["raise max_length"],
        ),
        ("d.parquet", "x", {}, [".jsonl"]),
        ("d.csv", "text\n", {}, ["d.csv has no rows"]),
        ("d.jsonl", "\n", {}, ["d.jsonl has no rows"]),
        ("d.jsonl", '{"text": ["a", "b"]}\n' * 2, {}, ["text: a row holds ['a', 'b'], where a text is wanted"]),
        (
            "d.jsonl",
            '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}\n'
            * 2,
            {},
            ["where a text is wanted", "messages"],
        ),
        (
            "d.jsonl",
            '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]}\n' * 2,
            {},
            ["messages, content: a row holds [{'type'", "each content a text"],
        ),
        (
            "d.jsonl",
            '{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}\n' * 2,
            {},
            ["calls of tools"],
        ),
        ("d.jsonl", '{"text": "a"}\n' * 2, {"split": "test"}, ["split: a file has no splits"]),
        ("d.jsonl", '{"text": "a"}\n' * 2, {"data_config": "en"}, ["data_config: a file has no"]),
    ],
)
def test_bad_data_says_what_to_change(
    tmp_path: Path, name: str, text: str, values: dict[str, Any], words: list[str]
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as error:
        data.prepare(configuration(path, **values), TOKENIZER)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    for content in (b"\xff\xfe\x00garbage", b'{"text": "caf\xe9"}\n' * 4):
        path.write_bytes(content)
        with pytest.raises(UserError, match="UTF-8"):
            data.prepare(configuration(path), TOKENIZER)


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(UserError, match=r"did you mean train\.jsonl\?"):
        data.check_source(str(tmp_path / "trian.jsonl"), "data")


def test_unknown_hub_data_is_one_line() -> None:
    with pytest.raises(UserError, match="neither a file here nor a data set"):
        data.read("someone/no-such-data-set", "data", configuration("someone/no-such-data-set"), "train")


def test_no_chat_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        first([{"messages": [{"role": "user", "content": "x"}]}], make_tokenizer(None))
