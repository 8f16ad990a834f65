"""A pytest plugin for PEFT's own tests: fuses every layer that PEFT makes, and writes what became of each test.

With FASTLORA_SUITE_FUSED=1 the whole session runs within `fastlora.fused`. The file FASTLORA_SUITE_RECORD gets a JSON
line for each test: its name, its outcome, the first line of an error, and how many calls the fused operator computed
and how many PEFT's forward did.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

_RECORD = os.environ["FASTLORA_SUITE_RECORD"]
_FUSED = os.environ["FASTLORA_SUITE_FUSED"] == "1"
_calls = {"fused": 0, "peft": 0}
_results: dict[str, dict[str, Any]] = {}


def _count_calls() -> None:
    from fastlora.integrations.peft import layers

    def watch(name: str) -> None:
        real = getattr(layers, name)

        def counting(*args: Any) -> Any:
            found = real(*args)
            _calls["peft" if isinstance(found, str) else "fused"] += 1
            return found

        setattr(layers, name, counting)

    watch("situation")
    watch("mixed_situation")


def _leave_packed_weights_alone() -> None:
    # On a CPU with AVX512-BF16 bitsandbytes repacks weights at the first evaluation: it refuses widths that 32 does
    # not divide, and gradients are wrong from then on. In both runs alike, its layers are those of any other CPU.
    with contextlib.suppress(ImportError):
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    _leave_packed_weights_alone()
    if _FUSED:
        import fastlora

        _count_calls()
        scope = fastlora.fused()
        scope.__enter__()
        session.config.add_cleanup(lambda: scope.__exit__(None, None, None))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    # Every test starts from the same random state in both runs, whatever the tests before it drew.
    import torch

    torch.manual_seed(0)
    _calls.update(fused=0, peft=0)
    done = yield
    with open(_RECORD, "a") as file:
        file.write(json.dumps({"test": item.nodeid, **_results.pop(item.nodeid), **_calls}) + "\n")
    return done


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    worst = _results.setdefault(report.nodeid, {"outcome": "passed", "why": ""})
    if report.outcome == "passed" and not hasattr(report, "wasxfail"):
        return
    if worst["outcome"] == "failed":
        return
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    crash = getattr(report.longrepr, "reprcrash", None)
    why = crash.message if crash else str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    worst.update(outcome=outcome, why=why.splitlines()[0][:200] if why else "")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        why = str(report.longrepr).splitlines()[-1][:200]
        with open(_RECORD, "a") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": "not collected", "why": why}) + "\n")
