"""The optimizer of the adapters: clipping inside the step, and which optimizer a name means."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
pytest.importorskip("pydantic", reason="pydantic is missing (extra: train)")
pytest.importorskip("yaml", reason="yaml is missing (extra: train)")

from fastlora.training import optimizer
from fastlora.training.config import TrainConfig
from fastlora.training.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config(**values: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", **values)


@pytest.mark.parametrize("max_norm", [0.05, 1e4])
def test_clipping_in_the_step_is_clipping_before_it(max_norm: float) -> None:
    ours = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(3))]
    theirs = copy.deepcopy(ours)
    one = optimizer.ClippedAdamW(ours, lr=0.1, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.1)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * (step + 1)
            b.grad = a.grad.clone()
        before = [p.grad.clone() for p in ours]
        if step < 3:
            found, expected = one.clip(max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            torch.testing.assert_close(found, expected)
            assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))
        one.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    # The last step was not clipped: what `clip` found serves one step.
    assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))


def test_which_optimizer_a_name_means() -> None:
    assert optimizer.choose(config(), CPU) == ("adamw_torch", None)
    name, made = optimizer.choose(config(lr=0.5), CUDA)
    assert name == "adamw_torch_fused"
    assert made is not None
    assert made[0] is optimizer.ClippedAdamW
    assert made[1]["lr"] == 0.5
    assert optimizer.choose(config(optim="adamw_torch_fused"), CPU)[1] is not None
    assert optimizer.choose(config(optim="sgd"), CUDA) == ("sgd", None)
    assert optimizer.choose(config(optim="adamw_8bit"), CUDA) == ("adamw_8bit", None)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim: 'adamw_torhc' .* did you mean adamw_torch"):
        optimizer.choose(config(optim="adamw_torhc"), CPU)


def test_an_8_bit_optimizer_wants_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        optimizer.choose(config(optim="paged_adamw_8bit"), CPU)


def test_training_clips_within_the_step(options: dict[str, Any], tmp_path: Path) -> None:
    from fastlora.training.config import load
    from fastlora.training.train import train

    runs = {}
    for optim in ("adamw_torch", "adamw_torch_fused"):
        values = options | {"optim": optim, "max_grad_norm": 0.01, "output_dir": str(tmp_path / optim)}
        values |= {"gradient_accumulation_steps": 2, "lora_dropout": 0.0}
        runs[optim] = train(load(None, values))
    one, other = runs.values()
    for (_, a), (_, b) in zip(one.losses, other.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    norms = [[log["grad_norm"] for log in run.log_history if "grad_norm" in log] for run in (one, other)]
    assert len(norms[0]) == len(one.losses)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_training_with_8_bit_moments(options: dict[str, Any]) -> None:
    from fastlora.training.config import load
    from fastlora.training.train import train

    seen = []

    class Look:
        """Stands for a callback: what the Trainer made of the name."""

        def __getattr__(self, name: str) -> Any:
            return lambda args, state, control, **kwargs: seen.append(kwargs.get("optimizer"))

    result = train(load(None, options | {"optim": "adamw_8bit", "max_steps": 2}), callbacks=[Look()])
    assert len(result.losses) == 2
    kinds = {type(getattr(one, "optimizer", one)).__module__ for one in seen if one is not None}
    assert kinds == {"bitsandbytes.optim.adamw"}
