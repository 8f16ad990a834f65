"""The head and the cross-entropy of a causal language model in one node that never holds all logits.

Found by what the model's forward does, not by its name: run once on a stand-in, it has to hand the head's logits of the
last hidden states, capped as the configuration says or as they are, to the loss function. Then, in training with
labels, the same is computed by `fastlora.loss`, and the output has no logits. In any other situation the model's
own forward runs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
from typing import Any

import torch
from torch import nn

from fastlora import ops
from fastlora.integrations.converted import (
    REPLACED,
    Converted,
    become,
    does_more,
    make_class,
    replaced,
    while_converted,
)
from fastlora.integrations.inner import inner_model
from fastlora.loss import linear_cross_entropy

_IGNORED = -100
HEAD = "lm_head"


class FusedLoss(Converted):
    """The forward of a converted language model."""

    output: type
    """What its own forward returns."""
    softcap: bool
    """Whether the logits are capped, as the configuration says."""

    @while_converted
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs if not args else _bound(self.stock, self, args, kwargs)
        if not _fusible(self, given):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        inner = {name: value for name, value in given.items() if name not in ("labels", "logits_to_keep")}
        outputs = getattr(self, self.base_model_prefix)(**inner)
        head = self._modules[HEAD]
        # The head may lie on another device than the last layer.
        hidden, labels = outputs.last_hidden_state.to(head.weight.device), given.get("shift_labels")
        ignored = given.get("ignore_index", _IGNORED)
        if labels is None:
            # Tokens before n predict token n.
            labels = nn.functional.pad(given["labels"][..., 1:], (0, 1), value=ignored)
        loss = linear_cross_entropy(
            hidden,
            head.weight,
            labels.to(hidden.device),
            bias=head.bias,
            count=given.get("num_items_in_batch"),
            ignore_index=ignored,
            softcap=self.config.final_logit_softcapping if self.softcap else None,
        )
        rest = (field.name for field in dataclasses.fields(self.output) if field.name not in ("loss", "logits"))
        return self.output(loss=loss, logits=None, **{name: getattr(outputs, name, None) for name in rest})


def _bound(kind: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    named = inspect.signature(kind.forward).bind(model, *args, **kwargs).arguments
    named.pop("self")
    return {**named, **named.pop("kwargs", {})}


def _fusible(model: Any, given: dict[str, Any]) -> bool:
    if not model.training or given.get("labels") is None or given.get("return_dict") is False:
        return False
    kept = given.get("logits_to_keep", 0)
    if not isinstance(kept, int) or kept or torch.compiler.is_compiling() or ops.transformed():
        return False
    return _head_reason(model) is None and _loss_reason(model) is None


def _loss_reason(model: Any) -> str | None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return None if model.loss_function is ForCausalLMLoss else "its loss function is not the one of causal models"


def _head_reason(model: Any) -> str | None:
    head = model._modules.get(HEAD)
    if type(head) is not nn.Linear or does_more(head):
        return f"{HEAD} is no plain linear layer"
    if not head.weight.is_floating_point():
        return f"the weight of {HEAD} is packed"
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return f"{HEAD} has hooks"
    return None


@functools.cache
def _fused(stock: Any, output: type, softcap: bool) -> type:
    # Trainers and generation read from the signature what a model takes.
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedLoss.forward(self, *args, **kwargs)

    return make_class(
        FusedLoss, stock, (_fused, stock, output, softcap), output=output, softcap=softcap, forward=forward
    )


def _recognize(model: Any) -> str | tuple[type, bool]:
    """The type of what the model's forward returns and whether it caps its logits, or why it is not the known one.

    The forward is run on a stand-in that has the model's configuration, an inner model that returns given states and
    a loss function that tells its arguments.
    """
    kind, prefix = type(model), getattr(model, "base_model_prefix", "")
    hidden = torch.linspace(-1, 1, 24, dtype=torch.float64, device="cpu").view(1, 4, 6)
    matrix = torch.linspace(-3, 2, 42, dtype=torch.float64, device="cpu").view(7, 6).sin()
    labels = torch.tensor([[3, 1, 6, 0]], device="cpu")
    told: dict[str, Any] = {}

    def loss_function(logits: Any = None, labels: Any = None, vocab_size: Any = None, **kwargs: Any) -> Any:
        told.update(logits=logits, labels=labels, kwargs=kwargs)
        return logits.sum()

    def inner(**kwargs: Any) -> Any:
        return types.SimpleNamespace(
            last_hidden_state=hidden, past_key_values=None, hidden_states=None, attentions=None, kwargs=kwargs
        )

    stand_in = types.SimpleNamespace(
        config=copy.deepcopy(model.config),
        vocab_size=7,
        training=True,
        loss_function=loss_function,
        **{prefix: inner, HEAD: lambda t: t @ matrix.T},
    )
    try:
        out: Any = kind.forward(stand_in, input_ids=torch.zeros_like(labels), labels=labels)
    except Exception as error:  # whatever it raises, it needs more than the formula has
        return f"the forward of {kind.__name__} is another: {error}"
    logits = told.get("logits")
    if not dataclasses.is_dataclass(out) or logits is None or told["labels"] is not labels:
        return f"the forward of {kind.__name__} does not end with a loss of logits and labels"
    made = getattr(out, "loss", None)
    if made is None or not torch.equal(made, logits.sum()):
        return f"the forward of {kind.__name__} adds to its loss"
    plain, cap = hidden @ matrix.T, getattr(model.config, "final_logit_softcapping", None)
    for softcap, expected in ((False, plain), (True, None if cap is None else cap * torch.tanh(plain / cap))):
        if expected is not None and logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-9):
            return type(out), softcap
    return f"the forward of {kind.__name__} changes its logits"


def reason(model: nn.Module) -> str | None:
    """Why the loss of a model cannot be fused, or None."""
    base = inner_model(model)
    if isinstance(base, FusedLoss):
        return None
    if not hasattr(base, "loss_function") or not hasattr(base, "config"):
        return f"{type(base).__name__} is no transformers model with a loss"
    if replaced(base):
        return REPLACED
    found = _head_reason(base) or _loss_reason(base)
    if found is not None:
        return found
    recognized = _recognize(base)
    return recognized if isinstance(recognized, str) else None


def fuse(model: nn.Module) -> None:
    """Have a model whose `reason` is None compute its loss in chunks. Calling it again is harmless."""
    base: Any = inner_model(model)
    if isinstance(base, FusedLoss):
        return
    recognized = _recognize(base)
    assert not isinstance(recognized, str)
    kind: Any = type(base)
    become(base, _fused(kind, *recognized))


def undo(model: nn.Module) -> None:
    """Take back what `fuse` did, if it did anything."""
    base: Any = inner_model(model)
    if isinstance(base, FusedLoss):
        become(base, base.stock)
