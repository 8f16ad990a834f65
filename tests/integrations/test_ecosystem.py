"""Fused layers under the tools that train and load models: TRL, accelerate, DeepSpeed, pre-quantized checkpoints."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

import peft_models  # noqa: E402
import processes  # noqa: E402
import surface  # noqa: E402

from fastlora.integrations.peft import accelerate, fused, restore  # noqa: E402
from fastlora.integrations.peft import layers as layers_module  # noqa: E402
from fastlora.integrations.peft.situation import situation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
Maker = Callable[..., Any]


def paths_of(model: Any) -> set[str]:
    """What the layers of ``model`` would do: "fused", or why not."""
    found = [situation(layer) for layer in surface.lora_layers(model)]
    return {entry if isinstance(entry, str) else "fused" for entry in found}


def unpacked(model: Any) -> Any:
    """``model`` as it is on processors whose instructions bitsandbytes does not repack weights for."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


# -- TRL -----------------------------------------------------------------------------------------------------------


def word_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def sft_losses(model: Any, folder: Path, device: str) -> list[float]:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = torch.randint(5, 128, (12, 10), generator=torch.Generator().manual_seed(2)).tolist()
    settings = trl.SFTConfig(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=device == "cpu", dataloader_pin_memory=False, save_strategy="no", seed=0,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=word_tokenizer())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("base", "fields"), [("4bit", {}), ("4bit", {"use_dora": True}), ("dense", {"use_rslora": True})], ids=str
)
def test_sft_trainer(
    base: str, fields: dict[str, Any], make_llama: Maker, tmp_path: Path, device: str, monkeypatch: Any
) -> None:
    """With TRL's defaults: bfloat16 autocast, adapters cast to bfloat16 on a 4-bit base, gradient checkpointing."""
    calls = []
    real = layers_module.situation
    monkeypatch.setattr(layers_module, "situation", lambda layer: calls.append(real(layer)) or calls[-1])
    losses = {}
    for name in ("stock", "fused"):
        model = make_llama(base, dtype=torch.bfloat16, **fields).to(device)
        if name == "fused":
            assert not accelerate(model).skipped
        losses[name] = sft_losses(model, tmp_path / name, device)
    assert len(losses["fused"]) == 4
    assert losses["fused"] == pytest.approx(losses["stock"], rel=2e-2)
    assert losses["fused"][-1] < losses["fused"][0]
    assert calls
    assert not [found for found in calls if isinstance(found, str)]


@pytest.mark.parametrize("loss", [False, True])
def test_sft_trainer_of_blocks(loss: bool, make_llama: Maker, tmp_path: Path, device: str) -> None:
    """TRL computes the loss itself, from the states before the head: it does not miss logits."""
    trl = pytest.importorskip("trl")
    if loss and tuple(map(int, trl.__version__.split(".")[:2])) < (1, 15):
        pytest.skip("TRL before 1.15 reads logits")
    stock = make_llama("4bit", dtype=torch.bfloat16).to(device)
    whole = make_llama("4bit", dtype=torch.bfloat16).to(device)
    assert not accelerate(whole, blocks=True, loss=loss).skipped
    want = sft_losses(stock, tmp_path / "stock", device)
    assert sft_losses(whole, tmp_path / "whole", device) == pytest.approx(want, rel=2e-2)


def test_sft_trainer_that_makes_the_adapters(tmp_path: Path, make_llama: Maker) -> None:
    """`SFTTrainer(peft_config=...)` within `fused`."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    data = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 4})
    with fused():
        trainer = trl.SFTTrainer(
            make_llama("dense", adapters=False), settings, train_dataset=data, processing_class=word_tokenizer(),
            peft_config=config,
        )  # fmt: skip
    trainer.train()
    assert paths_of(trainer.model) == {"fused"}
    assert all(isinstance(layer, layers_module.Fused) for layer in surface.lora_layers(trainer.model))


# -- several processes ---------------------------------------------------------------------------------------------


def join(rank: int, folder: str) -> None:
    """The group that a process joins.

    By a file: whoever asks for a free port may find it taken when the processes have imported what they need.
    """
    warnings.simplefilter("ignore")
    store = distributed.FileStore(f"{folder}/store", processes.WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes.WORLD)


def tokens() -> torch.Tensor:
    return torch.randint(1, 128, (processes.WORLD * 2, 12), generator=torch.Generator().manual_seed(3))


def whole_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Those of the mean of the losses of all processes."""
    for ids in tokens().chunk(processes.WORLD):
        (model(input_ids=ids, labels=ids).loss / processes.WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ddp(rank: int, folder: str, base: str, use_dora: bool) -> None:
    import accelerate as hf_accelerate

    join(rank, folder)
    accelerator = hf_accelerate.Accelerator(cpu=True)
    single, model = (peft_models.llama(base, use_dora=use_dora) for _ in range(2))
    accelerate(single)
    accelerate(model)
    want = whole_gradients(single)
    wrapped = accelerator.prepare_model(model)
    assert type(wrapped).__name__ == "DistributedDataParallel"
    ids = tokens().chunk(processes.WORLD)[rank]
    accelerator.backward(wrapped(input_ids=ids, labels=ids).loss)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6 + 1e-5 * grad.abs().max().item(), msg=name)
    assert paths_of(accelerator.unwrap_model(wrapped)) == {"fused"}


@pytest.mark.parametrize(("base", "use_dora"), [("4bit", False), ("dense", True)])
def test_ddp_by_accelerate(base: str, use_dora: bool, tmp_path: Path) -> None:
    processes.check(processes.run(ddp, str(tmp_path), base, use_dora, folder=tmp_path))


def zero3(rank: int, folder: str) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    join(rank, folder)
    import deepspeed

    # Shared memory for reductions, which would be compiled first.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo", verbose=False)
    single, model = (peft_models.llama("dense") for _ in range(2))
    want = {name: p.detach().clone() for name, p in single.named_parameters()}
    optimizer = torch.optim.SGD([p for p in single.parameters() if p.requires_grad], lr=1.0)
    grads = whole_gradients(single)
    optimizer.step()
    accelerate(model)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1e9,
    }
    learned = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(learned, lr=1.0), config=settings)
    assert paths_of(model) == {"the base weight is partitioned by DeepSpeed"}
    ids = tokens().chunk(processes.WORLD)[rank]
    with torch.no_grad():
        before = peft_models.llama("dense")(input_ids=ids, labels=ids).loss
    loss = engine(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss.detach(), before)
    engine.backward(loss)
    engine.step()
    after = dict(single.named_parameters())
    for name, p in model.named_parameters():
        if name in grads:
            with deepspeed.zero.GatheredParameters(p):
                moved, expected = p.data - want[name], after[name].data - want[name]
                scale = expected.abs().max().item()
                torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6 + 1e-4 * scale, msg=name)


def test_zero3_is_left_to_peft(tmp_path: Path) -> None:
    """ZeRO-3 gathers a module's weights when the module is called, which PEFT's forward does."""
    pytest.importorskip("deepspeed")
    processes.check(processes.run(zero3, str(tmp_path), folder=tmp_path))


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}], ids=str)
def test_a_pre_quantized_checkpoint(
    device_map: Any, storage: torch.dtype, make_llama: Maker, tmp_path: Path, ids: torch.Tensor
) -> None:
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage
    )
    make_llama("dense", adapters=False).save_pretrained(tmp_path / "dense")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=options, device_map={"": "cpu"}, dtype=torch.float32
    )
    quantized.save_pretrained(tmp_path / "packed")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("would go to the GPU")
    models = []
    for fast in (False, True):
        base = unpacked(
            transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "packed", device_map=device_map, dtype=torch.float32
            )
        )
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        models.append(peft.get_peft_model(base, config))
        if fast:
            report = accelerate(models[-1])
            assert {layer.kind for layer in report.replaced} == {"nf4/64 nested"}
            assert not report.skipped
    for model in models:
        model(input_ids=ids, labels=ids).loss.backward()
    stock, fast = (dict(model.named_parameters()) for model in models)
    for name, p in stock.items():
        if p.grad is not None:
            torch.testing.assert_close(fast[name].grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def dispatched(model: Any) -> Any:
    """``model`` with the hooks that a ``device_map`` of several devices brings, all of which are the CPU."""
    from accelerate import dispatch_model

    parts = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"), "cpu")
    dispatch_model(model, {**parts, "model.rotary_emb": "cpu"}, main_device="cpu", force_hooks=True)
    assert sum("forward" in module.__dict__ for module in model.modules()) > 14
    return model


def gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("blocks", [False, True], ids=["layers", "blocks"])
def test_a_model_on_several_devices_is_fused(when: str, blocks: bool, make_llama: Maker, ids: torch.Tensor) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    stock, model = make_llama(), make_llama()
    expected = gradients(stock, ids)
    if when == "before":
        dispatched(model.get_base_model())
    report = accelerate(model, "torch", blocks=blocks, loss=blocks)
    if when == "after":
        dispatched(model.get_base_model())
    assert len(report.replaced) == 14
    assert paths_of(model) == {"fused"}
    if blocks:
        assert all(block.reason is None for block in report.blocks)
    ran: list[str] = []

    def watch(name: str, module: Any) -> None:
        def pre_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return args, kwargs

        module._hf_hook.pre_forward = pre_forward

    for layer in surface.lora_layers(model):
        watch("base layer", layer.base_layer)
    watch("decoder layer", model.get_base_model().model.layers[0])
    for ours, theirs in zip(gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ran == ["decoder layer"]
    remove_hook_from_submodules(model.get_base_model())
    assert paths_of(model) == {"fused"}
    again = accelerate(model, "torch", blocks=blocks, loss=blocks)
    assert len(again.replaced) == 14
    restore(model)
    for ours, theirs in zip(gradients(model, ids), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_on_several_devices_is_restored(make_llama: Maker, ids: torch.Tensor) -> None:
    stock, model = make_llama(), dispatched(make_llama().get_base_model())
    expected = gradients(stock, ids)
    accelerate(model, blocks=True, loss=True)
    restore(model)
    for ours, theirs in zip(gradients(model, ids), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["offload", "io_same_device"])
def test_a_hook_that_does_more_than_to_move_inputs_is_run(change: str, make_llama: Maker) -> None:
    model = make_llama()
    dispatched(model.get_base_model())
    layer = surface.lora_layers(model)[0]
    setattr(layer.base_layer._hf_hook, change, True)
    report = accelerate(model)
    assert len(report.replaced) == 13
    assert "its forward is replaced on the instance" in situation(layer)


def test_layers_that_accelerate_offloads_are_left_to_peft(make_llama: Maker, ids: torch.Tensor, tmp_path: Path) -> None:
    """Their weights are on the meta device until a hook of the inner module brings them."""
    from accelerate import disk_offload

    stock, model = make_llama("dense"), make_llama("dense")
    accelerate(model)
    assert paths_of(model) == {"fused"}
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all("its forward is replaced on the instance" in path for path in paths_of(model))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_layer_replication(make_llama: Maker, ids: torch.Tensor) -> None:
    """Layers that share one base and have adapters of their own."""
    fields = {"layer_replication": [(0, 2), (0, 2)]}
    stock, fast = make_llama(**fields), make_llama(**fields)
    assert len(accelerate(fast).replaced) == 28
    for model in (stock, fast):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), (_, q) in zip(stock.named_parameters(), fast.named_parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
