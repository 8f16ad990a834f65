"""One QLoRA layer, every provider side by side. ``python -m fastlora.bench.layer``"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from fastlora.bench import providers, record, timing

SHAPES = {
    "llama-3-8b q/o": (4096, 4096),
    "llama-3-8b k/v": (1024, 4096),
    "llama-3-8b gate/up": (14336, 4096),
    "llama-3-8b down": (4096, 14336),
    "llama-3-70b q/o": (8192, 8192),
    "qwen2.5-7b q/o": (3584, 3584),
    "qwen2.5-7b gate/up": (18944, 3584),
    "gemma-2-9b q": (4096, 3584),
    "smollm2-135m q/o": (576, 576),
    "smollm2-135m gate/up": (1536, 576),
}
"""(out_features, in_features)"""
TOKENS = (1, 4, 16, 64, 256, 1024, 2048, 8192, 16384)
MODES = ("fwd", "bwd", "fwd+bwd")
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Relative Frobenius distance within which every provider must agree with the first before it is timed: wide
enough for the peers, whose results are rounded several times."""


def _calls(forward: Any, layer: Any, x: torch.Tensor, dy: torch.Tensor, mode: str) -> Any:
    leaves = (x, *providers.trained(forward, layer)) if mode != "fwd" else ()
    if mode == "fwd":

        def call() -> Any:
            with torch.no_grad():
                return forward(x)

        return call
    if mode == "fwd+bwd":
        return lambda: torch.autograd.grad(forward(x), leaves, dy, allow_unused=True)
    y = forward(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)


def compare(
    shape: tuple[int, int],
    m: int,
    r: int,
    mode: str,
    names: list[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    graph: bool = False,
    rounds: int = 11,
) -> dict[str, timing.Times | str]:
    """Times of the named providers on one layer, weights rotated past the cache; a string says why one is absent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    first = providers.make_layer(*shape, r, dtype, device)
    copies = timing.copies_past_cache(first.nbytes, device)
    layers = [first, *(providers.make_layer(*shape, r, dtype, device) for _ in range(copies - 1))]
    x = torch.randn(m, shape[1], device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(m, shape[0], device=device, dtype=dtype)
    truth = providers.fused(first, "reference")(x)
    calls: dict[str, timing.Call] = {}
    absent: dict[str, timing.Times | str] = {}
    for name in names:
        try:
            made = [providers.PROVIDERS[name](layer) for layer in layers]
            if name != "two GEMMs (floor)":
                distance = ((made[0](x).float() - truth.float()).norm() / truth.float().norm()).item()
                if not distance <= _TOLERANCE[dtype]:
                    raise RuntimeError(f"wrong by {distance:.2g}")
            each = [_calls(forward, layer, x, dy, mode) for forward, layer in zip(made, layers, strict=True)]
            calls[name] = lambda i, each=each: each[i % len(each)]()  # type: ignore[misc]
            calls[name](0)
        except Exception as error:  # a peer that cannot run is a row of the table, not the end of it
            calls.pop(name, None)
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    times = timing.measure_graph(calls, rounds=rounds) if graph else timing.measure(calls, device, rounds=rounds)
    return {**times, **absent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES)[:4], choices=SHAPES)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--ranks", nargs="*", type=int, default=[16])
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--providers", nargs="*", default=list(providers.PROVIDERS))
    parser.add_argument("--graph", action="store_true", help="GPU time alone, from CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    path = args.out / record.device_name() / f"layer{'-graph' if args.graph else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = record.environment()
    with path.open("w") as file:
        for shape, r, m, mode in itertools.product(args.shapes, args.ranks, args.tokens, args.modes):
            found = compare(SHAPES[shape], m, r, mode, args.providers, graph=args.graph)
            for name, times in found.items():
                value = {"absent": times} if isinstance(times, str) else dataclasses.asdict(times)
                row = {"shape": shape, "nk": SHAPES[shape], "m": m, "r": r, "mode": mode, "provider": name, **value}
                file.write(json.dumps({**row, "graph": args.graph, **environment}) + "\n")
            cells = ", ".join(
                f"{name} {'-' if isinstance(times, str) else f'{times.p50:.1f}'}" for name, times in found.items()
            )
            print(f"{shape} M={m} r={r} {mode}: {cells}", flush=True)
    print(path)


if __name__ == "__main__":
    main()
