"""Every feature of PEFT's LoRA layers, on every kind of base layer, against PEFT itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import surface
from surface import BASES, FEATURES, Feature

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
def test_feature(feature: Feature, base: str, paths: list[str]) -> None:
    if feature.needs is not None:
        pytest.importorskip(feature.needs)
    expected = feature.cell(base)
    arguments = {"base_bias": base == "conv1d"} if feature.name == "base without bias" else {}
    if expected.startswith("refused"):
        with pytest.raises((TypeError, RuntimeError, ValueError, AttributeError), match=expected.partition(": ")[2]):
            feature.run(surface.make(base, **arguments, **feature.fields), base, **feature.arguments)
        return
    stock = surface.make(base, **arguments, **feature.fields)
    fast = surface.make(base, **arguments, **feature.fields)
    accelerate(fast)
    assert list(fast.state_dict()) == list(stock.state_dict())
    want = feature.run(stock, base, **feature.arguments)
    got = feature.run(fast, base, **feature.arguments)
    assert " and ".join(dict.fromkeys(paths)) == expected.partition(",")[0]
    assert got.keys() == want.keys()
    tolerance = 2**-6 if feature.name == "autocast" else 1e-5
    for name, t in want.items():
        scale = t.abs().max().item() if t.is_floating_point() else 0
        torch.testing.assert_close(
            got[name], t, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_documented_table() -> None:
    """After a change of the features: python tests/integrations/surface.py"""
    assert surface.DOCUMENT.read_text() == surface.documented()
