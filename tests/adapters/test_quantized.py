"""Quantized adapters: what is stored, what comes back, layers, files and commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import batch, peft_mlp, stack, train, trained

import fastlora
from fastlora.adapters import quantized
from fastlora.adapters.quantized import QuantizedFactor

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("shape", [(4, 64), (96, 4), (7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_literal_rounding(shape: Any, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    w[1] = 0
    q = QuantizedFactor(w, "int8")
    want = torch.empty(shape)
    for i, row in enumerate(w.float()):
        scale = row.abs().max() / 127
        want[i] = torch.round(row / scale) * scale if scale else 0
    assert torch.equal(q.weight, want.to(dtype))
    assert q.nbytes == shape[0] * shape[1] + 4 * shape[0]
    largest = w.float().abs().amax(1, keepdim=True)
    assert ((q.weight.float() - w.float()).abs() <= largest / 254 + 2 ** (-8 if dtype != torch.float32 else -20)).all()


def test_int8_of_subnormal_values_keeps_their_signs() -> None:
    smallest = 2.0**-149
    w = torch.tensor([[190.0, -190.0, 1.0]]) * smallest  # over a scale that is rounded to the smallest number itself
    assert QuantizedFactor(w, "int8").values.tolist() == [[127, -127, 1]]


@pytest.mark.parametrize("shape", [(4, 64), (96, 4), (7, 11)])
def test_nf4_is_the_format_of_the_base(shape: Any) -> None:
    w = torch.randn(shape)
    q = QuantizedFactor(w, "nf4")
    assert torch.equal(q.weight, fastlora.NF4Weight.quantize(w, nested=False).dequantize(torch.float32))
    assert q.nbytes == (w.numel() + 1) // 2 + 4 * -(-w.numel() // 64)


def test_moving_to_a_type_changes_what_is_computed_alone() -> None:
    q = QuantizedFactor(torch.randn(4, 64), "int8")
    want = q.weight
    q.to(torch.bfloat16)
    assert (q.weight.dtype, q.scales.dtype, q.values.dtype) == (torch.bfloat16, torch.float32, torch.int8)
    assert torch.equal(q.weight, want.bfloat16())


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("form", ["standalone", "stock", "fused", "dora"])
def test_layers_compute_with_what_was_rounded(kind: str, form: str) -> None:
    model: Any = stack(dtype=torch.float32) if form == "standalone" else peft_mlp(use_dora=form == "dora")
    if form in ("fused", "dora"):
        fastlora.accelerate(model)
    x = batch(torch.float32)[0]
    exact = model(x).detach()
    quality = quantized.quantize(model, kind)
    got = model(x).detach()
    if form in ("fused", "dora"):
        assert not fastlora.accelerate(model).skipped
    assert 0 < max(quality.errors.values()) < (0.02 if kind == "int8" else 0.2)
    assert not torch.equal(got, exact)
    assert quantized.dequantize(model) == 2
    torch.testing.assert_close(model(x), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_compiled(kind: str) -> None:
    model = stack(dtype=torch.float32)
    quantized.quantize(model, kind)
    x = batch(torch.float32)[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_the_error_is_that_of_the_products() -> None:
    model = stack(dtype=torch.float32)
    before = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in model]
    quality = quantized.quantize(model, "nf4")
    for (_, error), layer, whole in zip(quality.errors.items(), model, before, strict=True):
        rounded = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert error == pytest.approx(float((rounded - whole).norm() / whole.norm()), rel=1e-4)
    assert quality.bytes_before == 4 * 2 * 4 * (64 + 128)
    assert quality.bytes_after == 2 * 4 * (64 + 128) // 2 + 4 * 2 * 4 * (64 + 128) // 64
    assert "at most" in str(quality)


def test_an_adapter_that_has_not_learned_has_no_error() -> None:
    assert set(quantized.quantize(stack(learned=False), "nf4").errors.values()) == {0.0}


def saved(folder: Path, **fields: Any) -> tuple[Any, torch.Tensor]:
    model = peft_mlp(**fields)
    train(model, torch.optim.AdamW(trained(model), lr=1e-2), 2, torch.float32)
    model.save_pretrained(str(folder))
    return model, batch(torch.float32)[0]


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_files(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = saved(tmp_path / "plain", **fields)
    quality = quantized.quantize_file(tmp_path / "plain", tmp_path / "small", kind)
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).glob("*.safetensors")) for d in ("plain", "small")]
    assert sizes[1] < sizes[0]
    loaded = quantized.load(peft_mlp().unload(), tmp_path / "small")
    assert sum(isinstance(m, QuantizedFactor) for m in loaded.modules()) == 4
    got = loaded(x)
    quantized.quantize(model, kind)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    fastlora.accelerate(loaded)
    torch.testing.assert_close(loaded(x), got, rtol=1e-4, atol=1e-5)
    quantized.dequantize_file(tmp_path / "small", tmp_path / "again")
    plain = peft.PeftModel.from_pretrained(peft_mlp().unload(), str(tmp_path / "again"))
    torch.testing.assert_close(plain(x), got, rtol=1e-4, atol=1e-5)
    assert len(quality.errors) == 2
    assert fastlora.merge(loaded, "dense")(x).isfinite().all()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    from fastlora.cli import main

    saved(tmp_path / "plain")
    assert main(["quantize", str(tmp_path / "plain"), str(tmp_path / "small"), "--type", "nf4"]) == 0
    assert "relative error of the output" in capsys.readouterr().out
    assert main(["dequantize", str(tmp_path / "small"), str(tmp_path / "again")]) == 0
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["r"] == 4
    for arguments, words in (
        (["quantize", str(tmp_path / "plain"), str(tmp_path / "x"), "--type", "int9"], "did you mean int8"),
        (["quantize", str(tmp_path / "plain"), str(tmp_path / "small")], "not empty"),
        (["quantize", str(tmp_path / "nowhere"), str(tmp_path / "x")], "no such folder"),
        (["dequantize", str(tmp_path / "plain"), str(tmp_path / "x")], "it is not quantized"),
        (["quantize", str(tmp_path / "small"), str(tmp_path / "x")], "it may be quantized already"),
    ):
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="choose from int8, nf4"):
        quantized.quantize(stack(), "int4")
    model = stack(dtype=torch.float32)
    quantized.quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantized.quantize(model)
    broken = stack(dtype=torch.float32)
    with torch.no_grad():
        broken[0].lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantized.quantize(broken)
    with pytest.raises(ValueError, match="without lora_bias"):
        quantized.quantize(peft_mlp(lora_bias=True))
