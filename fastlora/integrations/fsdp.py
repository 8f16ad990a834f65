"""QLoRA models over several processes with PyTorch's FSDP2: each holds a share of the frozen base, gathered a block at
a time.

Only bytes travel: the packed weights of a block with its norms, in one collective. They are stored as float32 words: in
a 16-bit type PyTorch's copy into the collective (``torch._foreach_copy_``, on CUDA) goes through float32 and rewrites
words that are NaN, one in 256. The statistics of the 4-bit weights (3 % of them where they are nested) stay whole in
every process, and so do the adapters unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from fastlora.integrations.inner import inner_model
from fastlora.linear import NF4Linear
from fastlora.nf4 import NF4Weight

Adapters = Literal["replicated", "sharded"]
_WORD = torch.float32
"""What packed bytes are stored as."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model, under whatever wrappers, in the order of their names.

    They are those that the model says must not be split. PEFT's own policy for wrapping names trained layers instead,
    of which FSDP2 can make nothing. Without such names the longest list of modules of one class counts. Raises
    ValueError where there is none.
    """
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
        found = max(lists, key=len, default=[])
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of blocks that could be sharded one by one")
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


def store_as_words(model: nn.Module) -> int:
    """Let the packed bytes of bitsandbytes' layers be read as float32, without copying them; returns how many were.

    What is no whole number of words stays as it is.
    """
    count = 0
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is None or weight.dtype == _WORD:
            continue
        packed = NF4Weight.from_bitsandbytes(weight, state)
        if packed.w_packed.numel() % _WORD.itemsize:
            continue
        stored = packed.to_bitsandbytes(_WORD)
        stored.quant_state, stored.module = state, module
        layer: Any = module
        layer.weight, layer.quant_state, layer.quant_storage = stored, state, _WORD
        count += 1
    return count


def shard(
    model: nn.Module,
    mesh: Any = None,
    *,
    adapters: Adapters = "replicated",
    reshard: bool = True,
    prefetch: int = 1,
) -> list[nn.Module]:
    """Shard the frozen parameters of a PEFT model over the processes of ``mesh``, in place. Returns its blocks.

    Every block is a unit: gathered before its forward and its backward pass, freed after each; input embeddings are a
    unit of their own, head and last norm stay gathered through the pass. A block that is on the CPU moves to the
    device of ``mesh`` just before it is sharded, so that a model need not fit one GPU.

    mesh: one-dimensional, by default all processes of the default process group. adapters: "replicated" leaves all
    that is trained out, for `torch.nn.parallel.DistributedDataParallel` or the caller to average the gradients of;
    "sharded" makes the trained parameters, their gradients and their optimizer's state DTensors. reshard: whether
    blocks are freed after their forward pass; without, they are gathered once in a step. prefetch: blocks that are
    gathered ahead. Packed bytes are stored as float32; a weight that is no whole number of such words stays whole.

    Raises ValueError for a model without blocks, RuntimeError before the process group is there.
    """
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    if adapters not in ("replicated", "sharded"):
        raise ValueError(f"adapters must be replicated or sharded, got {adapters!r}")
    if mesh is None:
        if not distributed.is_initialized():
            raise RuntimeError("sharding needs a process group: start the processes with torchrun")
        kind = "cuda" if "nccl" in distributed.get_backend_config() else "cpu"
        mesh = distributed.init_device_mesh(kind, (distributed.get_world_size(),))
    device = torch.device("cpu")
    if mesh.device_type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    blocks: list[Any] = decoder_layers(model)
    trained = {p for p in model.parameters() if p.requires_grad} if adapters == "replicated" else set()

    def split(module: nn.Module, again: bool) -> None:
        module.to(device)
        store_as_words(module)
        odd = {p for p in module.parameters() if getattr(p, "quant_state", None) and p.dtype != _WORD}
        for part in module.modules():  # what is kept for a layer would keep all of its bytes
            part.__dict__.pop("fastlora_weight", None)
        fully_shard(module, mesh=mesh, reshard_after_forward=again, ignored_params=(trained | odd) or None)

    embeddings = _own_embeddings(model)
    for block in blocks:
        split(block, reshard)
    if embeddings is not None:
        split(embeddings, True)
    split(model, False)
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - prefetch) : i][::-1])
    return blocks


def _own_embeddings(model: Any) -> nn.Module | None:
    """The input embeddings, where no other module has the same weight."""
    inner = inner_model(model)
    table = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    if type(table) is not nn.Embedding:
        return None
    owners = sum(any(p is table.weight for p in m._parameters.values()) for m in model.modules())
    return table if owners == 1 else None


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the frozen base that this process holds, with its name: shares of what is sharded, buffers, and
    the statistics of 4-bit weights."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            yield name, p.to_local() if hasattr(p, "to_local") else p.data
    for name, buffer in model.named_buffers():
        yield name, buffer
    for name, module in model.named_modules():
        state = getattr(module, "quant_state", None)
        if state is not None and not isinstance(module, NF4Linear):
            for key, t in statistics(state).items():
                yield f"{name}.{key}", t


def statistics(state: Any) -> dict[str, torch.Tensor]:
    """The tensors of a bitsandbytes ``QuantState``, without its tables of codes, which are the same for all."""
    found = {"absmax": state.absmax}
    if state.state2 is not None:
        found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return found


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen base that this process holds."""
    return sum(t.numel() * t.element_size() for _, t in frozen_tensors(model))


def replicate(model: nn.Module, device: torch.device, **options: Any) -> nn.Module:
    """``model`` in DistributedDataParallel, which averages the gradients of what is trained and looks at nothing else.

    The frozen base, sharded or not, is taken to be the same in every process: it is neither compared nor broadcast.
    options: of DistributedDataParallel.
    """
    from torch.nn.parallel import DistributedDataParallel

    names = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": False, **options}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)
