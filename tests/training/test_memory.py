"""The predicted memory of a step is what a step on a real device keeps and frees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
pytest.importorskip("peft", reason="peft is missing (extra: train)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: train)")

import fastlora
from fastlora.bench import models
from fastlora.training import memory
from fastlora.training.step import checkpoint_blocks

CPU = torch.device("cpu")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def config_of(name: str, blocks: int = 2) -> Any:
    return models.config(name, blocks, 512, **SIZES, head_dim=32)


def real(config: Any, checkpointing: bool, **options: Any) -> Any:
    model = models.adapt(models.base(config, CPU), r=8).train()
    fastlora.accelerate(model, **options)
    if checkpointing:
        checkpoint_blocks(model.get_base_model())
    return model


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass beside what the model holds."""
    known = {t.untyped_storage().data_ptr() for _, t in memory._states(model)}
    kept: dict[int, int] = {}
    held = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_prediction_is_what_a_real_step_takes(name: str, checkpointing: bool) -> None:
    config = config_of(name)
    model = real(config, checkpointing)
    ids = torch.zeros(2, 96, dtype=torch.long)
    found = memory.step(model, ids)
    predicted = memory.predict(config, 2, 96, r=8, checkpointing=checkpointing)
    static = predicted.fixed + memory.LIBRARIES
    assert predicted.peak - static == pytest.approx(found.peak, rel=0.1)
    assert sum(predicted.activations) == pytest.approx(sum(found.blocks), rel=0.1)
    assert len(predicted.activations) == 2


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-7b", "mistral-7b"])
def test_activations_of_a_block_are_what_autograd_saves(name: str) -> None:
    ids = torch.zeros(2, 96, dtype=torch.long)
    one, two = (saved_bytes(real(config_of(name, blocks), False), ids) for blocks in (1, 2))
    predicted = memory.predict(config_of(name, 3), 2, 96, r=8)
    assert predicted.activations[1] == pytest.approx(two - one, rel=0.1)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", models.CONFIGS)
def test_activations_of_a_fused_block_are_what_autograd_saves(name: str) -> None:
    ids = torch.zeros(2, 96, dtype=torch.long)
    one, two = (saved_bytes(real(config_of(name, blocks), False, blocks=True), ids) for blocks in (1, 2))
    fused, apart = (memory.predict(config_of(name, 3), 2, 96, r=8, blocks=blocks) for blocks in (True, False))
    assert fused.activations[1] == pytest.approx(two - one, rel=0.1)
    assert apart.activations[1] - fused.activations[1] > 2 * 96 * 512 * 2
    assert fused.adapters == apart.adapters


@pytest.mark.parametrize(("name", "normed"), [("llama-3-8b", False), ("qwen3-8b", True)])
def test_v_keeps_neither_q_nor_k(name: str, normed: bool) -> None:
    """As parts of one matrix they take what they take alone; where norms may keep q and k, v stays where it is."""
    ids = torch.zeros(2, 96, dtype=torch.long)
    together, alone = (real(config_of(name), False, backend="torch", blocks=True) for _ in range(2))
    for module in alone.modules():
        if "q_proj" in module._modules:
            for layer in module._modules.values():
                layer.__dict__.pop("fastlora_group", None)
    more = saved_bytes(together, ids) - saved_bytes(alone, ids)
    assert more == (2 * 2 * 192 * (256 + 64) if normed else 0)


def test_weights_are_counted_once_each() -> None:
    config = config_of("llama-3-8b")
    predicted = memory.predict(config, 1, 16, r=8)
    sizes = models.linear_sizes(config) * 2
    weights = sum(n * k for n, k in sizes)
    assert predicted.packed == weights // 2
    assert weights // 64 <= predicted.statistics <= weights // 64 + 3072 * len(sizes)
    assert predicted.adapters == pytest.approx(4 * 8 * sum(n + k for n, k in sizes), rel=0.01)
    assert predicted.optimizer == 2 * predicted.adapters
    embeddings = 2 * 2 * 512 * 256
    assert embeddings < predicted.dense < embeddings * 1.1
    tied = memory.predict(config_of("gemma-2-9b"), 1, 16, r=8)
    assert embeddings // 2 < tied.dense < embeddings * 0.6
    assert memory.predict(config, 1, 16, r=8, eight_bit_optimizer=True).optimizer == predicted.adapters // 2


def test_checkpointing_keeps_less_and_more_tokens_more() -> None:
    config = config_of("llama-3-8b", 4)
    kept = {on: memory.predict(config, 2, 64, checkpointing=on) for on in (False, True)}
    assert kept[True].activations[1] == 2 * 64 * 256 * 2
    assert kept[True].peak < kept[False].peak
    assert sum(memory.predict(config, 4, 64).activations) == pytest.approx(2 * sum(kept[False].activations), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_in_chunks_are_not_kept(checkpointing: bool) -> None:
    config = models.config("llama-3-8b", 2, 32000, **SIZES, head_dim=32)
    tokens, chunk = 4 * 2048, 2048
    apart, chunked = (
        memory.predict(config, 4, 2048, checkpointing=checkpointing, blocks=True, chunked_loss=on)
        for on in (False, True)
    )
    # One chunk and the gradient of the head's input; else bf16 logits, wider ones of the loss and their gradients.
    assert chunked.loss == pytest.approx(2 * (chunk * 32000 + tokens * 256), rel=0.02)
    assert apart.loss > 6 * tokens * 32000
    assert apart.peak - chunked.peak > 4 * tokens * 32000
    assert chunked.activations == apart.activations


def test_w_that_is_kept_for_the_backward_pass_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama-3-8b", 4)
    weights = 2 * 512 * 256 * 2
    decoded_again = {}
    for on in (False, True):
        predicted = memory.predict(config, 2, 64, blocks=True, checkpointing=on)
        with monkeypatch.context() as patch:
            patch.setattr(memory.recomputed, "running", lambda: False)
            decoded_again[on] = predicted.peak - memory.predict(config, 2, 64, blocks=True, checkpointing=on).peak
        assert not memory.recomputed._held
    assert decoded_again[False] == 0
    # It is there beside the weight of down and the gradient of h, and not only after them.
    assert weights // 4 <= decoded_again[True] <= weights


def test_kept_blocks_are_counted() -> None:
    config = config_of("llama-3-8b", 4)
    plain = memory.predict(config, 2, 64).activations
    kept = memory.predict(config, 2, 64, checkpointing=True, kept_blocks=1)
    checkpoint = 2 * 64 * 256 * 2
    assert kept.activations[:3] == (checkpoint,) * 3
    assert kept.activations[3] == pytest.approx(plain[3], rel=0.1)
    assert memory.predict(config, 2, 64, kept_blocks=1).activations == plain


def test_a_step_with_chunks_and_kept_blocks_takes_what_is_predicted() -> None:
    # Few logits: without a GPU's kernel they are widened.
    config = models.config("llama-3-8b", 3, 64, **SIZES, head_dim=32)
    model = real(config, False, loss=True)
    checkpoint_blocks(model.get_base_model(), keep=1)
    found = memory.step(model, torch.zeros(2, 96, dtype=torch.long))
    predicted = memory.predict(config, 2, 96, r=8, checkpointing=True, chunked_loss=True, kept_blocks=1)
    assert sum(predicted.activations) == pytest.approx(sum(found.blocks), rel=0.1)
    assert predicted.peak - predicted.fixed - memory.LIBRARIES == pytest.approx(found.peak, rel=0.1)


def test_copies_count_as_far_as_they_fit() -> None:
    config = config_of("llama-3-8b")
    without = memory.predict(config, 2, 64, blocks=True)
    assert without.copies == 0
    weights = sum(t.numel() * 2 for kind, t in memory._states(memory.meta_model(config, r=8)) if kind == "packed")
    for gib in (2 * weights / 2**30, 1):
        predicted = memory.predict(config, 2, 64, blocks=True, decoded_memory=gib)
        assert predicted.copies == pytest.approx(2 * weights, rel=0.01)
        assert predicted.peak == without.peak + predicted.copies
    half = memory.predict(config, 2, 64, blocks=True, decoded_memory=weights / 2**30).copies
    assert 0.7 * weights < half <= weights


@pytest.mark.parametrize("options", [[], ["--decoded-memory", "1"]])
def test_report_adds_up(capsys: pytest.CaptureFixture[str], tmp_path: Any, options: list[str]) -> None:
    pytest.importorskip("typer", reason="typer is missing (extra: train)")
    from fastlora.cli import main

    config_of("llama-3-8b").save_pretrained(tmp_path)
    assert main(["explain", "--model", str(tmp_path), "--batch", "2", "--seq", "32", "--r", "8", *options]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    values = {line[: line.rfind("  ")].strip(): float(line.split()[-2].replace(",", "")) for line in lines[:-1]}
    peak = values.pop("peak")
    assert sum(values.values()) == pytest.approx(peak, abs=0.1 * len(values))
    assert main(["explain", "--model", str(tmp_path / "nothing")]) == 2
    assert "model: no such folder" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("decoded", [0.0, 4.0])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prediction_on_a_gpu(checkpointing: bool, chunked: bool, decoded: float) -> None:
    config = models.config("llama-3-8b", 2, 32000)
    device = torch.device("cuda")
    others = torch.cuda.memory_allocated()  # what earlier tests of the process have left
    model = models.adapt(models.base(config, device), r=16).train()
    fastlora.accelerate(model, loss=chunked, decoded=decoded)
    models.checkpoint(model, checkpointing, keep=int(chunked))
    parameters = [p for _, p in models.adapters(model)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    (ids,) = models.token_batches(config, 2, 2048, device, 0, 1)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = memory.predict(
        config,
        2,
        2048,
        checkpointing=checkpointing,
        chunked_loss=chunked,
        kept_blocks=int(chunked),
        decoded_memory=decoded,
    )
    assert predicted.peak == pytest.approx(torch.cuda.max_memory_allocated() - others, rel=0.1)
