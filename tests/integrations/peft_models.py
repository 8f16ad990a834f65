"""Tiny models and layers with PEFT adapters, made in memory. Every B is not zero, so that adapters show in the output.

Widths are multiples of 64, because bitsandbytes' CPU kernel needs rows of whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


def quantize_linears(model: nn.Module, compute_dtype: torch.dtype, skip: tuple[str, ...] = ("lm_head",)) -> None:
    """Replace every ``nn.Linear`` by bitsandbytes' ``Linear4bit``, as transformers does when it loads in 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name in skip:
            continue
        linear = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
        linear.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
        )
        linear.bias = module.bias
        linear.to("cpu")
        # Evaluation on a CPU with AVX512-BF16 would rewrite the packed bytes in place, and training go wrong after it.
        linear.support_avx512bf16_for_cpu = False
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    model.is_loaded_in_4bit = True


def llama(
    base: str = "4bit",
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[nn.Module], Any] | None = None,
    adapters: bool = True,
    autocast_adapter_dtype: bool = True,
    **lora: Any,
) -> Any:
    """One and the same two-layer Llama at every call, with adapters on its 14 linear layers.

    base: "4bit" or "dense"; dtype: of the model; prepare: called on it before the adapters come; lora: further fields
    of LoraConfig.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if base == "4bit":
        quantize_linears(model, compute_dtype=dtype)
    if prepare is not None:
        prepare(model)
    if not adapters:
        return model
    fields = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    torch.manual_seed(1)
    lora_config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
    return peft.get_peft_model(model, lora_config, autocast_adapter_dtype=autocast_adapter_dtype)


def linear_layer(base: str, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base layer of 64 inputs and 96 outputs: ``Linear4bit`` or ``nn.Linear``."""
    holder = nn.ModuleDict({"linear": nn.Linear(64, 96, bias=bias).to(dtype)})
    if base == "4bit":
        quantize_linears(holder, dtype)
    return holder["linear"]


def lora_layer(base: str, bias: bool = False, dtype: torch.dtype = torch.float32, **fields: Any) -> nn.ModuleDict:
    """One PEFT layer over ``linear_layer``, under the name "layer" of a container that can be accelerated."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 4, "init_lora_weights": False, **fields})
    linear = linear_layer(base, bias, dtype)
    kind = peft.tuners.lora.Linear4bit if base == "4bit" else peft.tuners.lora.Linear
    layer = kind(linear, "default", config=config, r=config.r, lora_alpha=config.lora_alpha)
    layer.set_adapter("default")
    for name, p in layer.named_parameters():
        p.requires_grad_("lora_" in name)
    return nn.ModuleDict({"layer": layer})
