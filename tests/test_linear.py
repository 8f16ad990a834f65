"""The modules: PEFT's names, state dicts, moves between types and devices, and the ways in and out."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
from typing import Any

import pytest
import torch
from tolerance import assert_close, make_problem, truth_and_plain
from torch import nn

from fastlora import FastLoRALinear, NF4Linear, NF4Weight, reference

QUANT_TYPES = ("nf4", "fp4", None)


def make(in_features: int = 64, out_features: int = 48, **kwargs: Any) -> FastLoRALinear:
    """A small layer whose B is not zero, so that the adapter shows in the output."""
    return FastLoRALinear(in_features, out_features, **{"r": 4, "init_lora_weights": False, **kwargs})


def expected(layer: FastLoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The definition, from the reference."""
    base = layer.base_layer
    w = base.nf4 if isinstance(base, NF4Linear) else base.weight
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return reference.lora_linear(x, w, lora_a, lora_b, base.bias, layer.scaling["default"])


def statistics(layer: NF4Linear) -> dict[str, torch.Tensor]:
    return layer.nf4.tensors()


def assert_same_bits(layer: NF4Linear, before: dict[str, torch.Tensor]) -> None:
    after = statistics(layer)
    assert after.keys() == before.keys()
    for name, t in before.items():
        assert after[name].dtype == t.dtype, name
        assert torch.equal(after[name], t), name


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(bias: bool, quant_type: str | None, device: str) -> None:
    layer = make(quant_type=quant_type, bias=bias, lora_alpha=6, device=device)
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, expected(layer, x.view(-1, 64)).view(2, 3, 48))
    y.square().sum().backward()
    assert x.grad.shape == x.shape
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": 0}, r"in_features and out_features must be positive, got 0 and 48"),
        ({"out_features": -1}, r"must be positive, got 64 and -1"),
        ({"r": 0}, r"r must be a positive rank, got 0"),
        ({"r": -2}, r"r must be a positive rank, got -2"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1\.0"),
        ({"lora_dropout": -0.5}, r"lora_dropout must lie in \[0, 1\), got -0\.5"),
        ({"init_lora_weights": "pissa"}, r'must be True, False or "gaussian", got \'pissa\''),
        ({"blocksize": 48}, r"blocksize must be one of"),
        ({"quant_type": "int4"}, r"quant_type must be one of"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(device: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs, device=device)


def test_unknown_backend_raises_at_the_first_forward() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cublas'"):
        make(backend="cublas")(torch.randn(2, 64))


def test_only_the_adapter_learns() -> None:
    layer = make(bias=True)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }


@pytest.mark.parametrize("use_rslora", [True, False])
def test_scaling(use_rslora: bool) -> None:
    layer = make(r=4, lora_alpha=10, use_rslora=use_rslora)
    assert layer.scaling == {"default": 10 / (math.sqrt(4) if use_rslora else 4)}
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), expected(layer, x))


def test_init_modes() -> None:
    zero_b = [make(256, 48, r=16, init_lora_weights=mode) for mode in (True, "gaussian")]
    for layer in zero_b:
        assert not layer.lora_B["default"].weight.any()
        assert layer.lora_A["default"].weight.any()
    kaiming, gaussian = (layer.lora_A["default"].weight for layer in zero_b)
    assert kaiming.abs().max() <= 1 / math.sqrt(256)  # kaiming_uniform with a = sqrt(5)
    assert gaussian.std().item() == pytest.approx(1 / 16, rel=0.1)
    both = make(256, 48, r=16, init_lora_weights=False)
    assert both.lora_A["default"].weight.any()
    assert both.lora_B["default"].weight.any()


def test_starts_agree_with_peft() -> None:
    peft = pytest.importorskip("peft")
    for mode in (True, False, "gaussian"):
        torch.manual_seed(0)
        ours = make(quant_type=None, init_lora_weights=mode)
        torch.manual_seed(0)
        base = nn.Linear(64, 48, bias=False)
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=mode)
        theirs = peft.tuners.lora.Linear(base, "default", config=config, r=4, lora_alpha=8)
        for name in ("lora_A", "lora_B"):
            a, b = (getattr(layer, name)["default"].weight.std().item() for layer in (ours, theirs))
            assert a == pytest.approx(b, rel=0.2, abs=1e-12), (mode, name)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, None)])
def test_types(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    layer = make(dtype=dtype, adapter_dtype=adapter_dtype)
    assert layer.base_layer.nf4.dtype == dtype
    assert layer.lora_A["default"].weight.dtype == (adapter_dtype or dtype)
    x = torch.randn(3, 64, dtype=dtype)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("r", [1, 7, 1024])
def test_ranks(r: int) -> None:
    layer = make(32, 16, r=r, lora_alpha=r)
    problem = make_problem(3, 16, 32, r, scale=1.0)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    problem = dataclasses.replace(problem, w=layer.base_layer.nf4, lora_a=lora_a.detach(), lora_b=lora_b.detach())
    y = layer(problem.x)
    y.backward(problem.dy)
    truth, plain = truth_and_plain(problem)
    for name, actual in (("y", y), ("da", lora_a.grad), ("db", lora_b.grad)):
        assert_close(actual, plain[name], truth[name], name)


def test_dropout_only_in_training() -> None:
    layer = make(lora_dropout=0.5)
    x = torch.randn(4, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), expected(layer, x))
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_repr_names_what_matters(quant_type: str | None) -> None:
    text = repr(make(quant_type=quant_type, lora_alpha=6))
    assert "in_features=64, out_features=48, r=4, scaling=1.5, backend='auto'" in text
    if quant_type is not None:
        assert f"NF4Linear(in_features=64, out_features=48, bias=False, {quant_type}, blocksize=64, nested)" in text


# -- names and state dicts -----------------------------------------------------------------------------------------


def peft_layer(base: nn.Module, r: int = 4, lora_alpha: int = 8, **kwargs: Any) -> Any:
    """PEFT's layer over ``base``, its B not zero."""
    peft = pytest.importorskip("peft")
    from peft.tuners import lora

    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, init_lora_weights=False, **kwargs)
    kind = lora.Linear4bit if hasattr(base.weight, "quant_state") else lora.Linear
    return kind(base, "default", config=config, r=r, lora_alpha=lora_alpha)


def linear4bit(
    in_features: int = 64,
    out_features: int = 48,
    bias: bool = False,
    nested: bool = True,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A quantized layer of bitsandbytes, random."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(
        in_features, out_features, bias, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type
    )
    weight = torch.randn(out_features, in_features, dtype=dtype) * 0.1
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type=quant_type, module=linear
    )
    linear = linear.to("cpu")
    # Evaluation on a CPU with AVX512-BF16 would rewrite the packed bytes in place.
    linear.support_avx512bf16_for_cpu = False
    return linear


@pytest.mark.parametrize("bias", [True, False])
def test_names_are_those_of_peft(bias: bool) -> None:
    dense = peft_layer(nn.Linear(64, 48, bias=bias))
    ours = make(quant_type=None, bias=bias)
    assert list(ours.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in dense.named_parameters()]
    packed = peft_layer(linear4bit(bias=bias))
    assert set(make(bias=bias).state_dict()) == set(packed.state_dict())
    for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha"):
        assert hasattr(ours, name)
        assert hasattr(dense, name)
    assert (ours.r, ours.lora_alpha, ours.scaling) == (dense.r, dense.lora_alpha, dense.scaling)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(assign: bool, nested: bool, quant_type: str | None) -> None:
    kwargs = {"quant_type": quant_type, "nested": nested, "bias": True}
    source, target = make(**kwargs), make(**kwargs)
    x = torch.randn(3, 64)
    assert not torch.equal(source(x), target(x))
    state = source.state_dict()
    target.load_state_dict(state, assign=assign)
    assert torch.equal(source(x), target(x))
    packed, loaded = state["base_layer.weight"], target.base_layer.weight
    assert (packed.data_ptr() == loaded.data_ptr()) == assign


def test_loading_takes_the_format_of_the_file() -> None:
    source = make(quant_type="fp4", blocksize=128, nested=False)
    target = make()
    target.load_state_dict(source.state_dict())
    assert repr(target.base_layer) == repr(source.base_layer)
    assert_same_bits(target.base_layer, statistics(source.base_layer))


def test_saved_with_torch_and_loaded_with_its_safe_defaults() -> None:
    source, target = make(bias=True), make(bias=True)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file))
    x = torch.randn(3, 64)
    assert torch.equal(source(x), target(x))


def test_saved_as_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = make(bias=True), make(bias=True)
    target.load_state_dict(safetensors.load(safetensors.save(source.state_dict())))
    x = torch.randn(3, 64)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("base_layer.weight.absmax"), r"not the state of one 4-bit weight"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("base_layer.weight.")],
            r"not the state of one 4-bit weight",
        ),
        (lambda s: s.pop("base_layer.weight.nested_quant_map"), r"base_layer\.weight\.nested_quant_map is missing"),
        (lambda s: s.update({"base_layer.weight.absmax": torch.zeros(3, dtype=torch.uint8)}), r"absmax_q must be"),
        (lambda s: s.update({"base_layer.weight": torch.zeros(7, dtype=torch.uint8)}), r"w_packed must be"),
        (lambda s: s.update(make(128, 48).state_dict()), r"saved matrix is \(48, 128\), this layer's is \(48, 64\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_broken_base_weights_are_not_loaded(strict: bool, change: Any, message: str) -> None:
    state, layer = make().state_dict(), make()
    before = copy.deepcopy(statistics(layer.base_layer))
    change(state)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        layer.load_state_dict(state, strict=strict)
    assert_same_bits(layer.base_layer, before)


def test_missing_keys() -> None:
    layer, other = make(), make()
    before = copy.deepcopy(statistics(layer.base_layer))
    state = other.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A\.default\.weight"):
        make().load_state_dict({key: value for key, value in state.items() if "lora_A" not in key})
    adapter = {key: value for key, value in state.items() if key.startswith("lora_")}
    with pytest.raises(RuntimeError, match=r"Missing key.*base_layer\.weight"):
        layer.load_state_dict(adapter)
    missing, unexpected = layer.load_state_dict(adapter, strict=False)
    assert "base_layer.weight" in missing
    assert not unexpected
    assert_same_bits(layer.base_layer, before)
    assert torch.equal(layer.lora_B["default"].weight, other.lora_B["default"].weight)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [True, False])
def test_meta_device(nested: bool, quant_type: str | None) -> None:
    kwargs = {"quant_type": quant_type, "nested": nested, "bias": True, "lora_dropout": 0.1}
    source, layer = make(**kwargs), make(**kwargs, device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.load_state_dict(source.state_dict(), assign=True)
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    x = torch.randn(3, 64)
    assert torch.equal(layer.eval()(x), source.eval()(x))


def test_meta_base_takes_a_copy_without_assign() -> None:
    source, layer = make(bias=False), make(bias=False, device="meta").base_layer
    layer.load_state_dict(source.base_layer.state_dict())
    assert_same_bits(layer, statistics(source.base_layer))
    assert layer.weight.data_ptr() != source.base_layer.weight.data_ptr()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_are_those_of_bitsandbytes(bias: bool, quant_type: str, nested: bool) -> None:
    theirs = linear4bit(bias=bias, quant_type=quant_type, nested=nested)
    weight = NF4Weight.from_bitsandbytes(theirs.weight)
    ours = NF4Linear(NF4Weight.quantize(torch.randn(48, 64)), torch.zeros(48) if bias else None)
    ours.load_state_dict(theirs.state_dict())
    assert_same_bits(ours, weight.tensors())
    x = torch.randn(3, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    for key, value in ours.state_dict().items():
        assert torch.equal(value.reshape(-1), theirs.state_dict()[key].reshape(-1)), key

    state = ours.state_dict()
    bnb = pytest.importorskip("bitsandbytes")
    packed = state.pop("weight")
    inner = {key.removeprefix("weight."): value for key, value in state.items() if key.startswith("weight.")}
    back = bnb.nn.Params4bit.from_prequantized(packed.view(-1, 1), inner, device="cpu")
    assert torch.equal(
        bnb.functional.dequantize_4bit(back.data, back.quant_state), bnb.functional.dequantize_4bit(
            theirs.weight.data, theirs.weight.quant_state)
    )  # fmt: skip


# -- copies and moves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str, quant_type: str | None) -> None:
    layer = make(quant_type=quant_type, bias=True, lora_dropout=0.3, use_rslora=True).eval()
    if how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    assert repr(other) == repr(layer)
    assert not other.training
    assert {p.data_ptr() for p in other.parameters()}.isdisjoint({p.data_ptr() for p in layer.parameters()})
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
        (lambda layer: layer.half(), torch.float16),
        (lambda layer: layer.bfloat16().float(), torch.float32),
        (lambda layer: layer.double(), torch.float64),
        (lambda layer: layer.to("cpu", torch.float16), torch.float16),
    ],
)
def test_changing_the_type_keeps_the_packed_weight(move: Any, dtype: torch.dtype, nested: bool) -> None:
    layer = make(nested=nested, bias=True)
    before = copy.deepcopy(statistics(layer.base_layer))
    move(layer)
    assert_same_bits(layer.base_layer, before)
    assert layer.lora_A["default"].weight.dtype == layer.base_layer.bias.dtype == dtype
    assert layer(torch.randn(3, 64, dtype=dtype)).dtype == dtype


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_to_the_gpu_and_back(quant_type: str | None) -> None:
    layer = make(quant_type=quant_type, bias=True)
    x = torch.randn(3, 64)
    y = layer(x)
    layer.to("cuda", torch.float32)
    assert all(t.is_cuda for t in (*layer.parameters(), *layer.buffers()))
    torch.testing.assert_close(layer(x.cuda()).cpu(), y)
    assert torch.equal(layer.cpu()(x), y)


def test_to_meta_and_to_empty() -> None:
    layer = make(bias=True)
    layer.to("meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    source = make(bias=True)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), source(x))


def test_no_dense_weight_is_kept() -> None:
    layer = make(256, 256)
    before = {id(t) for t in (*layer.parameters(), *layer.buffers())}
    layer(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert {id(t) for t in (*layer.parameters(), *layer.buffers())} == before
    held = sum(t.numel() * t.element_size() for t in layer.base_layer.buffers())
    assert held < 256 * 256 * 0.7


# -- NF4Linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nf4_linear(dtype: torch.dtype, bias: bool, device: str) -> None:
    problem = make_problem(5, 24, 40, r=0, dtype=dtype, bias=bias, device=device)
    layer = NF4Linear(problem.w, problem.bias)
    x = problem.x.clone().requires_grad_()
    y = layer(x)
    y.backward(problem.dy)
    truth, plain = truth_and_plain(problem)
    assert_close(y, plain["y"], truth["y"], "y")
    assert_close(x.grad, plain["dx"], truth["dx"], "dx")
    assert not any(p.requires_grad for p in layer.parameters())


# -- ways in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(bias: bool, quant_type: str | None) -> None:
    linear = nn.Linear(64, 48, bias=bias)
    layer = FastLoRALinear.from_linear(linear, 4, 8, quant_type=quant_type, init_lora_weights=False)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), expected(layer, x))
    if quant_type is None:
        assert layer.base_layer is linear
        assert not linear.weight.requires_grad
    else:
        quantized = NF4Weight.quantize(linear.weight, quant_type=quant_type)
        assert_same_bits(layer.base_layer, quantized.tensors())
    if bias:
        assert torch.equal(layer.base_layer.bias, linear.bias)


@pytest.mark.parametrize("training", [True, False])
def test_from_linear_keeps_the_mode(training: bool) -> None:
    layer = FastLoRALinear.from_linear(nn.Linear(8, 8).train(training), 2, lora_dropout=0.5)
    assert layer.training == training
    assert layer.lora_dropout["default"].training == training


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear4bit_shares_the_bytes(bias: bool, nested: bool) -> None:
    base = linear4bit(bias=bias, nested=nested)
    bytes_before = base.weight.data.clone()
    layer = FastLoRALinear.from_linear(base, 4, 8, init_lora_weights=False)
    assert layer.base_layer is base
    weight = NF4Weight.from_bitsandbytes(base.weight)
    assert weight.w_packed.data_ptr() == base.weight.data_ptr()
    x = torch.randn(3, 64)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), reference.lora_linear(x, weight, lora_a, lora_b, base.bias, 2.0))
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert torch.equal(base.weight.data, bytes_before)
    assert base.weight.quant_state is not None


def test_from_linear_on_nf4_linear_shares_the_bytes() -> None:
    base = NF4Linear(NF4Weight.quantize(torch.randn(48, 64)))
    assert FastLoRALinear.from_linear(base).base_layer is base


@pytest.mark.parametrize(
    "module", [nn.Conv1d(3, 3, 1), nn.Embedding(3, 3), nn.Identity()], ids=lambda m: type(m).__name__
)
def test_from_linear_refuses_other_layers(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"expected nn.Linear, .*got {type(module).__name__}"):
        FastLoRALinear.from_linear(module)


# -- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("base", ["dense", "dense with bias", "4-bit", "4-bit with bias"])
def test_from_peft_and_back(base: str, use_rslora: bool) -> None:
    bias = "bias" in base
    linear = linear4bit(bias=bias) if base.startswith("4-bit") else nn.Linear(64, 48, bias=bias)
    stock = peft_layer(linear, r=4, lora_alpha=6, use_rslora=use_rslora, lora_dropout=0.25).eval()
    ours = FastLoRALinear.from_peft(stock)
    back = ours.to_peft()
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
        torch.testing.assert_close(back(x), stock(x))
    assert type(back) is type(stock)
    assert not back.training
    for layer in (ours, back):
        assert layer.base_layer is linear
        assert layer.lora_A["default"] is stock.lora_A["default"]
        assert layer.lora_B["default"] is stock.lora_B["default"]
        assert layer.scaling["default"] == stock.scaling["default"]
        assert layer.lora_dropout["default"].p == 0.25
        assert layer.r["default"] == 4
        assert layer.lora_alpha["default"] == 6
    assert list(back.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_our_own_becomes_one_of_peft(bias: bool, nested: bool) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    ours = make(bias=bias, nested=nested, lora_dropout=0.1, dtype=torch.float32)
    stock = ours.to_peft()
    assert stock.training
    assert stock.base_layer.weight.data_ptr() == ours.base_layer.weight.data_ptr()
    x = torch.randn(3, 64)
    torch.testing.assert_close(stock.eval()(x), ours.eval()(x))
    again = FastLoRALinear.from_peft(stock)
    assert torch.equal(again(x), ours(x))
    assert set(stock.state_dict()) == set(ours.state_dict())


def test_peft_keeps_a_scaling_that_was_changed() -> None:
    stock = peft_layer(nn.Linear(64, 48))
    stock.set_scale("default", 3)
    ours = FastLoRALinear.from_peft(stock)
    assert ours.scaling == stock.scaling
    assert ours.to_peft().scaling == stock.scaling


def test_from_peft_names_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    stock = peft_layer(nn.Linear(64, 48))
    stock.update_layer("other", 2, lora_alpha=2, config=peft.LoraConfig(r=2, lora_alpha=2))
    assert FastLoRALinear.from_peft(stock, "other").lora_A["default"] is stock.lora_A["other"]
    stock.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"name the adapter to take: the active ones are \['default', 'other'\]"):
        FastLoRALinear.from_peft(stock)
    with pytest.raises(ValueError, match=r"no adapter 'third' on this layer; it has \['default', 'other'\]"):
        FastLoRALinear.from_peft(stock, "third")


def test_from_peft_refuses_what_is_not_plain_lora() -> None:
    for kwargs in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ValueError, match="adapter 'default' is not plain LoRA"):
            FastLoRALinear.from_peft(peft_layer(nn.Linear(64, 48), **kwargs))
    merged = peft_layer(nn.Linear(64, 48))
    merged.merge()
    with pytest.raises(ValueError, match="unmerge the adapters first"):
        FastLoRALinear.from_peft(merged)
    transposed = peft_layer(nn.Linear(64, 48))
    transposed.fan_in_fan_out = True
    with pytest.raises(ValueError, match=r"weight as \(in_features, out_features\) is not supported"):
        FastLoRALinear.from_peft(transposed)
