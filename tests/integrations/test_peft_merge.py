"""``fastlora.merge``: what is left of the adapters in the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import surface  # noqa: E402

import fastlora  # noqa: E402
from fastlora import NF4Weight  # noqa: E402
from fastlora.integrations.peft import merging  # noqa: E402
from fastlora.linear import base_weight  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
}


def layer_error(model: nn.Module, targets: dict[str, torch.Tensor]) -> float:
    total = 0.0
    for name, target in targets.items():
        w = base_weight(model.get_submodule(name))
        w = w.dequantize(torch.float32) if isinstance(w, NF4Weight) else w
        total += (w - target).square().sum().item()
    return total


def targets(model: Any) -> dict[str, torch.Tensor]:
    """W + sBA of every layer, by name in the base model."""
    prefix = "base_model.model."
    with torch.no_grad():
        return {
            name.removeprefix(prefix): base_weight(layer.base_layer).dequantize(torch.float32)
            + layer.get_delta_weight("default")
            for name, layer in model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)
        }


@pytest.mark.parametrize("accelerated", [True, False], ids=["fused", "stock"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense(kind: str, accelerated: bool) -> None:
    model = surface.make("4bit", **KINDS[kind])
    if accelerated:
        fastlora.accelerate(model)
    expected = surface.output(model.eval())
    merged = fastlora.merge(model, "dense")
    assert {type(m) for name, m in merged.named_modules() if name.endswith(("up", "down"))} == {nn.Linear}
    assert not hasattr(merged, "is_loaded_in_4bit")
    torch.testing.assert_close(surface.output(merged), expected, rtol=1e-4, atol=1e-4)
    half = fastlora.merge(surface.make("4bit"), "dense", dtype=torch.float16)
    assert half.layers[0]["up"].weight.dtype == half.layers[0]["up"].bias.dtype == torch.float16


def test_dense_makes_layers_without_adapters_dense_too() -> None:
    model = surface.make("4bit", target_modules=["up"])
    expected = surface.output(model.eval())
    merged = fastlora.merge(model, "dense")
    assert type(merged.layers[0]["down"]) is nn.Linear
    torch.testing.assert_close(surface.output(merged), expected, rtol=1e-4, atol=1e-4)


def test_requantize_is_peft() -> None:
    """To the last bits of the statistics, whose mean bitsandbytes takes in another order."""
    stock = surface.make("4bit").merge_and_unload()
    ours = fastlora.merge(surface.make("4bit"), "requantize")
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name in ("layers.0.up", "layers.1.down"):
        want, got = (base_weight(model.get_submodule(name)).dequantize(torch.float32) for model in (stock, ours))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def read_error(model: nn.Module, wanted: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> float:
    """What the merged layers get wrong of inputs along the rows of A."""
    total = 0.0
    for name, target in wanted.items():
        w = base_weight(model.get_submodule(name))
        w = w.dequantize(torch.float32) if isinstance(w, NF4Weight) else w
        directions = torch.linalg.qr(adapters[name].T).Q
        total += ((w - target) @ directions).square().sum().item()
    return total


def read_by(model: Any) -> dict[str, torch.Tensor]:
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer.lora_A["default"].weight.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_error_aware_keeps_what_the_adapter_reads(storage: torch.dtype, kind: str) -> None:
    results = []
    for mode in ("dense", "requantize", "error-aware"):
        model = surface.make("4bit", **KINDS[kind])
        for layer in surface.lora_layers(model):
            weight = NF4Weight.from_bitsandbytes(layer.base_layer.weight).to_bitsandbytes(storage)
            layer.base_layer.weight = weight
        read = read_by(model)
        merged = fastlora.merge(model, mode)
        if mode != "dense":
            assert merged.layers[0]["up"].weight.dtype == storage
            assert merged.layers[0]["up"].weight.quant_state is merged.layers[0]["up"].quant_state
        results.append(merged)
    truth, requantized, aware = results
    exact = {name: truth.get_submodule(name).weight for name in ("layers.0.up", "layers.0.down", "layers.1.up")}
    assert read_error(aware, exact, read) < 0.25 * read_error(requantized, exact, read)
    assert layer_error(aware, exact) < 2 * layer_error(requantized, exact)


def test_calibration_keeps_the_outputs() -> None:
    wanted = targets(surface.make("4bit"))
    # Inputs of very different sizes that correlate, as those of real models.
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    x = ((x + torch.randn(64, 64, generator=generator)) * torch.logspace(-1.5, 0.5, 64)).view(4, 16, 64)
    up = "layers.0.up"
    results = []
    for calibration in (None, [x[:2], x[2:]]):
        model = fastlora.merge(surface.make("4bit"), calibration=calibration)
        difference = base_weight(model.get_submodule(up)).dequantize(torch.float32) - wanted[up]
        results.append((x @ difference.T).square().mean().item())
    assert results[1] < 0.5 * results[0]


def test_passes_bound_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer at a time, whose inputs come from the merged layers before it; every layer is merged in the end."""
    seen = []
    real = merging._second_moments

    def watch(model: Any, group: Any, batches: Any) -> Any:
        merged = [layer.merged for layer in surface.lora_layers(model)]
        seen.append((list(group), merged))
        return real(model, group, batches)

    monkeypatch.setattr(merging, "_second_moments", watch)
    monkeypatch.setattr(merging, "MOMENTS_BYTES", 1)
    model = surface.make("4bit")
    exact, expected = targets(model), surface.output(model.eval())
    layers = len(surface.lora_layers(model))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    merged = fastlora.merge(model, calibration=(batch for batch in [x]))
    assert [len(group) for group, _ in seen] == [1] * layers
    assert [sum(done) for _, done in seen] == list(range(layers))
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in merged.modules())
    assert layer_error(merged, exact) < 0.1 * sum(t.square().sum().item() for t in exact.values())
    error = surface.output(merged) - expected
    assert error.norm() < 0.5 * expected.norm()


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fastlora.merge(surface.make("4bit"), progress=True)
    shown = capsys.readouterr().err
    assert "merging" in shown
    assert "4/4" in shown


def test_two_active_adapters() -> None:
    model = surface.make("4bit")
    surface.add(model, "4bit")
    model.base_model.set_adapter(["default", "other"])
    expected = surface.output(model.eval())
    torch.testing.assert_close(surface.output(fastlora.merge(model, "dense")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["requantize", "dense", "error-aware"])
@pytest.mark.parametrize("base", ["dense", "conv1d"])
def test_dense_bases_are_merged_by_peft(base: str, mode: str) -> None:
    expected = surface.make(base).merge_and_unload().state_dict()
    got = fastlora.merge(surface.make(base), mode).state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], t) for name, t in expected.items())


@pytest.mark.parametrize("mode", ["requantize", "error-aware", "dense"])
def test_the_merged_model_is_saved_and_loaded(
    mode: str, make_llama: Callable[..., Any], ids: Any, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_llama("dense", adapters=False).save_pretrained(tmp_path / "base")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=options, device_map="cpu", dtype=torch.float32
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    merged = fastlora.merge(peft.get_peft_model(base, config), mode, dtype=torch.float32 if mode == "dense" else None)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu", dtype=torch.float32)
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, merged(input_ids=ids).logits)
    assert (getattr(loaded.config, "quantization_config", None) is None) == (mode == "dense")


def test_errors_leave_the_model_alone() -> None:
    model = surface.make("4bit")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="unknown mode 'fp8'; choose from requantize, dense, error-aware"):
        fastlora.merge(model, "fp8")
    with pytest.raises(ValueError, match="calibration is for mode 'error-aware'"):
        fastlora.merge(model, "dense", calibration=[])
    with pytest.raises(ValueError, match="not a PEFT model"):
        fastlora.merge(nn.Linear(2, 2))
    last = surface.lora_layers(model)[-1].lora_B["default"].weight
    last.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.down: an adapter is not finite"):
        fastlora.merge(model)
    last.data[0, 0] = 1
    after = model.state_dict()
    assert [name for name, t in before.items() if not torch.equal(t, after[name])] == [
        "base_model.model.layers.1.down.lora_B.default.weight"
    ]
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        fastlora.merge(model)


def test_variants_are_refused() -> None:
    model = surface.make("4bit", alora_invocation_tokens=[1])
    with pytest.raises(ValueError, match="ALoraLinearVariant cannot be merged into a 4-bit base"):
        fastlora.merge(model)
    model = surface.make("4bit")
    surface.add(model, "4bit", use_dora=True)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="DoRA is active together with other adapters"):
        fastlora.merge(model)
