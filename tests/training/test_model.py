"""Finding, checking and quantizing models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer

from fastlora.training import model as models
from fastlora.training.errors import UserError

CPU = torch.device("cpu")


def weights(model: torch.nn.Module) -> dict[str, Any]:
    return {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def test_find(tmp_path: Path, tiny_model: Path) -> None:
    assert models.find(str(tiny_model)) == models.Source(str(tiny_model))
    assert models.find("org/name") == models.Source("org/name")
    (tmp_path / "a.gguf").touch()
    assert models.find(str(tmp_path)) == models.Source(str(tmp_path), "a.gguf")
    (tmp_path / "b.gguf").touch()
    assert models.find(str(tmp_path / "b.gguf")) == models.Source(str(tmp_path), "b.gguf")
    with pytest.raises(UserError, match=r"name one of a\.gguf, b\.gguf"):
        models.find(str(tmp_path))


def test_find_says_what_is_wrong(tmp_path: Path, trained: Any) -> None:
    with pytest.raises(UserError, match="holds neither"):
        models.find(str(tmp_path))
    with pytest.raises(UserError, match="is an adapter, not a model"):
        models.find(str(trained.adapter_path))
    (tmp_path / "llama").mkdir()
    with pytest.raises(UserError, match="did you mean llama"):
        models.find(str(tmp_path / "lama"))


def test_unknown_hub_model_is_one_line() -> None:
    with pytest.raises(UserError, match="neither a local folder nor a model"):
        models.skeleton(models.find("someone/no-such-model"))


def test_damaged_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="check that its files are complete"):
        models.skeleton(models.find(str(tmp_path)))


def test_targets(tiny_model: Path) -> None:
    skeleton = models.skeleton(models.find(str(tiny_model)))
    assert len(models.targets(skeleton, "all-linear")) == 14
    assert models.targets(skeleton, ["k_proj", "layers.1.mlp.up_proj"]) == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
    ]
    with pytest.raises(UserError, match=r"'q_prj'.*did you mean q_proj.*layers: q_proj, k_proj"):
        models.targets(skeleton, ["q_prj"])
    # Of each layer of two: q 64x64, k and v 32x64, o 64x64, gate and up 128x64, down 64x128.
    assert models.adapter_parameters(skeleton, "all-linear", 2) == 2 * 2 * (128 + 96 + 96 + 128 + 192 * 3)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_quantize_in_place_is_what_transformers_does(tiny_model: Path, quantization: str) -> None:
    source = models.find(str(tiny_model))
    loaded = models.load_base(source, quantization=quantization, device=CPU, dtype=torch.float32)
    config = loaded.config.quantization_config
    dense = models.load_base(source, quantization="none", device=CPU, dtype=torch.float32)
    models.quantize_in_place(dense, config, 64, CPU)
    expected = weights(loaded)
    assert len(expected) == 14
    for name, weight in weights(dense).items():
        assert torch.equal(weight.data, expected[name].data)
        assert torch.equal(weight.quant_state.absmax, expected[name].quant_state.absmax)
    assert dense.is_loaded_in_4bit
    assert dense.is_quantized
    # The head has its own dense weights, and nothing may be repacked by an evaluation.
    assert type(dense.lm_head) is torch.nn.Linear
    before = {name: weight.data.clone() for name, weight in expected.items()}
    with torch.no_grad():
        loaded.eval()(torch.arange(6)[None])
    assert all(torch.equal(weight.data, before[name]) for name, weight in weights(loaded).items())


def test_other_block_size(tiny_model: Path) -> None:
    model = models.load_base(models.find(str(tiny_model)), blocksize=128, device=CPU, dtype=torch.float32)
    states = [weight.quant_state for weight in weights(model).values()]
    assert [state.blocksize for state in states] == [128] * 14
    assert states[0].absmax.numel() == 64 * 64 // 128


def test_tokenizer_gets_a_pad_token(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert models.load_tokenizer(models.find(str(tmp_path))).pad_token == "</s>"


def test_adapter_for_another_model(trained: Any, tiny_model: Path, other_model: Path) -> None:
    source = models.find(str(other_model))
    with pytest.raises(UserError) as error:
        models.check_adapter(trained.adapter_path, source, models.skeleton(source))
    message = str(error.value)
    assert re.search(r"in_features \d+ in the adapter and \d+ in ", message)
    assert f"trained on {str(tiny_model)!r}: pass --model" in message
    source = models.find(str(tiny_model))
    models.check_adapter(trained.adapter_path, source, models.skeleton(source))


def test_find_adapter(trained: Any, tmp_path: Path) -> None:
    assert models.find_adapter(trained.output_dir) == trained.adapter_path == models.find_adapter(trained.adapter_path)
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        models.find_adapter(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        models.find_adapter(tmp_path / "gone")


def test_device_and_backend_names() -> None:
    with pytest.raises(UserError, match="did you mean torch"):
        models.check_backend("toch")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            models.pick_device("cuda")
    assert models.pick_bf16("auto", CPU) is False
    assert models.pick_bf16(True, CPU) is True
