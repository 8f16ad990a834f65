"""Timing of interleaved variants, with launches or of GPU time alone; time of the host; peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastlora.tables import for_graphs
from fastlora.training.step import capture_stream

Call = Callable[[int], Any]
"""One call of a variant. The argument counts the calls, for rotating among copies of the inputs."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float
    launches: bool = True
    """Whether the host's launches are part of the time, as they are outside of a CUDA graph."""


def _times(samples: list[float], launches: bool) -> Times:
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], launches)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(samples), cuts[7], launches)


_MOST_COPIES = 64


def copies_past_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs to rotate among so that none is found in the last-level cache, where one call moves
    ``nbytes``; at most `_MOST_COPIES`, so that of the smallest inputs some are."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MOST_COPIES, -(-3 * cache // max(nbytes, 1))))


def whole_rotations(calls: int, copies: int) -> int:
    """At least so many calls that each of the copies has as many: replays of a graph of other numbers of calls would
    come back to a copy too soon, and find it in the cache."""
    return -(-calls // copies) * copies


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """The stream on which `measure_graph` captures; nothing on a CPU.

    What is to be captured must run here from its first call on: autograd runs a backward pass, and hands the gradients
    to the leaves, on the streams of the forward pass, and a capture that waits for another stream is invalid.
    """
    if device.type != "cuda":
        yield
        return
    outer = torch.cuda.current_stream(device)
    stream = capture_stream(outer.device_index)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


def now(device: torch.device) -> float:
    """Seconds of a clock, when everything that was launched on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _wall(call: Call, calls: int, device: torch.device, hold: bool = False) -> float:
    """Microseconds per call of ``calls`` calls in a row, until the device has finished them.

    ``hold`` keeps the device busy until all of them are queued, so that the host's time is no part of it.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if hold:
            torch.cuda._sleep(1_000_000)
        start.record()
        for i in range(calls):
            call(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls
    begin = time.perf_counter()
    for i in range(calls):
        call(i)
    return (time.perf_counter() - begin) * 1e6 / calls


def measure(
    variants: Mapping[str, Call], device: torch.device, *, rounds: int = 15, budget_ms: float = 10.0
) -> dict[str, Times]:
    """Time per call, launches included, of each variant; the variants take turns in every round.

    ``budget_ms`` is about how long one variant runs in one round.
    """
    calls = {name: _calls_within(call, device, budget_ms) for name, call in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(_wall(call, calls[name], device))
    return {name: _times(values, True) for name, values in samples.items()}


def _calls_within(call: Call, device: torch.device, budget_ms: float) -> int:
    _wall(call, 1, device)
    return max(1, min(200, int(budget_ms * 1e3 / _wall(call, 2, device))))


_ABANDONED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. The allocator goes on asking them whether a stream is theirs."""


def _capture(call: Call, calls: int) -> torch.cuda.CUDAGraph | None:
    """A graph of ``calls`` calls, captured on the current stream, or None where the calls cannot be captured."""
    for i in range(calls):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a collection may free what must not be freed during a capture
    try:
        # Backward passes run on threads of autograd: their calls are not this thread's to be judged.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            for i in range(calls):
                call(i)
    except Exception:
        _ABANDONED.append(graph)
        with contextlib.suppress(RuntimeError):
            # The default generator still takes itself to be captured, and would refuse to draw.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
        torch.cuda.synchronize()
        return None
    finally:
        gc.enable()
    return graph


def measure_graph(variants: Mapping[str, Call], *, calls: int = 20, rounds: int = 15) -> dict[str, Times]:
    """GPU time alone per call: ``calls`` calls of each variant are captured in a CUDA graph, the replays take turns.

    A variant that cannot be captured, and every one on a CPU, is timed with its launches, in the same rounds; its
    `Times.launches` says so.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with side_stream(device), for_graphs():
        graphs = {name: _capture(call, calls) if device.type == "cuda" else None for name, call in variants.items()}
        turns: dict[str, Callable[[], float]] = {}
        for name, call in variants.items():
            if (graph := graphs[name]) is None:
                turns[name] = functools.partial(_wall, call, calls, device)
            else:
                turns[name] = functools.partial(_replayed, graph, calls, device)
        warm_up = 2 if device.type == "cuda" else 1
        for i in range(rounds + warm_up):
            for name, turn in turns.items():
                sample = turn()
                if i >= warm_up:
                    samples[name].append(sample)
    return {name: _times(values, graphs[name] is None) for name, values in samples.items()}


def _replayed(graph: torch.cuda.CUDAGraph, calls: int, device: torch.device) -> float:
    return _wall(lambda _: graph.replay(), 2, device, hold=True) / calls


def measure_host(
    variants: Mapping[str, Call], device: torch.device, *, rounds: int = 11, calls: int = 20
) -> dict[str, Times]:
    """Time that the host spends per call, never waiting for the device: what a launch-bound program pays."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, call in variants.items():
            begin = time.perf_counter()
            for j in range(calls):
                call(j)
            sample = (time.perf_counter() - begin) * 1e6 / calls
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i > 0:
                samples[name].append(sample)
    return {name: _times(values, True) for name, values in samples.items()}


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one call allocates at most beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    call(0)  # a library's workspaces stay allocated
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device was measured to reach: the sides of the roofline."""

    bytes_per_second: float
    """Of a device-to-device copy, read plus written."""
    flops_per_second: float
    """Of the library's bf16 matrix product, multiplications and additions counted apart."""

    def roofline(self, nbytes: float, flops: float) -> float:
        """Microseconds that moving so many bytes and computing so many operations takes at least."""
        return 1e6 * max(nbytes / self.bytes_per_second, flops / self.flops_per_second)


def ceilings(device: torch.device, *, rounds: int = 11) -> Ceilings:
    """Measured in this process, on buffers far larger than any cache of a GPU (small ones on a CPU)."""
    size, (m, n, k) = (2**28, (8192, 4096, 4096)) if device.type == "cuda" else (2**20, (256, 256, 256))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    x, w = torch.randn(m, k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    y = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    variants: dict[str, Call] = {
        "copy": lambda _: target.copy_(source),
        "product": lambda _: torch.mm(x, w.T, out=y),
    }
    times = measure_graph(variants, calls=5, rounds=rounds)
    return Ceilings(2e6 * size / times["copy"].p50, 2e6 * m * n * k / times["product"].p50)
