"""Every method of ``fastlora train``: it learns, PEFT alone loads it, and it resumes as if never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file

import fastlora
from fastlora.training import methods
from fastlora.training import model as models
from fastlora.training.config import MethodName, load
from fastlora.training.errors import UserError
from fastlora.training.train import TrainResult, train

assert tiny.LINES
STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-fa": {"lora_fa_correction": True, "lr": 0.02},
    "lora-plus": {"lora_plus_ratio": 4.0},
    "dora": {},
    "vera": {"r": 16, "lr": 0.1},
    "delta-lora": {"delta_start": 2, "delta_weight": 0.5},
    "adalora": {"target_r": 2, "lr": 0.1},
    "dylora": {"min_r": 2},
    "dynamic-rank": {"eval_steps": 1, "rank_patience": 1, "shrink_above": 0.01, "min_r": 2},
    "prompt": {"lr": 0.3},
    "prefix": {"lr": 0.3},
    "bottleneck": {"r": 8},
    "layers": {"trained_layers": r"model\.layers\.1\..*_proj", "lr": 0.003},
    "full": {"quantization": "none", "lr": 0.003},
}
NO_LORA = ("prompt", "prefix", "bottleneck", "layers", "full")


def run(options: dict[str, Any], **values: Any) -> TrainResult:
    return train(load(None, options | {"max_steps": STEPS, "save_steps": 4, "lora_dropout": 0.0} | values))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_every_method_is_tested_and_made() -> None:
    of_classifications = {"head"}  # in test_tasks.py
    assert set(OPTIONS) | of_classifications == set(methods.METHODS) == set(get_args(MethodName))


@pytest.mark.parametrize("method", OPTIONS)
def test_learns_is_loaded_by_peft_and_resumes(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    whole = run(options, method=method, **OPTIONS[method])
    assert whole.eval_loss_before is not None
    assert whole.eval_loss_after is not None
    assert whole.eval_loss_after < whole.eval_loss_before
    if method not in NO_LORA:
        assert whole.layers_replaced == 14

    # PEFT alone, on its own layers, has the model that was evaluated.
    quantization = OPTIONS[method].get("quantization", "nf4")
    cpu = torch.device("cpu")
    source = models.find(options["model"])
    base = models.load_base(source, quantization=quantization, device=cpu, dtype=torch.float32)
    ids = torch.arange(12)[None] + 5
    if method in ("bottleneck", "layers", "full"):
        before = base(input_ids=ids).logits
        model = models.load_adapter(base, whole.adapter_path).eval()
        assert (model(input_ids=ids).logits - before).abs().max() > 0.01
    else:
        model = PeftModel.from_pretrained(base, str(whole.adapter_path)).eval()
        assert not any(type(module).__module__.startswith("fastlora") for module in model.modules())
    want = model(input_ids=ids).logits
    if method not in NO_LORA:
        assert fastlora.accelerate(model).replaced
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)

    # The second half, from the checkpoint in its middle.
    again = tmp_path / "again"
    again.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-4", again / "checkpoint-4")
    shutil.copy(whole.output_dir / "config.yaml", again)
    half = run(options, method=method, output_dir=str(again), resume=True, **OPTIONS[method])
    one, other = weights(whole.adapter_path), weights(half.adapter_path)
    assert one.keys() == other.keys()
    for name, t in one.items():
        torch.testing.assert_close(other[name], t, rtol=1e-4, atol=1e-5, msg=name)
    assert [loss for _, loss in half.losses][-4:] == pytest.approx([loss for _, loss in whole.losses][-4:], rel=1e-3)


@pytest.mark.parametrize("method", ["lora-fa", "vera", "delta-lora", "adalora", "dylora", "bottleneck", "layers"])
def test_checkpointing_changes_nothing(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    values = OPTIONS[method] | {"method": method, "max_steps": 4}
    results = [
        run(options, **values, gradient_checkpointing=on, lora_dropout=0.1, output_dir=str(tmp_path / str(on)))
        for on in (False, True)
    ]
    losses = [[loss for _, loss in result.losses] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", ["lora-plus", "dynamic-rank"])
def test_moments_in_8_bits(method: str, options: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    result = run(options, method=method, optim="adamw_8bit", **OPTIONS[method])
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before


def test_ranks_change_and_the_file_says_so(options: dict[str, Any]) -> None:
    result = run(options, method="dynamic-rank", **OPTIONS["dynamic-rank"])
    config = json.loads((result.adapter_path / "adapter_config.json").read_text())
    a = next(t for name, t in weights(result.adapter_path).items() if "lora_A" in name)
    assert config["r"] == a.shape[0] != 4


def test_adalora_removes_what_has_no_budget(options: dict[str, Any]) -> None:
    result = run(options, method="adalora", **OPTIONS["adalora"])
    rows = [t.shape[0] for name, t in weights(result.adapter_path).items() if "lora_A" in name]
    assert 14 <= sum(rows) <= 2 * 14 + 7
    assert len(set(rows)) > 1


def test_penalty_of_adalora_is_not_in_the_evaluation(options: dict[str, Any]) -> None:
    weighty, none = (
        run(options, method="adalora", lr=1e-9, orthogonality=value, output_dir=f"{options['output_dir']}{value}")
        for value in (5.0, 0.0)
    )
    assert weighty.eval_loss_after == pytest.approx(none.eval_loss_after, rel=1e-4)
    assert weighty.losses[0][1] > none.losses[0][1] + 1


def test_delta_lora_exports_twice_the_rank_of_a_late_start(options: dict[str, Any]) -> None:
    result = run(options, method="delta-lora", **OPTIONS["delta-lora"])
    assert json.loads((result.adapter_path / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("init", methods.STARTS)
def test_starts_that_change_the_base(init: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain = run(options, max_steps=1)
    whole = run(options, init=init, output_dir=str(tmp_path / "whole"))
    assert whole.eval_loss_before is not None
    assert whole.eval_loss_after is not None
    assert whole.eval_loss_before == pytest.approx(plain.eval_loss_before, rel=0.05)
    assert whole.eval_loss_before != plain.eval_loss_before
    assert whole.eval_loss_after < whole.eval_loss_before
    base = models.load_base(models.find(options["model"]), device=torch.device("cpu"), dtype=torch.float32)
    model = models.load_adapter(base, whole.adapter_path)
    from fastlora.adapters import starts

    rebuilt = methods.make(load(None, options | {"init": init})).adapt(
        models.load_base(models.find(options["model"]), device=torch.device("cpu"), dtype=torch.float32)
    )
    for (name, one), (_, two) in zip(starts.require_layers(model), starts.require_layers(rebuilt), strict=True):
        assert torch.equal(one.base_layer.weight, two.base_layer.weight), name
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole.output_dir / "checkpoint-4", half / "checkpoint-4")
    again = run(options, init=init, output_dir=str(half), resume=True)
    assert again.eval_loss_after == pytest.approx(whole.eval_loss_after, rel=1e-3)


def test_start_on_a_dense_base_is_exported_as_plain_lora(options: dict[str, Any]) -> None:
    from peft import PeftModel

    result = run(options, init="pissa", quantization="none")
    assert json.loads((result.adapter_path / "adapter_config.json").read_text())["r"] == 8
    base = models.load_base(
        models.find(options["model"]), quantization="none", device=torch.device("cpu"), dtype=torch.float32
    )
    ids = torch.arange(12)[None] + 5
    before = base(input_ids=ids).logits
    after = PeftModel.from_pretrained(base, str(result.adapter_path))(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "layers"}, "go together"),
        ({"trained_layers": "x"}, "go together"),
        ({"init": "loftq", "quantization": "none"}, "is for a quantized base"),
        ({"init": "pissa", "method": "delta-lora"}, "both move the base"),
        ({"method": "lora+"}, "did you mean lora"),
        ({"method": "dynamic-rank"}, "set eval_steps"),
        ({"method": "dynamic-rank", "eval_steps": 1, "max_r": 2}, "must ascend"),
        ({"method": "dynamic-rank", "eval_steps": 1, "grow_below": 0.5}, "grow_below must be less"),
        ({"method": "dylora", "min_r": 9}, "min_r must be at most r = 4"),
        ({"method": "adalora", "target_r": 9}, "target_r must be at most r = 4"),
        ({"method": "vera", "init": "pissa"}, "which vera has not"),
        ({"method": "adalora", "use_rslora": True}, "which adalora has not"),
        ({"method": "vera", "r": 0}, "r should be greater than or equal to 1"),
        ({"method": "dora", "r": 0}, "r should be greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(None, options | values)


def test_adalora_needs_steps(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="raise max_steps"):
        run(options, method="adalora", max_steps=1)


def test_layers_that_are_not_there(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no linear layer has a name like"):
        run(options, method="layers", trained_layers="q_proj")
    with pytest.raises(UserError, match="no linear layer is called"):
        run(options, method="bottleneck", target_modules="out_proj")


@pytest.mark.parametrize("method", ["bottleneck", "full"])
def test_files_of_our_own_are_neither_compared_nor_merged(method: str, options: dict[str, Any]) -> None:
    from fastlora.training.generate import generate
    from fastlora.training.merge import merge

    result = run(options, method=method, max_steps=1, quantization="none")
    with pytest.raises(UserError, match=f"method {method}, no adapter that can be taken off"):
        generate(result.adapter_path, ["the sky"], device="cpu")
    with pytest.raises(UserError, match=f"method {method} has no factors"):
        merge(result.adapter_path, result.output_dir / "merged")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("backend", ["auto", "peft"])
def test_virtual_tokens_are_compared_by_generate(
    method: str, backend: str, options: dict[str, Any], other_model: Path
) -> None:
    from fastlora.training.generate import Sampling, generate

    result = run(options, method=method, virtual_tokens=8, lr=0.3, max_steps=12)
    sampling = Sampling(max_new_tokens=12)
    (row,) = generate(result.adapter_path, ["the sky"], sampling=sampling, backend=backend, device="cpu")
    assert row.before != row.after
    with pytest.raises(UserError, match=r"its tokens have 64 features|cannot load"):
        generate(result.adapter_path, ["the sky"], model=str(other_model), device="cpu")


def test_a_quantized_adapter_keeps_the_base_that_its_start_changed(options: dict[str, Any], tmp_path: Path) -> None:
    from fastlora.adapters import quantized

    result = run(options, init="pissa", max_steps=1, lr=1e-3)
    quantized.quantize_file(result.adapter_path, tmp_path / "small")
    quantized.dequantize_file(tmp_path / "small", tmp_path / "back")
    source, ids = models.find(options["model"]), torch.arange(12)[None] + 5

    def logits(folder: Path) -> torch.Tensor:
        base = models.load_base(source, device=torch.device("cpu"), dtype=torch.float32)
        return models.load_adapter(base, folder).eval()(input_ids=ids).logits

    want = logits(result.adapter_path)
    for folder in ("small", "back"):
        assert (logits(tmp_path / folder) - want).norm() < 0.05 * want.norm()


def test_a_start_needs_the_rank(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"init: .*lower r"):
        run(options, init="pissa", r=60)
