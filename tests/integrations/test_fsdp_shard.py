"""`fastlora.integrations.fsdp` over two processes: bytes, statistics and gradients, in memory and on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import peft_models
import processes
import surface

import fastlora
from fastlora.integrations import fsdp
from fastlora.linear import base_weight


def bits(t: torch.Tensor) -> torch.Tensor:
    """What is stored: packed bytes read as a floating-point type may be NaN, which equals nothing."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def weights(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Bytes and statistics of every 4-bit weight."""
    found = {}
    for i, layer in enumerate(surface.lora_layers(model)):
        base = layer.base_layer
        packed = base.weight.full_tensor() if hasattr(base.weight, "full_tensor") else base.weight
        found[str(i)] = {"w_packed": bits(packed), **fsdp.statistics(base.quant_state)}
    return found


def assert_same_bits(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for name, tensors in a.items():
        assert tensors.keys() == b[name].keys()
        for key, t in tensors.items():
            assert torch.equal(bits(t), bits(b[name][key])), f"{key} of layer {name}"


def make(device: str = "cpu", **options: Any) -> Any:
    model = peft_models.llama().to(device)
    fastlora.accelerate(model, **options)
    return model


def step(call: Any, ids: torch.Tensor) -> torch.Tensor:
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def spoil_with_nan(model: Any) -> None:
    """Bytes that are NaN as bfloat16 (0x7FC1 and its like), which arithmetic would rewrite."""
    for layer in surface.lora_layers(model):
        packed = layer.base_layer.weight.data.view(torch.uint8).view(-1)
        packed[: packed.numel() // 4].view(torch.int16).fill_(0x7FC1)
        packed[packed.numel() // 4 : packed.numel() // 2].view(torch.int16).fill_(-0x003F)


def save_and_load(model: Any, wanted: dict[str, dict[str, torch.Tensor]], folder: str, device: str) -> None:
    """Shares on disk give every bit back."""
    from torch.distributed import checkpoint

    state = {name: t for name, t in model.state_dict().items() if "lora_" not in name}
    checkpoint.save(state, checkpoint_id=f"{folder}/shares")
    other = make(device)
    spoil_with_nan(other)
    fsdp.shard(other)
    fresh = {name: t for name, t in other.state_dict().items() if "lora_" not in name}
    checkpoint.load(fresh, checkpoint_id=f"{folder}/shares")
    assert_same_bits(weights(other), wanted)


def run(rank: int, folder: str, device: str) -> None:
    warnings.simplefilter("ignore")
    store = distributed.FileStore(f"{folder}/store", processes.WORLD)
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes.WORLD)
    near = {"rtol": 1.3e-6, "atol": 1e-5} if device == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    ids = torch.randint(1, 128, (2 * processes.WORLD, 12), generator=torch.Generator().manual_seed(3)).to(device)
    mine = ids.chunk(processes.WORLD)[rank]
    single = make(device, blocks=True)
    expected, loss = weights(single), step(single, ids)
    wanted = gradients(single)
    forms: dict[str, dict[str, Any] | None] = {
        "ddp": None,
        "replicated": {},
        "gathered once": {"reshard": False},
        "sharded": {"adapters": "sharded"},
        "checkpointing": {"prefetch": 2},
    }
    for name, options in forms.items():
        model = make(device, blocks=True)
        if options is not None:
            whole = fsdp.base_bytes(model)
            assert len(fsdp.shard(model, **options)) == 2
            assert whole / 2 <= fsdp.base_bytes(model) <= 1.1 * whole / 2, name
            assert all(p.device_mesh is not None for p in model.parameters() if not p.requires_grad)
        if name == "checkpointing":
            from fastlora.training.step import checkpoint_blocks

            checkpoint_blocks(model.get_base_model())
        adapters_sharded = (options or {}).get("adapters") == "sharded"
        call = model if adapters_sharded else fsdp.replicate(model, torch.device(device))
        for _ in range(2):  # the second step gathers into storage that was emptied
            model.zero_grad()
            mean = step(call, mine)
            distributed.all_reduce(mean)
            torch.testing.assert_close(mean / processes.WORLD, loss, msg=name, **near)
            for key, grad in gradients(model).items():
                torch.testing.assert_close(grad, wanted[key], msg=f"{name}: {key}", **near)
        assert_same_bits(weights(model), expected)
        kept = [layer.__dict__["fastlora_weight"][2] for layer in surface.lora_layers(model)]
        held = sum(w.w_packed.untyped_storage().nbytes() for w in kept)
        assert (held == 0) == (options is not None), f"{name}: {held} gathered bytes are kept after the step"
        if name == "replicated":
            save_and_load(model, expected, folder, device)

    model = make(device)
    spoil_with_nan(model)
    spoiled = weights(model)
    fsdp.shard(model)
    with torch.no_grad():
        model(input_ids=mine)
    assert_same_bits(weights(model), spoiled)


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_are_as_one(tmp_path: Path, kind: str) -> None:
    if kind == "cuda" and torch.cuda.device_count() < processes.WORLD:
        pytest.skip(f"needs {processes.WORLD} GPUs")
    processes.check(processes.run(run, str(tmp_path), kind, folder=tmp_path))


def test_blocks_are_found_where_peft_finds_none() -> None:
    model = make()
    blocks = fsdp.decoder_layers(model)
    assert [type(block).__name__ for block in blocks] == ["LlamaDecoderLayer"] * 2
    for module in model.modules():
        module.__dict__.pop("_no_split_modules", None)
    plain = torch.nn.ModuleDict({"a": torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])})
    assert len(fsdp.decoder_layers(plain)) == 3
    with pytest.raises(ValueError, match="no list of blocks"):
        fsdp.decoder_layers(torch.nn.Linear(2, 2))


def test_bytes_read_as_another_type_are_the_same_bytes() -> None:
    model = make()
    before = weights(model)
    pointers = [layer.base_layer.weight.data_ptr() for layer in surface.lora_layers(model)]
    assert fsdp.store_as_words(model) == 14
    assert fsdp.store_as_words(model) == 0
    assert [layer.base_layer.weight.data_ptr() for layer in surface.lora_layers(model)] == pointers
    assert_same_bits(weights(model), before)
    assert {layer.base_layer.weight.dtype for layer in surface.lora_layers(model)} == {torch.float32}
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, make()(input_ids=ids).logits)


def test_sharding_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="replicated or sharded"):
        fsdp.shard(torch.nn.Linear(2, 2), adapters="both")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="process group"):
        fsdp.shard(torch.nn.Linear(2, 2))


def test_a_kept_weight_follows_its_bytes() -> None:
    """As FSDP2 does it: one storage, emptied and filled again; or another tensor in its place."""
    from fastlora.linear import kept_weight

    layer = surface.lora_layers(make())[0]
    base = layer.base_layer
    first = kept_weight(layer, base)
    assert kept_weight(layer, base) is first
    base.weight.data = base.weight.data.clone()
    second = kept_weight(layer, base)
    assert second is not first
    assert second.w_packed.data_ptr() == base.weight.data_ptr()
    assert torch.equal(base_weight(base).w_packed, second.w_packed)
