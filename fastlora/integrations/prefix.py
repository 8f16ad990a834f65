"""Attention behind a learned prefix, without a mask (Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for
Generation", 2021).

    token i attends to the prefix and to tokens 0 .. i: the mask is causal, aligned to the lower right corner

PEFT gives the model the prefix as a cache that is not empty. For PyTorch's attention transformers then makes the mask
(M, P + M) a tensor, with which no flash kernel runs: all scores are computed, also those that are masked, and the keys
and values of grouped queries are repeated. Flash kernels know the aligned form by itself. `enable` has it said instead
of written out wherever it is all that the mask says: no padding, no sliding window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias, causal_lower_right

from fastlora.integrations.inner import inner_model

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError("attention behind a prefix needs transformers: pip install 'fastlora-kernels[train]'") from error

NAME = "fastlora_prefix"
"""The attention implementation, as transformers calls it."""
_STOCK = "sdpa"


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *args: Any,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask for PyTorch's attention, or the name of the one that is causal and nothing else."""
    aligned = (
        not args
        and allow_is_causal_skip  # else the mask is not a causal one
        and isinstance(q_offset, int)
        and q_length > 1
        and kv_offset == 0
        and 0 < q_offset == kv_length - q_length
        and (local_size is None or kv_length < local_size)
        and not torch.compiler.is_compiling()
        and (attention_mask is None or (attention_mask.shape[-1] == kv_length and bool(attention_mask.all())))
    )
    if aligned:
        return causal_lower_right(q_length, kv_length)
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        *args,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' call of PyTorch's attention; query (B, H, M, D), key and value (B, H / groups, P + M, D)."""
    if isinstance(attention_mask, CausalBias):
        if kwargs.get("position_bias") is None and query.dtype == key.dtype == value.dtype:
            groups = query.shape[1] != key.shape[1]
            y = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=groups
            )
            return y.transpose(1, 2).contiguous(), None
        attention_mask = attention_mask._materialize(query.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def enable(model: Any) -> bool:
    """Have PyTorch's attention in ``model``, a transformers model or PEFT's around one, compute so. Returns whether it
    does now: not where the model has another attention, or code of its own for it."""
    model = inner_model(model)
    able = model.config._attn_implementation in (_STOCK, NAME) and model._can_set_attn_implementation()
    if able:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        model.set_attn_implementation(NAME)
    return bool(able)


def disable(model: Any) -> bool:
    """Undo `enable`. Returns whether there was anything to undo."""
    model = inner_model(model)
    able = model.config._attn_implementation == NAME
    if able:
        model.set_attn_implementation(_STOCK)
    return bool(able)
