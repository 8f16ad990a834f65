"""Training steps over several GPUs beside one, and beside PEFT's: ``fastlora bench --suite distributed``.

The steps are those of `fastlora.bench.train_step`, with a batch of the case for each GPU. One process a GPU is started
for all tasks; where one hangs or dies, the rest goes on in fresh ones. Every process measures, the slowest counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from fastlora.bench import layer, models, train_step
from fastlora.bench.record import Row
from fastlora.bench.train_step import BLOCKS, BLOCKS_LIGER, PEFT, PEFT_PREPARED, STACKS, Case

COLLECTIVE = datetime.timedelta(seconds=60)
"""How long a collective may take until its process gives up."""
_MEET = datetime.timedelta(seconds=20)
"""How long the processes wait for each other between two tasks."""


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is spread over the processes."""

    alone: bool = False
    """The first process runs, the others wait."""
    sharded: bool = False
    """FSDP2 shards the base, with these options of `fastlora.integrations.fsdp.shard`."""
    options: tuple[tuple[str, Any], ...] = ()


ONE, DDP, FSDP = "one GPU", "DDP", "FSDP2"
IN_PARTS = "one GPU in micro-batches"
SHARDED_ADAPTERS, GATHERED_ONCE = "FSDP2, adapters sharded", "FSDP2, gathered once"
WAYS: dict[str, Way] = {
    ONE: Way(alone=True),
    IN_PARTS: Way(alone=True),
    DDP: Way(),
    FSDP: Way(sharded=True),
    SHARDED_ADAPTERS: Way(sharded=True, options=(("adapters", "sharded"),)),
    GATHERED_ONCE: Way(sharded=True, options=(("reshard", False),)),
}
SPEED, LOSS, LARGE, LINKS = "speed", "loss", "large", "links"


@dataclasses.dataclass(frozen=True)
class Task:
    """What the processes measure at a time."""

    kind: str
    way: str
    stack: str
    case: Case
    seconds: float = 45
    profile: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.stack}, {self.way}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        return cls(**{**values, "case": Case.from_dict(values["case"])})


@dataclasses.dataclass(frozen=True)
class Found:
    """What a task gave, or why it gave nothing."""

    task: Task
    absent: str | None = None
    ms: float = 0.0
    peak_bytes: int | None = None
    """The most that a GPU held, of all GPUs."""
    base_bytes: int = 0
    """Of the frozen base, in one process."""
    losses: tuple[float, ...] = ()
    gpu_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    processes: int = 1
    links: dict[str, float] = dataclasses.field(default_factory=dict)
    """GB/s of collectives."""

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.task.case.tokens * self.processes / self.ms

    @classmethod
    def from_json(cls, line: str) -> Found:
        values = json.loads(line)
        task = Task.from_dict(values["task"])
        return cls(**{**values, "task": task, "losses": tuple(values["losses"])})


LOSS_STEPS, LOSS_BATCHES = 30, 3
STEADY = 2.0
"""How many times the noise floor a loss curve may be from one GPU's."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The cases of a run."""

    speed: Case
    loss: Case
    """Its batch is the global one."""
    large: Case
    """As many of its blocks as one GPU holds."""
    steps: int = LOSS_STEPS


_TINY = (
    *(("hidden_size", 64), ("intermediate_size", 128), ("num_attention_heads", 4), ("num_key_value_heads", 2)),
    ("head_dim", 16),
)
FULL = Sizes(
    Case("llama-3-8b", 8, 4, 2048),
    Case("smollm2-135m", 30, 8, 512),
    Case("llama-3-70b", 80, 1, 2048, checkpointing=True, vocabulary=128256),
)
QUICK = Sizes(
    Case("llama-3-8b", 2, 2, 16, changes=_TINY, vocabulary=128),
    Case("smollm2-135m", 2, 4, 16, changes=_TINY, vocabulary=128),
    Case("llama-3-70b", 3, 1, 16, True, _TINY, 128),
    steps=4,
)


def tasks(sizes: Sizes, stacks: Sequence[str] = (PEFT, PEFT_PREPARED, BLOCKS, BLOCKS_LIGER)) -> list[Task]:
    """What a run measures, in its order: what changes transformers for a whole process comes last."""
    fastest = next((name for name in reversed(stacks) if train_step.missing(STACKS[name]) is None), stacks[-1])
    found = [Task(LINKS, DDP, "", sizes.speed)]
    found += [Task(LOSS, way, BLOCKS, sizes.loss, 90) for way in (ONE, IN_PARTS, DDP, FSDP)]
    for stack in stacks:
        ways = [ONE, FSDP] if stack == PEFT_PREPARED else [ONE, DDP, FSDP]
        ways += [SHARDED_ADAPTERS, GATHERED_ONCE] if stack == fastest else []
        for way in ways:
            found.append(Task(SPEED, way, stack, sizes.speed, 60, profile=stack == fastest and way in (ONE, FSDP)))
    return [*found, *(Task(LARGE, way, fastest, sizes.large, 60) for way in (ONE, FSDP))]


# --- in a process of the run ---


def _spread(task: Task, model: Any, world: int, device: torch.device) -> tuple[Any, int]:
    """What to call with a batch, and the bytes of the base in this process."""
    from torch.distributed import init_device_mesh

    from fastlora.integrations import fsdp

    way = WAYS[task.way]
    if way.sharded:
        fsdp.shard(model, init_device_mesh(device.type, (world,)), **dict(way.options))
    held = fsdp.base_bytes(model)
    averaged = way.alone or dict(way.options).get("adapters") == "sharded"
    return (model if averaged else fsdp.replicate(model, device)), held


def _build(task: Task, device: torch.device) -> Any:
    base = models.repeated if task.kind == LARGE else None
    return train_step._model(STACKS[task.stack], task.case, device, base=base)


def _speed(task: Task, rank: int, world: int, device: torch.device) -> Found:
    model = _build(task, device)
    call, held = _spread(task, model, world, device)
    one = train_step.measure(
        task.stack, task.case, model, device, profile=task.profile, ceiling=None, call=call, seed=rank
    )
    return _of_all(Found(task, None, one.ms, one.peak_bytes, held, one.losses, one.gpu_ms), world)


def _loss(task: Task, rank: int, world: int, device: torch.device, steps: int) -> Found:
    """Training on few batches again and again; each process has its part of every batch."""
    way, case = WAYS[task.way], task.case
    model = _build(task, device)
    models.restart(model, 0)
    model.train()
    call, held = _spread(task, model, world, device)
    parameters = [p for _, p in models.adapters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=train_step.LR)
    batches = models.token_batches(case.config(), case.batch, case.length, device, 0, LOSS_BATCHES)
    parts = world if task.way == IN_PARTS else 1
    losses = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        mine = batch if way.alone else batch.chunk(world)[rank]
        total = torch.zeros((), device=device)
        for part in mine.chunk(parts):
            with torch.autocast(device.type, torch.bfloat16):
                loss = call(input_ids=part, labels=part).loss / parts
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    curve = torch.stack(losses)
    if not way.alone:
        torch.distributed.all_reduce(curve)
        curve /= world
    return Found(task, None, 1.0, None, held, tuple(curve.tolist()))


def _links(task: Task, world: int, device: torch.device, nbytes: int = 1 << 27) -> Found:
    """GB/s that a GPU receives in the collectives of sharding and of averaging."""
    from torch import distributed

    nbytes = nbytes if device.type == "cuda" else 1 << 16
    share = torch.zeros(nbytes // world, dtype=torch.uint8, device=device)
    whole = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    gradients = torch.zeros(nbytes // 4, device=device)
    runs = {
        "all-gather": lambda: distributed.all_gather_into_tensor(whole, share),
        "all-reduce": lambda: distributed.all_reduce(gradients),
    }
    found = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        ms, _ = train_step.time_steps(lambda run=run: run() or share, device, 8)  # type: ignore[misc]
        received = nbytes * (world - 1) / world * (2 if name == "all-reduce" else 1)
        found[name] = received / ms / 1e6
    return Found(task, None, 1.0, links=found)


def _of_all(mine: Found, world: int) -> Found:
    """The slowest time and the highest peak of all processes."""
    if WAYS[mine.task.way].alone:
        return mine
    from torch import distributed

    gathered: list[Any] = [None] * world
    distributed.all_gather_object(gathered, (mine.ms, mine.peak_bytes or 0, mine.losses[-1]))
    return dataclasses.replace(
        mine,
        ms=max(ms for ms, _, _ in gathered),
        peak_bytes=max(peak for _, peak, _ in gathered) or None,
        losses=(statistics.mean(loss for _, _, loss in gathered),),
        processes=world,
    )


def _measure(task: Task, rank: int, world: int, device: torch.device, steps: int) -> Found | None:
    if WAYS[task.way].alone and rank:
        return None
    if task.kind == LINKS:
        return _links(task, world, device)
    if task.kind == LOSS:
        return _loss(task, rank, world, device, steps)
    return _speed(task, rank, world, device)


def _fit(task: Task, device: torch.device) -> Task:
    """The task with as many blocks as the GPU holds."""
    if task.kind != LARGE or device.type != "cuda":
        return task
    blocks = min(task.case.blocks, fitting_blocks(task.case, torch.cuda.mem_get_info(device)[0], 1))
    least = torch.tensor(max(1, blocks))
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return dataclasses.replace(task, case=dataclasses.replace(task.case, blocks=int(least)))


def fitting_blocks(case: Case, free: int, world: int) -> int:
    """How many blocks of a case's shape fit ``free`` bytes of a GPU, one of ``world``, by what they hold: the packed
    weights (a share of them) with whole statistics, adapters with gradients and moments in float32, a checkpoint; and
    beside them embeddings, head, logits, and one gathered block with its activations."""
    config, tokens = case.config(), case.tokens
    sizes = models.linear_sizes(config)
    weights, adapters = sum(n * k for n, k in sizes), sum(train_step.R * (n + k) for n, k in sizes)
    block = weights / 2 / world + weights / 60 + adapters * 16 + tokens * config.hidden_size * 2
    ends = 2 * config.vocab_size * config.hidden_size * 2 + tokens * config.vocab_size * 10
    working = weights / 2 * 2 + tokens * sum(n + k for n, k in sizes) * 6
    return max(0, int((0.9 * free - ends - working) / block))


def child(spec: Path) -> int:
    """One process of a run: reads the tasks, measures each with the others; the first writes a line for each."""
    from torch import distributed

    request = json.loads(spec.read_text())
    rank, world, out = int(os.environ["RANK"]), request["world"], Path(request["out"])
    device = torch.device("cuda", rank) if request["cuda"] else torch.device("cpu")
    if request["cuda"]:
        torch.cuda.set_device(device)
    store = distributed.TCPStore("127.0.0.1", request["port"], world, rank == 0, timeout=datetime.timedelta(minutes=3))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if request["cuda"] else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE,
    )
    for i, values in enumerate(request["tasks"]):
        task = _fit(Task.from_dict(values), device)
        if rank == 0:
            _write(out, {"begin": i})
        found: Found | None = None
        failure = ""
        try:
            if (reason := train_step.missing(STACKS[task.stack])) if task.stack else None:
                found = Found(task, reason)
            else:
                found = _measure(task, rank, world, device, request["steps"])
        except Exception as error:
            failure = layer.why(error)
            print(f"{task.title}: {failure}", file=sys.stderr, flush=True)
        train_step._free(device)
        store.set(f"{i}/{rank}", failure or "done")
        wait = datetime.timedelta(seconds=task.seconds) if WAYS[task.way].alone else _MEET
        ends = []
        try:
            store.wait([f"{i}/{other}" for other in range(world)], wait)
            ends = [store.get(f"{i}/{other}").decode() for other in range(world)]
        except RuntimeError:
            failure = failure or "another process hangs"
        failed = [text for text in ends if text != "done"]
        if rank == 0:
            failure = failure or next(iter(failed), "")
            _write(out, {"index": i, **dataclasses.asdict(Found(task, failure) if failure else found or Found(task))})
        # Processes that do not know the same of a collective cannot begin another one.
        if not ends or (0 < len(failed) < world and not WAYS[task.way].alone):
            os._exit(4)
    os._exit(0)  # without waiting for what a failed task has left in the communicators


def _write(out: Path, line: dict[str, Any]) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


# --- the run ---


class _Group:
    """The processes of a run; iterating gives what they measure, as they do. They end with the iteration."""

    def __init__(self, tasks: list[Task], world: int, cuda: bool, steps: int, end: float, startup: float) -> None:
        self.tasks, self.world, self.cuda, self.steps, self.end, self.startup = tasks, world, cuda, steps, end, startup
        self.failure = ""
        """Why the first task without a result has none, once they have ended."""

    def __iter__(self) -> Iterator[Found]:
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            folder = Path(scratch)
            out, spec = folder / "found.jsonl", folder / "spec.json"
            out.touch()
            request = {
                "tasks": [dataclasses.asdict(task) for task in self.tasks],
                "world": self.world,
                "port": get_free_port(),
                "cuda": self.cuda,
                "steps": self.steps,
                "out": str(out),
            }
            spec.write_text(json.dumps(request))
            command = [sys.executable, "-m", "fastlora.bench.distributed", "--child", str(spec)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.logs = [folder / f"rank-{rank}.log" for rank in range(self.world)]
            running = []
            for rank, log in enumerate(self.logs):
                file = stack.enter_context(log.open("w"))
                mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
                running.append(subprocess.Popen(command, env=mine, stdout=file, stderr=file))
                stack.callback(self._end, running[-1])
            yield from self._watch(running, out)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def _watch(self, running: list[subprocess.Popen[bytes]], out: Path) -> Iterator[Found]:
        seen, limit, what = 0, time.monotonic() + self.startup, "the processes did not start"
        while True:
            codes = [process.poll() for process in running]
            *lines, _ = out.read_text().split("\n")  # the last may be half written
            for line in lines[seen:]:
                values = json.loads(line)
                if "begin" in values:
                    task = self.tasks[values["begin"]]
                    limit, what = time.monotonic() + task.seconds + 5, "it took too long"
                else:
                    del values["index"]
                    yield Found.from_json(json.dumps(values))
            seen = len(lines)
            bad = [rank for rank, code in enumerate(codes) if code]
            if bad:
                said = [text for text in self.logs[bad[0]].read_text().split("\n") if text.strip()]
                self.failure = f"process {bad[0]} ended with {codes[bad[0]]}: {said[-1][:160] if said else ''}"
                return
            if all(code is not None for code in codes):
                self.failure = "the processes ended without a result"
                return
            now = time.monotonic()
            if now > min(limit, self.end):
                self.failure = what if limit <= self.end else "the time of the run was over"
                return
            time.sleep(0.2)


def measure(
    wanted: list[Task], world: int, *, cuda: bool, steps: int, seconds: float = 270, startup: float = 90
) -> Iterator[Found]:
    """The tasks over ``world`` processes, as they are measured. No longer than ``seconds``."""
    end, left = time.monotonic() + seconds, list(wanted)
    while left:
        if time.monotonic() > end:
            yield from (Found(task, "the time of the run was over") for task in left)
            return
        group = _Group(left, world, cuda, steps, end, startup)
        done = 0
        for found in group:
            done += 1
            yield found
        left = left[done:]
        if left and group.failure:
            yield Found(left.pop(0), group.failure)


def line(one: Found) -> str:
    """What was measured, in a line."""
    title = f"{one.task.case.title}: {one.task.title}"
    if one.absent is not None:
        return f"{title}: {one.absent}"
    if one.task.kind == LINKS:
        return f"links: {', '.join(f'{name} {value:.0f} GB/s' for name, value in one.links.items())}"
    if one.task.kind == LOSS:
        return f"{title}: loss {one.losses[0]:.4f} to {one.losses[-1]:.4f}"
    memory = "" if one.peak_bytes is None else f", peak {one.peak_bytes / 2**30:.2f} GiB"
    base = f", base {one.base_bytes / 2**30:.2f} GiB"
    return f"{title}: {one.ms:.1f} ms, {one.tokens_per_second:,.0f} tokens/s{memory}{base}"


GOAL_DDP, GOAL_FSDP, GOAL_PEFT, GOAL_MEMORY = 1.9, 1.7, 1.8, 0.1


def rows(found: Iterable[Found], world: int = 2) -> list[Row]:
    """The goals first, then all that was measured."""
    found = list(found)
    speed = {(one.task.way, one.task.stack): one for one in found if one.task.kind == SPEED}
    table: list[Row] = []
    if speed:
        case = next(iter(speed.values())).task.case.title
        case = f"{case} a GPU, {world} GPUs"
        table += _goals(speed, case, world)
    table += _loss_rows([one for one in found if one.task.kind == LOSS])
    for one in found:
        table += _informing(one, world)
    return table


def _goals(speed: dict[tuple[str, str], Found], case: str, world: int) -> Iterator[Row]:
    def best(ways: tuple[str, ...]) -> Found | None:
        ours = [one for (way, stack), one in speed.items() if way in ways and STACKS[stack].fuse and not one.absent]
        return max(ours, key=lambda one: one.tokens_per_second, default=None)

    def row(metric: str, ours: Found | None, key: tuple[str, str], goal: float) -> Row:
        other = speed.get(key)
        if ours is None or other is None or other.absent:
            why = "none of ours was measured" if ours is None else f"{key[1]}, {key[0]}: "
            why += "" if ours is None else "not measured" if other is None else str(other.absent)
            return Row(case, metric, None, goal, True, why)
        value = ours.tokens_per_second / other.tokens_per_second
        return Row(case, metric, value, goal, True, f"{ours.task.stack}, {ours.task.way}")

    ddp, sharded = best((DDP,)), best((FSDP, SHARDED_ADAPTERS, GATHERED_ONCE))
    per_gpu = world / 2  # the goals are those of two GPUs
    for metric, ours, goal in (("DDP", ddp, GOAL_DDP), ("FSDP2", sharded, GOAL_FSDP)):
        stack = BLOCKS if ours is None else ours.task.stack
        yield row(f"tokens/s of {metric} over one GPU", ours, (ONE, stack), goal * per_gpu)
    for peer, which in ((PEFT_PREPARED, ", prepared"), (PEFT, "")):  # as in `train_step.GOAL_PEERS`
        yield row(f"tokens/s of FSDP2 over PEFT's FSDP2{which}", sharded, (FSDP, peer), GOAL_PEFT)
    freed = best((FSDP, SHARDED_ADAPTERS))
    alone = speed.get((ONE, freed.task.stack)) if freed is not None else None
    metric = f"distance of the sharded base from 1/{world} of one GPU's, share"
    if freed is None or alone is None or alone.absent:
        yield Row(case, metric, None, GOAL_MEMORY, note="not measured")
    else:
        value = abs(freed.base_bytes * world / alone.base_bytes - 1)
        yield Row(case, metric, value, GOAL_MEMORY, note=f"{freed.base_bytes / 2**30:.3f} GiB a GPU")


def _loss_rows(found: list[Found]) -> Iterator[Row]:
    by_way = {one.task.way: one for one in found}
    if ONE not in by_way:
        return
    case = by_way[ONE].task.case
    title = f"{case.model}, {case.blocks} blocks, global batch {case.batch} x {case.length}, random weights"
    metric = "mean distance of the loss from one GPU's, over that of one GPU in micro-batches"
    one, again = by_way[ONE], by_way.get(IN_PARTS)
    for way in (DDP, FSDP):
        other = by_way.get(way)
        missing = [name for name, x in ((ONE, one), (IN_PARTS, again), (way, other)) if x is None or x.absent]
        if missing or again is None or other is None:
            yield Row(title, f"{metric}, {way}", None, STEADY, note=f"not measured: {', '.join(missing)}")
            continue
        floor = max(_distance(one, again), 1e-5 * abs(one.losses[-1]))
        distance = _distance(one, other)
        note = f"{len(one.losses)} steps; floor {floor:.2g}, distance {distance:.2g}"
        yield Row(title, f"{metric}, {way}", distance / floor, STEADY, note=note)
    for way, each in by_way.items():
        if not each.absent:
            yield Row(title, f"loss after {len(each.losses)} steps, {way}", each.losses[-1])


def _distance(a: Found, b: Found) -> float:
    return statistics.mean(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def _informing(one: Found, world: int) -> Iterator[Row]:
    task = one.task
    if task.kind == LOSS and one.absent is None:
        return
    title = f"{task.case.title} a GPU, {world} GPUs"
    name = f"{task.stack}, {task.way}" if task.stack else "links"
    if one.absent is not None:
        yield Row(title, f"{'loss' if task.kind == LOSS else 'tokens/s'}, {name}", None, note=one.absent)
        return
    if task.kind == LINKS:
        for collective, value in one.links.items():
            yield Row(f"{world} GPUs", f"GB/s that a GPU receives, {collective}", value)
        return
    yield Row(title, f"tokens/s, {name}", one.tokens_per_second)
    yield Row(title, f"ms a step, {name}", one.ms)
    if one.peak_bytes is not None:
        yield Row(title, f"peak memory GiB, {name}", one.peak_bytes / 2**30)
    yield Row(title, f"base GiB a GPU, {name}", one.base_bytes / 2**30)
    yield Row(title, f"loss, {name}", one.losses[-1])
    for kind, ms in sorted(one.gpu_ms.items(), key=lambda item: -item[1]):
        yield Row(title, f"GPU ms, {kind}, {name}", ms)
    if task.kind == LARGE and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        share = 1 if WAYS[task.way].alone else world
        yield Row(title, f"blocks that fit by what they hold, {task.way}", fitting_blocks(task.case, total, share))


def curves(found: Iterable[Found]) -> dict[str, list[float]]:
    """The loss curves for the record."""
    return {one.task.way: list(one.losses) for one in found if one.task.kind == LOSS and one.absent is None}


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"] or len(sys.argv) != 3:
        raise SystemExit("this module is started by fastlora bench --suite distributed")
    sys.exit(child(Path(sys.argv[2])))
