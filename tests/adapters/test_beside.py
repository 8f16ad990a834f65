"""What stands beside LoRA: fused bases without adapters, bottlenecks, trained layers, chunks, and task switching."""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import pytest
import torch
from small import MLP, batch, loss_of, peft_mlp, stack, train, trained
from torch import nn

import fastlora
from fastlora import FastLoRALinear, NF4Linear
from fastlora.adapters import bottleneck, chunked, layerwise, switch
from fastlora.adapters.lora_fa import saved_bytes
from fastlora.backends import dense
from fastlora.linear import base_weight

pytestmark = pytest.mark.filterwarnings("ignore")
FP32 = torch.float32


def base_mlp(kind: str = "4bit") -> Any:
    return peft_mlp(base=kind).unload()


def test_fused_base_is_that_of_bitsandbytes() -> None:
    from fastlora.integrations import bitsandbytes

    stock = base_mlp()
    fast = copy.deepcopy(stock)
    keys = list(fast.state_dict())
    assert bitsandbytes.fuse(fast) == 2
    results = []
    for model in (stock, fast):
        x = batch(FP32)[0].requires_grad_()
        y = model(x)
        (y * torch.linspace(-1, 1, 64)).sum().backward()
        results.append((y.detach(), x.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert list(fast.state_dict()) == keys
    x = batch(FP32)[0].requires_grad_()
    assert saved_bytes(lambda: fast.up(x), fast) == 0  # dx alone: no input is kept
    fast.up.forward = functools.partial(fast.up.forward)
    assert bitsandbytes.unfuse(fast) == 2
    torch.testing.assert_close(fast(x), stock(x))  # behind a wrapper that has kept the forward, too
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    with pytest.raises(ValueError, match="unknown backend"):
        bitsandbytes.fuse(fast, "cuda2")


def test_fused_base_survives_copies_moves_and_loading() -> None:
    from fastlora.integrations import bitsandbytes

    model = base_mlp()
    bitsandbytes.fuse(model)
    x = batch(FP32)[0]
    want = model(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), want)
    with torch.no_grad():
        other = base_mlp("dense")
        torch.nn.init.normal_(other.up.weight)
    again.up.weight.data[:64] ^= 0x11
    assert not torch.equal(again(x), want)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_prompts_over_a_fused_base(method: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from fastlora.integrations import bitsandbytes

    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, False, compute_dtype=FP32, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=packed)
            packed.to("cpu").support_avx512bf16_for_cpu = False
            base.set_submodule(name, packed)
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    stock = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    fast = copy.deepcopy(stock)
    assert bitsandbytes.fuse(fast) == 14
    ids = torch.arange(20).view(2, 10) + 3
    losses: list[list[float]] = []
    for model in (stock, fast):
        optimizer = torch.optim.AdamW(trained(model), lr=0.05)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_bottleneck_against_the_formula(kind: str) -> None:
    model = base_mlp(kind)
    x = batch(FP32)[0]
    before = model(x).detach()
    w, bias = dense(base_weight(model.down), FP32), model.down.bias
    assert bottleneck.add(model, 3, ("down",)) == ["down"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)  # it starts as the model was
    layer = model.down
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"down.{part}.{leaf}" for part in ("down", "up") for leaf in ("weight", "bias")
    }
    with torch.no_grad():
        for p in trained(model):
            p.copy_(torch.randn_like(p))
    inner = torch.randn(5, 128)
    h = inner @ w.T + bias
    u = nn.functional.gelu(h @ layer.down.weight.T + layer.down.bias)
    torch.testing.assert_close(layer(inner), h + u @ layer.up.weight.T + layer.up.bias, rtol=1e-4, atol=1e-4)


def test_bottleneck_gradcheck_and_training() -> None:
    layer = bottleneck.Bottleneck(NF4Linear(fastlora.NF4Weight.quantize(torch.randn(7, 64))), 2, torch.float64)
    with torch.no_grad():
        for p in trained(layer):
            p.copy_(torch.randn_like(p))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(x: torch.Tensor, *ps: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, ps, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *trained(layer)))
    model = base_mlp()
    bottleneck.add(model, 8, ("up", "down"))
    losses = train(model, torch.optim.AdamW(trained(model), lr=0.02), 10, FP32)
    assert losses[-1] < 0.9 * losses[0]
    state = {name: p for name, p in model.state_dict().items() if ".down." in name or ".up." in name}
    other = base_mlp()
    bottleneck.add(other, 8, ("up", "down"))
    other.load_state_dict(state, strict=False)
    assert torch.equal(other(batch(FP32)[0]), model(batch(FP32)[0]))


def test_bottleneck_refuses() -> None:
    with pytest.raises(ValueError, match="no linear layer is called o_proj or down_proj"):
        bottleneck.add(base_mlp())
    with pytest.raises(ValueError, match="must be 1 or more"):
        bottleneck.add(base_mlp(), 0, ("down",))


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_layerwise_trains_the_chosen_layers_as_dense_ones(kind: str) -> None:
    model, plain = base_mlp(kind), MLP()
    plain.load_state_dict({**base_mlp("dense").state_dict()})
    with torch.no_grad():
        plain.up.weight.copy_(dense(base_weight(model.up), FP32))
        plain.down.weight.copy_(dense(base_weight(model.down), FP32))
    assert layerwise.unfreeze(model, "do.*") == ["down"]
    plain.requires_grad_(False)
    plain.down.requires_grad_(True)
    losses = [train(m, torch.optim.AdamW(trained(m), lr=1e-3), 4, FP32) for m in (model, plain)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.down.weight, plain.down.weight, rtol=1e-3, atol=1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"down.weight", "down.bias"}
    assert type(model.up) is type(base_mlp(kind).up)
    with pytest.raises(ValueError, match="no linear layer has a name like"):
        layerwise.unfreeze(model, "do")


def test_layerwise_keeps_master_weights() -> None:
    model = peft_mlp(dtype=torch.bfloat16).unload()
    layerwise.unfreeze(model, "down")
    assert model.down.weight.dtype == FP32
    y = model(batch(torch.bfloat16)[0])
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model.down.weight.grad.dtype == FP32


@pytest.mark.parametrize("tokens", [1, 3, 5, 10, 100])
@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_chunks_give_the_same(tokens: int, base: str) -> None:
    whole = peft_mlp(base=base)
    fastlora.accelerate(whole)
    parts = copy.deepcopy(whole)
    chunked.chunk(parts.base_model.model, tokens)
    results = []
    for model in (whole, parts):
        x = batch(FP32)[0].view(2, 5, 64).requires_grad_()
        y = model(x)
        (y * torch.linspace(-1, 1, 64)).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in trained(model))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max() + 1))
    with torch.no_grad():
        torch.testing.assert_close(parts(x), results[0][0], rtol=1e-4, atol=1e-5)


def test_gradcheck_of_chunks() -> None:
    layer = chunked.chunk(stack(r=2)[0], 2)
    x = batch()[0][:3].requires_grad_()
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *leaves), fast_mode=True)


def test_chunks_with_dropout_recompute_the_same_mask() -> None:
    model = nn.Sequential(
        FastLoRALinear(8, 6, 2, lora_dropout=0.5, init_lora_weights=False, dtype=torch.float64), nn.Tanh()
    )
    chunked.chunk(model, 2)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return model(x)

    assert torch.autograd.gradcheck(run, (x,))


class Counted(nn.Module):
    """Remembers the most rows that it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.most = max(self.most, x.shape[0])
        return x.exp()


def test_chunks_keep_nothing_of_the_inside() -> None:
    inner = Counted()
    model = nn.Sequential(*stack(), inner)
    x = batch()[0].requires_grad_()
    assert saved_bytes(lambda: model(x), model) > 10 * 64 * 8
    inner.most = 0
    chunked.chunk(model, 4)
    assert saved_bytes(lambda: model(x), model) == x.nbytes
    loss_of(model).backward()
    assert inner.most == 4
    chunked.unchunk(model)
    model(x)
    assert inner.most == 10


def test_chunking_refuses() -> None:
    with pytest.raises(ValueError, match="tokens must be 1 or more"):
        chunked.chunk(stack(), 0)
    with pytest.raises(ValueError, match="no submodule is called 'mlp'"):
        chunked.chunk_mlps(stack(), 4)
    assert chunked.chunk_mlps(nn.ModuleDict({"mlp": stack()}), 4) == 1


def tasks() -> tuple[Any, torch.Tensor]:
    peft = pytest.importorskip("peft")
    model = peft_mlp()
    torch.manual_seed(9)
    for name, r, alpha in (("two", 8, 3), ("three", 2, 5)):
        config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["up", "down"], init_lora_weights=False)
        model.add_adapter(name, config)
    fastlora.accelerate(model)
    return model.eval(), batch(FP32)[0]


def test_switching_is_set_adapter() -> None:
    model, x = tasks()
    want = {}
    for name in ("default", "two", "three"):
        model.set_adapter(name)
        want[name] = model(x).detach()
    chosen = switch.Tasks(model)
    assert chosen.names == ("default", "two", "three")
    for name in ("three", "default", "two", "two"):
        chosen.use(name)
        assert torch.equal(model(x), want[name])
        assert model.active_adapter == name
        assert model.base_model.active_adapters == [name]
    with pytest.raises(ValueError, match="no adapter 'four'; choose from default, two, three"):
        chosen.use("four")


def test_a_switch_takes_less_than_a_millisecond_a_layer() -> None:
    model, _ = tasks()
    chosen = switch.Tasks(model)
    begin = time.perf_counter()
    for i in range(100):
        chosen.use(("default", "two")[i % 2])
    assert (time.perf_counter() - begin) / 100 / 2 < 1e-3


def test_merged_and_unmerged_agree_after_a_switch() -> None:
    peft = pytest.importorskip("peft")
    model = peft_mlp(base="dense")
    model.add_adapter("two", peft.LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False))
    fastlora.accelerate(model)
    x, chosen = batch(FP32)[0], switch.Tasks(model)
    for name in ("two", "default"):
        chosen.use(name)
        want = model(x).detach()
        model.merge_adapter()
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="unmerge_adapter first"):
            chosen.use("two")
        model.unmerge_adapter()


def test_a_batch_of_several_tasks() -> None:
    model, x = tasks()
    names = ["two", "default", "three", "two", "__base__", "default", "three", "two", "default", "two"]
    mixed = model(x, adapter_names=names)
    chosen = switch.Tasks(model)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = model(x[i : i + 1])
        else:
            chosen.use(name)
            want = model(x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], want, rtol=1e-4, atol=1e-4)


def test_copying_into_a_larger_adapter() -> None:
    model, x = tasks()
    chosen = switch.Tasks(model)
    addresses = [p.data_ptr() for n, p in model.named_parameters() if ".two." in n]
    for source in ("default", "three"):
        chosen.use(source)
        want = model(x).detach()
        switch.copy(model, source, "two")
        chosen.use("two")
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert addresses == [p.data_ptr() for n, p in model.named_parameters() if ".two." in n]
    with pytest.raises(ValueError, match="make 'default' larger"):
        switch.copy(model, "two", "default")


def test_switching_needs_adapters() -> None:
    with pytest.raises(ValueError, match="not a PEFT model"):
        switch.Tasks(stack())
