"""Whole models for the benchmarks: real shapes, random weights in NF4, LoRA on every linear layer but the head."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastlora.training.step import checkpoint_blocks

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
"""What the hub's config.json of each model says of its shape. Llama 3, Qwen 2.5 and 3, Mistral v0.3 base models."""


def config(name: str, blocks: int | None = None, vocabulary: int | None = None, **changes: Any) -> Any:
    """The transformers configuration of a model of `CONFIGS`, with so many decoder blocks and another vocabulary."""
    from transformers import AutoConfig

    values = {"tie_word_embeddings": False, **CONFIGS[name], "use_cache": False, **changes}
    values |= {} if blocks is None else {"num_hidden_layers": blocks}
    values |= {} if vocabulary is None else {"vocab_size": vocabulary}
    # Some defaults lie outside of a small vocabulary.
    values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **values}
    return AutoConfig.for_model(**values)


def base(config: Any, device: torch.device, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a transformers configuration with random weights, its blocks' linear layers in nested NF4.

    Weights are drawn and quantized on ``device``, so that billions of them take seconds on a GPU. The same seed gives
    the same weights on the same kind of device. The model says of itself what one that transformers quantized does: to
    PEFT, to trainers, and in a saved configuration.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fastlora.training import model as models

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    models.quantize_in_place(model, quantization, models.DEFAULT_BLOCKSIZE, device)
    model.config.quantization_config = quantization
    model.config.use_cache = False
    model.is_loaded_in_4bit = True
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would repack the bytes in place
    return model


def repeated(config: Any, device: torch.device) -> Any:
    """As `base`, of blocks that all have the weights of the first: of a large model only one block is ever dense."""
    count, config.num_hidden_layers = config.num_hidden_layers, 1
    model = base(config, device)
    config.num_hidden_layers = count
    blocks = model.get_decoder().layers
    for i in range(1, count):
        block = copy.deepcopy(blocks[0])
        block.self_attn.layer_idx = i
        blocks.append(block)
    return model


def adapt(model: Any, *, r: int = 16, alpha: float = 32, seed: int = 0) -> Any:
    """The PEFT model with an adapter on every linear layer but the head: float32, as PEFT makes it, from ``seed``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    restart(adapted, seed)
    return adapted


def restart(model: Any, seed: int) -> None:
    """Give every adapter of ``model`` its start again: A normal in the order of the layers' names, B zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(adapters(model)):
            if "lora_A" in name:
                values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                if isinstance(parameter, DTensor):
                    values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
                parameter.copy_(values)
            else:
                parameter.zero_()


def adapters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters with their names, without what wrappers put before ``model.layers``."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name[name.find("layers.") :], parameter


def checkpoint(model: Any, on: bool, *, captured: bool = False, keep: int = 0) -> None:
    """Turn gradient checkpointing of a PEFT model on, but for the last ``keep`` blocks, or off, for a step that is
    captured or not."""
    inner = model.get_base_model()
    if on:
        checkpoint_blocks(inner, random=not captured, keep=keep)
    else:
        getattr(inner, "activation_checkpointing_disable", inner.gradient_checkpointing_disable)()


def linear_sizes(config: Any) -> list[tuple[int, int]]:
    """(out_features, in_features) of the linear layers of one block of a Llama-like decoder."""
    hidden, middle = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (middle, hidden), (middle, hidden), (hidden, middle)]


def step_operations(config: Any, batch: int, length: int, r: int) -> float:
    """Multiplications and additions that one training step of the adapters needs: base products forward and towards
    the input, causal attention, LoRA products, the head. Nothing that is computed again counts."""
    tokens, sizes = batch * length, linear_sizes(config)
    base = sum(n * k for n, k in sizes) * 4
    lora = sum(r * (n + k) for n, k in sizes) * 6
    width = sizes[0][0]
    attention = 6 * length * width  # 2 products of half a square forward, 4 backward
    head = 4 * config.vocab_size * config.hidden_size
    return float(tokens) * (config.num_hidden_layers * (base + lora + attention) + head)


def token_batches(config: Any, batch: int, length: int, device: torch.device, seed: int, count: int) -> Any:
    """``count`` batches (batch, length) of random tokens, the same for every implementation."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (count, batch, length), generator=generator)
    return list(itertools.islice(ids.to(device), count))
