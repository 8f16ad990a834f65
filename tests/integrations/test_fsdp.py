"""FSDP2 over two processes: packed bytes, statistics, output and gradients are those of one process."""

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
from fastlora import NF4Weight
from fastlora.integrations.peft import layers as layers_module
from fastlora.linear import base_weight


def make(use_dora: bool) -> Any:
    """QLoRA with bf16 quant_storage, as FSDP needs it to shard packed weights."""
    model = peft_models.llama(use_dora=use_dora)
    for layer in surface.lora_layers(model):
        base = layer.base_layer
        weight = NF4Weight.from_bitsandbytes(base.weight).to_bitsandbytes(torch.bfloat16)
        weight.module = base
        base.weight, base.quant_state = weight, weight.quant_state
    fastlora.accelerate(model)
    return model


def step(model: Any) -> torch.Tensor:
    ids = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits agree: packed bytes read as bfloat16 may be NaN, which equals nothing."""
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def run(rank: int, folder: str, use_dora: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    store = distributed.FileStore(f"{folder}/store", processes.WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes.WORLD)
    single, model = make(use_dora), make(use_dora)
    mesh = distributed.init_device_mesh("cpu", (processes.WORLD,))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    paths: list[Any] = []
    real = layers_module.situation

    def watch(layer: Any) -> Any:
        found = real(layer)
        paths.append(found)
        if not isinstance(found, str):
            same = names[layer]
            expected = base_weight(same.base_layer).tensors()
            got = found[2].tensors()
            assert expected.keys() == got.keys()
            assert all(same_bytes(got[name], t) for name, t in expected.items()), "other bytes when gathered"
        return found

    names = dict(zip(surface.lora_layers(model), surface.lora_layers(single), strict=True))
    for ours, theirs in names.items():
        weight = ours.base_layer.weight
        assert hasattr(weight, "full_tensor")
        assert weight.to_local().numel() * processes.WORLD == theirs.base_layer.weight.numel()
        assert same_bytes(weight.full_tensor(), theirs.base_layer.weight.data)
    want = step(single)
    layers_module.situation = watch
    got = step(model)
    layers_module.situation = real
    fused = [path for path in paths if not isinstance(path, str)]
    assert len(fused) == len(paths) == 14, [path for path in paths if isinstance(path, str)]
    torch.testing.assert_close(got, want)
    theirs = dict(single.named_parameters())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(whole(p.grad), theirs[name].grad, msg=name)
    state = {name: whole(t) for name, t in model.state_dict().items()}
    for name, t in single.state_dict().items():
        if name in state:
            assert same_bytes(state[name], t), name
    assert any("lora_A" in name for name in state)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_two_processes_are_as_one(use_dora: bool, tmp_path: Path) -> None:
    processes.check(processes.run(run, str(tmp_path), use_dora, folder=tmp_path))
