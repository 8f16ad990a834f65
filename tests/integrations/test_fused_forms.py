"""What a fused layer computes beyond one plain adapter, in every type and under what a training script does to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import surface  # noqa: E402
from tolerance import assert_close  # noqa: E402

from fastlora import NF4Weight  # noqa: E402
from fastlora.integrations.peft import accelerate  # noqa: E402
from fastlora.integrations.peft.situation import situation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Maker = Callable[..., Any]
FORMS = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "two": {},
}


def make(form: str, base: str, dtype: torch.dtype = FP32, device: str = "cpu", **fields: Any) -> Any:
    model = surface.make(base, dtype, autocast_adapter_dtype=dtype == FP32, device=device, **FORMS[form], **fields)
    if form == "two":
        surface.add(model, base, **fields)
        model.base_model.set_adapter(["default", "other"])
        if dtype != FP32:
            for layer in surface.lora_layers(model):
                layer.lora_A.to(dtype)
                layer.lora_B.to(dtype)
    return model


def one_layer(model: Any, x: torch.Tensor, dy: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients of the first adapted layer."""
    layer = surface.first(model)
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, BF16, enabled=autocast):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **grads}


def in_double(model: Any) -> Any:
    """PEFT's own layers in float64, on the dequantized bytes."""
    truth = copy.deepcopy(model)
    for parent in list(truth.modules()):
        base = getattr(parent, "base_layer", None)
        if base is not None and getattr(base.weight, "quant_state", None) is not None:
            linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
            linear.weight = nn.Parameter(NF4Weight.from_bitsandbytes(base.weight).dequantize(torch.float64), False)
            linear.bias = base.bias
            parent.base_layer = linear
    return truth.double()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("base", surface.BASES)
@pytest.mark.parametrize("form", FORMS)
def test_error_against_float64(form: str, base: str, dtype: torch.dtype, device: str) -> None:
    stock = make(form, base, dtype, device)
    if form == "dora":
        with torch.no_grad():
            for layer in surface.lora_layers(stock):
                layer.lora_magnitude_vector["default"].weight.mul_(1.3)
    fast, truth = copy.deepcopy(stock), in_double(stock)
    assert not accelerate(fast).skipped
    x, dy = torch.randn(32, 64).to(device, dtype), torch.randn(32, 128).to(device, dtype)
    plain, actual = one_layer(stock, x, dy), one_layer(fast, x, dy)
    wanted = one_layer(truth, x.double(), dy.double())
    assert actual.keys() == plain.keys() == wanted.keys()
    for name, want in wanted.items():
        assert_close(actual[name], plain[name], want, name)


@pytest.mark.parametrize("storage", [torch.uint8, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("form", FORMS)
def test_any_format_and_storage(form: str, quant_type: str, storage: torch.dtype, device: str) -> None:
    stock = make(form, "4bit", device=device)
    for layer in surface.lora_layers(stock):
        base = layer.base_layer
        dense = NF4Weight.from_bitsandbytes(base.weight).dequantize(FP32)
        nested = storage != BF16
        base.weight = NF4Weight.quantize(dense, quant_type=quant_type, nested=nested).to_bitsandbytes(storage)
        base.weight.module, base.quant_state = base, base.weight.quant_state
    fast = copy.deepcopy(stock)
    report = accelerate(fast)
    assert {layer.kind for layer in report.replaced} == {f"{quant_type}/64{' nested' if nested else ''}"}
    want = surface.train(stock)
    for name, t in surface.train(fast).items():
        scale = want[name].abs().max().item()
        torch.testing.assert_close(t, want[name], rtol=1e-4, atol=1e-5 * scale, msg=name)


# Types of x, of the adapters, and autocast, on a bf16 base: as trainers call the layers.
SETUPS = [(BF16, BF16, True), (BF16, FP32, True), (FP32, FP32, True), (FP32, FP32, False), (BF16, FP32, False)]


@pytest.mark.parametrize(("x_dtype", "adapter_dtype", "autocast"), SETUPS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_types_are_those_of_peft(
    form: str, x_dtype: torch.dtype, adapter_dtype: torch.dtype, autocast: bool, device: str
) -> None:
    stock = make(form, "4bit", BF16, device)
    for layer in surface.lora_layers(stock):
        layer.lora_A.to(adapter_dtype)
        layer.lora_B.to(adapter_dtype)
        layer.lora_magnitude_vector.float()
    fast = copy.deepcopy(stock)
    bias = copy.deepcopy(surface.first(fast).base_layer.bias)
    accelerate(fast)
    x, dy = torch.randn(16, 64).to(device, x_dtype), torch.randn(16, 128, device=device)
    want, got = one_layer(stock, x, dy, autocast), one_layer(fast, x, dy, autocast)
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in want.items()}
    for name, t in want.items():
        assert (got[name].float() - t.float()).norm() <= 2**-6 * t.float().norm(), name
    assert torch.equal(surface.first(fast).base_layer.bias, bias)
    assert surface.first(fast).base_layer.bias.dtype == BF16


@pytest.mark.parametrize("form", FORMS)
def test_scaling_as_a_tensor(form: str, device: str) -> None:
    stock, fast = make(form, "4bit", device=device), make(form, "4bit", device=device)
    accelerate(fast)
    for model in (stock, fast):
        for layer in surface.lora_layers(model):
            layer.scaling["default"] = torch.tensor(0.3, device=device)
    want = surface.train(stock)
    for name, t in surface.train(fast).items():
        torch.testing.assert_close(t, want[name], rtol=1e-4, atol=1e-5 * want[name].abs().max().item(), msg=name)


REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook on the magnitude": (
        lambda m: m.lora_magnitude_vector["default"].register_forward_hook(lambda *a: None),
        "the magnitude: it has hooks",
    ),
    "other magnitude": (
        lambda m: m.lora_magnitude_vector.update({"default": peft.tuners.lora.dora.DoraEmbeddingLayer(False)}),
        "the magnitude is a DoraEmbeddingLayer",
    ),
    "transposed": (lambda m: setattr(m, "fan_in_fan_out", True), "fan_in_fan_out contradicts the base layer"),
    "magnitude elsewhere": (
        lambda m: m.lora_magnitude_vector["default"].to("meta"),
        "the magnitude is on another device",
    ),
    "bias": (lambda m: m.lora_bias.update(default=True), "DoRA adapter 'default' has a bias on lora_B"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_to_leave_dora_to_peft(case: str) -> None:
    change, reason = REASONS[case]
    layer = surface.first(surface.make("dense", use_dora=True))
    change(layer)
    assert situation(layer) == reason


def test_the_norm_follows_the_weights() -> None:
    """What is kept of W for DoRA is not kept longer than W."""
    stock, fast = make("dora", "4bit"), make("dora", "4bit")
    accelerate(fast)
    surface.train(fast)
    other = surface.make("4bit")
    with torch.no_grad():
        for model in (stock, fast):
            for layer, source in zip(surface.lora_layers(model), surface.lora_layers(other), strict=True):
                dense = -2 * NF4Weight.from_bitsandbytes(source.base_layer.weight).dequantize(FP32).flip(0)
                new = NF4Weight.quantize(dense).to_bitsandbytes()
                layer.base_layer.weight.copy_(new.data)  # in place: the same storage, other bytes
                old = layer.base_layer.weight.quant_state
                old.absmax.copy_(new.quant_state.absmax)
                old.offset.copy_(new.quant_state.offset)
                old.state2.absmax.copy_(new.quant_state.state2.absmax)
    torch.testing.assert_close(surface.output(fast), surface.output(stock), rtol=1e-4, atol=1e-4)
    for model in (stock, fast):
        model.merge_adapter()
        model.unmerge_adapter()
    torch.testing.assert_close(surface.output(fast), surface.output(stock), rtol=1e-4, atol=1e-4)


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def llama(make_llama: Maker, form: str, base: str, **fields: Any) -> Any:
    model = make_llama(base, **FORMS[form], **fields)
    if form == "two":
        torch.manual_seed(5)
        config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **fields}
        model.add_adapter("other", peft.LoraConfig(**config))
        model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_replays_dropout(form: str, reentrant: bool, make_llama: Maker, ids: torch.Tensor) -> None:
    model = llama(make_llama, form, "4bit", lora_dropout=0.4)
    accelerate(model)
    model.enable_input_require_grads()
    model.train()
    torch.manual_seed(9)
    want = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    torch.manual_seed(9)
    got = step(model, ids)
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert torch.equal(got[name], t), name


@pytest.mark.parametrize("base", ["4bit", "dense"])
@pytest.mark.parametrize("form", FORMS)
def test_made_in_inference_mode(form: str, base: str) -> None:
    with torch.inference_mode():
        stock = make(form, base).eval()
        fast = copy.deepcopy(stock)
        assert not accelerate(fast).skipped
    x = torch.randn(3, 64)
    for scope in (torch.inference_mode, torch.no_grad):
        with scope():
            torch.testing.assert_close(fast(x), stock(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["4bit", "dense"])
@pytest.mark.parametrize("form", ["dora", "two"])
def test_torch_compile_of_the_model(form: str, base: str, make_llama: Maker, ids: torch.Tensor) -> None:
    import torch._dynamo

    stock, fast = llama(make_llama, form, base), llama(make_llama, form, base)
    accelerate(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    compiled(input_ids=ids, labels=ids).loss.backward()
    got = {name: p.grad for name, p in fast.named_parameters() if p.grad is not None}
    for name, grad in step(stock, ids).items():
        if name != "loss":
            torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("base", surface.BASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_compiles_without_graph_breaks(form: str, base: str, device: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    fast = make(form, base, device=device, lora_dropout=0.0)
    accelerate(fast)
    layer, x = surface.first(fast), torch.randn(5, 64, device=device)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_a_cache(form: str, make_llama: Maker, ids: torch.Tensor) -> None:
    stock, fast = (llama(make_llama, form, "4bit").eval() for _ in range(2))
    accelerate(fast)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "use_cache": True}
    want = stock.generate(input_ids=ids, **arguments)
    assert torch.equal(fast.generate(input_ids=ids, **arguments), want)
    if form in ("lora", "lora_bias"):
        names = ["default", "__base__"]
        want = stock.generate(input_ids=ids, adapter_names=names, num_beams=2, **arguments)
        assert torch.equal(fast.generate(input_ids=ids, adapter_names=names, num_beams=2, **arguments), want)


def test_dora_caching(device: str) -> None:
    """PEFT's context keeps the norms during evaluation, and drops them in training."""
    from peft.helpers import DoraCaching

    stock, fast = (make("dora", "4bit", device=device).eval() for _ in range(2))
    accelerate(fast)
    magnitudes = [layer.lora_magnitude_vector["default"] for layer in surface.lora_layers(fast)]
    before = surface.output(fast)
    assert not any(m._dora_cache for m in magnitudes)
    with DoraCaching():
        for _ in range(2):
            torch.testing.assert_close(surface.output(fast), before)
        assert all(m._dora_cache for m in magnitudes)
        with torch.no_grad():
            for layer in surface.lora_layers(fast):
                layer.lora_B["default"].weight.mul_(2)
        kept = surface.output(fast)
        fast.train()
        assert not any(m._dora_cache for m in magnitudes)
        for layer in surface.lora_layers(stock):
            layer.lora_B["default"].weight.data.mul_(2)
        torch.testing.assert_close(surface.output(fast), surface.output(stock), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(kept, surface.output(fast))
    fast.eval()
    with DoraCaching():
        surface.output(fast)
    assert all(m._dora_cache for m in magnitudes)
    surface.output(fast)  # outside of the context
    assert not any(m._dora_cache for m in magnitudes)
