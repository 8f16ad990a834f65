"""What the package sets out to reach on an H200, measured in one run: ``fastlora bench --suite goals``.

bf16, rank 16, nested NF4, random data. Times are GPU time alone, from CUDA graphs, except where a row says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastlora import backends
from fastlora.bench import layer as layers
from fastlora.bench import providers, timing
from fastlora.bench.layer import Measured
from fastlora.bench.providers import BASE, FLOOR, Layer, Mode, Provider
from fastlora.bench.record import Row
from fastlora.nf4 import NF4Weight

OURS, ADDMM, PEFT_BF16, PEFT_FP32 = "fastlora", "dequant+mm+addmm", "PEFT bf16", "PEFT fp32"
PEERS = (ADDMM, PEFT_BF16, PEFT_FP32)
RANK = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the goals' cases are."""

    shrink: int = 1
    """What every dimension is divided by."""
    rounds: int = 11

    def shape(self, n: int, k: int) -> tuple[int, int]:
        return n // self.shrink, k // self.shrink

    def tokens(self, m: int) -> int:
        return max(m // self.shrink, 1)


FULL, QUICK = Size(), Size(shrink=32, rounds=2)


@dataclasses.dataclass
class Run:
    """One run of the suite: where it measures, how large, and what it has found."""

    device: torch.device
    size: Size = FULL
    times: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Quantiles of every variant, beside the rows' medians."""
    ceilings: timing.Ceilings | None = None

    def keep(self, case: str, metric: str, times: dict[str, timing.Times]) -> None:
        """Note the quantiles of a case."""
        self.times += [
            {"case": case, "metric": metric, "variant": name} | dataclasses.asdict(t) for name, t in times.items()
        ]

    def compare(self, shape: tuple[int, int], m: int, mode: Mode, names: tuple[str, ...], **what: Any) -> Any:
        """`layer.compare`, its quantiles kept."""
        found = layers.compare(shape, m, RANK, mode, names, device=self.device, rounds=self.size.rounds, **what)
        for field in ("gpu_us", "wall_us", "host_us"):
            times = {name: each for name, one in found.items() if (each := getattr(one, field)) is not None}
            self.keep(title(shape, m), f"{mode}, {field}", times)
        return found


def title(shape: tuple[int, int], m: int) -> str:
    return f"{shape[0]} x {shape[1]}, M = {m}"


def _launched(*times: timing.Times) -> str:
    return "with launches" if any(t.launches for t in times) else ""


def ratio(
    case: str, metric: str, found: dict[str, Measured], above: str, below: str, goal: float, at_least: bool
) -> Row:
    """The time of ``above`` over that of ``below``, or why there is none."""
    for name in (above, below):
        if found[name].gpu_us is None:
            return Row(case, metric, None, goal, at_least, f"{name}: {found[name].absent or 'not measured'}")
    a, b = found[above], found[below]
    # A time with launches is compared with its like.
    one, other = a.gpu_us, b.gpu_us
    if one and other and one.launches != other.launches:
        one, other = a.wall_us, b.wall_us
    if one is None or other is None:
        return Row(case, metric, None, goal, at_least, "one of the two could not be captured in a CUDA graph")
    return Row(case, metric, one.p50 / other.p50, goal, at_least, _launched(one, other))


def _microseconds(case: str, metric: str, one: Measured, field: str = "gpu_us", goal: float | None = None) -> Row:
    times: timing.Times | None = getattr(one, field)
    if times is None:
        return Row(case, metric, None, goal, note=one.absent or "not measured")
    return Row(case, metric, times.p50, goal, note=_launched(times) if field == "gpu_us" else "")


def _training(
    n: int, k: int, tokens: int, floor: float, speed_ups: dict[str, float], memory: bool = False
) -> Callable[[Run], Iterator[Row]]:
    """Forward and backward of x, A and B against the two bare GEMMs and against peers."""

    def case(run: Run) -> Iterator[Row]:
        shape, m = run.size.shape(n, k), run.size.tokens(tokens)
        case = title(shape, m)
        found = run.compare(shape, m, "fwd+bwd", (FLOOR, OURS, *PEERS), wall=True, memory=True)
        yield ratio(case, "fwd+bwd: time over the two bare GEMMs", found, OURS, FLOOR, floor, False)
        for peer in PEERS:
            if peer in speed_ups:
                yield ratio(case, f"fwd+bwd: speed-up over {peer}", found, peer, OURS, speed_ups[peer], True)
        for name in (FLOOR, OURS, *PEERS):
            yield _microseconds(case, f"fwd+bwd us, {name}", found[name])
        for name in (OURS, *PEERS):
            yield _microseconds(case, f"fwd+bwd us with launches, {name}", found[name], "wall_us")
        if memory:
            yield from _memory(case, found, run.device)

    return case


def _memory(case: str, found: dict[str, Measured], device: torch.device) -> Iterator[Row]:
    metric = "peak memory of fwd+bwd, MB"
    if device.type == "cpu":
        yield Row(case, metric, None, note="not counted on a CPU")
        return
    peaks = {name: one.peak_bytes / 1e6 for name, one in found.items() if name != FLOOR and one.peak_bytes is not None}
    ours, best = peaks.pop(OURS, None), min(peaks, key=lambda name: peaks[name], default=None)
    note = f"best peer: {best}" if best else "no peer ran"
    yield Row(case, metric, ours, peaks[best] if best else 0.0, note=note if ours else found[OURS].absent or "")
    for name, peak in peaks.items():
        yield Row(case, f"{metric}, {name}", peak)


def _forward(n: int, k: int, tokens: int, goal: float) -> Callable[[Run], Iterator[Row]]:
    def case(run: Run) -> Iterator[Row]:
        shape, m = run.size.shape(n, k), run.size.tokens(tokens)
        found = run.compare(shape, m, "fwd", (FLOOR, OURS))
        yield ratio(title(shape, m), "fwd: time over the bare GEMM", found, OURS, FLOOR, goal, False)
        for name in (FLOOR, OURS):
            yield _microseconds(title(shape, m), f"fwd us, {name}", found[name])

    return case


def _decode(
    n: int, k: int, m: int, *, goal_us: float | None = None, roofline: float | None = None
) -> Callable[[Run], Iterator[Row]]:
    """Forward without gradients, the weights rotated past the cache."""

    def case(run: Run) -> Iterator[Row]:
        shape = run.size.shape(n, k)
        case, names = title(shape, m), (FLOOR, BASE, OURS, PEFT_BF16)
        found = run.compare(shape, m, "decode", names)
        yield _microseconds(case, "decode us", found[OURS], goal=goal_us)
        if roofline is not None:
            ours = found[OURS]
            assert run.ceilings is not None
            packed = NF4Weight.empty(shape).nbytes
            least = run.ceilings.roofline(layers.moved_bytes(packed, shape, m, "decode"), 0)
            value, note = None, ours.absent or "not measured"
            if ours.gpu_us is not None:
                value, note = ours.gpu_us.p50 / least, _launched(ours.gpu_us)
            yield Row(case, "decode: time over the byte roofline", value, roofline, note=note)
            yield Row(case, "byte roofline, us", least)
        for peer in (FLOOR, BASE):
            yield ratio(case, f"decode: speed-up over {_DECODERS[peer]}", found, peer, OURS, 1.0, True)
        for name in (FLOOR, BASE, PEFT_BF16):
            yield _microseconds(case, f"decode us, {_DECODERS[name]}", found[name])

    return case


_DECODERS = {FLOOR: "bf16 cuBLAS", BASE: "bitsandbytes without an adapter", PEFT_BF16: PEFT_BF16}


def _launches(run: Run) -> Iterator[Row]:
    """The host's time for one layer, forward and backward, where it hides nothing."""
    shape, m = run.size.shape(4096, 4096), run.size.tokens(256)
    case, names = title(shape, m), (OURS, ADDMM, PEFT_BF16, "PEFT fp32 autocast")
    found = run.compare(shape, m, "fwd+bwd", names, gpu=False, host=True)
    yield _microseconds(case, "host us of fwd+bwd", found[OURS], "host_us", 120.0)
    for name in names[1:]:
        yield _microseconds(case, f"host us of fwd+bwd, {name}", found[name], "host_us")


def _dequantization(n: int, k: int) -> Callable[[Run], Iterator[Row]]:
    """Against the device's copy bandwidth, a copy of as many bytes and bitsandbytes, all rotated past the cache."""

    def case(run: Run) -> Iterator[Row]:
        with timing.side_stream(run.device):
            yield from measured(run)

    def measured(run: Run) -> Iterator[Row]:
        device, shape = run.device, run.size.shape(n, k)
        case = f"dequantize {shape[0]} x {shape[1]}, nested NF4"
        layer = providers.make_layer(*shape, RANK, torch.bfloat16, device)
        nbytes = layer.nbytes + layer.dense.nbytes
        copies = timing.copies_past_cache(nbytes, device)
        each = [layer, *(providers.copy_of(layer) for _ in range(copies - 1))]
        outs = [one.dense for one in each]
        # Two buffers, not the halves of one: the second half may start where a copy cannot use wide loads.
        halves = [[torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)] for _ in each]
        truth = layer.w.dequantize(torch.bfloat16)
        variants: dict[str, timing.Call] = {
            "fastlora": lambda i: backends.dequantize(each[i % copies].w, torch.bfloat16, outs[i % copies]),
            "copy": lambda i: halves[i % copies][0].copy_(halves[i % copies][1]),
        }
        absent = ""
        try:
            from bitsandbytes import functional as bnb

            theirs = [one.w.to_bitsandbytes() for one in each]
            into = outs if device.type == "cuda" else [None] * copies  # it has no out on a CPU
            variants["bitsandbytes"] = lambda i: bnb.dequantize_4bit(
                theirs[i % copies], theirs[i % copies].quant_state, out=into[i % copies]
            )
            variants["bitsandbytes"](0)
        except Exception as error:
            absent = layers.why(error)
            variants.pop("bitsandbytes", None)
        outs[0].zero_()
        variants["fastlora"](0)
        if not torch.equal(outs[0], truth):
            raise RuntimeError("the result differs from the format's definition")
        times = timing.measure_graph(variants, calls=timing.whole_rotations(20, copies), rounds=run.size.rounds)
        run.keep(case, "dequantize, gpu", times)
        ours, copy = times["fastlora"], times["copy"]
        note = _launched(ours, copy)
        assert run.ceilings is not None
        share = nbytes / run.ceilings.bytes_per_second * 1e6 / ours.p50
        yield Row(case, "share of the copy bandwidth", share, 0.9, True, note)
        metric = "speed-up over bitsandbytes"
        if (peer := times.get("bitsandbytes")) is None:
            yield Row(case, metric, None, 1.7, True, absent)
        else:
            yield Row(case, metric, peer.p50 / ours.p50, 1.7, True, _launched(ours, peer))
        for name, value in times.items():
            yield Row(case, f"dequantize us, {name}", value.p50, note=_launched(value))

    return case


def saved_bytes(provider: Provider, layer: Layer, x: torch.Tensor) -> int:
    """Bytes kept for the backward pass beside x, the adapters and the packed weight."""
    known = {t.untyped_storage().data_ptr() for t in (x, *provider.trained, *layer.w.tensors().values())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = provider.forward(x)  # what is saved lives, at an address of its own, as long as the result
    total = sum(kept.values())
    del y
    return total


def _saved(run: Run) -> Iterator[Row]:
    shape, m = run.size.shape(4096, 4096), run.size.tokens(8192)
    layer = providers.make_layer(*shape, RANK, torch.bfloat16, run.device)
    x = torch.zeros(m, shape[1], dtype=torch.bfloat16, device=run.device, requires_grad=True)
    saved, u = saved_bytes(providers.fused(layer), layer, x), m * RANK * x.element_size()
    yield Row(title(shape, m), "saved for backward beside x and references, bytes", saved, u)


def differing(provider: Provider, x: torch.Tensor, dy: torch.Tensor) -> int:
    """Elements of the output and of the gradients that differ between two runs."""
    runs = []
    for _ in range(2):
        y = provider.forward(x)
        runs.append([y.detach(), *torch.autograd.grad(y, (x, *provider.trained), dy)])
    return sum(int((a != b).sum()) for a, b in zip(*runs, strict=True))


def _repeated(backend: str, tokens: int) -> Callable[[Run], Iterator[Row]]:
    def case(run: Run) -> Iterator[Row]:
        (n, k), m = run.size.shape(4096, 4096), run.size.tokens(tokens)
        layer = providers.make_layer(n, k, RANK, torch.bfloat16, run.device)
        generator = torch.Generator(run.device).manual_seed(1)
        x, dy = (torch.randn(m, size, device=run.device, dtype=torch.bfloat16, generator=generator) for size in (k, n))
        metric = f"run to run, backend {backend}: differing elements"
        reasons = []
        if backend != "auto":
            problem = backends.Problem(m, n, k, RANK, device_type=run.device.type)
            reasons = backends.BACKENDS[backend].unsupported(problem, backends.this_machine())
        if reasons:
            yield Row(title((n, k), m), metric, None, note="; ".join(reasons))
        else:
            found = differing(providers.fused(layer, backend), x.requires_grad_(), dy)
            yield Row(title((n, k), m), metric, found, 0)

    return case


def _ceilings(run: Run) -> Iterator[Row]:
    run.ceilings = timing.ceilings(run.device, rounds=run.size.rounds)
    yield Row("device", "copy, TB/s", run.ceilings.bytes_per_second / 1e12)
    yield Row("device", "bf16 GEMM, TFLOP/s", run.ceilings.flops_per_second / 1e12)


CASES: dict[str, Callable[[Run], Iterator[Row]]] = {
    "device": _ceilings,
    "forward": _forward(4096, 4096, 8192, 1.08),
    **{
        f"training {n} x {k}, {m}": _training(n, k, m, floor, speed_ups, memory=m == 8192)
        for m, floor, speed_ups in (
            (8192, 1.12, {ADDMM: 1.15, PEFT_BF16: 1.3, PEFT_FP32: 1.9}),
            (2048, 1.25, {ADDMM: 1.3}),
        )
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336))
    },
    "training 1024 x 4096, 8192": _training(1024, 4096, 8192, 1.35, {}),
    **{
        f"decode 4096 x 4096, {m}": _decode(4096, 4096, m, goal_us=goal)
        for m, goal in ((1, 6.0), (16, 6.0), (64, 8.0), (256, 18.0))
    },
    **{f"decode 14336 x 4096, {m}": _decode(14336, 4096, m, roofline=2.0) for m in (1, 16)},
    "launches": _launches,
    "dequantize 4096 x 4096": _dequantization(4096, 4096),
    "dequantize 14336 x 4096": _dequantization(14336, 4096),
    "saved": _saved,
    **{f"repeated {m}": _repeated("auto", m) for m in (1, 16, 64, 256, 2048)},
    **{f"repeated {backend}": _repeated(backend, 2048) for backend in ("triton", "torch")},
}
"""By the name that the progress bar shows, in the order in which they run."""


def measure(name: str, run: Run) -> list[Row]:
    """The rows of one case. A case that fails is a row that says why, with a goal that it misses."""
    rows = []
    try:
        for row in CASES[name](run):
            rows.append(row)
    except Exception as error:
        rows.append(Row(name, "measured", None, 1.0, True, layers.why(error)))
    return rows
