"""Every feature of PEFT's LoRA layers, on every kind of base layer, against PEFT itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import surface
from surface import BASES, FEATURES, Feature

from fastlora import native
from fastlora.integrations.peft import accelerate
from fastlora.integrations.peft import layers as layers_module

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of each call of a fused layer, in the words of the table."""
    seen: list[str] = []

    def watch(name: str) -> None:
        real = getattr(layers_module, name)

        def spy(*args: Any) -> Any:
            found = real(*args)
            seen.append(surface.PEFT + found if isinstance(found, str) else "fused")
            return found

        monkeypatch.setattr(layers_module, name, spy)

    watch("situation")
    watch("mixed_situation")
    return seen


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_feature(feature: Feature, base: str, device: str, paths: list[str]) -> None:
    if feature.needs is not None:
        pytest.importorskip(feature.needs)
    if feature.gpu and device == "cpu":
        pytest.skip("PEFT does it only on a GPU")
    expected = feature.cell(base)
    arguments = {"device": device, **feature.model, **feature.fields}
    if expected.startswith("refused"):
        with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError), match=expected.partition(": ")[2]):
            feature.run(surface.make(base, **arguments), base, **feature.arguments)
        return
    stock, fast = surface.make(base, **arguments), surface.make(base, **arguments)
    accelerate(fast)
    assert list(fast.state_dict()) == list(stock.state_dict())
    want = feature.run(stock, base, **feature.arguments)
    got = feature.run(fast, base, **feature.arguments)
    assert " and ".join(dict.fromkeys(paths)) == expected.partition(",")[0]
    assert got.keys() == want.keys()
    narrow = feature.name == "autocast" or "dtype" in feature.model
    # A GPU adds the products of one row up in another order for each kernel.
    tolerance = 2**-6 if narrow else 1e-5 if device == "cpu" else 1e-4
    for name, t in want.items():
        scale = t.abs().max().item() if t.is_floating_point() else 0
        assert got[name].dtype == t.dtype
        torch.testing.assert_close(
            got[name], t, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", [pytest.param("cuda", marks=pytest.mark.gpu), *surface.BACKENDS[1:]])
@pytest.mark.parametrize("kind", surface.KINDS, ids=lambda kind: kind.name)
def test_backend(kind: surface.Kind, name: str, kernel_device: str) -> None:
    where = kernel_device if name in ("cuda", "triton") else "cpu"
    if (reason := {"cuda": native.available("cuda"), "cpu": native.available("cpu")}.get(name)) is not None:
        pytest.skip(reason)
    arguments = {"dtype": kind.dtype, "lora_dropout": kind.dropout_p, "device": where}
    stock, fast = surface.make(kind.base, **arguments), surface.make(kind.base, **arguments)
    expected = kind.cell(name)
    if expected != "fused":
        reason = re.escape(expected.partition(": ")[2])
        with pytest.raises(RuntimeError, match=reason):
            accelerate(fast, name)
        return
    assert {layer.backend for layer in accelerate(fast, name).replaced} == {name}
    if kind.dropout_p:
        trained = surface.train(fast)
        assert all(t.isfinite().all() for t in trained.values())
        assert not torch.equal(trained["y"], surface.output(fast.eval()))
        want, got = surface.output(stock.eval()), surface.output(fast)
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * want.abs().max().item())
        return
    want, results = surface.train(stock), surface.train(fast)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}.get(kind.dtype, 2**-6)
    for key, t in want.items():
        scale = tolerance * t.abs().max().item()
        torch.testing.assert_close(results[key], t, rtol=tolerance, atol=scale, msg=lambda m, n=key: f"{n}: {m}")


def test_the_documented_table() -> None:
    """After a change of the features: python tests/integrations/surface.py"""
    assert surface.DOCUMENT.read_text() == surface.documented()
