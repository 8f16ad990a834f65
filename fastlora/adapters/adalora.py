"""AdaLoRA: a budget of ranks, shared out among the layers by importance (Zhang et al., "AdaLoRA: Adaptive Budget
Allocation for Parameter-Efficient Fine-Tuning", 2023).

    y = x W^T + alpha / R * (x (E * A)^T) B^T          A (R, K), E (R, 1), B (N, R): singular vectors and values

    I_t = |p * dp|                                     sensitivity of each element of A, E and B
    I'  = beta1 I' + (1 - beta1) I_t                   smoothed
    U'  = beta2 U' + (1 - beta2) |I_t - I'|            its uncertainty
    S_i = s(E_i) + mean_k s(A_ik) + mean_n s(B_ni),  s = I' U'

    loss += orth_reg_weight * mean(|A A^T - 1|, |B^T B - 1|)

Of all triplets (A_i, E_i, B_i) of the model the ``budget(t)`` with the largest S_i keep their E_i; that of the others
is set to zero. The budget falls from ``R`` to ``target_r`` a layer as a cube, between the steps tinit and
total_step - tfinal. Where it stays, the triplets without budget are removed, and with them their part of every product.

The layers, the penalty and the files are PEFT's (``peft.AdaLoraConfig``); `fastlora.accelerate` fuses the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora import ops
from fastlora.adapters.rank import Change, move_state

_STABLE = 1e-5
"""What PEFT adds to the rank that it divides by."""
_PARTS = ("lora_A", "lora_E", "lora_B")


class _Weighted(torch.autograd.Function):
    """E * A for lora_e (R, 1) and lora_a (R, K)."""

    @staticmethod
    def forward(ctx: Any, lora_a: torch.Tensor, lora_e: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(lora_a, lora_e)
        return lora_a * lora_e

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        lora_a, lora_e = ctx.saved_tensors
        da = g * lora_e if ctx.needs_input_grad[0] else None
        de = torch.linalg.vecdot(g, lora_a).unsqueeze(1) if ctx.needs_input_grad[1] else None
        return da, de


def factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]:
    """lora_a (R, K) with the singular values in it, lora_b (N, R), and the scale."""
    scaled = _Weighted.apply(layer.lora_A[adapter], layer.lora_E[adapter])
    return scaled, layer.lora_B[adapter], layer.scaling[adapter] * _share(layer, adapter)


def _share(layer: Any, adapter: str) -> float | torch.Tensor:
    """1 / R, as PEFT takes it from a tensor that may be on a GPU: read once, for as long as it stays what it is."""
    rank = layer.ranknum[adapter]
    if ops.must_dispatch(rank) or rank.is_inference():
        return 1 / (rank.view(()) + _STABLE)
    known = layer.__dict__.get("fastlora_share")
    if known is None or known[0] is not rank or known[1] != rank._version:
        known = layer.fastlora_share = rank, rank._version, 1 / (float(rank) + _STABLE)
    return known[2]


def layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Name and layer of every AdaLoRA layer. Raises ValueError when there are none."""
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer._modules.get("lora_E"), nn.ParameterDict) and adapter in layer.lora_E
    }
    if not found:
        raise ValueError(f"the model has no AdaLoRA layer with an adapter {adapter!r}: make it with peft.AdaLoraConfig")
    return found


def penalty(model: nn.Module, adapter: str = "default") -> torch.Tensor:
    """mean(|A A^T - 1|, |B^T B - 1|) over all layers: PEFT's term, matrices of one shape at once."""
    by_shape: dict[Any, list[torch.Tensor]] = {}
    for layer in layers(model, adapter).values():
        for t in (layer.lora_A[adapter], layer.lora_B[adapter].T):
            by_shape.setdefault(t.shape, []).append(t)
    norms = []
    for group in by_shape.values():
        t = torch.stack(group)
        one = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
        norms.append(torch.linalg.vector_norm(torch.baddbmm(one, t, t.mT, beta=-1), dim=(1, 2)))
    return torch.cat(norms).mean()


def penalize(model: Any, adapter: str = "default") -> None:
    """Let the loss of a PEFT model have `penalty` while it trains, and not when it is evaluated.

    In place of PEFT's own, which is in both, and takes a launch for each step of each matrix.
    """
    tuner = model.base_model
    config = model.peft_config[adapter]

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = tuner.model(*args, **kwargs)
        if tuner.training and config.orth_reg_weight and getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + config.orth_reg_weight * penalty(tuner.model, adapter)
        return outputs

    tuner.forward = forward


class Allocator:
    """Shares out the budget. In place of PEFT's ``update_and_allocate``: call `step` after each optimizer's step and
    before the gradients are cleared.

    model: a PEFT model with an AdaLoRA adapter; its ``AdaLoraConfig`` is the schedule. Raises ValueError for a schedule
    without room between tinit and tfinal.
    """

    def __init__(self, model: Any, adapter: str = "default") -> None:
        self.adapter, self.config = adapter, model.peft_config[adapter]
        prefix = "base_model.model." if hasattr(model, "base_model") else ""
        self._layers = {name.removeprefix(prefix): layer for name, layer in layers(model, adapter).items()}
        self._full = len(self._layers) * self.config.init_r
        c = self.config
        if c.total_step is None or c.total_step <= c.tinit + c.tfinal:
            raise ValueError(
                f"total_step = {c.total_step} leaves no step between tinit = {c.tinit} and tfinal = {c.tfinal}"
            )
        if not 1 <= c.target_r <= c.init_r:
            raise ValueError(f"target_r must be from 1 to init_r = {c.init_r}, got {c.target_r}")
        self.smoothed: list[torch.Tensor] = []
        self.uncertainty: list[torch.Tensor] = []

    def _parameters(self) -> list[torch.Tensor]:
        return [getattr(layer, part)[self.adapter] for layer in self._layers.values() for part in _PARTS]

    def budget(self, step: int) -> int:
        """How many triplets of the model are to keep their singular value at ``step``."""
        c, last = self.config, len(self._layers) * self.config.target_r
        if step <= c.tinit:
            return self._full
        if step > c.total_step - c.tfinal:
            return last
        left = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return int((self._full - last) * left**3 + last)

    @torch.no_grad()
    def _observe(self) -> None:
        ps = self._parameters()
        grads = [p.grad for p in ps if p.grad is not None]
        if len(grads) < len(ps):
            raise ValueError("an AdaLoRA parameter has no gradient: call step before the gradients are cleared")
        now = torch._foreach_abs(torch._foreach_mul(ps, grads))
        if not self.smoothed:
            self.smoothed = [torch.zeros_like(p) for p in ps]
            self.uncertainty = [torch.zeros_like(p) for p in ps]
        beta1, beta2 = self.config.beta1, self.config.beta2
        torch._foreach_mul_(self.smoothed, beta1)
        torch._foreach_add_(self.smoothed, now, alpha=1 - beta1)
        torch._foreach_sub_(now, self.smoothed)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self.uncertainty, beta2)
        torch._foreach_add_(self.uncertainty, now, alpha=1 - beta2)

    def importance(self) -> list[torch.Tensor]:
        """(R,) of each layer: the importance of its triplets."""
        scores = torch._foreach_mul(self.smoothed, self.uncertainty)
        triplets = (scores[i : i + 3] for i in range(0, len(scores), 3))
        return [e.view(-1) + a.mean(1) + b.mean(0) for a, e, b in triplets]

    @torch.no_grad()
    def _mask(self, budget: int) -> None:
        scores = self.importance()
        if budget >= self._full:
            return
        threshold = torch.kthvalue(torch.cat(scores), self._full - budget).values
        keep = [score > threshold for score in scores]
        for layer, mask in zip(self._layers.values(), keep, strict=True):
            layer.lora_E[self.adapter].masked_fill_(~mask[:, None], 0)
        masks = torch.stack(keep).tolist()  # the one synchronisation
        self.config.rank_pattern = {
            f"{name}.lora_E.{self.adapter}": mask for name, mask in zip(self._layers, masks, strict=True)
        }

    def step(self, step: int, optimizer: Any = None) -> bool:
        """Update the importances, and at the steps of the schedule the budget; ``step`` counts from 1.

        When the budget has reached its end, triplets without budget are removed from the parameters and from
        ``optimizer``. Returns whether that happened now. Raises ValueError when a parameter has no gradient.
        """
        c, end = self.config, self.config.total_step - self.config.tfinal
        if step < end:
            self._observe()
            if step > c.tinit and step % c.deltaT == 0:
                self._mask(self.budget(step))
        elif step == end:
            if not self.smoothed:  # a schedule so short that nothing was observed before
                self._observe()
            self._mask(self.budget(step))
            self.smoothed, self.uncertainty = [], []
            remove(self._layers, c.rank_pattern, self.adapter, optimizer)
            return True
        return False

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """The importances and, as PEFT's files lack what is masked, all factors."""
        return {
            "parameters": [p.detach() for p in self._parameters()],
            "smoothed": self.smoothed,
            "uncertainty": self.uncertainty,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Restore what `state_dict` gave, with the ranks that the layers had then."""
        parts = state["parameters"]
        for i, layer in enumerate(self._layers.values()):
            for name, t in zip(_PARTS, parts[3 * i : 3 * i + 3], strict=True):
                present = getattr(layer, name)[self.adapter]
                t = t.to(present.device, present.dtype)
                if t.shape == present.shape:
                    present.copy_(t)
                else:
                    getattr(layer, name)[self.adapter] = nn.Parameter(t, present.requires_grad)
            layer.r[self.adapter] = layer.lora_E[self.adapter].shape[0]
        ps = self._parameters()
        self.smoothed = [t.to(p.device) for t, p in zip(state["smoothed"], ps, strict=False)]
        self.uncertainty = [t.to(p.device) for t, p in zip(state["uncertainty"], ps, strict=False)]


@torch.no_grad()
def remove(
    layers: dict[str, Any], pattern: dict[str, list[bool]] | None, adapter: str = "default", optimizer: Any = None
) -> None:
    """Remove the triplets that ``pattern``, a ``rank_pattern`` of PEFT's, masks. The scale stays what it was.

    layers: by the names that ``pattern`` has. A layer that loses all of them keeps one, with a singular value of zero:
    PEFT's files know no layer of rank 0.
    """
    if pattern is None:
        return
    changes = []
    for name, layer in layers.items():
        mask = pattern[f"{name}.lora_E.{adapter}"]
        if not any(mask):
            mask[0] = True
        keep = torch.tensor(mask, device=layer.lora_E[adapter].device)
        if bool(keep.all()):
            continue
        for part in _PARTS:
            old = getattr(layer, part)[adapter]

            def chosen(t: torch.Tensor, keep: torch.Tensor = keep, columns: bool = part == "lora_B") -> torch.Tensor:
                return t[:, keep] if columns else t[keep]

            new = nn.Parameter(chosen(old.detach()).contiguous(), old.requires_grad)
            getattr(layer, part)[adapter] = new
            changes.append(Change(old, new, chosen, chosen))
        layer.r[adapter] = sum(mask)
    if optimizer is not None:
        move_state(optimizer, changes)
