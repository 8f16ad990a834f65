"""Causal attention without masks, by a kernel of choice, for transformers models that attend through PyTorch.

Right as long as padding, if any, is on the right: no token sees what is after it. transformers looks at masks and
positions on the host in every step, which then waits for the device; and with a mask the fastest kernels do not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CAUSAL = "fastlora_causal"
"""How the names of the attention implementations of `use_causal_attention` begin."""
KERNELS = ("auto", "pytorch", "flash", "cudnn")
"""Which kernel attends: what was the fastest on such a GPU, what PyTorch picks, FlashAttention, cuDNN."""

_ORDER = {
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
}
_REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For what the chosen kernel cannot compute, such as masks and wide heads."""


def fastest(capability: tuple[int, int] | None) -> str:
    """The kernel for "auto" on a CUDA GPU of this compute capability, or on no GPU."""
    if capability is None or capability < (9, 0) or not torch.backends.cudnn.is_available():
        return "pytorch"
    return "cudnn"


def _causal_mask(
    *args: Any, kv_length: int, local_size: int | None = None, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor | None:
    """No mask where plain causal attention is meant, so that the attention kernel needs none; never one of padding."""
    from transformers.masking_utils import sdpa_mask

    if local_size is None or kv_length <= local_size:
        return None
    return sdpa_mask(*args, kv_length=kv_length, local_size=local_size, attention_mask=None, **kwargs)


def _all_tokens(decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A mask of all tokens where there is none: transformers would ask the positions for packed sequences."""
    given = kwargs.get("inputs_embeds")
    given = kwargs.get("input_ids") if given is None else given
    if args or given is None or kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    return args, kwargs | {"attention_mask": torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)}


def _windowed(config: Any) -> bool:
    """Whether some layers see only what is near, which takes a mask once sequences are longer."""
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is not None or any("full" not in str(kind) for kind in kinds)


def _attend(kernel: str) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kernel == "pytorch":
        return sdpa_attention_forward
    order = [*_ORDER[kernel], *_REST]

    def attend(*args: Any, **kwargs: Any) -> Any:
        # Only the forward pass: its node knows the backward pass that belongs to it.
        with sdpa_kernel(order, set_priority=True):
            return sdpa_attention_forward(*args, **kwargs)

    return attend


def use_causal_attention(model: Any, kernel: str = "pytorch") -> None:
    """Let a transformers model that attends through PyTorch's ``scaled_dot_product_attention`` do so without masks.

    kernel: one of `KERNELS`; what it cannot compute falls to the others. A model that attends in another way is left
    as it is. Raises ValueError for an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown attention kernel {kernel!r}; choose from {', '.join(KERNELS)}")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = model.config._attn_implementation
    if implementation != "sdpa" and not implementation.startswith(CAUSAL):
        return
    if kernel == "auto":
        kernel = fastest(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    windowed = _windowed(model.config)
    name = f"{CAUSAL}_{kernel}" + ("_windowed" if windowed else "")
    ALL_ATTENTION_FUNCTIONS.register(name, _attend(kernel))
    if windowed:
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _causal_mask)
        decoder = getattr(model, model.base_model_prefix, model)
        if _all_tokens not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(_all_tokens, with_kwargs=True)
    model.config._attn_implementation = name
