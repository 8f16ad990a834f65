"""Several processes. Without a GPU they are forked from one server process, which imports the libraries once.

They end together, and without taking their groups or the interpreter down: a thread of gloo's whose peer has left, or
that wants the interpreter, may hang or abort the process.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

WORLD = 2
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launcher_environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun sets in its processes."""
    values = (rank, rank, WORLD, WORLD, "127.0.0.1", port)
    return dict(zip(LAUNCHER, map(str, values), strict=True))


_MEETING = 10.0
"""Seconds that a process waits for the others to be done as well."""


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _done(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.done"


def _child(
    function: Callable[..., Any], rank: int, port: int, folder: Path, paths: list[str], args: tuple[Any, ...],
    timeout: float,
) -> None:  # fmt: skip
    """A process as torchrun starts it; what it prints is its log, and where it hangs."""
    file = os.open(_log(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.dump_traceback_later(0.9 * timeout, file=2)
    os.environ |= launcher_environment(rank, port)
    os.environ.pop("TRITON_INTERPRET", None)  # the server has that of the test that came first
    sys.path[:] = paths
    torch.set_num_threads(1)
    try:
        code = function(rank, *args) or 0
        _done(folder, rank).touch()
        until = time.monotonic() + (0 if code else _MEETING)
        while time.monotonic() < until and not all(_done(folder, other).exists() for other in range(WORLD)):
            time.sleep(0.01)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(function: Callable[..., Any], *args: Any, folder: Path, timeout: float = 240) -> list[tuple[int, str]]:
    """``function(rank, *args)`` in `WORLD` processes: the exit code and the output of each.

    A process that takes longer than ``timeout`` seconds is killed, and its exit code is negative.
    """
    # The libraries look for GPUs when they are imported, and a process that has done so cannot be forked.
    server = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    server.set_forkserver_preload(["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"])
    port = get_free_port()
    for rank in range(WORLD):
        _done(folder, rank).unlink(missing_ok=True)  # of another run
    started = [
        server.Process(target=_child, args=(function, rank, port, folder, list(sys.path), args, timeout))
        for rank in range(WORLD)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [(process.exitcode or 0, _log(folder, rank).read_text()) for rank, process in enumerate(started)]


def check(results: list[tuple[int, str]]) -> None:
    """Fails with the output of the processes that failed."""
    failed = [f"process {rank} ended with {code}:\n{text}" for rank, (code, text) in enumerate(results) if code]
    assert not failed, "\n".join(failed)
