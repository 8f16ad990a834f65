"""Classification of texts and of words: data, heads, metrics, methods, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastlora.cli import main
from fastlora.training import data, methods, tasks
from fastlora.training import model as models
from fastlora.training.config import load
from fastlora.training.errors import UserError
from fastlora.training.train import TrainResult, train

GOOD, BAD = ("blue", "green", "small"), ("lazy", "frozen", "brown")


def reviews(count: int = 96) -> list[dict[str, Any]]:
    """The one word that differs decides the label."""
    rows = []
    for i in range(count):
        good = i % 2 == 0
        word = (GOOD if good else BAD)[i // 2 % 3]
        rows.append({"text": f"the sky is {word} and the fox {i % 7}", "label": "good" if good else "bad"})
    return rows


def words(count: int = 96) -> list[dict[str, Any]]:
    rows = []
    for row in reviews(count):
        tokens = row["text"].split()
        rows.append(
            {"tokens": tokens, "tags": [{True: "UP"}.get(t in GOOD, "DOWN" if t in BAD else "O") for t in tokens]}
        )
    return rows


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def classify(bert: Path, tmp_path: Path) -> dict[str, Any]:
    """The configuration of a short run on the CPU."""
    return {
        "task": "sequence-classification",
        "model": str(bert),
        "data": str(tiny.write_rows(tmp_path / "reviews.jsonl", reviews())),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "max_length": 32,
        "max_steps": 40,
        "batch_size": 8,
        "lr": 1e-2,
        "r": 4,
        "eval_fraction": 0.25,
        "tensorboard": False,
    }


def run(options: dict[str, Any], **values: Any) -> TrainResult:
    return train(load(None, options | values))


def test_a_text_gets_its_label(classify: dict[str, Any]) -> None:
    result = run(classify)
    assert result.labels == ("bad", "good")
    assert result.metrics_before["accuracy"] < 0.9
    assert result.metrics_after == {"accuracy": 1.0, "f1": 1.0}
    assert result.layers_replaced == 13  # six in each of two blocks, and the pooler
    assert "accuracy" in result.summary()
    assert "perplexity" not in result.summary()
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    assert json.loads((result.output_dir / "result.json").read_text())["labels"] == ["bad", "good"]


def test_words_get_their_labels(classify: dict[str, Any], tmp_path: Path) -> None:
    options = classify | {"data": str(tiny.write_rows(tmp_path / "w.jsonl", words())), "task": "token-classification"}
    result = run(options, max_steps=60)
    assert result.labels == ("DOWN", "O", "UP")
    assert result.metrics_after["f1"] > 0.95 > result.metrics_before["f1"]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {"quantization": "none", "lr": 1e-3}),
        ("head", {"lr": 1e-1}),
        ("lora-fa", {}),
        ("lora-plus", {"lr": 2e-3}),
        ("dora", {}),
        ("vera", {"r": 32, "lr": 5e-2}),
        ("layers", {"trained_layers": r".*\.query", "lr": 1e-3}),
    ],
)
def test_methods_learn_labels(classify: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    result = run(classify, **{"method": method, "max_steps": 30, **options})
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.05


def test_accumulated_batches_are_one_batch(classify: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = (
        run(
            classify,
            batch_size=8 // count,
            gradient_accumulation_steps=count,
            max_steps=4,
            output_dir=str(tmp_path / str(count)),
        )
        for count in (1, 4)
    )
    assert [loss for _, loss in parts.losses] == pytest.approx([loss for _, loss in whole.losses], rel=1e-3)
    assert parts.eval_loss_after == pytest.approx(whole.eval_loss_after, rel=1e-3)


def test_a_probe_changes_the_head_alone(classify: dict[str, Any]) -> None:
    result = run(classify, method="head", max_steps=2)
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert set(saved) == {"classifier.weight", "classifier.bias"}


def test_full_fine_tuning_goes_on_where_it_stopped(classify: dict[str, Any], tmp_path: Path) -> None:
    values = {"method": "full", "quantization": "none", "lr": 1e-3, "save_steps": 3}
    whole = run(classify, **values, max_steps=6, output_dir=tmp_path / "whole")
    run(classify, **values, max_steps=6, output_dir=tmp_path / "part")
    import shutil

    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    again = run(classify, **values, max_steps=6, output_dir=tmp_path / "part", resume=True)
    one, two = (load_file(r.adapter_path / "adapter_model.safetensors") for r in (whole, again))
    assert len(one) > 20
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_heads_stay_dense_and_learn(classify: dict[str, Any], bert: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    config = load(None, classify)
    base = models.load_base(
        models.find(str(bert)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        auto_class="AutoModelForSequenceClassification",
        heads=tasks.HEADS,
        options={"num_labels": 3},
    )
    assert isinstance(base.bert.encoder.layer[0].attention.self.query, Linear4bit)
    assert type(base.classifier) is torch.nn.Linear
    model = methods.make(config).adapt(base)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in learned if "lora_" not in name} == {"weight", "bias"}
    assert all("classifier.modules_to_save" in name for name in learned if "lora_" not in name)
    assert not any("classifier" in name for name in learned if "lora_" in name)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_targets_leave_heads_out(bert: Path, task: str) -> None:
    skeleton = models.skeleton(models.find(str(bert)), tasks.TASKS[task].auto_class)
    assert not any("classifier" in name for name in models.targets(skeleton, "all-linear"))
    assert tasks.heads(skeleton) == ["classifier"]


def prepared(classify: dict[str, Any], bert: Path, rows: list[dict[str, Any]], tmp_path: Path, **values: Any) -> Any:
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    config = load(None, classify | {"data": str(path), "eval_fraction": 0} | values)
    return tasks.make(config).prepare(models.load_tokenizer(models.find(str(bert))))


def test_labels_that_are_numbers_keep_their_order(classify: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    rows = [{"text": f"fox {i}", "label": i} for i in (10, 2, 0, 2)]
    examples = prepared(classify, bert, rows, tmp_path)
    assert examples.labels == ("0", "2", "10")
    assert examples.train["labels"][:] == [2, 1, 0, 1]


def test_the_first_token_of_a_word_carries_its_label(classify: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["the", "unbelievable", "fox"], "tags": ["O", "UP", "O"]}]
    examples = prepared(classify, bert, rows, tmp_path, task="token-classification")
    tokenizer = models.load_tokenizer(models.find(str(bert)))
    encoded = tokenizer(rows[0]["tokens"], is_split_into_words=True)
    row = examples.train[0]
    assert row["input_ids"] == encoded["input_ids"]
    assert [label for label in row["labels"] if label != data.IGNORED] == [0, 1, 0]
    assert row["labels"].index(1) == encoded.word_ids().index(1)
    assert len(row["labels"]) > 3  # the long word is of several tokens


@pytest.mark.parametrize(
    ("rows", "values", "says"),
    [
        ([{"text": "a", "label": 1}], {}, "1 different labels"),
        (
            [{"text": "a", "stars": 1}],
            {},
            "no column is called label or labels: set label_column; columns: text, stars",
        ),
        ([{"body": "a", "label": 1}], {}, "no column is called text: set text_column"),
        ([{"text": "a", "label": 1}], {"label_column": "stars"}, "no column 'stars'"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], {}, "0.5 in 'label' is no label"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], {}, "None in 'label' is no label"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": ""}], {}, "'' in 'label' is no label"),
        ([{"text": "a", "label": 1.0}, {"text": "b", "label": None}], {}, "None in 'label' is no label"),
        ([{"text": "", "label": "x"}, {"text": None, "label": "y"}], {}, "every row is empty"),
        (
            [{"tokens": [], "labels": []}, {"tokens": [""], "labels": ["X"]}, {"tokens": [""], "labels": ["O"]}],
            {"task": "token-classification"},
            "every row is empty",
        ),
        ([{"tokens": ["a"], "labels": "O"}], {"task": "token-classification"}, "a list of labels"),
        (
            [{"tokens": ["a", "b"], "labels": ["O"]}, {"tokens": ["a"], "labels": ["X"]}],
            {"task": "token-classification"},
            "not a list of 1 words",
        ),
    ],
)
def test_data_that_does_not_fit(
    classify: dict[str, Any], bert: Path, tmp_path: Path, rows: list[dict[str, Any]], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        prepared(classify, bert, rows, tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"step": "compile"}, "compile is for causal-lm"),
        ({"trainer": "trl"}, "no sequence-classification"),
        ({"method": "full"}, "set quantization none"),
        ({"method": "head", "task": "causal-lm"}, "set a task of classification"),
        ({"task": "regression"}, "task should be one of causal-lm"),
        ({"task": "causal-lm"}, r"is an encoder \(bert\)"),
        ({"method": "prompt"}, "method: prompt is for causal-lm"),
        ({"method": "prefix"}, "method: prefix is for causal-lm"),
    ],
)
def test_settings_that_do_not_go_together(classify: dict[str, Any], values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(classify, **values)


def test_rows_without_a_token_are_left_out(classify: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    rows = [{"text": "" if i % 3 == 0 else f"fox {i}", "label": i % 2} for i in range(12)]
    examples = prepared(classify, bert, rows, tmp_path)
    assert len(examples.train) == 8
    rows = [
        {"tokens": [] if i % 3 == 0 else ["the", "fox"], "tags": [] if i % 3 == 0 else ["O", "X"]} for i in range(12)
    ]
    examples = prepared(classify, bert, rows, tmp_path, task="token-classification")
    assert len(examples.train) == 8


def test_an_example_longer_than_the_positions_of_the_model(classify: dict[str, Any], tmp_path: Path) -> None:
    assert run(classify, max_length=1024, max_steps=1).steps == 1, "no example is as long as that"
    long = [{"text": " ".join([row["text"]] * 9), "label": row["label"]} for row in reviews(8)]
    source = str(tiny.write_rows(tmp_path / "long.jsonl", long))
    with pytest.raises(UserError, match=r"max_length: \d+ tokens.* positions for 64: set max_length 64"):
        run(classify, data=source, max_length=1024, overwrite=True)
    assert run(classify, data=source, max_length=64, max_steps=1, overwrite=True).steps == 1


def test_an_encoder_takes_no_step_of_a_causal_model(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", str(bert), "--seq", "16"]) == 2
    assert "is an encoder" in capsys.readouterr().err


def test_positions_that_begin_later() -> None:
    from transformers import OPTConfig, OPTForCausalLM, RobertaConfig, RobertaModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    roberta = RobertaModel(RobertaConfig(**small, intermediate_size=16, max_position_embeddings=34))
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=32))
    for model in (roberta, opt):
        model(input_ids=torch.full((1, 32), 5))
        models.check_length(model, 32, "max_length")
        with pytest.raises(UserError, match="positions for 32"):
            models.check_length(model, 33, "max_length")


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_adapters_that_score_labels_are_not_for_text(classify: dict[str, Any], tmp_path: Path, method: str) -> None:
    from fastlora.training.generate import generate
    from fastlora.training.merge import merge

    result = run(classify, method=method, max_steps=1)
    with pytest.raises(UserError, match="scores labels"):
        generate(result.adapter_path, ["a"], device="cpu")
    with pytest.raises(UserError, match="scores labels"):
        merge(result.adapter_path, tmp_path / "merged")


def test_scores_of_a_hand_made_case() -> None:
    truth, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    found = tasks.scores(predicted, truth, range(4))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx((2 / 4 + 4 / 5 + 0) / 3)
    assert tasks.scores(predicted, truth, [1])["f1"] == pytest.approx(4 / 5)


def test_padding_is_not_scored() -> None:
    from types import SimpleNamespace

    config = load(None, {"model": "-", "data": "-", "task": "token-classification"})
    compute = tasks.make(config).metrics(("A", "O"))
    assert compute is not None
    prediction = SimpleNamespace(
        predictions=np.array([[0, 1, -100], [0, 0, 0]]), label_ids=np.array([[0, 1, -100], [-100, 0, 1]])
    )
    assert compute(prediction) == {"accuracy": 0.75, "f1": pytest.approx(0.8)}


def test_models_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bert: Path) -> None:
    package = tmp_path / "carrier_of_models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    (package / "inner").symlink_to(bert)
    monkeypatch.syspath_prepend(tmp_path)
    assert models.find("package:carrier_of_models/inner").name == str(package / "inner")
    with pytest.raises(UserError, match="has no iner; did you mean inner"):
        models.find("package:carrier_of_models/iner")
    for name in ("no_such_package", "no-name", ""):
        with pytest.raises(UserError, match="no package"):
            models.find(f"package:{name}")


def test_command(classify: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in classify.items() if name != "tensorboard"]
    assert main(["train", *flags, "--no-tensorboard", "--max-steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "labels: bad, good" in out
    assert "accuracy" in out


def test_parameters_of_a_model_and_an_adapter(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", str(bert), "--task", "sequence-classification", "--r", "4", "--depth", "3"]) == 0
    out = capsys.readouterr().out
    learned = 2 * (4 * (64 + 64) * 4 + 2 * (64 + 128) * 4) + 2 * 64 * 4 + 64 * 2 + 2
    assert f"{learned:,} trainable" in out
    assert main(["parameters", str(bert), "--r", "4", "--target-modules", "q_proj"]) == 2
    assert "no linear layer is called 'q_proj'" in capsys.readouterr().err
