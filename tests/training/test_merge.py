"""Merging an adapter into its dense base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlora import NF4Weight
from fastlora.training import durable
from fastlora.training import model as models
from fastlora.training.errors import UserError
from fastlora.training.merge import merge


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_merged_model_is_base_plus_adapter(trained: Any, tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    folder = merge(trained.output_dir, tmp_path / "merged", dtype=dtype)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert merged.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    base = models.load_base(
        models.find(str(tiny_model)), quantization="none", device=torch.device("cpu"), dtype=torch.float32
    )
    adapted = models.load_adapter(base, trained.adapter_path)
    layer = adapted.base_model.model.model.layers[1].mlp.down_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.base_layer.weight + layer.scaling["default"] * product
    actual = merged.model.layers[1].mlp.down_proj.weight.float()
    assert not torch.allclose(actual, layer.base_layer.weight, atol=1e-2)
    # Two roundings of bfloat16: of the difference and of the sum.
    torch.testing.assert_close(actual, expected, atol=1e-6 if dtype == "float32" else 2**-7, rtol=2**-7)
    if dtype == "float32":
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["error-aware", "requantize"])
def test_merged_in_4_bits(trained: Any, tmp_path: Path, mode: str) -> None:
    folder = merge(trained.output_dir, tmp_path / "merged", dtype="float32", mode=mode)
    dense = merge(trained.output_dir, tmp_path / "dense", dtype="float32")
    models_ = [AutoModelForCausalLM.from_pretrained(path, device_map="cpu") for path in (folder, dense)]
    packed, exact = (model.model.layers[1].mlp.down_proj.weight for model in models_)
    assert models_[0].config.quantization_config.bnb_4bit_quant_type == "nf4"
    error = NF4Weight.from_bitsandbytes(packed).dequantize(torch.float32) - exact
    assert error.norm() < 0.15 * exact.norm()


def test_merged_with_calibration(trained: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {word} is what the model is for." for word in ("first", "second", "third")))
    plain, calibrated = (
        merge(trained.output_dir, tmp_path / name, dtype="float32", mode="error-aware", calibration=source)
        for name, source in (("plain", None), ("calibrated", str(text)))
    )
    models_ = [AutoModelForCausalLM.from_pretrained(path, device_map="cpu") for path in (plain, calibrated)]
    one, other = (model.model.layers[1].mlp.down_proj.weight for model in models_)
    assert one.shape == other.shape
    assert not torch.equal(one, other)
    with pytest.raises(UserError, match="calibration: no such file"):
        merge(trained.output_dir, tmp_path / "m", mode="error-aware", calibration=str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match="calibration: mode dense does not use data"):
        merge(trained.output_dir, tmp_path / "m", calibration=str(text))


def test_bad_inputs(trained: Any, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dtype should be one of bfloat16, float16, float32, not 'int8'$"):
        merge(trained.output_dir, tmp_path / "m", dtype="int8")
    with pytest.raises(UserError, match=r"mode should be one of dense, error-aware, requantize, not 'fp8'$"):
        merge(trained.output_dir, tmp_path / "m", mode="fp8")
    with pytest.raises(UserError, match="is for another model"):
        merge(trained.output_dir, tmp_path / "m", model=str(other_model))
    with pytest.raises(UserError, match="is not empty"):
        merge(trained.output_dir, trained.output_dir)
    with pytest.raises(UserError, match="no such folder"):
        merge(tmp_path / "gone", tmp_path / "m")
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="free space"):
        merge(trained.output_dir, tmp_path / "m")


def copy_without_seal(adapter: Path, folder: Path) -> None:
    """An adapter as PEFT saves it, whose files nothing vouches for."""
    shutil.copytree(adapter, folder)
    (folder / durable.MANIFEST).unlink()


def test_adapter_with_a_broken_number(trained: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    copy_without_seal(trained.adapter_path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be merged"):
        merge(folder, tmp_path / "m")


def test_damaged_adapter(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    copy_without_seal(trained.adapter_path, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="cannot read"):
        merge(folder, tmp_path / "m")
