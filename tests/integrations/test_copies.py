"""``accelerate(model, decoded=...)``: which weights are kept dense, and that nothing but time shows it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from fastlora import backends, decoded
from fastlora.integrations.peft import accelerate, copies, restore

pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = 14
NBYTES = 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
"""Of two blocks' linear layers in float32."""


@pytest.fixture(autouse=True)
def _no_copy_lives_on() -> Iterator[None]:
    yield
    gc.collect()
    assert not decoded.held()


def grads(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("blocks", [False, True])
def test_nothing_is_decoded_again(
    make_llama: Callable[..., Any], ids: torch.Tensor, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama("4bit")
    accelerate(model, backend="torch", blocks=blocks)
    before = grads(model, ids)
    report = accelerate(model, backend="torch", blocks=blocks, decoded=math.inf)
    assert report.copies == copies.Copies(LAYERS, LAYERS, NBYTES)
    assert f"{LAYERS} of {LAYERS} packed weights kept dense" in str(report)

    def decode(*args: Any) -> None:
        raise AssertionError("a weight was decoded")

    with monkeypatch.context() as patch:
        patch.setattr(backends, "dequantize", decode)
        assert same(grads(model, ids), before)
    assert restore(model) == LAYERS
    assert not decoded.held()


def test_memory_holds_groups_as_far_as_they_fit(make_llama: Callable[..., Any], ids: torch.Tensor) -> None:
    model = make_llama("4bit")
    before = grads(model, ids) if accelerate(model, backend="torch", blocks=True) else []
    block = NBYTES / 2 / copies.GIB
    for gib in (block / 5, block / 2, block, 1.5 * block):
        report = accelerate(model, backend="torch", blocks=True, decoded=gib)
        assert report.copies is not None
        assert 0 < report.copies.nbytes <= gib * copies.GIB
        assert sum(t.nbytes for t in decoded.held()) == report.copies.nbytes
        assert same(grads(model, ids), before)
    assert accelerate(model, backend="torch", decoded=1e-6).copies == copies.Copies(0, LAYERS, 0)
    assert not decoded.held()
    # q, k and v lie in one matrix, and so do gate and up.
    accelerate(model, backend="torch", blocks=True, decoded=math.inf)
    assert sorted(t.shape[0] for t in decoded.held()) == sorted(2 * [64 + 32 + 32, 64, 2 * 128, 64])


def test_without_it_copies_go(make_llama: Callable[..., Any]) -> None:
    model = make_llama("4bit")
    assert accelerate(model, backend="torch", decoded=1).copies is not None
    assert decoded.held()
    assert accelerate(model, backend="torch").copies is None
    assert not decoded.held()
    accelerate(model, backend="torch", decoded=1)
    assert accelerate(model).copies is None  # whose kernels read none here
    assert not decoded.held()
    accelerate(model, backend="torch", decoded=1)
    del model
    gc.collect()
    assert not decoded.held()


def test_a_changed_weight_is_decoded(make_llama: Callable[..., Any], ids: torch.Tensor) -> None:
    changed, kept = make_llama("4bit"), make_llama("4bit")
    accelerate(changed, backend="torch")
    accelerate(kept, backend="torch", decoded=1)
    for model in (changed, kept):
        layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.base_layer")
        layer.weight.data.bitwise_xor_(255)
        layer.weight.add_(0)  # ``data`` hides a change from autograd, and so from whoever keeps what was made of it
    assert same(grads(kept, ids), grads(changed, ids))


def test_dense_weights_and_kernels_for_cpus_have_no_copies(make_llama: Callable[..., Any]) -> None:
    assert accelerate(make_llama("dense"), backend="torch", decoded=1).copies == copies.Copies(0, 0, 0)
    assert accelerate(make_llama("4bit"), decoded=1).copies == copies.Copies(0, 0, 0)


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float16, LAYERS), (torch.float32, 0)])
def test_types_whose_kernels_read_no_copy_have_none(
    make_llama: Callable[..., Any], dtype: torch.dtype, packed: int
) -> None:
    kept = accelerate(make_llama("4bit", dtype), backend="triton", decoded=1).copies
    assert kept is not None
    assert kept.packed == kept.layers == packed


@pytest.mark.parametrize("gib", [-1.0, math.nan])
def test_what_is_no_amount_is_refused(make_llama: Callable[..., Any], gib: float) -> None:
    model = make_llama("4bit")
    with pytest.raises(ValueError, match="GiB, 0 or more"):
        accelerate(model, decoded=gib)
    assert restore(model) == 0


def test_no_copy_stays_where_memory_ends(make_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make_llama("4bit"), []

    def dequantize(*args: Any) -> None:
        made.append(args)
        if len(made) > 3:
            raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(backends, "dequantize", dequantize)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(model, backend="torch", decoded=1)
    assert not decoded.held()


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_a_captured_step_keeps_its_copies(blocks: bool) -> None:
    from fastlora.bench import models
    from fastlora.training.step import CapturedStep

    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = models.config("llama-3-8b", 2, 512, **sizes, head_dim=128)
    device = torch.device("cuda")
    model = models.adapt(models.base(config, device), r=16).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(512, (4, 2048), device=device)
    accelerate(model, blocks=blocks, loss=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(batch: Any) -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    def step(run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        loss = run({"input_ids": ids, "labels": ids})
        return [loss, *(p.grad.clone() for p in parameters)]

    with torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False, enable_cudnn=False):
        before = step(run)
        report = accelerate(model, blocks=blocks, loss=True, decoded=1)
        assert report.copies is not None
        assert report.copies.layers == LAYERS
        assert same(step(run), before)
        captured = CapturedStep(run, parameters)
        first = step(captured)
        accelerate(model, blocks=blocks, loss=True)
        assert not decoded.held()
        torch.cuda.empty_cache()
        busy = [torch.full((1 << 20,), math.nan, device=device) for _ in range(64)]
        assert same(step(captured), first)
        assert len(busy) == 64
