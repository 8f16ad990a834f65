"""Tiny models of every architecture whose blocks are fused, with PEFT adapters on all linear layers, 4 bits below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_models import quantize_linears

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16, "hidden_activation": "gelu"}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "phi3": ("Phi3", {}),
}
"""Name of the model's classes in transformers, and what its configuration has beside `SIZES`."""
JOINT = ("phi3",)
"""Those whose q, k and v, and gate and up, are one layer each."""


def make(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", rounded: bool = False, **lora: Any) -> Any:
    """One and the same model at every call. ``rounded``: of weights that bfloat16 can hold, whatever ``dtype``."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    kind, fields = ARCHITECTURES[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    torch.manual_seed(0)
    config = getattr(transformers, kind + suffix)(**{**SIZES, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases are zero at first
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    model = (model.to(torch.bfloat16) if rounded else model).to(dtype)
    quantize_linears(model, compute_dtype=dtype)
    torch.manual_seed(1)
    options = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", **options), autocast_adapter_dtype=not rounded
    )
    if rounded:
        for name_, parameter in model.named_parameters():
            if "lora_" in name_:
                parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return model.to(device)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """The results of two models by name, the same but for the order of their sums."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-6 + 2e-5 * value.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
