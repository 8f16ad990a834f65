"""The configuration: YAML, flags, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="pydantic is missing (extra: train)")
pytest.importorskip("yaml", reason="pyyaml is missing (extra: train)")

import yaml

from fastlora.training.config import TrainConfig, load
from fastlora.training.errors import UserError

NEEDED = {"model": "m", "data": "d.txt"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d.txt\nr: 8\nlr: 1e-3\n")
    config = load(path, {"r": "32", "target_modules": "q_proj, v_proj", "blocksize": "128"})
    assert (config.r, config.lr, config.target_modules, config.blocksize) == (32, 1e-3, ["q_proj", "v_proj"], 128)


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    config = load(None, NEEDED | {"lora_dropout": 0.1, "bf16": True})
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config
    assert set(yaml.safe_load(path.read_text())) == set(TrainConfig.model_fields)


def test_fused_by_default_where_that_can_be(tmp_path: Path) -> None:
    config = load(None, NEEDED)
    assert (config.blocks, config.chunked_loss) == (True, True)
    for values in ({"trainer": "trl"}, {"trainer": "auto"}, {"task": "sequence-classification"}):
        config = load(None, NEEDED | values)
        assert (config.blocks, config.chunked_loss) == (True, False)
    config = load(None, NEEDED | {"backend": "peft"})
    assert (config.blocks, config.chunked_loss) == (False, False)
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config
    # What was not given is not kept from one backend to another.
    assert load(None, config.model_dump(exclude_unset=True) | {"backend": "auto"}).blocks
    for name in ("blocks", "chunked_loss", "liger", "decoded_memory"):
        with pytest.raises(UserError, match="backend peft has none"):
            load(None, NEEDED | {"backend": "peft", name: True})


def test_example_is_valid_and_names_every_field() -> None:
    path = Path(__file__).parents[2] / "examples" / "train.yaml"
    load(path)
    text = path.read_text()
    assert [name for name in TrainConfig.model_fields if f"{name}:" not in text] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": -1}, ["r should be greater than or equal to 1", "-1"]),
        ({"r": 0}, ["r should be greater than or equal to 1"]),
        ({"r": "four"}, ["r should be a valid integer", "four"]),
        ({"lora_alfa": 8}, ["lora_alfa", "did you mean lora_alpha"]),
        ({"quantization": "nf5"}, ["nf4, fp4, none", "did you mean nf4?"]),
        ({"blocksize": "65"}, ["blocksize", "64"]),
        ({"decoded_memory": -1}, ["decoded_memory should be greater than or equal to 0"]),
        ({"decoded_memory": "inf"}, ["decoded_memory"]),
        ({"decoded_memory": 1, "quantization": "none"}, ["quantization none has no such weights"]),
        ({"eval_fraction": 1.5}, ["eval_fraction should be less than 1"]),
        ({"bf16": "maybe"}, ["bf16", "true, false, auto"]),
        ({"target_modules": " , "}, ["target_modules", "all-linear"]),
        ({"prompt_column": "q"}, ["completion_column"]),
        ({"text_column": "t", "messages_column": "m"}, ["only one of"]),
        ({"template": "chatml"}, ["template", "{column}"]),
        ({"resume": True, "overwrite": True}, ["resume and overwrite"]),
        ({"learning_rate": 1e-3}, ["unknown key 'learning_rate'; did you mean lr?"]),
        ({"epochs": "inf"}, ["epochs should be a finite number"]),
        ({"weight_decay": float("inf")}, ["weight_decay should be a finite number"]),
        ({"eval_steps": 2, "eval_fraction": 0}, ["eval_steps needs data to evaluate on"]),
        ({"method": "layers", "trained_layers": "("}, ["trained_layers '(' is no regular expression"]),
        ({"output_dir": None}, ["output_dir should be a path, not None"]),
    ],
)
def test_bad_values_name_what_to_change(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(None, NEEDED | values)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_keys_are_all_named() -> None:
    with pytest.raises(UserError, match=r"--model.*--data"):
        load()


@pytest.mark.parametrize(
    ("text", "word"), [("r: [1\nx: 2", "line"), ("- a\n- b", "list"), ("\x00", "not valid YAML"), ("r: 4", "model")]
)
def test_bad_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        load(path)


def test_missing_file_names_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("")
    with pytest.raises(UserError, match=r"did you mean train\.yaml"):
        load(tmp_path / "trian.yaml")
