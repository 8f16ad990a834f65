"""What every test runs under: no network, one thread, fixed seeds, and gpu tests only where there is a GPU."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Read once, when the libraries that they belong to are imported: this file is imported before any test module.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton decides at import whether kernels are compiled or interpreted on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

_WHY_NO_GPU = "needs a CUDA device: " + (
    "this PyTorch is built without CUDA"
    if torch.version.cuda is None and torch.version.hip is None
    else "torch.cuda.is_available() is False"
)


def pytest_configure() -> None:
    # The sizes are tiny: threads would cost more than they save, and vary the order of sums.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=_WHY_NO_GPU))


_AS_INSTALLED = {"training", "bench", "report", "test_demo.py", "test_examples.py", "test_search.py"}
"""Rooms whose tests are of whole runs: what a CPU computes there is what it computes for users."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Without Triton's interpreter, which is a thousand times slower, in this process and those that it starts.

    Around the whole test, since fixtures of a session train, too.
    """
    whole = item.path.relative_to(Path(__file__).parent).parts[0] in _AS_INSTALLED
    if HAS_CUDA or not whole or item.get_closest_marker("interpreted"):
        return (yield)
    from fastlora import backends

    machine = dataclasses.replace(backends.this_machine(), triton_interpreted=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        patch.setattr(backends, "this_machine", lambda: machine)
        return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    # A module that was skipped as a whole has no keywords.
    reports = terminalreporter.getreports("skipped")
    skipped = [report for report in reports if "gpu" in getattr(report, "keywords", ())]
    if skipped and not HAS_CUDA:
        terminalreporter.write_line(f"{len(skipped)} gpu tests skipped: {_WHY_NO_GPU}", yellow=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def _built_in_rules() -> Iterator[None]:
    """No table of this machine or of the package decides anything, except in tests that bring their own."""
    from fastlora import tables

    with tables.use(tables.Tables()):
        yield


_NAN_BYTE = 0xFF
"""Repeated, NaN in every floating-point type."""


@pytest.fixture(autouse=True)
def _poisoned_gpu_memory(request: pytest.FixtureRequest) -> None:
    """The memory that a gpu test gets first holds NaN, so that a kernel that uses what nobody wrote fails.

    `poison_empty` does not see allocations of the extension.
    """
    if not HAS_CUDA or request.node.get_closest_marker("gpu") is None:
        return
    # PyTorch serves sizes up to a MiB and larger ones apart; a large block is split.
    sizes = [1 << 20] * 32 + [1 << 28]
    taken = [torch.full((size,), _NAN_BYTE, dtype=torch.uint8, device="cuda") for size in sizes]
    del taken  # all at once: each had a place of its own


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The test runs once on the CPU and, where there is one, once on the GPU."""
    return request.param


@pytest.fixture
def triton_runs(device: str) -> None:
    """Skips a test on a device where no Triton kernel runs."""
    from fastlora import backends

    if device == "cpu" and not backends.this_machine().triton_interpreted:
        pytest.skip("Triton's interpreter is off")


@pytest.fixture
def kernel_device() -> str:
    """Where Triton kernels run: compiled on the GPU, or interpreted on CPU tensors without one."""
    return "cuda" if HAS_CUDA else "cpu"


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """``torch.empty`` returns NaN (or the largest integer), so that a kernel that leaves an element unwritten fails."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
