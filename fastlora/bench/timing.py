"""Timing of interleaved variants, with launches or of GPU time alone."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[int], Any]
"""One call of a variant. The argument counts the calls, for rotating among copies of the inputs."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float


def _times(samples: list[float]) -> Times:
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(samples), cuts[7])


def copies_past_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of inputs of ``nbytes`` to rotate among so that none is found in the last-level cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(64, -(-3 * cache // max(nbytes, 1))))


def _wall(call: Call, calls: int, device: torch.device) -> float:
    """Microseconds per call of ``calls`` calls in a row, until the device has finished them."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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
    calls = {}
    for name, call in variants.items():
        _wall(call, 3, device)
        calls[name] = max(1, min(200, int(budget_ms * 1e3 / _wall(call, 2, device))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            samples[name].append(_wall(call, calls[name], device))
    return {name: _times(values) for name, values in samples.items()}


def measure_graph(variants: Mapping[str, Call], *, calls: int = 20, rounds: int = 15) -> dict[str, Times]:
    """GPU time alone per call: ``calls`` calls of each variant are captured in a CUDA graph, the replays take turns."""
    graphs = {}
    for name, call in variants.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(calls):
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i)
        graphs[name] = graph
    replays: dict[str, Call] = {name: lambda _, graph=graph: graph.replay() for name, graph in graphs.items()}  # type: ignore[misc]
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds + 2):
        for name, replay in replays.items():
            sample = _wall(replay, 1, torch.device("cuda")) / calls
            if i >= 2:
                samples[name].append(sample)
    return {name: _times(values) for name, values in samples.items()}
