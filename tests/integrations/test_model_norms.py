"""Decoder layers that add and normalize in one step, in every architecture."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("triton")

import architectures
from architectures import ARCHITECTURES, assert_same

from fastlora import norm
from fastlora.integrations.peft import accelerate, norms, restore
from fastlora.integrations.peft.norms import FusedNorm, FusedResidual

pytestmark = pytest.mark.filterwarnings("ignore")
ARCHITECTURE = pytest.mark.parametrize("name", ARCHITECTURES)
ALONE = {"qwen3": (2, 2), "gemma2": (2, 1), "gemma3": (4, 3)}
"""Norms of a layer behind its branches and of q and k, and those that come again where the layer is a checkpoint: what
is behind the MLP gives nothing that its backward pass needs."""
IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, triton_runs: None) -> list[bool]:
    """For every step that ran: whether it added a residual."""
    seen: list[bool] = []

    def added(*args: Any) -> Any:
        found = norm.added(*args)
        if found is not None:
            seen.append(args[-1] is not None)
        return found

    monkeypatch.setattr(FusedResidual, "added", staticmethod(added))
    return seen


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, triton_runs: None) -> list[torch.Size]:
    """The shapes of all that norms were given which stand alone."""
    seen: list[torch.Size] = []

    def added(x: torch.Tensor, *args: Any) -> Any:
        found = norm.added(x, *args)
        if found is not None:
            seen.append(x.shape)
        return found

    monkeypatch.setattr(FusedNorm, "added", staticmethod(added))
    return seen


def layers(model: Any) -> Any:
    return model.base_model.model.model.layers


def steps_of(model: Any) -> list[Any]:
    """What became of the layers when the norms are fused."""
    return [block for block in norms.fuse(model) if block.kind == "residual and norm"]


def results(model: Any, device: str, **options: Any) -> dict[str, torch.Tensor]:
    """Loss, hidden states and the gradient of every adapter."""
    model.zero_grad()
    ids = IDS.to(device)
    out = model(input_ids=ids, labels=ids, output_hidden_states=True, **options)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    states = {f"state {i}": t.detach() for i, t in enumerate(out.hidden_states)}
    return {"loss": out.loss.detach(), **states, **grads}


@ARCHITECTURE
@pytest.mark.parametrize("checkpointing", [False, True])
def test_like_the_model(
    name: str, checkpointing: bool, device: str, steps: list[bool], alone: list[torch.Size]
) -> None:
    stock, fast = (architectures.make(name, device=device) for _ in range(2))
    assert [block.reason for block in steps_of(fast)] == [None, None]
    for model in (stock, fast):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    assert_same(results(fast, device), results(stock, device))
    assert steps.count(True) == steps.count(False) == 2 * (1 + checkpointing)
    once, again = ALONE.get(name, (0, 0))
    assert len(alone) == 1 + 2 * (once + again * checkpointing)
    fast.eval(), stock.eval()
    with torch.no_grad():
        ids = IDS.to(device)
        torch.testing.assert_close(fast(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_generation_with_a_cache_is_the_same(name: str, device: str, steps: list[bool]) -> None:
    stock, fast = (architectures.make(name, device=device).eval() for _ in range(2))
    list(norms.fuse(fast))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(IDS.to(device), **options), stock.generate(IDS.to(device), **options))
    assert steps


def test_a_norm_that_learns_or_has_hooks_runs_itself(device: str, steps: list[bool]) -> None:
    stock, fast = (architectures.make("llama", device=device).train() for _ in range(2))
    list(norms.fuse(fast))
    called = []
    for model in (stock, fast):
        layers(model)[0].input_layernorm.weight.requires_grad_()
        layers(model)[1].post_attention_layernorm.register_forward_hook(lambda *_: called.append(1))
    assert_same(results(fast, device), results(stock, device))
    assert len(called) == 2
    assert steps == [True, False]


def test_dropped_branches_are_added_by_the_layer(device: str, steps: list[bool]) -> None:
    fast = architectures.make("phi3", device=device).train()
    list(norms.fuse(fast))
    layers(fast)[0].resid_mlp_dropout.p = 0.5
    results(fast, device)
    assert len(steps) == 2
    fast.eval()
    results(fast, device)
    assert len(steps) == 6
    layers(fast)[0].resid_mlp_dropout.train()
    results(fast, device)
    assert len(steps) == 8


def test_norms_that_stand_alone_run_themselves_where_more_is_asked(device: str, alone: list[torch.Size]) -> None:
    stock, fast = (architectures.make("qwen3", device=device).train() for _ in range(2))
    called = []
    for model in (stock, fast):
        attention = layers(model)[0].self_attn
        attention.q_norm.forward = functools.partial(type(attention.q_norm).forward, attention.q_norm)
    parents = [block.name for block in norms.fuse(fast) if block.kind == "norm"]
    assert parents[0].endswith("model.model")
    assert parents[1].endswith("layers.0.self_attn")
    assert not isinstance(layers(fast)[0].self_attn.q_norm, FusedNorm)
    for model in (stock, fast):
        layers(model)[0].self_attn.k_norm.weight.requires_grad_()
        layers(model)[1].self_attn.q_norm.register_forward_hook(lambda *_: called.append(1))
    assert_same(results(fast, device), results(stock, device))
    assert len(called) == 2
    assert len(alone) == 3, "the last one, and in the second layer q's and k's"
    norms.undo(fast)
    assert not any(isinstance(module, FusedNorm | FusedResidual) for module in fast.modules())


def test_accelerate_reports_and_restore_gives_back(device: str) -> None:
    model = architectures.make("llama", device=device)
    kind = type(layers(model)[0])
    found = [block for block in accelerate(model, blocks=True).blocks if block.kind == "residual and norm"]
    assert [block.layers for block in found] == [("input_layernorm", "post_attention_layernorm")] * 2
    assert all(isinstance(layer, FusedResidual) and isinstance(layer, kind) for layer in layers(model))
    assert type(layers(model)[0]).__name__ == kind.__name__
    accelerate(model)
    assert type(layers(model)[0]) is kind
    accelerate(model, blocks=True)
    restore(model)
    assert type(layers(model)[0]) is kind


def test_a_class_that_sharding_made_of_a_layer_stays(device: str) -> None:
    """FSDP2 gives a module a class of its own below the one it has, which `restore` must not take away."""
    model = architectures.make("llama", device=device)
    accelerate(model, blocks=True)
    layer = layers(model)[0]
    sharded = type("Sharded", (type(layer),), {})
    layer.__class__ = sharded
    accelerate(model, blocks=True)
    restore(model)
    assert type(layer) is sharded
    assert not isinstance(layers(model)[1], FusedResidual)


def test_copies_and_files(device: str) -> None:
    model = architectures.make("gemma2", device=device).eval()
    list(norms.fuse(model))
    layer = layers(model)[0]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(other) is type(layer)
        assert other.layout == layer.layout


class Elsewhere(nn.Module):
    """A layer that looks like one of those."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = like.self_attn, like.mlp
        self.input_layernorm, self.post_attention_layernorm = like.input_layernorm, like.post_attention_layernorm


class Parallel(Elsewhere):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        x = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=x, **kwargs)[0] + self.mlp(x)


class Scaled(Elsewhere):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        h = hidden_states + 0.5 * self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h))


class Forgetful(Elsewhere):
    def forward(self, hidden_states: Any, mask: Any = None, **kwargs: Any) -> Any:
        h = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h))


class Talkative(Elsewhere):
    def forward(self, hidden_states: Any, tell: Any = None, **kwargs: Any) -> Any:
        x = self.input_layernorm(hidden_states)
        h = hidden_states + self.self_attn(hidden_states=x, tell=tell, **kwargs)[0]
        out = h + self.mlp(self.post_attention_layernorm(h))
        return (out, x) if tell else out


class Needy(Elsewhere):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        return self.other(hidden_states)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Parallel, "is another"),
        (Scaled, "is another"),
        (Talkative, "is another"),
        (Forgetful, "changes what it hands its attention"),
        (Needy, "has no attribute 'other'"),
    ],
)
def test_another_layer_stays_as_it_is(kind: Any, reason: str) -> None:
    model = nn.Sequential(kind(layers(architectures.make("llama"))[0]))
    (report,) = steps_of(model)
    assert reason in str(report.reason)
    assert type(model[0]) is kind


class Liger(nn.Module):
    """What Liger's norms are made of; its kernel runs on GPUs only."""

    __module__ = "liger_kernel.transformers.rms_norm"

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon
        self.offset, self.casting_mode = 0.0, "llama"

    def forward(self, x: Any) -> Any:
        raise AssertionError("the step computes it")


def test_norms_of_liger_say_what_they_compute(device: str, steps: list[bool]) -> None:
    stock, fast = (architectures.make("llama", device=device).train() for _ in range(2))
    for layer in layers(fast):
        layer.input_layernorm = Liger(layer.input_layernorm)
        layer.post_attention_layernorm = Liger(layer.post_attention_layernorm)
    assert [block.reason for block in steps_of(fast)] == [None, None]
    assert_same(results(fast, device), results(stock, device))
    assert len(steps) == 4
    del layers(fast)[0].input_layernorm.offset
    accelerate(fast)
    assert "input_layernorm" in str(steps_of(fast)[0].reason)


def test_another_norm_stays_as_it_is() -> None:
    model = architectures.make("llama")
    layers(model)[0].input_layernorm = nn.LayerNorm(64)
    layers(model)[1].forward = lambda *args, **kwargs: None
    first, second = steps_of(model)
    assert "input_layernorm is no root mean square norm" in str(first.reason)
    assert "replaced on the instance" in str(second.reason)
