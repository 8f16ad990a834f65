"""What a training step will need of the GPU's memory, without a GPU: ``fastlora explain --model CONFIG``.

The step runs on PyTorch's meta device, where tensors have shapes and lifetimes but no values: what is saved for the
backward pass, and when it is freed, is what the real step saves and frees. Inside fused operators nothing is seen; what
they allocate for a moment, a dense base weight, is added.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastlora import decoded, recomputed
from fastlora.linear import NF4Linear, to_linear4bit
from fastlora.nf4 import NF4Weight
from fastlora.training import model as models
from fastlora.training.step import checkpoint_blocks

_GRAIN = 512
"""Bytes: PyTorch's allocator rounds every request up to a multiple."""
LIBRARIES = 2 * 32 * 2**20
"""Bytes of cuBLAS's workspaces on a Hopper GPU, which PyTorch allocates too."""
_FUSED_ATTENTION = "fastlora_meta"


def size_of(nbytes: int) -> int:
    """What the allocator takes for a tensor of so many bytes."""
    return -(-nbytes // _GRAIN) * _GRAIN


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators made and that still live, on whatever device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak = ""
        """What `phase` was when the most was alive."""
        self.phase = ""
        self._known: dict[int, int] = {}

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        """Do not count what is there before the step."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = 0

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = size_of(storage.nbytes())
        weakref.finalize(storage, self._forget, key)
        self.need(self._known[key])
        self.now += self._known[key]

    def need(self, nbytes: int) -> None:
        """Count bytes that are there for a moment only."""
        if self.now + nbytes > self.peak:
            self.peak, self.at_peak = self.now + nbytes, self.phase

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # a question about values, such as whether a mask is all ones
        self.need(_inside(func, args))
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return out


def _inside(func: Any, args: Any) -> int:
    """Bytes of the dense base weight that a fused operator decodes while it runs."""
    if func.namespace != "fastlora":
        return 0
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False))
    n, k = values.get("n"), values.get("k")
    if not isinstance(n, int) or not isinstance(k, int) or values.get("quant_type") is None:
        return 0
    x = next(value for value in args if isinstance(value, torch.Tensor))
    return size_of(n * k * x.element_size())


def _flash(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Attention as a GPU's fused kernel saves for it: q, k, v, the output and a float32 per row."""
    scaling = kwargs.get("scaling")
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, 0.0, True, scale=scaling)[0].transpose(1, 2).contiguous(), None


class _GatedMLP(torch.autograd.Function):
    """What the node of a fused gated MLP allocates and keeps; compilers and dispatch modes only see single layers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, widths: tuple[int, int, int], *parameters: torch.Tensor) -> torch.Tensor:
        rows, (k, middle, n) = x.numel() // x.shape[-1], widths
        dense = x.new_empty(2 * middle, k)
        gate, up = x.new_empty(rows, middle), x.new_empty(rows, middle)
        if recomputed.running():
            recomputed.hand_over(gate, dense)
        del dense
        u = [x.new_empty(rows, a.shape[0]) for a in parameters[::2]]
        h, dense = x.new_empty(rows, middle), x.new_empty(n, middle)
        ctx.save_for_backward(x, gate, up, *u, *parameters)
        ctx.widths = widths
        del h, dense
        return x.new_empty(*x.shape[:-1], n)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, gate, _, *rest = ctx.saved_tensors
        k, middle, n = ctx.widths
        kept = recomputed.take(gate)
        dense = dy.new_empty(n, middle)
        dh = torch.empty_like(gate)  # the gradients of gate and up take the place of their values, h that of dh
        del dense
        grads = [torch.empty_like(p) for p in rest[len(rest) // 3 :]]
        del dh
        dense, dx = dy.new_empty(2 * middle, k) if kept is None else kept, torch.empty_like(x)
        del dense, kept
        return dx, None, *grads


class _AddNorm(torch.autograd.Function):
    """What the node of a sum and its norm allocates and keeps."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Any:
        h = x.detach() if residual is None else torch.empty_like(x)
        ctx.save_for_backward(h, weight, x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32))
        ctx.summed = residual is not None
        return h, torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor, dy: torch.Tensor) -> Any:
        dx = torch.empty_like(ctx.saved_tensors[0])
        return dx, dx if ctx.summed else None, None


def _added(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out: tuple[torch.Tensor, torch.Tensor] = _AddNorm.apply(x, residual, weight)
    return out


def _stand_in(mlp: Any) -> None:
    """Let a fused MLP allocate on the meta device what its node does elsewhere."""
    names = [name for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") if name in mlp._modules]
    layers = [mlp._modules[name] for name in names]
    down = layers[-1]
    widths = (layers[0].in_features, down.in_features, down.out_features)
    parameters = [
        part[adapter].weight
        for layer in layers
        for adapter in layer.active_adapters
        for part in (layer.lora_A, layer.lora_B)
    ]
    mlp.forward = lambda x: _GatedMLP.apply(x, widths, *parameters)


def _is_fused_mlp(module: nn.Module) -> bool:
    """Whether `fastlora.accelerate` gave a module with a down projection another class."""
    return hasattr(type(module), "stock") and "down_proj" in module._modules


def meta_model(
    config: Any,
    *,
    r: int,
    quantized: bool = True,
    blocks: bool = False,
    chunked_loss: bool = False,
    decoded_memory: float = 0.0,
) -> Any:
    """The fused PEFT model of a transformers configuration, without a byte of memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import fastlora

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.config.use_cache = False
    head = model.get_output_embeddings()
    for name, dense in list(model.named_modules()):
        if quantized and type(dense) is nn.Linear and dense is not head:
            shape = (dense.out_features, dense.in_features)
            empty = NF4Weight.empty(shape, nested=True, dtype=torch.bfloat16, device="meta")
            model.set_submodule(name, to_linear4bit(NF4Linear(empty, dense.bias)).requires_grad_(False))
    model.is_loaded_in_4bit = quantized
    if model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(_FUSED_ATTENTION, _flash)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_FUSED_ATTENTION, lambda *args, **kwargs: None)
        model.config._attn_implementation = _FUSED_ATTENTION
    lora = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora, low_cpu_mem_usage=True).train()
    fastlora.accelerate(adapted, blocks=blocks, loss=chunked_loss, decoded=decoded_memory)
    for module in adapted.modules():
        if _is_fused_mlp(module):
            _stand_in(module)
        if hasattr(type(module), "added"):
            # Compilers and dispatch modes see PyTorch's operators instead.
            module.__dict__["added"] = _added
    return adapted


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes of one training step in bf16 with AdamW, when everything that a step keeps is there."""

    packed: int
    """Packed base weights."""
    statistics: int
    """Their block statistics."""
    copies: int
    """Packed weights that are kept dense as well."""
    dense: int
    """Embeddings, head, norms, buffers."""
    adapters: int
    gradients: int
    optimizer: int
    batch: int
    activations: tuple[int, ...]
    """Kept for the backward pass by each decoder block."""
    rest: int
    """Kept before the first of them."""
    loss: int
    """Logits and loss, at their most, during the forward pass."""
    transient: int
    """At the peak, beyond what the blocks keep; gradients of adapters that are there by then are among it."""
    peak: int
    at_peak: str
    libraries: int = LIBRARIES

    @property
    def fixed(self) -> int:
        """There during the whole step, the adapters' gradients not counted."""
        return self.packed + self.statistics + self.copies + self.dense + self.adapters + self.optimizer + self.batch

    def table(self) -> str:
        """The parts as aligned text, in MiB."""
        blocks = self.activations
        rows = [
            ("packed base weights", self.packed),
            ("statistics of the blocks of weights", self.statistics),
            *([("packed weights that are kept dense", self.copies)] if self.copies else []),
            ("embeddings, head, norms", self.dense),
            ("adapters", self.adapters),
            ("optimizer (two moments of each adapter)", self.optimizer),
            (f"activations kept, {len(blocks)} blocks of {statistics.median(blocks) / 2**20:,.1f} MiB", sum(blocks)),
            ("activations kept before the blocks", self.rest),
            (f"on top of what is kept, at the peak: {self.at_peak}", self.transient),
            ("workspaces of libraries", self.libraries),
            ("peak", self.peak),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {nbytes / 2**20:>10,.1f} MiB" for name, nbytes in rows]
        logits = f"logits and loss take {self.loss / 2**20:,.1f} MiB in the forward pass"
        return "\n".join([*lines, f"{logits}; the peak is {self.peak / 2**30:.2f} GiB"])


def _bytes(tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> int:
    """What distinct tensors take together."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size_of(nbytes) for nbytes in storages.values())


def _states(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that the model holds, with what it is."""
    for _, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            state = getattr(tensor, "quant_state", None)
            if state is None:
                yield ("adapters" if tensor.requires_grad else "dense"), tensor
                continue
            yield "packed", tensor
            weight = NF4Weight.from_bitsandbytes(tensor, state)
            copy = decoded.find([weight], weight.dtype)
            if copy is not None:
                yield "copies", copy
            for part in weight.tensors().values():
                if part is not None and part.untyped_storage()._cdata != tensor.untyped_storage()._cdata:
                    yield "statistics", part


def _decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


@dataclasses.dataclass
class Step:
    """What lived during one step, in bytes, without what was there before it."""

    peak: int = 0
    at_peak: str = ""
    blocks: tuple[int, ...] = ()
    """Kept for the backward pass by each decoder block."""
    before: int = 0
    """Kept before the first block."""
    kept: int = 0
    """Kept when the head begins."""
    loss: int = 0
    """Beyond that, at the most, until the forward pass ends."""


def step(model: Any, ids: torch.Tensor, autocast: bool = False) -> Step:
    """Count what lives during forward and backward of a PEFT model on ``ids``, which may be on any device.

    autocast: compute in bfloat16 where tensors are wider.
    """
    live, started, found = Live(), [], Step()
    live.ignore(tensor for _, tensor in _states(model))
    live.ignore(iter([ids]))
    blocks = _decoder_blocks(model)
    number = {block: i for i, block in enumerate(blocks)}

    def enter(block: nn.Module, *_: Any) -> None:
        # A checkpointed block comes again in the backward pass.
        live.phase = f"backward of block {number[block]}" if found.loss else f"block {number[block]}"
        started.append(live.now)

    def end(*_: Any) -> None:
        found.kept, live.phase = live.now, "logits and loss"

    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    inner = model.get_base_model()
    # Not on the head, which a fused loss does not call.
    handles.append(getattr(inner, inner.base_model_prefix).register_forward_hook(end))
    context = torch.autocast(ids.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    try:
        with live, context:
            loss = model(input_ids=ids, labels=ids).loss
            before_loss, live.phase = live.peak, "backward"
        # The peak so far may have been inside of a block.
        found.loss = max(before_loss - found.kept, 1)
        with live:
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    edges = [*started[: len(blocks)], found.kept]
    found.blocks = tuple(b - a for a, b in itertools.pairwise(edges))
    found.before, found.peak, found.at_peak = edges[0], live.peak, live.at_peak
    return found


def predict(
    config: Any,
    batch: int,
    length: int,
    *,
    r: int = 16,
    checkpointing: bool = False,
    quantized: bool = True,
    blocks: bool = False,
    chunked_loss: bool = False,
    kept_blocks: int = 0,
    decoded_memory: float = 0.0,
    eight_bit_optimizer: bool = False,
) -> Prediction:
    """The memory of a training step of a transformers configuration on ``batch`` sequences of ``length`` tokens.

    chunked_loss: head and loss by `fastlora.loss`. kept_blocks: with ``checkpointing``, the last so many blocks are not
    computed again. decoded_memory: GiB for dense copies of packed weights. Raises UserError for an encoder, and for
    more tokens than the model has positions.
    """
    models.check_causal(config, getattr(config, "name_or_path", "") or "it")
    model = meta_model(
        config, r=r, quantized=quantized, blocks=blocks, chunked_loss=chunked_loss, decoded_memory=decoded_memory
    )
    models.check_length(model, length, "seq")
    if checkpointing:
        checkpoint_blocks(model.get_base_model(), keep=kept_blocks)
    return predict_model(model, batch, length, eight_bit_optimizer=eight_bit_optimizer)


def predict_model(model: Any, batch: int, length: int, *, eight_bit_optimizer: bool = False) -> Prediction:
    """The same of a model that is on the meta device."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    kinds: dict[str, list[torch.Tensor]] = {"packed": [], "statistics": [], "copies": [], "dense": [], "adapters": []}
    for kind, tensor in _states(model):
        kinds[kind].append(tensor)
    sizes = {kind: _bytes(tensors) for kind, tensors in kinds.items()}
    moments = sizes["adapters"] // 2 if eight_bit_optimizer else 2 * sizes["adapters"]
    found = step(model, ids)
    static = sum(sizes.values()) + moments + size_of(ids.nbytes)
    return Prediction(
        **sizes,
        gradients=sizes["adapters"],
        optimizer=moments,
        batch=size_of(ids.nbytes),
        activations=found.blocks,
        rest=found.before,
        loss=found.loss,
        transient=found.peak - found.kept,
        peak=static + found.peak + LIBRARIES,
        at_peak=found.at_peak,
    )
