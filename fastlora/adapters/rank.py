"""Ranks that change while an adapter is trained: parameters and the optimizer's moments are truly resized.

Growing by new rows leaves the layer's function as it is: their A is random, their B zero, the scale is kept. Shrinking
from R to r keeps the closest matrix of rank r to B A (the truncated singular value decomposition):

    A' = T_a A,   B' = B T_b,   B' A' = svd_r(B A)

The gradients of the new factors are dA' = T_b^T dA and dB' = dB T_a^T, and so the first moments of an optimizer are
turned; its second moments by the squares of the same numbers, as for gradients that do not correlate.

`RankController` follows the validation loss: a loss that stops falling asks for more rank, one that falls easily needs
less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.adapters.variant import require_layers

_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg", "state1")
"""Names under which optimizers keep first moments, bitsandbytes' last."""
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum", "state2")
"""Names under which they keep second moments."""
_ONLY_SQUARES = ("adagrad", "rmsprop")
"""bitsandbytes' optimizers whose first and only state is a second moment."""

Turn = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """A parameter in place of another, and how what an optimizer knows of the old one becomes that of the new one."""

    old: nn.Parameter
    new: nn.Parameter
    moment: Turn
    square: Turn


def move_state(optimizer: Any, changes: list[Change]) -> None:
    """Put the new parameters where the old ones were in ``optimizer``, PyTorch's or accelerate's, moments included.

    A state that is quantized, or of which it is not known how it turns, begins anew for these parameters.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    squares: tuple[str, ...] = _SQUARES
    if getattr(optimizer, "optimizer_name", None) in _ONLY_SQUARES:
        squares = (*_SQUARES, "state1")
    by_id = {id(change.old): change for change in changes}
    for group in optimizer.param_groups:
        group["params"] = [by_id[id(p)].new if id(p) in by_id else p for p in group["params"]]
    for change in changes:
        state = optimizer.state.pop(change.old, None)
        if state is None:
            continue
        turned = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                known = name in squares or name in _MOMENTS
                if value.shape != change.old.shape or not value.is_floating_point() or not known:
                    break
                turned[name] = (change.square if name in squares else change.moment)(value).contiguous()
            else:
                turned[name] = value
        else:
            optimizer.state[change.new] = turned


def _parts(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def replace(
    layer: Any,
    adapter: str,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    turns: tuple[Turn, Turn, Turn, Turn] = (torch.zeros_like,) * 4,
) -> list[Change]:
    """Give ``adapter`` new factors; ``turns``: of the moments of A, its squares, the moments of B, its squares."""
    changes = []
    for part, t, moment, square in (("lora_A", lora_a, *turns[:2]), ("lora_B", lora_b, *turns[2:])):
        module = getattr(layer, part)[adapter]
        old = module.weight
        module.weight = nn.Parameter(t.to(old.dtype).contiguous(), old.requires_grad)
        changes.append(Change(old, module.weight, moment, square))
    r = lora_a.shape[0]
    layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = layer.r[adapter] = r
    return changes


def set_scale(layer: Any, adapter: str, scale: float) -> None:
    """Set what the product of A and B is multiplied by, and the lora_alpha that gives it at the present rank."""
    r = layer.r[adapter]
    rslora = layer.use_rslora[adapter] if isinstance(layer.use_rslora, dict) else layer.use_rslora
    layer.scaling[adapter] = scale
    layer.lora_alpha[adapter] = scale * (math.sqrt(r) if rslora else r)


@torch.no_grad()
def select(layer: Any, adapter: str, rows: torch.Tensor) -> list[Change]:
    """Keep these rows of A and columns of B, and their moments, exactly."""
    lora_a, lora_b = _parts(layer, adapter)

    def of_a(t: torch.Tensor) -> torch.Tensor:
        return t[rows]

    def of_b(t: torch.Tensor) -> torch.Tensor:
        return t[:, rows]

    return replace(layer, adapter, lora_a[rows], lora_b[:, rows], (of_a, of_a, of_b, of_b))


@torch.no_grad()
def shrink(layer: Any, adapter: str, rank: int) -> list[Change]:
    """Keep the best approximation of B A of rank ``rank``, in factors of equal singular values."""
    lora_a, lora_b = _parts(layer, adapter)
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    a, b = lora_a.to(wide), lora_b.to(wide)
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    if s.numel() < rank or not bool(
        s[0] > 0
    ):  # nothing was learned, or more rank than the layer has: no direction leads
        return select(layer, adapter, torch.arange(rank, device=a.device))
    # Directions without content keep a row of A and no column of B, as new ones have: both zero would never learn.
    empty = s <= s[0] * torch.finfo(wide).eps * max(a.shape[1], b.shape[0])
    root = s.sqrt()
    root_a = torch.where(empty, a.norm() / math.sqrt(a.shape[0]), root)
    root_b = torch.where(empty, 0, root)
    turn_a = root_a[:, None] * (vt @ torch.linalg.pinv(ra.T))  # (r, R)
    turn_b = (torch.linalg.pinv(rb) @ u) * root_b  # (R, r)

    def turns(left: torch.Tensor) -> tuple[Turn, Turn]:
        def moment(t: torch.Tensor) -> torch.Tensor:
            return (left @ t.to(left.dtype)).to(t.dtype)

        def square(t: torch.Tensor) -> torch.Tensor:
            return (left.square() @ t.to(left.dtype)).to(t.dtype)

        return moment, square

    of_a = turns(turn_b.T)
    of_b = tuple(lambda t, f=f: f(t.T).T for f in turns(turn_a))
    new_a, new_b = root_a[:, None] * (vt @ qa.T), (qb @ u) * root_b
    return replace(layer, adapter, new_a, new_b, (*of_a, *of_b))  # type: ignore[arg-type]


@torch.no_grad()
def grow(layer: Any, adapter: str, rank: int) -> list[Change]:
    """Add rows of A, drawn as LoRA draws them, and zero columns of B, with moments of zero."""
    lora_a, lora_b = _parts(layer, adapter)
    more = rank - lora_a.shape[0]
    rows = torch.empty(more, lora_a.shape[1], dtype=torch.float32, device=lora_a.device)
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    def of_a(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t, t.new_zeros(more, t.shape[1])))

    def of_b(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t, t.new_zeros(t.shape[0], more)), 1)

    new_a = torch.cat((lora_a, rows.to(lora_a.dtype)))
    return replace(layer, adapter, new_a, of_b(lora_b), (of_a, of_a, of_b, of_b))


def resize(model: nn.Module, rank: int, optimizer: Any = None, adapter: str = "default") -> int:
    """Give ``adapter`` of every LoRA layer the rank ``rank``, keeping the scale. Returns how many layers changed.

    The parameters are new objects; those of ``optimizer``, PyTorch's or accelerate's, change with them. Gradients are
    dropped. Raises ValueError for a rank below 1, for a model wrapped for data parallelism and for layers that a
    variant of LoRA computes.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("DistributedDataParallel cannot follow parameters that change: resize before wrapping")
    layers = require_layers(model, adapter)
    for name, layer in layers:
        if adapter in layer.lora_variant:
            kind = type(layer.lora_variant[adapter]).__name__
            raise ValueError(f"{name}: an adapter of the kind {kind} cannot change its rank")
    changes, changed = [], 0
    for _, layer in layers:
        scale, present = layer.scaling[adapter], layer.lora_A[adapter].weight.shape[0]
        if present != rank:
            changes += (shrink if rank < present else grow)(layer, adapter, rank)
            set_scale(layer, adapter, scale)
            changed += 1
    if optimizer is not None:
        move_state(optimizer, changes)
    write_config(model, adapter)
    return changed


def write_config(model: Any, adapter: str = "default") -> None:
    """Let a PEFT model's configuration, which is saved, say the rank and lora_alpha that its layers have."""
    config = getattr(model, "peft_config", {}).get(adapter)
    if config is None:
        return
    layers = require_layers(model, adapter)
    ranks = {name: layer.r[adapter] for name, layer in layers}
    alphas = {name: layer.lora_alpha[adapter] for name, layer in layers}
    config.r, config.lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config.rank_pattern = _exceptions(ranks, config.r)
    config.alpha_pattern = _exceptions(alphas, config.lora_alpha)


def _exceptions(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    return {name.removeprefix("base_model.model."): v for name, v in values.items() if v != usual}


@dataclasses.dataclass
class RankController:
    """A rank that follows the validation loss.

    After ``patience`` evaluations in a row that each improve the loss by less than the share ``grow_below``, the rank
    is multiplied by ``factor``; after as many that each improve it by more than ``shrink_above``, it is divided.
    Between the two nothing happens (hysteresis). The evaluation after a change is not counted. A smaller rank whose
    loss does not come back to what it was within ``patience`` evaluations is undone, and is from then on the limit
    below which the rank does not go; a larger one that brought no improvement is the limit above.
    """

    rank: int
    min_rank: int = 1
    max_rank: int = 256
    grow_below: float = 0.002
    shrink_above: float = 0.02
    patience: int = 2
    factor: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.min_rank <= self.rank <= self.max_rank:
            raise ValueError(
                "ranks must satisfy 1 <= min_rank <= rank <= max_rank, "
                f"got {self.min_rank}, {self.rank}, {self.max_rank}"
            )
        if not 0 <= self.grow_below < self.shrink_above:
            raise ValueError(
                f"grow_below must be less than shrink_above, got {self.grow_below} and {self.shrink_above}"
            )
        if self.patience < 1 or self.factor < 2:
            raise ValueError(f"patience must be 1 or more and factor 2 or more, got {self.patience} and {self.factor}")
        self._floor, self._ceiling = self.min_rank, self.max_rank
        self._last: float | None = None
        self._slow = self._fast = self._since = 0
        self._before: tuple[int, float] | None = None
        """Rank and loss before the last change, until that has proved itself."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def update(self, loss: float) -> int | None:
        """Take the loss of an evaluation; the rank to change to, or None to stay.

        Raises ValueError for a loss that is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss is {loss}: lower the learning rate")
        last, self._last = self._last, loss
        if last is None:
            return None
        self._since += 1
        if self._before is not None:
            undone = self._judge(*self._before, loss)
            if undone is not None:
                return self._change(undone, loss, proved=True)
        if self._since == 1 and self._before is not None:
            return None
        gain = (last - loss) / abs(last) if last else 0.0
        self._slow = self._slow + 1 if gain < self.grow_below else 0
        self._fast = self._fast + 1 if gain > self.shrink_above else 0
        if self._slow >= self.patience:
            return self._change(min(self.rank * self.factor, self._ceiling), loss)
        if self._fast >= self.patience:
            return self._change(max(self.rank // self.factor, self._floor), loss)
        return None

    def _judge(self, rank: int, before: float, loss: float) -> int | None:
        """The rank to go back to, when the last change has failed to prove itself in time."""
        smaller = self.rank < rank
        proved = loss <= before if smaller else before - loss > self.grow_below * abs(before)
        if proved:
            self._before = None
        elif self._since >= self.patience:
            if smaller:
                self._floor = rank
                return rank
            self._ceiling = self.rank
            self._before = None
        return None

    def _change(self, rank: int, loss: float, proved: bool = False) -> int | None:
        self._slow = self._fast = 0
        if rank == self.rank:
            return None
        self._before = None if proved else (self.rank, loss)
        self._since = 0
        self.rank = rank
        return rank
