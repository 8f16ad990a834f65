"""``accelerate(model, blocks=True)`` against the model without blocks, and against PEFT, for every architecture."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import inspect
import io
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import architectures
from architectures import ARCHITECTURES, JOINT, assert_same

from fastlora import blocks as fused_blocks
from fastlora import groups
from fastlora.integrations.peft import accelerate, norms, restore, rotary
from fastlora.integrations.peft import blocks as blocks_module
from fastlora.integrations.peft.blocks import FusedMLP
from fastlora.integrations.peft.layers import SLOT

pytestmark = pytest.mark.filterwarnings("ignore")

BESIDE = {"residual and norm", "norm", "rotary embedding"}
"""The kinds of blocks that need no adapter."""
ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    SLOT.results = None
    yield
    SLOT.results = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused nodes that ran: "group" or "mlp"."""
    seen: list[str] = []

    def spy(name: str, node: str) -> None:
        real = getattr(fused_blocks, node)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(fused_blocks, node, wrapped)

    spy("group", "lora_linears")
    spy("mlp", "gated_mlp")
    return seen


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, device: str) -> str:
    """The backend whose stacked form is to run for 16-bit types, whatever the sizes."""
    pytest.importorskip("triton")
    from fastlora.kernels import config

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted")
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs the tensor memory accelerator")
    monkeypatch.setattr(config, "form", lambda *args: "persistent")
    monkeypatch.setattr(config, "PROJECTED_ROWS", 1 << 30)
    return "triton"


def ids(device: str = "cpu") -> torch.Tensor:
    return torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3)).to(device)


def step(model: Any, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every adapter."""
    tokens = ids(next(model.parameters()).device.type) if tokens is None else tokens
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def accelerated(name: str, backend: str = "torch", **options: Any) -> Any:
    model = architectures.make(name, **options)
    accelerate(model, backend, blocks=True)
    return model


def attention(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].self_attn


def mlp(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].mlp


# -- numbers -------------------------------------------------------------------------------------------------------


@ARCHITECTURE
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_loss_and_every_gradient(name: str, backend: str, device: str, calls: list[str]) -> None:
    stock, layered = (architectures.make(name, device=device) for _ in range(2))
    accelerate(layered, backend)
    fast = accelerated(name, backend, device=device)
    want = step(stock)
    assert_same(step(layered), want)
    assert not calls
    assert_same(step(fast), want)
    grouped = backend == "torch" and name not in JOINT
    assert sorted(calls) == (["group"] * 2 if grouped else []) + ["mlp"] * 2


def error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], name: str) -> float:
    return float((got[name].double() - want[name].double()).norm())


@ARCHITECTURE
@pytest.mark.parametrize("form", ["library", "stacked"])
def test_error_in_bfloat16(name: str, form: str, device: str, request: pytest.FixtureRequest, calls: list[str]) -> None:
    """Of the loss and every gradient, against the same model in float32: at most twice that of the single layers."""
    truth = step(architectures.make(name, torch.float32, device, rounded=True))
    layered = architectures.make(name, torch.bfloat16, device, rounded=True)
    accelerate(layered, "torch")
    unfused = step(layered)
    backend = request.getfixturevalue("stack") if form == "stacked" else "torch"
    fused = step(accelerated(name, backend, dtype=torch.bfloat16, device=device, rounded=True))
    assert calls
    eps = torch.finfo(torch.bfloat16).eps
    for key, value in truth.items():
        assert fused[key].dtype == unfused[key].dtype
        bound = 2 * error(unfused, truth, key) + eps * float(value.double().norm())
        assert error(fused, truth, key) <= bound, key


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool, device: str, calls: list[str]) -> None:
    want = step(architectures.make(name, device=device))
    fast = accelerated(name, device=device)
    fast.train()
    fast.enable_input_require_grads()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step(fast)
    assert_same(got, want)
    assert calls.count("mlp") == 4
    assert calls.count("group") == (0 if name in JOINT else 4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_compiled_as_one_graph(name: str, device: str, calls: list[str]) -> None:
    fast = accelerated(name, device=device)
    want = step(fast)
    calls.clear()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    got = step(compiled)
    assert_same({key.removeprefix("_orig_mod."): value for key, value in got.items()}, want)
    assert calls == ["mlp"] * 2, "as operators; q, k and v are single layers"


def test_generation(device: str) -> None:
    stock, fast = architectures.make("llama", device=device), accelerated("llama", device=device)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(ids(device), **options), stock.generate(ids(device), **options))


def test_bf16_autocast_with_float32_inputs(device: str) -> None:
    """As after PEFT's preparation for training in 4 bits: norms in float32, layers that compute in bfloat16."""
    peft = pytest.importorskip("peft")

    def prepared() -> Any:
        model = architectures.make("llama", torch.bfloat16, device)
        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        return model

    layered, fast = prepared(), prepared()
    accelerate(layered, "torch")
    accelerate(fast, "torch", blocks=True)
    with torch.autocast(device, torch.bfloat16):
        want, got = step(layered), step(fast)
    for key, value in want.items():
        assert got[key].dtype == value.dtype
        torch.testing.assert_close(got[key], value, rtol=0.1, atol=0.05 * value.abs().max().item())


# -- when layers compute for themselves ------------------------------------------------------------------------------


def change_nothing(model: Any) -> None:
    pass


def second_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def switch(model: Any) -> None:
    second_adapter(model)
    model.set_adapter("other")


def both(model: Any) -> None:
    second_adapter(model)
    model.base_model.set_adapter(["default", "other"])


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def merge(model: Any) -> None:
    for layer in (attention(model).k_proj, mlp(model).down_proj):
        layer.merge()


def hook(model: Any) -> None:
    for layer in (attention(model).v_proj, mlp(model).gate_proj):
        layer.register_forward_hook(lambda module, args, y: y * 2)


def pre_hook(model: Any) -> None:
    for layer in (attention(model).v_proj, mlp(model).up_proj):
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replaced(model: Any) -> None:
    act = mlp(model).act_fn
    mlp(model).act_fn = nn.Tanh() if isinstance(act, nn.Module) else torch.tanh


def scaled(model: Any) -> None:
    for layer in (attention(model).q_proj, mlp(model).up_proj):
        layer.scaling["default"] *= 3


def frozen(model: Any) -> None:
    for layer in (attention(model).q_proj, mlp(model).up_proj, mlp(model, 1).down_proj):
        layer.lora_A["default"].weight.requires_grad_(False)


CHANGES: dict[str, tuple[Callable[[Any], None], int, int]] = {
    "nothing": (change_nothing, 2, 2),
    "another adapter": (switch, 2, 2),
    "two adapters": (both, 0, 0),
    "disabled adapters": (disable, 0, 0),
    "merged layers": (merge, 2, 1),
    "hooks": (hook, 1, 1),
    "pre-hooks": (pre_hook, 1, 1),
    "another activation": (replaced, 3, 1),
    "another scale": (scaled, 2, 2),
    "frozen adapters": (frozen, 2, 2),
}
"""What is done to a model that has blocks, and how many groups and MLPs of two layers then compute together. Where an
MLP's own forward runs, its gate and up are a group if they can be."""


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_calls(change: str, calls: list[str]) -> None:
    do, groups_left, mlps_left = CHANGES[change]
    stock, fast = architectures.make("llama"), accelerated("llama")
    step(fast)
    for model in (stock, fast):
        torch.manual_seed(5)
        do(model)
    calls.clear()
    tokens = ids()
    if change == "disabled adapters":
        with torch.no_grad():
            got, want = (model(input_ids=tokens).logits for model in (fast, stock))
        torch.testing.assert_close(got, want)
    else:
        assert_same(step(fast), step(stock))
    assert (calls.count("group"), calls.count("mlp")) == (groups_left, mlps_left)


def test_dropout_is_left_to_the_layers(calls: list[str]) -> None:
    stock, fast = (architectures.make("llama", lora_dropout=0.4) for _ in range(2))
    report = accelerate(fast, "torch", blocks=True)
    assert {block.kind for block in report.joined} == BESIDE
    assert all("dropout" in block.reason for block in report.blocks if block.reason is not None)
    fast.train()
    step(fast)
    assert not calls
    for model in (stock, fast):
        model.eval()
    assert_same(step(fast), step(stock))
    assert len(calls) == 4


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}], ids=str)
def test_what_cannot_join(fields: dict[str, Any]) -> None:
    stock, fast = (architectures.make("llama", **fields) for _ in range(2))
    report = accelerate(fast, "torch", blocks=True)
    assert_same(step(fast), step(stock))
    if "use_dora" in fields:
        assert {block.kind for block in report.joined} == BESIDE
        assert "more than one plain adapter" in str(report)
    else:
        layers = [block.layers for block in report.joined if block.kind not in ("residual and norm", "norm")]
        assert layers == [("q_proj", "v_proj")] * 2 + [("apply_rotary_pos_emb",)]
        assert "gate_proj has no adapter" in str(report)


def group_of(model: Any) -> Any:
    return attention(model).q_proj.fastlora_group


def test_results_are_for_the_same_x_only(calls: list[str]) -> None:
    fast = accelerated("llama")
    layers = attention(fast)
    x = torch.randn(2, 6, 64)
    want = layers.k_proj(torch.clone(x))
    layers.q_proj(x)
    calls.clear()
    assert torch.equal(layers.k_proj(x), want)
    assert not calls, "it was there already"
    layers.q_proj(x)
    torch.testing.assert_close(layers.k_proj(x.clone()), want)
    layers.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(layers.k_proj(x), attention(architectures.make("llama")).k_proj(x))


@pytest.mark.parametrize("what", ["parameter in place", "scaling", "adapters off", "no_grad"])
def test_results_are_for_the_same_layer_only(what: str) -> None:
    """Nothing that changes between the calls of two siblings is missed."""
    stock, fast = architectures.make("llama"), accelerated("llama")
    x = torch.randn(2, 6, 64)
    attention(fast).q_proj(x)
    for model in (stock, fast):
        layer = attention(model).k_proj
        if what == "parameter in place":
            with torch.no_grad():
                layer.lora_B["default"].weight.mul_(3)
        elif what == "scaling":
            layer.scaling["default"] = 5.0
        elif what == "adapters off":
            layer.enable_adapters(False)
    with torch.set_grad_enabled(what != "no_grad"):
        got, want = (attention(model).k_proj(x) for model in (fast, stock))
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad


def test_nothing_is_kept_alive() -> None:
    fast = accelerated("llama")
    layers = attention(fast)
    x = torch.randn(2, 6, 64, requires_grad=True)
    known = weakref.ref(x)
    layers.q_proj(x)
    assert SLOT.results.waiting
    layers.o_proj(torch.randn(2, 6, 64))
    assert SLOT.results is None, "the next fused layer forgets them"
    layers.q_proj(x), layers.k_proj(x), layers.v_proj(x)
    assert SLOT.results is None
    del x
    gc.collect()
    assert known() is None


def test_a_group_that_shares_nothing_gives_up(calls: list[str]) -> None:
    fast = accelerated("llama")
    layers, group = attention(fast), group_of(fast)
    for _ in range(blocks_module._MISSES):
        assert not group.given_up
        layers.q_proj(torch.randn(2, 6, 64))
        layers.o_proj(torch.randn(2, 6, 64))
    assert group.given_up
    calls.clear()
    layers.q_proj(torch.randn(2, 6, 64))
    assert not calls


def test_any_order_and_repeated_calls(calls: list[str]) -> None:
    fast, stock = accelerated("llama"), architectures.make("llama")
    x = torch.randn(2, 6, 64)
    for name in ("v_proj", "q_proj", "q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(getattr(attention(fast), name)(x), getattr(attention(stock), name)(x))


# -- copies, undoing, the report -------------------------------------------------------------------------------------


def test_copies_are_independent() -> None:
    fast = accelerated("llama")
    want = step(fast)
    other = copy.deepcopy(fast)
    assert group_of(other) is not group_of(fast)
    assert group_of(other).layers == [getattr(attention(other), key) for key in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        for p in fast.parameters():
            if p.is_floating_point():
                p.zero_()
    assert_same(step(other), want)


def test_pickled() -> None:
    fast = accelerated("llama")
    want, file = step(fast), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(mlp(again), FusedMLP)
    assert_same(step(again), want)


@ARCHITECTURE
def test_undone(name: str) -> None:
    stock, fast = architectures.make(name), accelerated(name)
    step(fast)
    assert isinstance(mlp(fast), FusedMLP)
    assert list(fast.state_dict()) == list(stock.state_dict())
    restore(fast)
    for (_, a), (_, b) in zip(stock.named_modules(), fast.named_modules(), strict=True):
        assert type(a) is type(b)
        assert not [key for key in vars(b) if "fastlora" in key]
    assert_same(step(fast), step(stock))


@pytest.mark.parametrize("part", ["layer", "mlp", "model"])
def test_undone_behind_a_wrapper_of_a_forward(part: str) -> None:
    stock, fast = architectures.make("llama"), architectures.make("llama")
    accelerate(fast, blocks=True, loss=True)
    base = fast.get_base_model()
    module = {"layer": base.model.layers[0], "mlp": base.model.layers[0].mlp, "model": base}[part]
    module.forward = functools.partial(module.forward)  # as hooks of accelerate, which keep the bound method
    step(fast)
    accelerate(fast, blocks=True, loss=True)
    assert_same(step(fast), step(stock))
    restore(fast)
    assert_same(step(fast), step(stock))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_an_mlp_takes_x_by_the_name_it_has_there(name: str) -> None:
    fast = mlp(accelerated(name))
    assert isinstance(fast, FusedMLP)
    x = torch.randn(2, 3, 64)
    (parameter,) = inspect.signature(fast.stock.forward).parameters.keys() - {"self"}
    torch.testing.assert_close(fast(**{parameter: x}), fast(x))


def test_without_blocks_again() -> None:
    fast = accelerated("llama")
    accelerate(fast, "torch", blocks=True)
    assert isinstance(mlp(fast), FusedMLP)
    assert type(mlp(fast)).__mro__.count(FusedMLP) == 1
    report = accelerate(fast)
    assert not report.blocks
    assert not isinstance(mlp(fast), FusedMLP)
    assert "fastlora_group" not in vars(attention(fast).q_proj)


@ARCHITECTURE
def test_report(name: str) -> None:
    report = accelerate(architectures.make(name), "torch", blocks=True)
    table = str(report)
    assert [block.reason for block in report.blocks if block.kind == "gated MLP"] == [None, None]
    if name in JOINT:
        assert "gate_up_proj, down_proj" in table
        assert "by layer: it is one layer already" in table
    else:
        assert "q_proj, k_proj, v_proj" in table
    fused = {"qwen3": "10 of 10", "gemma2": "10 of 10", "gemma3": "12 of 12", "phi3": "6 of 8"}.get(name, "8 of 8")
    assert f"{fused} blocks fused" in table
    assert "rotary embedding   apply_rotary_pos_emb" in table


class Odd(nn.Module):
    """An MLP with the usual names."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layers.gate_proj, layers.up_proj, layers.down_proj
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Limited(Odd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(max=self.limit)


@pytest.mark.parametrize("default", ["meta", "bfloat16"])
def test_what_tensors_are_by_default_says_nothing_of_a_model(default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recognizing tries formulas on tensors of its own. A class is tried once: what was found is set aside here."""
    model, other = architectures.make("llama"), architectures.make("llama")
    expected = accelerate(other, blocks=True, loss=True).blocks
    monkeypatch.setattr(norms, "_formulas", {})
    for found in (norms._fused, rotary._recognize, blocks_module._computes_gated_mlp):
        found.cache_clear()
    try:
        if default == "meta":
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(torch.bfloat16)
        assert accelerate(model, blocks=True, loss=True).blocks == expected
        assert rotary.reason(model) is None
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [Odd, Limited])
def test_other_formulas_are_left_alone(kind: type[Odd]) -> None:
    model = architectures.make("llama")
    model.base_model.model.model.layers[0].mlp = kind(mlp(model))
    report = accelerate(model, "torch", blocks=True)
    odd, usual = (block for block in report.blocks if block.layers[-1] == "down_proj")
    assert odd.reason.startswith(f"the forward of {kind.__name__} ")
    assert usual.reason is None
    assert type(mlp(model)) is kind
    assert [block.layers for block in report.joined][:2] == [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]


def test_a_second_input_is_seen() -> None:
    class Crossed(nn.Module):
        def __init__(self, layers: Any) -> None:
            super().__init__()
            self.q_proj, self.k_proj = layers.q_proj, layers.k_proj

        def forward(self, x: torch.Tensor, key_value_states: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x) @ self.k_proj(key_value_states).mT

    model = Crossed(attention(architectures.make("llama", target_modules=["q_proj", "k_proj"])))
    (block,) = accelerate(model, "torch", blocks=True).blocks
    assert "key_value_states" in block.reason


def test_activations_are_known_by_their_values() -> None:
    from transformers.activations import ACT2FN

    names = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh",
    }
    for name, expected in names.items():
        assert blocks_module._recognize(ACT2FN[name]) == expected
    for name in ("relu", "quick_gelu", "gelu_fast", "mish"):
        found = blocks_module._recognize(ACT2FN[name])
        assert found not in names.values() or name == "gelu_fast"


# -- Liger -----------------------------------------------------------------------------------------------------------


def test_liger_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    model = architectures.make("llama")
    with pytest.raises(ImportError, match=r"pip install 'fastlora-kernels\[liger\]'"):
        accelerate(model, liger=True)
    assert not [key for module in model.modules() for key in vars(module) if "fastlora" in key]


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A library with Liger's way of changing a model; the options of every call."""
    seen: list[dict[str, Any]] = []

    def apply_liger_kernel_to_llama(
        rope: bool = True, cross_entropy: bool = False, rms_norm: bool = True, swiglu: bool = True, model: Any = None
    ) -> None:
        seen.append({"rope": rope, "cross_entropy": cross_entropy, "rms_norm": rms_norm, "swiglu": swiglu})
        library = importlib.import_module("transformers.models.llama.modeling_llama")
        real = library.apply_rotary_pos_emb
        library.apply_rotary_pos_emb = lambda *args, **kwargs: real(*args, **kwargs)
        norm = model.model.norm
        norm.__dict__["forward"] = lambda x: type(norm).forward(norm, x)
        norm.offset = 0.0

    package, library = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    library.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    package.transformers = library
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", library)
    return seen


def test_liger_keeps_to_the_rest_and_is_undone(liger: list[dict[str, Any]]) -> None:
    library = importlib.import_module("transformers.models.llama.modeling_llama")
    rope = library.apply_rotary_pos_emb
    models = [architectures.make("llama") for _ in range(2)]
    want = step(models[0])
    for model in models:
        report = accelerate(model, "torch", blocks=True, liger=True)
        accelerate(model, "torch", blocks=True, liger=True)
        assert report.liger == ("rope", "rms_norm")
        assert "Liger kernels: rope, rms_norm" in str(report)
    assert liger == [{"rope": True, "cross_entropy": False, "rms_norm": True, "swiglu": False}] * 2
    assert library.apply_rotary_pos_emb is not rope
    assert_same(step(models[0]), want)
    restore(models[0])
    norm = models[0].base_model.model.model.norm
    assert "forward" not in vars(norm)
    assert "offset" not in vars(norm)
    assert library.apply_rotary_pos_emb is not rope, "the other model still uses it"
    restore(models[1])
    assert library.apply_rotary_pos_emb is rope


def test_liger_without_what_a_graph_cannot_hold(liger: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    library = sys.modules["liger_kernel.transformers"]
    inner = library.apply_liger_kernel_to_llama
    losses = []

    def apply_liger_kernel_to_llama(
        rope: bool = True,
        cross_entropy: bool = True,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        model: Any = None,
    ) -> None:
        losses.append((cross_entropy, fused_linear_cross_entropy))
        inner(rope, cross_entropy, rms_norm, False, model)

    monkeypatch.setattr(library, "apply_liger_kernel_to_llama", apply_liger_kernel_to_llama)
    model = architectures.make("llama")
    report = accelerate(model, "torch", liger="captured")
    restore(model)
    assert report.liger == ("rope", "rms_norm")
    assert "rope, rms_norm (not its cross-entropy, which a CUDA graph cannot hold)" in str(report)
    report = accelerate(model, "torch", liger=True)
    restore(model)
    assert report.liger == ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm")
    assert "not its cross-entropy" not in str(report)
    assert losses == [(False, False), (True, True)]
    with pytest.raises(ValueError, match="liger is True, False or 'captured', not 'all'"):
        accelerate(model, "torch", liger="all")


def test_liger_without_kernels_for_a_model(liger: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="no kernels for models of type 'qwen2'"):
        accelerate(architectures.make("qwen2"), liger=True)
    assert not liger


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_liger_knows_every_architecture(name: str) -> None:
    library = pytest.importorskip("liger_kernel.transformers")
    kind = architectures.make(name).get_base_model().config.model_type
    assert "model" in inspect.signature(getattr(library, f"apply_liger_kernel_to_{kind}")).parameters


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_with_liger(name: str) -> None:
    pytest.importorskip("liger_kernel.transformers")
    stock, fast = (architectures.make(name, device="cuda") for _ in range(2))
    want = step(stock)
    accelerate(fast, "torch", blocks=True, liger=True)
    got = step(fast)
    restore(fast)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-2 * value.abs().max().item())


def test_nothing_is_stacked_where_layers_are_as_fast() -> None:
    """On small sizes with "auto", groups leave the layers alone, and the MLP computes each with its own backend."""
    fast = accelerated("llama", "auto")
    x = torch.randn(2, 6, 64)
    attention(fast).q_proj(x)
    assert SLOT.results is None
    report = str(accelerate(fast, "auto", blocks=True))
    assert "by layer: stacking is not faster for float32 on cpu here" in report
    assert "6 of 8 blocks fused" in report
    projections = blocks_module._projections(group_of(fast).layers)
    assert isinstance(groups.form(x.view(-1, 64), projections, "auto"), groups.Each)
