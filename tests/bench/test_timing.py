"""Timing: who runs when, what counts as a launch, what a GPU cannot capture."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fastlora.bench import timing

CPU = torch.device("cpu")


def test_variants_take_turns() -> None:
    order: list[str] = []
    variants = {name: lambda _, name=name: (order.append(name), time.sleep(0.002)) for name in "ab"}
    timing.measure(variants, CPU, rounds=3, budget_ms=0)
    assert order[-6:] == ["a", "b"] * 3


def test_calls_are_counted_so_that_copies_rotate() -> None:
    seen: list[int] = []
    times = timing.measure_host({"a": seen.append}, CPU, rounds=1, calls=3)
    assert seen == [0, 1, 2] * 2  # the first round warms up
    assert times["a"].p50 > 0


def test_a_graph_comes_back_to_a_copy_only_after_all_others() -> None:
    for copies in range(1, 65):
        for calls in (2, 3, 20):
            found = timing.whole_rotations(calls, copies)
            assert calls <= found < calls + copies
            replayed = [i % copies for _ in range(3) for i in range(found)]
            assert all(len(set(replayed[i : i + copies])) == copies for i in range(len(replayed) - copies))


def test_quantiles() -> None:
    times = timing._times([float(i) for i in range(11)], False)
    assert (times.p20, times.p50, times.p80, times.launches) == (2.0, 5.0, 8.0, False)
    assert timing._times([3.0], True) == timing.Times(3.0, 3.0, 3.0, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs")
def test_without_graphs_the_times_say_so() -> None:
    assert timing.measure_graph({"a": lambda _: None}, calls=2, rounds=2)["a"].launches


def test_roofline_is_the_higher_of_two_bounds() -> None:
    ceilings = timing.Ceilings(bytes_per_second=1e12, flops_per_second=1e14)
    assert ceilings.roofline(2e6, 1e6) == pytest.approx(2.0)
    assert ceilings.roofline(2e6, 1e9) == pytest.approx(10.0)


def test_peak_memory_needs_a_gpu() -> None:
    assert timing.peak_memory(lambda _: None, CPU) is None


@pytest.mark.gpu
def test_peak_memory_counts_what_is_freed_again() -> None:
    device = torch.device("cuda")

    def call(_: int) -> Any:
        torch.empty(2**24, dtype=torch.uint8, device=device)
        return torch.empty(2**22, dtype=torch.uint8, device=device)

    assert timing.peak_memory(call, device) == 2**24


@pytest.mark.gpu
def test_what_cannot_be_captured_harms_nobody_else() -> None:
    x = torch.ones(64, 64, device="cuda")
    good, bad = (lambda _: x @ x), (lambda _: (x @ x).sum().item())
    times = timing.measure_graph({"before": good, "bad": bad, "after": good}, calls=3, rounds=3)
    assert [times[name].launches for name in ("before", "bad", "after")] == [False, True, False]
    assert torch.randn(3, device="cuda").isfinite().all()
    assert not timing.measure_graph({"again": good}, calls=3, rounds=3)["again"].launches
