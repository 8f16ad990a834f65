"""LoRA-FA: A stays as it was drawn, only B learns (Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for
Large Language Models Fine-tuning", 2023).

    y  = x W^T + scale * u B^T,   u = dropout(x) A^T
    dB = scale * (dy^T u)
    dx = dy W + dropout((scale * dy B) A)

Nothing of the backward pass needs x, so that of a layer's activations only u (M, R) is kept: R / K of LoRA's.

The gradient of the full weight W + scale * B A that a step of B can follow best is had from

    g = dB (A A^T)^-1 / scale^2

(the least-squares solution, as the authors' optimizer and PEFT's ``create_lorafa_optimizer`` use it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.adapters.variant import require_layers

_RIDGE = 1e-8


def freeze(model: nn.Module, adapter: str = "default") -> int:
    """Freeze A of every LoRA layer. Returns how many parameters remain to be trained in B.

    Raises ValueError when the model has no such layer.
    """
    trained = 0
    for _, layer in require_layers(model, adapter):
        layer.lora_A[adapter].requires_grad_(False)
        trained += layer.lora_B[adapter].weight.numel()
    return trained


class Correction:
    """Turns the gradient of each B into ``dB (A A^T)^-1 / scale^2`` before an optimizer's step.

    The inverses are taken once, in float32 (float64 for such adapters): A does not change. Use with any optimizer:
    ``Correction(model).attach(optimizer)``.
    """

    def __init__(self, model: nn.Module, adapter: str = "default") -> None:
        self._parts: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, layer in require_layers(model, adapter):
            lora_a = layer.lora_A[adapter].weight
            if lora_a.requires_grad:
                raise ValueError(f"{name}: A is trained: call fastlora.adapters.lora_fa.freeze(model) first")
            a = lora_a.detach().to(torch.promote_types(lora_a.dtype, torch.float32))
            gram = a @ a.T
            gram.diagonal().add_(_RIDGE)
            inverse = torch.linalg.pinv(gram, hermitian=True) / float(layer.scaling[adapter]) ** 2
            self._parts.append((layer.lora_B[adapter].weight, inverse))

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Correct the gradients that there are."""
        for lora_b, inverse in self._parts:
            if lora_b.grad is not None:
                lora_b.grad = (lora_b.grad.to(inverse.dtype) @ inverse).to(lora_b.grad.dtype)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Correct before every step of ``optimizer``; the handle that removes it again."""
        return optimizer.register_step_pre_hook(self)


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of the tensors that ``run()`` keeps for a backward pass, parameters and buffers of ``model`` left out.

    A storage that several operators keep is counted once. It measures what LoRA-FA saves, and any other change.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()  # held until the bytes are counted
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total
