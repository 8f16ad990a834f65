"""Training over several processes, started by ``torchrun`` or ``accelerate launch``: which kind of parallelism, what is
refused, who prints and writes, what happens when a process dies."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fastlora.training import durable
from fastlora.training.config import TrainConfig, uses_trl
from fastlora.training.errors import EXIT_LOST, UserError, first_line

T = TypeVar("T")
SHARDS = "optimizer"
"""The folder of a checkpoint that every process writes its share of."""
SCHEDULE = "schedule.safetensors"
_TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others: the first of them may tokenize the data alone."""
_FSDP_METHODS = ("lora", "lora-fa", "lora-plus", "dora")
_ACCELERATE = "ACCELERATE_USE_FSDP"
_TRUE = ("1", "true", "yes", "on")


class RankError(UserError):
    """An error of one process, which prints it itself."""

    alone = True


class LostProcess(RankError):
    """Another process of the run is gone."""

    exit_code = EXIT_LOST


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    kind: Literal["none", "ddp", "fsdp"] = "none"
    """none: one process; ddp: each holds the whole base; fsdp: each holds a share of it."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def environment() -> World:
    """What the launcher's environment variables say of this process; kind none without a launcher."""
    rank = _number("RANK", 0)
    return World("none", rank, _number("LOCAL_RANK", rank), _number("WORLD_SIZE", 1))


def resolve(config: TrainConfig) -> World:
    """The processes of a run of ``config``.

    Raises UserError where the launcher and the configuration disagree, and for what cannot run in several processes.
    """
    found = environment()
    if _flag("ACCELERATE_USE_DEEPSPEED") or "DEEPSPEED_ZERO_STAGE" in os.environ:
        raise UserError(
            "distributed: DeepSpeed is not supported (ZeRO-3 cannot partition 4-bit weights, and a partitioned adapter "
            "is empty when a fused layer reads it): launch with torchrun, or with an accelerate configuration without "
            "DeepSpeed, and set distributed fsdp"
        )
    for name, what in (("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"), ("ACCELERATE_USE_TP", "tensor parallelism")):
        if _flag(name):
            raise UserError(f"distributed: {what} is not supported: set distributed ddp or fsdp, and launch without it")
    wanted = config.distributed
    launched_fsdp = _flag(_ACCELERATE)
    if found.size < 2:
        if wanted != "auto":
            raise UserError(
                f"distributed: {wanted} needs several processes and there is one: start the run with "
                "torchrun --nproc-per-node N -m fastlora.cli train ..., or accelerate launch, or set distributed auto"
            )
        return World()
    if launched_fsdp and wanted == "ddp":
        raise UserError(
            "distributed: ddp is set, but accelerate was told to use FSDP: set distributed fsdp or auto, or launch "
            "with --multi_gpu alone"
        )
    if launched_fsdp and _flag("FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "distributed: the base cannot wait on the CPU (fsdp_offload_params): set it false in accelerate's "
            "configuration; with more GPUs each holds less"
        )
    kind: Literal["ddp", "fsdp"] = "fsdp" if wanted == "fsdp" or launched_fsdp else "ddp"
    world = dataclasses.replace(found, kind=kind)
    _check(config, world)
    return world


def _check(config: TrainConfig, world: World) -> None:
    from fastlora.training import methods

    if config.method in methods.CHANGING:
        raise UserError(f"distributed: {config.method} changes the layers from what one process sees: run one process")
    if config.step != "eager":
        raise UserError(f"distributed: step {config.step} cannot wait for other processes: set step eager")
    if world.kind != "fsdp":
        return
    if config.method not in _FSDP_METHODS:
        raise UserError(
            f"distributed: fsdp shards the base under {', '.join(_FSDP_METHODS)}, not under {config.method}: "
            "set distributed ddp"
        )
    if config.init in methods.STARTS:
        raise UserError(f"distributed: init {config.init} changes base weights, which fsdp shards: set distributed ddp")
    if config.decoded_memory:
        raise UserError("distributed: decoded_memory keeps weights whole, which fsdp shards: set distributed ddp")
    if uses_trl(config):
        raise UserError("distributed: TRL's SFTTrainer wraps the model itself: set trainer transformers for fsdp")


@contextlib.contextmanager
def processes(world: World, on_gpu: bool) -> Iterator[None]:
    """The process group of a run, with one GPU for each process if ``on_gpu``. One that is there already is used.

    Raises RankError where this process has no GPU to itself.
    """
    if world.kind == "none":
        yield
        return
    from torch import distributed

    # The model is sharded here: transformers and accelerate are not to load or wrap it in their own way.
    for name in [name for name in os.environ if name == _ACCELERATE or name.startswith("FSDP_")]:
        del os.environ[name]
    if on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise RankError(
                f"distributed: process {world.local_rank} of this machine has no GPU of its own, "
                f"{torch.cuda.device_count()} are visible: start fewer processes"
            )
        torch.cuda.set_device(world.local_rank)
    mine = not distributed.is_initialized()
    if mine:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        try:
            distributed.init_process_group(backend, timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise RankError(f"distributed: the processes did not find each other ({first_line(error)})") from error
    try:
        yield
    finally:
        if mine and distributed.is_initialized():
            distributed.destroy_process_group()


def on_main(world: World, run: Callable[[], T]) -> T:
    """The result of ``run``, which the first process alone runs; its errors are every process's, and printed once."""
    if world.kind == "none":
        return run()
    from torch import distributed

    found: list[Any] = [None, None]
    original: UserError | None = None
    if world.main:
        try:
            found[0] = run()
        except UserError as failed:
            original, found[1] = failed, (str(failed), failed.exit_code)
    distributed.broadcast_object_list(found, src=0)
    if original is not None:
        raise original
    if found[1] is not None:
        error = UserError(found[1][0])
        error.exit_code = found[1][1]
        raise error
    return found[0]


def main_first(world: World, run: Callable[[], T]) -> T:
    """``run`` in the first process, then in the others: what it caches on disk is made once."""
    mine: list[T] = []
    on_main(world, lambda: mine.append(run()))
    return mine[0] if mine else run()


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is set in any process; all of them must ask."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    together = torch.tensor(int(flag))
    distributed.all_reduce(together, distributed.ReduceOp.MAX)
    return bool(together)


_LOST = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket timeout"),
    *("nccl", "gloo", "process group", "timed out waiting", "recvvalue failed", "remote process exited"),
)


@contextlib.contextmanager
def lost_processes(world: World, how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Turns what a collective raises when another process has died into a `LostProcess` that says how to go on."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        told = str(error).lower()
        if world.kind == "none" or not any(text in told for text in _LOST):
            raise
        raise LostProcess(
            f"process {world.rank} of {world.size}: another process of the run has ended or hangs "
            f"({first_line(error)[:160]}): {how_to_go_on()}"
        ) from error


def fits(base_bytes: int, device: torch.device) -> bool:
    """Whether a model of so many bytes can be loaded on ``device`` as a whole, before it is sharded."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return base_bytes < 0.7 * free


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Leave a share of the frozen base in this process, on ``device``."""
    from torch.distributed import init_device_mesh

    from fastlora.integrations import fsdp

    base: Any = model
    fsdp.shard(model, init_device_mesh(device.type, (world.size,)))
    base.get_base_model().hf_device_map = {"": device}  # accelerate compares it with its own


class DistributedTrainer:
    """Mix-in of a Trainer: averages the gradients of what is trained, whether the base is sharded or not, and has every
    process write its share of the optimizer's state where it is."""

    world = World()

    def _wrap_model(self: Any, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self.world.kind == "none" or not training or self.accelerator.unwrap_model(model) is not model:
            return super()._wrap_model(model, training=training, dataloader=dataloader)  # type: ignore[misc]
        from fastlora.integrations import fsdp

        # Mixed precision alone: accelerate takes a model with shares in it for one that it must not replicate.
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return fsdp.replicate(prepared, self.args.device)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if self.world.kind != "fsdp":
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        from torch.distributed import checkpoint

        checkpoint.save(self._shares(), checkpoint_id=Path(output_dir) / SHARDS, no_dist=False)
        if self.args.should_save:
            durable.save_tree(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / SHARDS).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        from torch.distributed import checkpoint as shares
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        state = self._shares()
        try:
            shares.load(state, checkpoint_id=Path(checkpoint) / SHARDS, no_dist=self.world.kind == "none")
            scheduler = durable.load_tree(Path(checkpoint) / SCHEDULE)
        except (OSError, RuntimeError, ValueError, shares.CheckpointException) as error:
            raise UserError(
                f"resume: cannot read {checkpoint} ({first_line(error)}): use another checkpoint"
            ) from error
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state["optimizer"])
        self.lr_scheduler.load_state_dict(scheduler)

    def _shares(self: Any) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {"optimizer": get_optimizer_state_dict(self.model, self._plain_optimizer())}

    def _plain_optimizer(self: Any) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper
