"""One QLoRA layer, every provider side by side: ``fastlora bench --suite layer``."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from fastlora import reference
from fastlora.bench import providers, timing
from fastlora.bench.providers import Layer, Mode, Provider

MODELS = {
    "llama-3-8b": {"q/o": (4096, 4096), "k/v": (1024, 4096), "gate/up": (14336, 4096), "down": (4096, 14336)},
    "llama-3-70b": {"q/o": (8192, 8192), "k/v": (1024, 8192), "gate/up": (28672, 8192), "down": (8192, 28672)},
    "qwen2.5-7b": {"q/o": (3584, 3584), "k/v": (512, 3584), "gate/up": (18944, 3584), "down": (3584, 18944)},
    "mistral-7b": {"q/o": (4096, 4096), "k/v": (1024, 4096), "gate/up": (14336, 4096), "down": (4096, 14336)},
    "gemma-2-9b": {
        "q": (4096, 3584),
        "k/v": (2048, 3584),
        "o": (3584, 4096),
        "gate/up": (14336, 3584),
        "down": (3584, 14336),
    },
    "smollm2-135m": {"q/o": (576, 576), "k/v": (192, 576), "gate/up": (1536, 576), "down": (576, 1536)},
}
"""(out_features, in_features) of each projection."""
SHAPES = {f"{model} {name}": nk for model, parts in MODELS.items() for name, nk in parts.items()}

DEFAULT_SHAPES = tuple(f"llama-3-8b {name}" for name in MODELS["llama-3-8b"])
DEFAULT_TOKENS = (1, 16, 256, 2048, 8192)
DEFAULT_RANKS = (16,)
DEFAULT_MODES: tuple[Mode, ...] = ("fwd+bwd", "decode")
DEFAULT_PROVIDERS = tuple(name for name in providers.PROVIDERS if name not in ("fastlora reference", "PEFT compiled"))
MOST_DECODED = 256
"""Tokens up to which the mode "decode" is measured."""

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Relative Frobenius distance from the float32 formulas within which every provider must stay before it is timed:
wide enough for the peers, whose results are rounded several times."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of one provider; a field is None where it was not asked for or does not exist."""

    gpu_us: timing.Times | None = None
    """GPU time alone. Where its ``launches`` is set the provider could not be captured in a CUDA graph."""
    wall_us: timing.Times | None = None
    """With the host's launches; there too where some of the providers could not be captured."""
    host_us: timing.Times | None = None
    """The host's time alone."""
    peak_bytes: int | None = None
    absent: str | None = None
    """Why nothing was measured."""


def moved_bytes(w_bytes: int, shape: tuple[int, int], m: int, mode: Mode, itemsize: int = 2) -> int:
    """Bytes that a layer must move at least: the packed weight and x, y, dy and dx, once in each direction."""
    one_way = w_bytes + m * sum(shape) * itemsize
    return 2 * one_way if mode == "fwd+bwd" else one_way


def operations(shape: tuple[int, int], m: int, r: int, mode: Mode) -> int:
    """Multiplications and additions of a layer with its adapter; backward without the gradient of the base weight."""
    n, k = shape
    forward, backward = 2 * m * (n * k + r * (n + k)), 2 * m * (n * k + 2 * r * (n + k))
    return {"fwd": forward, "decode": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]


def does_not_fit(shape: tuple[int, int], m: int, device: torch.device) -> str | None:
    """Why a case is skipped, or None. A provider with float32 copies of everything must fit beside the truth."""
    (n, k), gib = shape, 2**30
    need = 40 * m * (n + k) + 24 * n * k
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need <= 0.9 * free:
        return None
    return f"needs about {need / gib:.1f} GiB, {free / gib:.1f} GiB are free"


def _truth(layer: Layer, x: torch.Tensor, dy: torch.Tensor, mode: Mode) -> dict[str, torch.Tensor]:
    """Output and gradients of the formulas in float32."""
    with torch.no_grad():
        x32, a, b = (t.detach().float() for t in (x, layer.lora_a, layer.lora_b))
        y, u = reference.forward(x32, layer.w, a, b, None, layer.scale, None)
        found = {"y": y}
        if mode in ("bwd", "fwd+bwd"):
            grads = reference.backward(dy.float(), x32, u, layer.w, a, b, layer.scale, None)
            found |= {name: grad for name, grad in zip(("dx", "dA", "dB"), grads, strict=True) if grad is not None}
    return found


def _check(provider: Provider, layer: Layer, x: torch.Tensor, dy: torch.Tensor, mode: Mode, truth: Any) -> None:
    """Raise RuntimeError where the provider's results are not those of the formulas."""
    with torch.set_grad_enabled(mode != "decode"):
        y = provider.forward(x)
    got = {"y": y.detach()}
    if mode in ("bwd", "fwd+bwd"):
        grads = torch.autograd.grad(y, (x, *provider.trained), dy)
        got |= dict(zip(("dx", "dA", "dB"), grads, strict=True))
    for name, value in got.items():
        distance = ((value.float() - truth[name]).norm() / truth[name].norm()).item()
        if not distance <= _TOLERANCE[layer.dense.dtype]:
            raise RuntimeError(f"{name} is wrong by {distance:.2g}")


def why(error: BaseException) -> str:
    """An error as a line of a table."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def compare(
    shape: tuple[int, int],
    m: int,
    r: int,
    mode: Mode,
    names: tuple[str, ...],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    gpu: bool = True,
    wall: bool = False,
    host: bool = False,
    memory: bool = False,
    rounds: int = 11,
) -> dict[str, Measured]:
    """Measure the named providers on one layer, each checked first, weights rotated past the cache.

    A provider that cannot run, or computes something else, is an entry that says why.
    """
    if reason := does_not_fit(shape, m, device):
        return {name: Measured(absent=reason) for name in names}
    with timing.side_stream(device):
        return _compare(shape, m, r, mode, names, device, dtype, gpu, wall, host, memory, rounds)


def _compare(
    shape: tuple[int, int],
    m: int,
    r: int,
    mode: Mode,
    names: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    gpu: bool,
    wall: bool,
    host: bool,
    memory: bool,
    rounds: int,
) -> dict[str, Measured]:
    gc.collect()  # graphs of the case before
    (n, k), generator = shape, torch.Generator(device).manual_seed(1)
    layer = providers.make_layer(n, k, r, dtype, device)
    x = torch.randn(m, k, device=device, dtype=dtype, generator=generator).requires_grad_()
    dy = torch.randn(m, n, device=device, dtype=dtype, generator=generator)
    truth = _truth(layer, x, dy, mode)
    copies = timing.copies_past_cache(moved_bytes(layer.nbytes, shape, m, mode), device)
    layers = [layer, *(providers.copy_of(layer) for _ in range(copies - 1))]
    calls: dict[str, timing.Call] = {}
    absent = {}
    for name in names:
        try:
            built = [providers.PROVIDERS[name](each) for each in layers]
            if name not in providers.WITHOUT_ADAPTER:
                _check(built[0], layer, x, dy, mode, truth)
            each = [provider.call(x, dy, mode) for provider in built]
            calls[name] = lambda i, each=each: each[i % len(each)]()  # type: ignore[misc]
            calls[name](0)
        except Exception as error:
            calls.pop(name, None)
            absent[name] = Measured(absent=why(error))
    del truth
    # A call of much work fills a graph alone, little ones must be so many that the gaps between graphs vanish.
    in_graph = timing.whole_rotations(3 if m >= 1024 else 20, copies)
    times = timing.measure_graph(calls, calls=in_graph, rounds=rounds) if gpu else {}
    uneven = len({each.launches for each in times.values()}) > 1
    walls = timing.measure(calls, device, rounds=min(rounds, 5)) if wall or uneven else {}
    hosts = timing.measure_host(calls, device, rounds=rounds) if host else {}
    peaks = {name: timing.peak_memory(call, device) for name, call in calls.items()} if memory else {}
    return {
        name: absent.get(name) or Measured(times.get(name), walls.get(name), hosts.get(name), peaks.get(name))
        for name in names
    }


def cases(
    shapes: tuple[str, ...], tokens: tuple[int, ...], ranks: tuple[int, ...], modes: tuple[Mode, ...]
) -> list[tuple[str, int, int, Mode]]:
    """What is measured: (shape, m, r, mode); of shapes of one size the first."""
    sizes = {SHAPES[name]: name for name in reversed(shapes)}
    first = [name for name in shapes if sizes[SHAPES[name]] == name]
    return [
        (shape, m, r, mode)
        for shape, r, mode, m in itertools.product(first, ranks, modes, tokens)
        if mode != "decode" or m <= MOST_DECODED
    ]


def lines(
    case: tuple[str, int, int, Mode],
    names: tuple[str, ...],
    ceilings: timing.Ceilings,
    device: torch.device,
    *,
    graph: bool = True,
    rounds: int = 7,
) -> Iterator[dict[str, Any]]:
    """The records of one case, a line for each provider."""
    shape, m, r, mode = case
    try:
        found = compare(
            SHAPES[shape],
            m,
            r,
            mode,
            names,
            device=device,
            gpu=graph and device.type == "cuda",
            wall=True,
            host=m <= MOST_DECODED,  # beyond, the queue of launches may fill and make the host wait
            memory=True,
            rounds=rounds,
        )
    except Exception as error:
        found = {name: Measured(absent=why(error)) for name in names}
    for name, measured in found.items():
        row = {"shape": shape, "nk": SHAPES[shape], "m": m, "r": r, "mode": mode, "provider": name}
        yield {**row, **dataclasses.asdict(measured), "ceilings": dataclasses.asdict(ceilings)}
