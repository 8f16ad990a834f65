"""Fused layers in place of PEFT's: ``fastlora.accelerate(model)`` and ``fastlora.restore(model)``, or, from the start,
``get_peft_model(model, register(config))`` and ``with fused():``.

A layer is converted by changing its class to a subclass of its own: parameters, optimizer references, hooks, buffers
and state-dict names stay the same objects, and every PEFT method goes on working. Only ``forward`` differs, and only
where the fused operator computes what PEFT would; in any other situation PEFT's own forward runs.

    situation.py   what a layer is to compute at the moment, or why PEFT's forward runs
    forward.py     several adapters at once, mixed batches, DoRA
    layers.py      the fused classes
    blocks.py      layers that compute together
    norms.py       norms, and the residual stream of a decoder layer
    liger.py       Liger kernels for what is not a linear layer
    rotary.py      the rotary embedding of q and k
    loss.py        the head and the cross-entropy in one node
    methods.py     those of VeRA and AdaLoRA
    report.py      what became of each layer
    merging.py     merging that keeps what was learned
    convert.py     accelerate, restore, register, fused
"""

try:
    import peft as _peft  # noqa: F401
except ImportError as error:
    raise ImportError("fastlora.accelerate needs PEFT: pip install 'fastlora-kernels[train]'") from error

from fastlora.integrations.peft.convert import accelerate, fused, register, restore, unregister
from fastlora.integrations.peft.layers import FUSED
from fastlora.integrations.peft.merging import merge
from fastlora.integrations.peft.methods import FusedAdaLora as _FusedAdaLora  # noqa: F401  (they join FUSED)
from fastlora.integrations.peft.report import BlockReport, LayerReport, Report

__all__ = [
    "FUSED",
    "BlockReport",
    "LayerReport",
    "Report",
    "accelerate",
    "fused",
    "merge",
    "register",
    "restore",
    "unregister",
]
