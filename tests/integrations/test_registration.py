"""Fused layers from the start: by a registered configuration, or by everything PEFT makes within a block."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import surface  # noqa: E402
from peft.tuners.lora import LoraModel  # noqa: E402

from fastlora import FastLoRALinear  # noqa: E402
from fastlora.integrations.peft import FUSED, accelerate, fused, register, restore, unregister  # noqa: E402
from fastlora.integrations.peft.layers import _CACHES, Fused  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(base: str, way: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model, config = surface.Tiny(base), surface.config(base, **fields)
    torch.manual_seed(1)
    if way == "register":
        return peft.get_peft_model(model, register(config, "torch"))
    with fused("torch"):
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("way", ["register", "fused"])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "mica"}], ids=str)
@pytest.mark.parametrize("base", surface.BASES)
def test_the_same_as_accelerate(base: str, fields: dict[str, Any], way: str) -> None:
    if base == "4bit" and "init_lora_weights" in fields:
        pytest.skip("PEFT refuses it")
    converted = surface.make(base, **fields)
    accelerate(converted, "torch")
    made = adapted(base, way, **fields)
    ours, theirs = surface.lora_layers(made), surface.lora_layers(converted)
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    assert all(isinstance(layer, Fused) and layer.fastlora_backend == "torch" for layer in ours)
    attributes = [[set(layer.__dict__) - set(_CACHES) for layer in layers] for layers in (ours, theirs)]
    assert attributes[0] == attributes[1]
    assert list(made.state_dict()) == list(converted.state_dict())
    want = surface.train(converted)
    for name, t in surface.train(made).items():
        assert torch.equal(t, want[name]), name
    assert restore(made) == 4
    assert {type(layer) for layer in surface.lora_layers(made)} <= set(FUSED)


@pytest.mark.parametrize("base", ["dense", "4bit"])
def test_the_same_as_the_standalone_layer(base: str) -> None:
    layer = surface.lora_layers(adapted(base, "register"))[0]
    standalone = FastLoRALinear.from_peft(layer, backend=layer.fastlora_backend)
    x = torch.randn(3, 64)
    assert torch.equal(standalone(x), layer(x))


def test_later_adapters_need_no_registration() -> None:
    model = adapted("dense", "register")
    surface.add(model, "dense")
    assert all(isinstance(layer, Fused) for layer in surface.lora_layers(model))


def test_the_registration_ends() -> None:
    config = register(surface.config("dense"))
    assert unregister(config) is config
    assert config._custom_modules is None
    model = peft.get_peft_model(surface.Tiny("dense"), config)
    assert not any(isinstance(layer, Fused) for layer in surface.lora_layers(model))


def test_other_custom_modules_stay() -> None:
    class Mine(peft.tuners.lora.Linear):
        pass

    for first in (True, False):
        config = surface.config("dense")
        if first:
            config._register_custom_module({nn.Linear: Mine})
        register(config)
        if not first:
            config._register_custom_module({nn.Linear: Mine})
        model = peft.get_peft_model(surface.Tiny("dense"), config)
        assert {type(layer) for layer in surface.lora_layers(model)} == {Mine}
        assert nn.Linear in config._custom_modules
        assert list(unregister(config)._custom_modules) == [nn.Linear]


def test_a_registered_configuration_can_be_copied_and_saved(tmp_path: Any) -> None:
    config = register(surface.config("dense"), "torch")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        model = peft.get_peft_model(surface.Tiny("dense"), other)
        assert all(layer.fastlora_backend == "torch" for layer in surface.lora_layers(model))
    config.save_pretrained(tmp_path)
    plain = surface.config("dense")
    assert peft.LoraConfig.from_pretrained(tmp_path).to_dict().keys() == plain.to_dict().keys()


def test_layers_that_cannot_be_fused_are_those_of_peft() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "conv": nn.Conv2d(1, 1, 3), "linear": nn.Linear(8, 8)})
    config = register(peft.LoraConfig(target_modules=["embedding", "conv", "linear"]))
    kinds = [type(layer) for layer in surface.lora_layers(peft.get_peft_model(model, config))]
    assert kinds == [peft.tuners.lora.Embedding, peft.tuners.lora.Conv2d, FUSED[peft.tuners.lora.Linear]]


def test_target_parameters_are_those_of_peft() -> None:
    config = register(peft.LoraConfig(target_modules=[], target_parameters=["up.weight"]))
    model = peft.get_peft_model(surface.Tiny("dense"), config)
    assert {type(layer).__name__ for layer in surface.lora_layers(model)} == {"ParamWrapper"}


def test_loading_within_the_block(tmp_path: Any) -> None:
    saved = surface.make("dense")
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    with fused(), fused("torch"):
        model = peft.PeftModel.from_pretrained(surface.Tiny("dense"), tmp_path, low_cpu_mem_usage=True)
    assert all(layer.fastlora_backend == "torch" for layer in surface.lora_layers(model))
    torch.testing.assert_close(surface.output(model), surface.output(saved.eval()))


def test_injection_within_the_block() -> None:
    with fused():
        model = peft.inject_adapter_in_model(surface.config("dense"), surface.Tiny("dense"))
    assert all(isinstance(layer, Fused) for layer in surface.lora_layers(model))


def test_the_block_ends() -> None:
    before = LoraModel._create_new_module
    with fused():
        assert LoraModel._create_new_module is not before
    assert LoraModel._create_new_module is before
    with pytest.raises(ValueError, match="Target modules"), fused():
        peft.get_peft_model(surface.Tiny("dense"), peft.LoraConfig(target_modules=["nothing"]))
    assert LoraModel._create_new_module is before


@pytest.mark.parametrize(
    "way", [lambda backend: register(surface.config("dense"), backend), lambda b: fused(b).__enter__()]
)
def test_unknown_backend(way: Any) -> None:
    with pytest.raises(ValueError, match="unknown backend 'cublas'; choose from auto, "):
        way("cublas")
