"""The optimizer of the adapters: few launches, and no pass over gradients but the one that measures them."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.training.config import TrainConfig
from fastlora.training.errors import UserError, near, require

FUSED = ("auto", "adamw_torch_fused")
"""Names of `ClippedAdamW` in a configuration; auto means it on a GPU and PyTorch's own on a CPU."""


class ClippedAdamW(torch.optim.AdamW):
    """AdamW in one launch over all parameters, which scales gradients that `clip` found too long as it reads them."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self._divisor: torch.Tensor | None = None

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Let the next `step` scale the gradients to a common norm of at most ``max_norm``. Returns their norm.

        The gradients themselves stay as they are until that step.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # As torch.nn.utils.clip_grad_norm_ computes it, to the inverse.
        self._divisor = ((norm + 1e-6) / max_norm).clamp_(min=1.0).float()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self._divisor is None:
            return super().step(closure)
        # By this name the fused kernel finds what to divide gradients by.
        self.grad_scale: torch.Tensor | None = self._divisor
        try:
            return super().step(closure)
        finally:
            self.grad_scale = self._divisor = None


def choose(config: TrainConfig, device: torch.device) -> tuple[str, tuple[Any, dict[str, Any]] | None]:
    """The transformers name of the optimizer, and the class with its settings where it is ours.

    Raises UserError for a name that transformers does not know, or one whose package is missing.
    """
    from transformers.training_args import OptimizerNames

    name = config.optim
    if name in FUSED and (device.type == "cuda" or name != "auto"):
        return "adamw_torch_fused", (ClippedAdamW, {"lr": config.lr, "betas": (0.9, 0.999), "eps": 1e-8})
    if name == "auto":
        return "adamw_torch", None
    names = [str(known.value) for known in OptimizerNames]
    if name not in names:
        hint = near(name, ["auto", *names])
        raise UserError(f"optim: {name!r} is no optimizer of transformers: auto, or {hint or 'adamw_torch'}")
    if "bit" in name or "bnb" in name or name.startswith("paged"):
        require("bitsandbytes")
    return name, None


class FusedClipping:
    """Mix-in of a Trainer: clips within the step of a `ClippedAdamW`, and as the Trainer does for any other."""

    def _clip_grad_norm(self: Any, model: torch.nn.Module) -> torch.Tensor:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper
        if isinstance(optimizer, ClippedAdamW):
            return optimizer.clip(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)  # type: ignore[misc]
