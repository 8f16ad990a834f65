"""Attention behind a prefix: what transformers computes with a mask, without one where the mask is only causal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from fastlora.integrations import prefix  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IDS = torch.arange(20).view(2, 10) + 3


def made(window: int | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    if window is None:
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes))
    else:
        base = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES | changes, sliding_window=window))
    return peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each mask that is asked for is the named one."""
    seen: list[bool] = []
    made_by = prefix._mask

    def watched(*args: Any, **kwargs: Any) -> Any:
        mask = made_by(*args, **kwargs)
        seen.append(isinstance(mask, prefix.CausalBias))
        return mask

    monkeypatch.setattr(prefix, "_mask", watched)
    return seen


def both(model: Any, dtype: torch.dtype | None = None, **inputs: Any) -> list[list[torch.Tensor]]:
    """Logits and gradients of the prefix, of the model as it is and with `prefix.enable`."""
    results = []
    for enabled in (False, True):
        this = copy.deepcopy(model)
        if enabled:
            assert prefix.enable(this)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            out = this(input_ids=IDS, labels=IDS, **inputs)
        out.loss.backward()
        results.append([out.logits, *(p.grad for p in this.parameters() if p.requires_grad)])
    assert len(results[0]) == 2
    return results


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_same_result_without_a_mask(kv_heads: int, masked: bool, forms: list[bool]) -> None:
    inputs = {"attention_mask": torch.ones_like(IDS)} if masked else {}
    want, got = both(made(num_key_value_heads=kv_heads), **inputs)
    assert forms == [True]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert want[1].abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_needs_a_mask(side: str, forms: list[bool]) -> None:
    mask = torch.ones_like(IDS)
    mask[0, slice(0, 3) if side == "left" else slice(7, 10)] = 0
    want, got = both(made(), attention_mask=mask)
    assert forms == [False]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("window", "named"), [(6, False), (14, False), (15, True)])
def test_a_window_needs_a_mask(window: int, named: bool, forms: list[bool]) -> None:
    want, got = both(made(window))
    assert forms == [named]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_under_autocast(forms: list[bool]) -> None:
    """The prefix is float32 there and the new keys bfloat16, until the cache joins them."""
    want, got = both(made(), torch.bfloat16)
    assert forms == [True]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.abs().max()))


def test_generation_is_the_same() -> None:
    model = made().eval()
    want = model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False)
    assert prefix.enable(model)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), want)


def test_disable_gives_the_stock_attention_back() -> None:
    model = made()
    assert not prefix.disable(model)
    assert prefix.enable(model)
    assert prefix.enable(model)
    assert model.get_base_model().config._attn_implementation == prefix.NAME
    assert prefix.disable(model)
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_another_attention_stays() -> None:
    model = made()
    model.get_base_model().set_attn_implementation("eager")
    assert not prefix.enable(model)
    assert model.get_base_model().config._attn_implementation == "eager"
