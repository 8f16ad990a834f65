"""The rotary embedding of models whose attention computes q, k and v together."""

from __future__ import annotations

import gc
import sys
import types
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import architectures
import peft
import transformers

from fastlora import accelerate, restore
from fastlora.integrations.peft import rotary as integration
from fastlora.kernels import rotary as kernels


def make(device: str = "cpu") -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False),
    )
    return model.to(device)


def function() -> Any:
    return vars(sys.modules[transformers.LlamaForCausalLM.__module__])[integration.FUNCTION]


def step(model: Any, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.arange(24, device=device).view(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    adapters = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, adapters))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch, whether it was one of a backward pass."""
    seen: list[bool] = []
    inner = kernels.rotate
    monkeypatch.setattr(kernels, "rotate", lambda *a, inverse=False: seen.append(inverse) or inner(*a, inverse=inverse))
    return seen


def test_a_model_reads_q_and_k_where_they_lie(device: str, triton_runs: None, calls: list[bool]) -> None:
    stock, model = function(), make(device)
    loss, gradients = step(model, device)
    report = accelerate(model, "torch", blocks=True)
    assert [block.reason for block in report.blocks if block.kind == "rotary embedding"] == [None]
    found, found_gradients = step(model, device)
    assert calls == [False, False, True, True]
    torch.testing.assert_close(found, loss)
    for got, want in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)
    calls.clear()
    step(make(device), device)
    assert not calls, "another model's q and k are contiguous"
    restore(model)
    assert function() is stock


def test_a_model_that_norms_its_heads(device: str, triton_runs: None, calls: list[bool]) -> None:
    """Its q and k lie by themselves: the cosines tell whose they are."""
    name = "qwen3"
    stock, fast, other = (architectures.make(name, device=device) for _ in range(3))
    maker = type(fast.get_base_model().model.rotary_emb)
    accelerate(fast, "torch", blocks=True)
    loss, gradients = step(stock, device)
    assert not calls, "another model of the type"
    found, found_gradients = step(fast, device)
    assert calls == [False, False, True, True]
    torch.testing.assert_close(found, loss)
    for got, want in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-6)
    accelerate(other, "torch", blocks=True)
    accelerate(fast, "torch")
    calls.clear()
    step(fast, device)
    assert not calls
    restore(other)
    assert type(other.get_base_model().model.rotary_emb) is type(fast.get_base_model().model.rotary_emb) is maker


def test_the_function_stays_while_a_model_wants_it() -> None:
    stock, first, second = function(), make(), make()
    accelerate(first, "torch", blocks=True)
    accelerate(first, "torch", blocks=True)
    accelerate(second, "torch", blocks=True)
    replaced = function()
    assert replaced is not stock
    restore(first)
    assert function() is replaced
    accelerate(second, "torch")
    assert function() is stock
    restore(second)
    assert function() is stock
    accelerate(first, "torch", blocks=True)
    assert function() is not stock
    del first
    gc.collect()
    restore(second)
    assert function() is stock


def test_what_liger_puts_back_is_no_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    library = sys.modules[transformers.LlamaForCausalLM.__module__]

    def liger_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *rest: Any) -> Any:
        raise AssertionError

    liger_rotary_pos_emb.__module__ = "liger_kernel.transformers.rope"

    def apply_liger_kernel_to_llama(rope: bool = True, model: Any = None) -> None:
        library.apply_rotary_pos_emb = liger_rotary_pos_emb

    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    stock, plain, with_liger = function(), make(), make()
    accelerate(plain, "torch", blocks=True)
    accelerate(with_liger, "torch", blocks=True, liger=True)
    assert getattr(function(), integration._ORIGINAL) is liger_rotary_pos_emb
    restore(plain)
    restore(with_liger)
    assert function() is stock


def test_only_the_formula_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    library = sys.modules[transformers.LlamaForCausalLM.__module__]
    stock = function()

    def interleaved(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        return tuple(torch.stack((t[..., 0::2], t[..., 1::2]), -1).flatten(-2) * cos.unsqueeze(1) for t in (q, k))

    def without_sizes(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return stock(q, k, cos, sin)

    def raising(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        raise RuntimeError("needs more")

    for other, words in (
        (interleaved, "computes something else"),
        (without_sizes, "other arguments"),
        (raising, "needs more"),
    ):
        monkeypatch.setattr(library, integration.FUNCTION, other)
        model = make()
        report = accelerate(model, "torch", blocks=True)
        (block,) = (block for block in report.blocks if block.kind == "rotary embedding")
        assert words in (block.reason or "")
        assert function() is other
    monkeypatch.delattr(library, integration.FUNCTION)
    (block,) = (b for b in accelerate(make(), "torch", blocks=True).blocks if b.kind == "rotary embedding")
    assert "has no" in (block.reason or "")


def test_a_class_from_nowhere_is_left_alone() -> None:
    model = make()
    base: Any = model.get_base_model()
    base.__class__ = type("Made", (type(base),), {"__module__": "nowhere"})
    report = accelerate(model, "torch", blocks=True)
    assert [b.reason for b in report.blocks if b.kind == "rotary embedding"] == [
        "its module has no apply_rotary_pos_emb"
    ]
    restore(model)
