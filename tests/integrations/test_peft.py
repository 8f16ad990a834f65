"""``fastlora.accelerate`` against PEFT itself: the same model, the same numbers, the same files."""

from __future__ import annotations

import copy
import functools
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import linear_layer, lora_layer
from tolerance import GRADS, Problem, assert_close, make_problem
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed import tensor as distributed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fastlora import NF4Weight, reference  # noqa: E402
from fastlora.integrations.peft import FUSED, Report, accelerate, restore  # noqa: E402
from fastlora.integrations.peft import layers as layers_module  # noqa: E402
from fastlora.integrations.peft.layers import Fused  # noqa: E402
from fastlora.linear import base_weight  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
]

LoraLayer = peft.tuners.lora.LoraLayer
Maker = Callable[..., Any]
BASES = ("4bit", "dense")


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def first(model: nn.Module) -> Any:
    return next(iter(layers(model).values()))


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The adapters that the fused operator runs for, filled as it runs."""
    calls: list[Any] = []
    real, real_mixed = layers_module.situation, layers_module.mixed_situation

    def spy(layer: Any) -> Any:
        found = real(layer)
        if not isinstance(found, str):
            calls.append(found[1])
        return found

    def mixed_spy(layer: Any, names: list[str]) -> Any:
        found = real_mixed(layer, names)
        if not isinstance(found, str):
            calls.append(names)
        return found

    monkeypatch.setattr(layers_module, "situation", spy)
    monkeypatch.setattr(layers_module, "mixed_situation", mixed_spy)
    return calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return fused_calls(monkeypatch)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    ids = ids.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device), **kwargs).logits


def assert_same_training(fast: Any, stock: Any, ids: torch.Tensor) -> None:
    torch.testing.assert_close(step(fast, ids), step(stock, ids))
    got, want = grads(fast), grads(stock)
    assert got.keys() == want.keys()
    assert any("lora_A" in name for name in want)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6 + 1e-5 * grad.abs().max().item(), msg=name)


@pytest.fixture(params=BASES)
def pair(request: pytest.FixtureRequest, make_llama: Maker, device: str) -> tuple[Any, Any]:
    """The same model twice: stock, and accelerated."""
    stock, fast = (make_llama(request.param).to(device) for _ in range(2))
    accelerate(fast)
    return stock, fast


# -- numbers -------------------------------------------------------------------------------------------------------


def test_loss_and_every_gradient(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = pair
    assert_same_training(fast, stock, ids)
    assert len(calls) == len(layers(fast)) == 14


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_named_backend(backend: str, make_llama: Maker, ids: torch.Tensor) -> None:
    stock, fast = make_llama(), make_llama()
    report = accelerate(fast, backend)
    assert {layer.backend for layer in report.replaced} == {backend}
    assert_same_training(fast, stock, ids)


BF16, FP32 = torch.bfloat16, torch.float32
# How trainers call the layers of a bf16 model: types of x and of the adapters, autocast or not.
SETUPS = {
    "SFTTrainer": (BF16, BF16, True),
    "Trainer": (BF16, FP32, True),
    "prepared for k-bit training, Trainer": (FP32, FP32, True),
    "prepared for k-bit training, no autocast": (FP32, FP32, False),
    "loop by hand": (BF16, FP32, False),
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("base", BASES)
def test_error_against_float64(base: str, setup: str, calls: list[str], device: str) -> None:
    """On a bf16 base: the type and the gradients' types are PEFT's, the output's error is at most PEFT's."""
    x_dtype, adapter_dtype, autocast = SETUPS[setup]
    if base == "dense" and x_dtype == FP32 and not autocast:
        pytest.skip("PEFT itself cannot multiply float32 x with a bfloat16 base")
    stock = lora_layer(base, bias=True, dtype=BF16)
    stock["layer"].lora_A.to(adapter_dtype)
    stock["layer"].lora_B.to(adapter_dtype)
    fast = copy.deepcopy(stock.to(device))
    accelerate(fast)
    x0, dy = torch.randn(128, 64).to(device, x_dtype), torch.randn(128, 96, device=device)

    def run(model: Any) -> dict[str, torch.Tensor]:
        x = x0.clone().requires_grad_()
        with torch.autocast(device, BF16, enabled=autocast):
            y = model["layer"](x)
        y.backward(dy.to(y.dtype))
        a, b = model["layer"].lora_A["default"].weight, model["layer"].lora_B["default"].weight
        return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}

    plain, actual = run(stock), run(fast)
    assert calls == ["default"]
    layer = stock["layer"]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    bias, scale = layer.base_layer.bias.detach(), layer.scaling["default"]
    problem = Problem(x0, dy.to(plain["y"].dtype), base_weight(layer.base_layer), a, b, bias, scale)
    problem = problem.to(torch.float64)
    if base == "dense":
        problem.w.copy_(layer.base_layer.weight)
    truth = problem.run()

    def error(results: dict[str, torch.Tensor], name: str) -> float:
        return (results[name].double() - truth[name]).norm().item()

    assert actual["y"].dtype == plain["y"].dtype
    assert error(actual, "y") <= error(plain, "y")
    if not autocast:
        # PEFT then computes the adapter in the adapter's type; this layer computes in the base's, in 16 bits.
        low = Problem(x0, dy, problem.w if base == "dense" else base_weight(layer.base_layer), a, b, bias, scale)
        low = low.to(BF16).run()
        plain |= {name: low[name].to(plain[name].dtype) for name in GRADS}
    for name in GRADS:
        assert_close(actual[name], plain[name], truth[name], name)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_compute_dtype_holds_under_autocast(dtype: torch.dtype, device: str) -> None:
    """bitsandbytes computes in its layer's compute_dtype whatever autocast says."""
    model = lora_layer("4bit", dtype=FP32).to(device)
    accelerate(model)
    x = torch.randn(5, 64).to(device, dtype)
    expected = model["layer"](x)
    with torch.autocast(device, BF16):
        y = model["layer"](x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_x_in_float64_over_16_bits(how: str, device: str) -> None:
    model = lora_layer("4bit", dtype=BF16).to(device)
    accelerate(model)
    layer = model["layer"]
    run = torch.compile(layer, backend="aot_eager") if how == "compiled" else layer
    x = torch.randn(5, 64, dtype=torch.float64, device=device, requires_grad=True)
    y = run(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float64, torch.float64)
    assert torch.equal(y, layer(x.float()).double())  # which the accumulator fills


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_bias_of_the_base_keeps_its_type(dtype: torch.dtype, base: str, device: str) -> None:
    """PEFT on bitsandbytes casts the bias in place to the type that it computes in."""
    model = lora_layer(base, bias=True, dtype=BF16).to(device)
    model["layer"].base_layer.bias.data = model["layer"].base_layer.bias.data.float()
    accelerate(model)
    y = model["layer"](torch.randn(3, 64, dtype=dtype, device=device))
    assert y.dtype == dtype
    assert model["layer"].base_layer.bias.dtype == FP32


@pytest.mark.parametrize("base", BASES)
def test_trained_bias_gets_its_gradient(base: str) -> None:
    stock = lora_layer(base, bias=True)
    stock["layer"].base_layer.bias.requires_grad_()
    fast = copy.deepcopy(stock)
    accelerate(fast)
    x = torch.randn(5, 64)
    for model in (stock, fast):
        model["layer"](x).square().sum().backward()
    got, want = (m["layer"].base_layer.bias.grad for m in (fast, stock))
    torch.testing.assert_close(got, want)


def test_only_lora_b_learns(make_llama: Maker, ids: torch.Tensor) -> None:
    stock, fast = make_llama(), make_llama()
    accelerate(fast)
    for model in (stock, fast):
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.requires_grad_(False)
    step(stock, ids)
    step(fast, ids)
    assert not any("lora_A" in name for name in grads(fast))
    for name, grad in grads(stock).items():
        torch.testing.assert_close(grads(fast)[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}]
)
def test_scalings_and_ranks(fields: dict[str, Any], make_llama: Maker, ids: torch.Tensor) -> None:
    stock, fast = make_llama(**fields), make_llama(**fields)
    report = accelerate(fast)
    assert {layer.rank for layer in report.layers} == ({2, 8} if "rank_pattern" in fields else {8})
    assert_same_training(fast, stock, ids)


def test_scaling_may_be_a_tensor_and_may_change(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = pair
    for model in pair:
        for layer in layers(model).values():
            layer.scaling["default"] = torch.tensor(0.3, device=layer.lora_A["default"].weight.device)
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    before = logits(fast, ids)
    for model in pair:
        for layer in layers(model).values():
            layer.set_scale("default", 5.0)
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert not torch.allclose(logits(fast, ids), before)
    assert len(calls) == 14 * 4


# -- the report ----------------------------------------------------------------------------------------------------


def test_report(make_llama: Maker) -> None:
    model = make_llama()
    report = accelerate(model)
    assert isinstance(report, Report)
    assert [layer.name for layer in report.replaced] == list(layers(model))
    assert not report.skipped
    by_name = {layer.name: layer for layer in report.layers}
    up = by_name["base_model.model.model.layers.0.mlp.up_proj"]
    assert (up.kind, up.shape, up.rank, up.backend, up.reason) == ("nf4/64 nested", (128, 64), 8, "torch", None)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "count", "base", "out", "x", "in", "rank", "runs", "on"]
    row = next(line for line in lines if "up_proj" in line)
    assert " ".join(row.split()) == "base_model.model.model.layers.*.mlp.up_proj 2 nf4/64 nested 128 x 64 8 torch"
    assert lines[-1] == "14 of 14 LoRA layers fused"


def test_report_of_a_dense_base(make_llama: Maker) -> None:
    assert {layer.kind for layer in accelerate(make_llama("dense", dtype=BF16)).layers} == {"dense bfloat16"}


def swap(container: str, child: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        getattr(layer, container)[child] = make(getattr(layer, container)[child])

    return change


REASONS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "trained base": ("dense", lambda m: m.base_layer.weight.requires_grad_(), "the base weight is trained"),
    "repacked": (
        "4bit",
        lambda m: setattr(m.base_layer.weight.quant_state, "packing_format_for_cpu", True),
        "repacked this weight for CPU inference",
    ),
    "base hook": (
        "dense",
        lambda m: m.base_layer.register_forward_hook(lambda *a: None),
        "base layer: it has hooks",
    ),
    "base pre-hook": (
        "4bit",
        lambda m: m.base_layer.register_forward_pre_hook(lambda *a: None),
        "base layer: it has hooks",
    ),
    "base forward": (
        "dense",
        lambda m: setattr(m.base_layer, "forward", functools.partial(m.base_layer.forward)),
        "base layer: its forward is replaced on the instance",
    ),
    "hook on lora_A": (
        "dense",
        lambda m: m.lora_A["default"].register_full_backward_hook(lambda *a: None),
        "lora_A: it has hooks",
    ),
    "hook on lora_B": (
        "dense",
        lambda m: m.lora_B["default"].register_forward_hook(lambda *a: None),
        "lora_B: it has hooks",
    ),
    "hook on dropout": (
        "dense",
        lambda m: m.lora_dropout["default"].register_forward_hook(lambda *a: None),
        "lora_dropout: it has hooks",
    ),
    "other lora_A": (
        "dense",
        swap("lora_A", "default", lambda old: nn.modules.linear.NonDynamicallyQuantizableLinear(64, 8, bias=False)),
        "lora_A is a NonDynamicallyQuantizableLinear",
    ),
    "other dropout": (
        "dense",
        swap("lora_dropout", "default", lambda old: nn.AlphaDropout(0.1)),
        "lora_dropout is a AlphaDropout",
    ),
    "other base": (
        "dense",
        lambda m: setattr(m, "base_layer", nn.modules.linear.NonDynamicallyQuantizableLinear(64, 96)),
        "the base layer is a NonDynamicallyQuantizableLinear",
    ),
    "own forward": (
        "dense",
        lambda m: setattr(m, "forward", functools.partial(m.forward)),
        "its forward is replaced on the instance",
    ),
    "no adapter active": ("dense", lambda m: m.set_adapter([]), "no adapter is active"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons_to_leave_a_layer_to_peft(case: str, calls: list[str]) -> None:
    base, change, reason = REASONS[case]
    model = lora_layer(base, lora_dropout=0.0)
    change(model["layer"])
    with pytest.warns(UserWarning, match=f"(?s)no layer was fused:.*PEFT: .*{reason}"):
        report = accelerate(model)
    assert not report.replaced
    if case != "repacked":  # PEFT itself goes wrong there
        model["layer"](torch.randn(3, 64))
    assert not calls


def shard_adapter(layer: Any, mesh: Any) -> None:
    lora_a = layer.lora_A["default"]
    lora_a.weight = nn.Parameter(distributed.distribute_tensor(lora_a.weight.data, mesh, [distributed.Shard(0)]))


def shard_packed_base(layer: Any, mesh: Any) -> None:
    base = layer.base_layer
    base.quant_state = base.weight.quant_state
    packed = distributed.distribute_tensor(base.weight.data, mesh, [distributed.Shard(0)])
    base.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize(
    ("shard", "reason"),
    [(shard_adapter, "lora_A is sharded or wrapped"), (shard_packed_base, "the packed base weight is a DTensor")],
)
def test_sharded_weights_are_left_to_peft(shard: Callable[..., None], reason: str, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = lora_layer("4bit")
        shard(model["layer"], torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.warns(UserWarning, match=f"(?s)no layer was fused:.*PEFT: {reason}"):
            assert not accelerate(model).replaced
    finally:
        torch.distributed.destroy_process_group()


def test_gpt2(calls: list[Any]) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        size = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0))
        fields = {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": False, "fan_in_fan_out": True}
        return peft.get_peft_model(model, peft.LoraConfig(r=4, **fields)).eval()

    stock, fast = gpt2(), gpt2()
    report = accelerate(fast)
    assert {(layer.kind, layer.shape) for layer in report.replaced} == {
        ("dense float32", (192, 64)),
        ("dense float32", (64, 64)),
        ("dense float32", (64, 256)),
    }
    assert_same_training(fast, stock, torch.randint(1, 64, (1, 8)))
    assert len(calls) == 3


def test_layers_that_are_not_linear_are_left_to_peft() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv, self.linear = nn.Embedding(9, 64), nn.Conv2d(1, 1, 3), nn.Linear(64, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            h = self.embedding(ids)
            return self.linear(self.conv(h[None, None])[0, 0, :, :1].expand(-1, 64)) + self.linear(h[1:-1])

    config = peft.LoraConfig(r=4, target_modules=["embedding", "conv", "linear"], init_lora_weights=False)
    model = peft.get_peft_model(Model(), config)
    ids = torch.arange(9)
    expected = model(ids)
    report = accelerate(model)
    assert [layer.name.rpartition(".")[2] for layer in report.replaced] == ["linear"]
    assert {layer.name.rpartition(".")[2]: (layer.reason, layer.rank) for layer in report.skipped} == {
        "embedding": ("Embedding layers are not linear LoRA layers", 4),
        "conv": ("Conv2d layers are not linear LoRA layers", 4),
    }
    torch.testing.assert_close(model(ids), expected)
    assert "PEFT: Conv2d layers are not linear LoRA layers" in str(report)


# -- other states of the adapters ----------------------------------------------------------------------------------


def test_disabled_adapters(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = pair
    with stock.disable_adapter(), fast.disable_adapter():
        assert torch.equal(logits(fast, ids), logits(stock, ids))
    assert not calls
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert len(calls) == 14


def test_merged_and_unmerged(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of rounding in 4 bits
        for model in pair:
            model.eval()
            model.merge_adapter()
        assert torch.equal(logits(fast, ids), logits(stock, ids))
        assert not calls
        for model in pair:
            model.unmerge_adapter()
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert len(calls) == 14


def test_merge_and_unload(pair: tuple[Any, Any], ids: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, fast = (model.eval().merge_and_unload() for model in pair)
    assert not layers(fast)
    assert torch.equal(logits(fast, ids), logits(stock, ids))
    assert list(fast.state_dict()) == list(stock.state_dict())


def test_unload(pair: tuple[Any, Any], ids: torch.Tensor) -> None:
    stock, fast = (model.eval().unload() for model in pair)
    assert torch.equal(logits(fast, ids), logits(stock, ids))


def test_mixed_batch(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[Any]) -> None:
    for model in pair:
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.eval()
    stock, fast = pair
    names = ["__base__", "other"]
    torch.testing.assert_close(logits(fast, ids, adapter_names=names), logits(stock, ids, adapter_names=names))
    assert calls == [names] * 14
    for wrong, match in ((["other"], "Length of `adapter_names`"), (["other", "nobody"], "non-existing adapter")):
        with pytest.raises(ValueError, match=match):
            logits(fast, ids, adapter_names=wrong)


@pytest.mark.parametrize("shape", [(4, 64), (4, 3, 64), (4, 1, 3, 64)], ids=str)
def test_mixed_batch_of_any_shape_with_gradients(shape: tuple[int, ...], calls: list[Any]) -> None:
    """Inference first: what it keeps must not be unusable in training."""
    stock, fast = lora_layer("dense", bias=True), lora_layer("dense", bias=True)
    for model in (stock, fast):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=3, init_lora_weights=False)
        model["layer"].update_layer("other", 3, lora_alpha=5, config=config)
    fast.load_state_dict(stock.state_dict())
    accelerate(fast)
    names = ["default", "other", "__base__", "other"]
    x = torch.randn(shape)
    with torch.inference_mode():
        fast["layer"](x, adapter_names=names)
    for model in (stock, fast):
        model["layer"](x, adapter_names=names).square().sum().backward()
    assert calls == [names] * 2
    for name, grad in grads(stock).items():
        torch.testing.assert_close(grads(fast)[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_mixed_batch_of_fake_tensors_leaves_nothing_behind() -> None:
    stock = lora_layer("dense")["layer"]
    fast = copy.deepcopy(stock)
    accelerate(fast)
    x, names = torch.randn(2, 64), ["default", "__base__"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fast(mode.from_tensor(x), adapter_names=names).shape == (2, 96)
    torch.testing.assert_close(fast(x, adapter_names=names), stock(x, adapter_names=names))


def test_mixed_batch_with_dropout_is_left_to_peft(calls: list[Any]) -> None:
    model = lora_layer("dense", lora_dropout=0.5)
    accelerate(model)
    model.train()["layer"](torch.randn(2, 64), adapter_names=["default", "__base__"])
    assert not calls
    model.eval()["layer"](torch.randn(2, 64), adapter_names=["default", "__base__"])
    assert len(calls) == 1


@pytest.mark.parametrize("probabilities", [(0.0, 0.5, 0.25), (0.5, 0.25, 0.5)], ids=str)
def test_dropout_of_each_active_adapter(probabilities: tuple[float, ...], calls: list[Any]) -> None:
    """Every mask is independent; each output is that of some mask with the adapter's own probability."""
    model = lora_layer("dense", bias=True, lora_dropout=probabilities[0])
    layer = model["layer"]
    for name, p in zip("bc", probabilities[1:], strict=True):
        config = peft.LoraConfig(r=3, lora_dropout=p, init_lora_weights=False)
        layer.update_layer(name, 3, lora_alpha=5, config=config)
    names = ["default", "b", "c"]
    layer.set_adapter(names)
    accelerate(model)
    model.train()
    x = torch.randn(1, 64).expand(8192, -1)
    with torch.no_grad():
        samples = layer(x) - layer.base_layer(x)
        expected = layer.eval()(x[:1]) - layer.base_layer(x[:1])
        deviation = samples.std(0) / 8192**0.5
        assert ((samples.mean(0) - expected[0]).abs() < 6 * deviation).all()
        variance = torch.zeros(96)
        for name, p in zip(names, probabilities, strict=True):
            delta = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
            variance += p / (1 - p) * (delta * x[0]).square().sum(1)
        torch.testing.assert_close(samples.var(0), variance, rtol=0.12, atol=0)
    assert calls == [names] * 2


def test_adapters_that_come_and_go(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = pair
    default = logits(fast, ids)
    for model in pair:
        torch.manual_seed(5)
        model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.set_adapter("other")
    calls.clear()
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert calls == ["other"] * 14
    assert not torch.allclose(logits(fast, ids), default)
    for model in pair:
        model.set_adapter("default")
        model.delete_adapter("other")
    assert torch.equal(logits(fast, ids), default)
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))


def test_a_hook_that_comes_later_is_called(make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    model = make_llama()
    accelerate(model)
    seen = []
    handle = first(model).base_layer.register_forward_hook(lambda *args: seen.append(1))
    logits(model, ids)
    assert (len(seen), len(calls)) == (1, 13)
    handle.remove()
    logits(model, ids)
    assert (len(seen), len(calls)) == (1, 27)


def test_hooks_on_the_layer_itself_are_called(make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    model = make_llama()
    seen = []
    first(model).register_forward_hook(lambda *args: seen.append(1))
    accelerate(model)
    logits(model, ids)
    assert (len(seen), len(calls)) == (1, 14)


# -- files ---------------------------------------------------------------------------------------------------------


def test_adapter_files_are_those_of_peft(pair: tuple[Any, Any], tmp_path: Path) -> None:
    stock, fast = pair
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    assert {p.name for p in (tmp_path / "fast").iterdir()} == {p.name for p in (tmp_path / "stock").iterdir()}
    stock_bytes, fast_bytes = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stock", "fast")
    )
    assert fast_bytes == stock_bytes
    stock_config, fast_config = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "fast")
    )
    assert fast_config.pop("target_modules").sort() == stock_config.pop("target_modules").sort()
    assert fast_config == stock_config


def test_load_adapter(pair: tuple[Any, Any], make_llama: Maker, tmp_path: Path, ids: torch.Tensor, calls: Any) -> None:
    stock, fast = pair
    with torch.no_grad():
        for p in stock.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    stock.save_pretrained(tmp_path)
    fast.load_adapter(tmp_path, "loaded")
    fast.set_adapter("loaded")
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert calls == ["loaded"] * 14
    fast.save_pretrained(tmp_path / "again", selected_adapters=["loaded"])
    again = (tmp_path / "again" / "loaded" / "adapter_model.safetensors").read_bytes()
    assert again == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_an_adapter_of_ours_loads_in_plain_peft(make_llama: Maker, tmp_path: Path, ids: torch.Tensor) -> None:
    fast = make_llama()
    accelerate(fast)
    step(fast, ids)
    with torch.no_grad():
        for p in fast.parameters():
            if p.grad is not None:
                p.sub_(p.grad)
    fast.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(make_llama(adapters=False), tmp_path)
    torch.testing.assert_close(logits(stock.eval(), ids), logits(fast.eval(), ids))


def test_state_dicts_are_those_of_peft(pair: tuple[Any, Any]) -> None:
    stock, fast = pair
    got, want = fast.state_dict(), stock.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[name], t) for name, t in want.items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str, make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    model = make_llama()
    accelerate(model, "reference")
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    expected = logits(model, ids)
    calls.clear()
    assert torch.equal(logits(other, ids), expected)
    assert len(calls) == 14
    assert first(other).fastlora_backend == "reference"
    assert restore(other) == 14
    torch.testing.assert_close(logits(other, ids), expected)


# -- generation and training ---------------------------------------------------------------------------------------


def test_greedy_generation(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = (model.eval() for model in pair)
    ids = ids.to(stock.device)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fast.generate(input_ids=ids, **arguments), stock.generate(input_ids=ids, **arguments))
    assert calls


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_prepared_for_kbit_training_with_checkpointing(
    base: str, reentrant: bool, make_llama: Maker, ids: torch.Tensor, calls: list[str]
) -> None:
    def prepare(model: nn.Module) -> None:
        model.is_loaded_in_4bit = True
        peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.is_loaded_in_4bit = base == "4bit"

    stock, fast = make_llama(base, prepare=prepare), make_llama(base, prepare=prepare)
    accelerate(fast)
    stock.train()
    fast.train()
    assert_same_training(fast, stock, ids)
    # The last layers of a recomputed block may not run again where early stopping knows that nothing needs them.
    assert 14 < len(calls) <= 28


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_dropout(reentrant: bool, make_llama: Maker, ids: torch.Tensor) -> None:
    model = make_llama(lora_dropout=0.4)
    accelerate(model)
    model.enable_input_require_grads()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(9)
        results.append((step(model, ids), {name: g.clone() for name, g in grads(model).items()}))
    (loss, want), (loss_again, got) = results
    assert torch.equal(loss, loss_again)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


def test_dropout(pair: tuple[Any, Any], make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = make_llama(lora_dropout=0.5), make_llama(lora_dropout=0.5)
    accelerate(fast)
    fast.train()
    assert not torch.equal(logits(fast, ids), logits(fast, ids))
    assert step(fast, ids).isfinite()
    assert len(calls) == 14 * 3
    torch.testing.assert_close(logits(fast.eval(), ids), logits(stock.eval(), ids))


@pytest.mark.parametrize("blocks", [False, True])
def test_dropout_has_a_mode_of_its_own(blocks: bool, make_llama: Maker, ids: torch.Tensor) -> None:
    """As where it is left on for evaluation, to see how sure a model is, or off for a part of the training."""
    stock, fast = make_llama(lora_dropout=0.5), make_llama(lora_dropout=0.5)
    accelerate(fast, blocks=blocks)
    for model in (stock, fast):
        model.eval()
        expected = logits(model, ids)
        for on in (True, False):
            model.train(not on)
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.train(on)
            assert torch.equal(logits(model, ids), logits(model, ids)) is not on
        torch.testing.assert_close(logits(model, ids), expected)


def test_dropout_is_unbiased(make_llama: Maker) -> None:
    model = lora_layer("dense", lora_dropout=0.5)
    accelerate(model)
    layer, x = model["layer"], torch.randn(1, 64).expand(4096, -1)
    with torch.no_grad():
        expected = layer.eval()(x[:1])
        samples = layer.train()(x)
        base = layer.base_layer(x[:1])
    deviation = samples.std(0) / 64  # of the mean of 4096 samples
    assert ((samples.mean(0) - expected[0]).abs() < 6 * deviation).all()
    assert not torch.allclose(expected, base)


@pytest.mark.parametrize("autocast", [True, False])
def test_trainer_with_checkpoint_and_resume(
    autocast: bool, make_llama: Maker, tmp_path: Path, ids: torch.Tensor
) -> None:
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 128, (12, 8))]

    def train(model: Any, name: str, resume: Path | None = None) -> tuple[Any, list[float]]:
        arguments = transformers.TrainingArguments(
            tmp_path / name,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=2,
            bf16=autocast,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about one another
        _, stock_losses = train(make_llama(lora_dropout=0.0), "stock")
        fast = make_llama(lora_dropout=0.0)
        accelerate(fast)
        fast, losses = train(fast, "fast")
        resumed = make_llama(lora_dropout=0.0)
        accelerate(resumed)
        resumed, _ = train(resumed, "fast", tmp_path / "fast" / "checkpoint-2")
    assert losses == pytest.approx(stock_losses, rel=2e-2 if autocast else 1e-4)
    assert losses[0] != losses[-1]
    a, b = peft.get_peft_model_state_dict(fast), peft.get_peft_model_state_dict(resumed)
    for name, t in a.items():
        torch.testing.assert_close(b[name], t, rtol=0, atol=0, msg=name)


def test_torch_compile(pair: tuple[Any, Any], ids: torch.Tensor, calls: list[str]) -> None:
    import torch._dynamo

    stock, fast = pair
    ids = ids.to(stock.device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    loss = compiled(input_ids=ids, labels=ids).loss
    loss.backward()
    want = step(stock, ids)
    torch.testing.assert_close(loss.detach(), want)
    for name, grad in grads(stock).items():
        torch.testing.assert_close(grads(fast)[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("base", BASES)
def test_a_layer_compiles_without_graph_breaks(base: str) -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    model = lora_layer(base, lora_dropout=0.1)
    accelerate(model)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model["layer"], fullgraph=True, dynamic=True, backend=counter)
    for rows, scaling in ((5, 0.5), (9, 0.5), (17, 2.0), (17, 3.5)):
        model["layer"].scaling["default"] = scaling
        x = torch.randn(rows, 64)
        assert compiled(x).shape == (rows, 96)
    assert counter.frame_count == 1
    model.eval()
    compiled = torch.compile(model["layer"], fullgraph=True, dynamic=True, backend=counter)
    x = torch.randn(7, 64)
    torch.testing.assert_close(compiled(x), model["layer"](x))
    torch._dynamo.reset()


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_the_packed_bytes(make_llama: Maker, ids: torch.Tensor) -> None:
    """bitsandbytes repacks the weights for CPU inference in place, after which training on them goes wrong."""
    model = make_llama()
    for layer in layers(model).values():
        layer.base_layer.support_avx512bf16_for_cpu = True  # as it is where the processor has the instructions
    accelerate(model)
    before = {name: layer.base_layer.weight.data.clone() for name, layer in layers(model).items()}
    model.eval()
    logits(model, ids)
    with model.disable_adapter():
        logits(model, ids)
    for name, layer in layers(model).items():
        assert torch.equal(layer.base_layer.weight.data, before[name]), name
        assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)
    restore(model)
    assert all(layer.base_layer.support_avx512bf16_for_cpu for layer in layers(model).values())


def test_no_dense_weight_is_kept(make_llama: Maker, ids: torch.Tensor) -> None:
    model = make_llama()
    accelerate(model)
    before = {id(t) for t in (*model.parameters(), *model.buffers())}
    attributes = {name: set(layer.base_layer.__dict__) for name, layer in layers(model).items()}
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    shapes = {tuple(layer.base_layer.weight.quant_state.shape) for layer in layers(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    own = {p.data_ptr() for p in model.parameters()}  # lm_head's weight has such a shape
    assert not [
        t.shape for t in saved if t.is_floating_point() and tuple(t.shape) in shapes and t.data_ptr() not in own
    ]
    loss.backward()
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == before
    assert attributes == {name: set(layer.base_layer.__dict__) for name, layer in layers(model).items()}


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_any_quant_storage(storage: torch.dtype) -> None:
    model = lora_layer("4bit")
    base = model["layer"].base_layer
    expected_weight = NF4Weight.from_bitsandbytes(base.weight).dequantize()
    base.weight.data = base.weight.data.view(-1).view(storage).view(-1, 1)
    x = torch.randn(3, 64)
    a, b = (part["default"].weight for part in (model["layer"].lora_A, model["layer"].lora_B))
    accelerate(model)
    expected = reference.lora_linear(x, expected_weight, a, b, None, model["layer"].scaling["default"])
    torch.testing.assert_close(model["layer"](x), expected)


def test_a_weight_whose_state_is_only_on_the_module() -> None:
    """Sharding replaces the weight by a plain parameter; the state stays on the layer."""
    model = lora_layer("4bit")
    layer = model["layer"]
    x = torch.randn(3, 64)
    expected = layer(x)
    layer.base_layer.quant_state = layer.base_layer.weight.quant_state
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data, requires_grad=False)
    assert accelerate(model).replaced
    torch.testing.assert_close(layer(x), expected)


def test_linear4bit_under_a_plain_peft_layer(calls: list[str]) -> None:
    """PEFT wraps it so where the model is not marked as loaded in 4 bits."""
    linear = linear_layer("4bit")
    config = peft.LoraConfig(r=8, lora_alpha=8, init_lora_weights=False)
    model = nn.ModuleDict({"layer": peft.tuners.lora.Linear(linear, "default", config=config, r=8, lora_alpha=8)})
    x = torch.randn(3, 64)
    expected = model["layer"](x)
    (report,) = accelerate(model).layers
    assert report.kind == "nf4/64 nested"
    torch.testing.assert_close(model["layer"](x), expected)
    assert calls == ["default"]


# -- on and off ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_restore(base: str, make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    model = make_llama(base)
    before = {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    stock = logits(model, ids)
    accelerate(model)
    assert {type(layer) for layer in layers(model).values()} <= set(FUSED.values())
    assert all(isinstance(layer, before[name][0]) for name, layer in layers(model).items())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert restore(model) == 14
    assert {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()} == before
    assert torch.equal(logits(model, ids), stock)
    assert not calls
    assert restore(model) == 0


@pytest.mark.parametrize("method", ["LoRA", "VeRA"])
def test_restored_behind_a_wrapper_of_its_forward(method: str, ids: torch.Tensor, make_llama: Maker) -> None:
    model = make_llama("dense", adapters=method == "LoRA")
    if method == "VeRA":
        model = peft.get_peft_model(model, peft.VeraConfig(r=8, target_modules=["q_proj"], d_initial=0.5))
    stock = logits(model, ids)
    accelerate(model)
    layer = next(m for m in model.modules() if isinstance(m, Fused))
    layer.forward = functools.partial(layer.forward)  # as hooks of accelerate, which keep the bound method
    assert report_of(accelerate(model), layer, model).reason is None
    torch.testing.assert_close(logits(model, ids), stock)
    restore(model)
    assert torch.equal(logits(model, ids), stock)


def report_of(report: Report, layer: nn.Module, model: nn.Module) -> Any:
    name = next(name for name, module in model.named_modules() if module is layer)
    return next(line for line in report.layers if line.name == name)


def test_accelerating_twice(make_llama: Maker, ids: torch.Tensor) -> None:
    stock, fast = make_llama(), make_llama()
    for layer in layers(fast).values():
        layer.base_layer.support_avx512bf16_for_cpu = True
    first_report, second = accelerate(fast), accelerate(fast)
    assert first_report == second
    assert_same_training(fast, stock, ids)
    accelerate(fast, "reference")
    assert {layer.fastlora_backend for layer in layers(fast).values()} == {"reference"}
    assert restore(fast) == 14
    assert type(first(fast)) is type(first(stock))
    assert first(fast).base_layer.support_avx512bf16_for_cpu


def test_a_model_without_adapters() -> None:
    with pytest.raises(ValueError, match=r"no PEFT LoRA layers; wrap it with peft\.get_peft_model first"):
        accelerate(nn.Sequential(nn.Linear(4, 4)))
    assert restore(nn.Sequential(nn.Linear(4, 4))) == 0


@pytest.mark.parametrize("none", [False, True], ids=["all can be fused", "none can be fused"])
def test_unknown_backend(none: bool, make_llama: Maker) -> None:
    model = make_llama("dense")
    if none:
        model.base_model.set_adapter([])
    before = {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match="unknown backend 'cublas'; choose from auto, "):
        accelerate(model, "cublas")
    assert {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()} == before


def test_a_named_backend_that_cannot_run(make_llama: Maker) -> None:
    model = make_llama("dense", dtype=torch.float64)
    before = {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()}
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run .*float64 is not a type of these kernels"):
        accelerate(model, "triton")
    assert {name: (type(layer), dict(layer.__dict__)) for name, layer in layers(model).items()} == before


def test_part_of_a_model(make_llama: Maker, ids: torch.Tensor, calls: list[str]) -> None:
    stock, fast = make_llama(), make_llama()
    accelerate(fast.base_model.model.model.layers[0])
    torch.testing.assert_close(logits(fast, ids), logits(stock, ids))
    assert len(calls) == 7


@pytest.mark.parametrize("base", BASES)
def test_transforms_and_forward_mode_run_pefts_forward(base: str, calls: list[str]) -> None:
    stock = lora_layer(base)["layer"]
    fast = copy.deepcopy(stock)
    accelerate(fast)
    x, dx = torch.randn(3, 64), torch.randn(3, 64)
    learned = {name: p.detach() for name, p in stock.named_parameters() if "lora_" in name}
    found = []
    for layer in (stock, fast):

        def loss(parameters: Any, x: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        results = list(torch.func.grad(loss)(learned, x).values())
        results += torch.func.vmap(torch.func.grad(loss), (None, 0))(learned, torch.stack((x, dx))).values()
        results += torch.func.jvp(lambda x: loss(learned, x), (x,), (dx,))
        with torch.autograd.forward_ad.dual_level():
            for scope in (torch.no_grad, torch.enable_grad):
                with scope():
                    y = layer(torch.autograd.forward_ad.make_dual(x, dx))
                    results += torch.autograd.forward_ad.unpack_dual(y)
        found.append(results)
    assert not calls
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want)
    assert accelerate(fast).replaced


@pytest.mark.parametrize("blocks", [False, True])
def test_forward_mode_through_a_model(blocks: bool, make_llama: Maker, ids: torch.Tensor) -> None:
    tangents = []
    for model in (make_llama("dense"), make_llama("dense")):
        if tangents:
            accelerate(model, blocks=blocks, loss=blocks)
        model.get_base_model().set_attn_implementation("eager")
        embedded = model.get_input_embeddings()(ids).detach()
        with torch.no_grad(), torch.autograd.forward_ad.dual_level():
            out = model(inputs_embeds=torch.autograd.forward_ad.make_dual(embedded, embedded.cos()), labels=ids)
            tangents.append(torch.autograd.forward_ad.unpack_dual(out.loss).tangent)
    torch.testing.assert_close(*tangents)


def test_shapes_of_x(calls: list[str]) -> None:
    model = lora_layer("4bit")
    w, layer = base_weight(model["layer"].base_layer), model["layer"]
    accelerate(model)
    problem = make_problem(6, 96, 64, r=0)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = reference.lora_linear(problem.x, w, a, b, None, layer.scaling["default"])
    for shape in ((6, 64), (2, 3, 64), (1, 6, 1, 64)):
        torch.testing.assert_close(layer(problem.x.view(shape)), expected.view(*shape[:-1], 96))
    assert layer(problem.x[0]).shape == (96,)
    assert layer(problem.x[:0]).shape == (0, 96)
    assert len(calls) == 5


def test_layers_read_as_those_of_peft() -> None:
    """PEFT's messages and users' scripts know the layers by these names."""
    model = lora_layer("dense")
    stock = repr(model["layer"])
    accelerate(model, "torch")
    assert repr(type(model["layer"])) == "<class 'peft.tuners.lora.layer.Linear'>"
    assert repr(Fused).endswith("layers.Fused'>")
    lines = repr(model["layer"]).splitlines()
    assert lines.pop(1) == "  fused, backend='torch'"
    assert lines == stock.splitlines()
