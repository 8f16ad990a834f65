"""Tiles from the tables: what turns a function of ``config`` into a lookup with that function as its fallback."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastlora import tables

_FIELDS = {"block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages"}
"""What a table may say. block_r follows from the rank: what holds one rank in a tile would be wrong for the next."""
_TYPES = {"16-bit": torch.bfloat16, "float32": torch.float32}


def fields(block_m: int = 0, block_n: int = 0, block_k: int = 0, *, warps: int = 0, stages: int = 0) -> dict[str, int]:
    """The fields of a candidate; one that is not given stays as the function chooses it."""
    given = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps, "num_stages": stages}
    return {name: value for name, value in given.items() if value}


class Tuned:
    """The tiles of one kernel: those that the tables hold for the nearest problem, else those of the function.

    ``choose`` takes the sizes and types that its tiles depend on, a ``device`` and ``tiles``: without tiles it chooses
    by its own rules, with them it returns what of them fits, raises ValueError where nothing does, or returns None
    where its kernel does not run at all. M decides by the nearest power of two only, and a table holds few, so few
    variants of a kernel are ever compiled.
    """

    def __init__(self, choose: Callable[..., Any], candidates: tuple[dict[str, int], ...]) -> None:
        self.name, self._choose, self._candidates = choose.__name__, choose, candidates
        self._signature = inspect.signature(choose)
        self._chosen = tables.cached(maxsize=1024)(self._look_up)
        functools.update_wrapper(self, choose)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if tables.forced_tiles and self.name in tables.forced_tiles:
            return tables.forced_tiles[self.name](self, *args, **kwargs)
        return self._chosen(*args, **kwargs)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The function's choice, whatever the tables hold."""
        return self._choose(*args, **kwargs)

    def _look_up(self, *args: Any, **kwargs: Any) -> Any:
        device, at = self.problem(*args, **kwargs)
        found = tables.current().tile(device.described, self.name, at) if device.name else None
        if found is not None:
            try:
                return self.proposed(found[1].tiles, *args, **kwargs)
            except ValueError:  # `skipped` says which and why
                pass
        return self._choose(*args, **kwargs)

    def problem(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, int | str]]:
        """The device, and by name what else the tiles depend on, as a table has it."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        at: dict[str, int | str] = {}
        for name, value in bound.arguments.items():
            if name in ("device", "tiles"):
                continue
            if name == "m":
                value = tables.bucket(value)
            elif name == "r":
                value = tables.rank_bucket(value)
            elif isinstance(value, torch.dtype):
                value = tables.dtype_class(value, "cuda")
            at[name] = "none" if value is None else value
        return bound.arguments["device"], at

    def arguments(self, at: Mapping[str, int | str]) -> dict[str, Any]:
        """The inverse of `problem`, less the device. Raises ValueError where ``at`` belongs to other arguments."""
        names = [name for name in self._signature.parameters if name not in ("device", "tiles")]
        if set(at) != set(names):
            raise ValueError(f"is about {', '.join(sorted(at))}; the tiles depend on {', '.join(names)}")
        words = {**_TYPES, "none": None, "forward": "forward", "backward": "backward"}
        for name, value in at.items():
            if isinstance(value, str) and value not in words:
                raise ValueError(f"{name} should be a size or one of {', '.join(words)}, not {value}")
        return {name: words[value] if isinstance(value, str) else value for name, value in at.items()}

    def proposed(self, wanted: Mapping[str, int], *args: Any, **kwargs: Any) -> Any:
        """The function's own tiles with other fields. Raises ValueError where they cannot run."""
        if unknown := set(wanted) - _FIELDS:
            raise ValueError(f"{', '.join(sorted(unknown))} cannot be chosen by a table")
        base = self._choose(*args, **kwargs)
        tiles = None if base is None else dataclasses.replace(base, **wanted)
        got = None if base is None else self._choose(*args, **kwargs, tiles=tiles)
        if got is None:
            raise ValueError("this kernel does not run for the problem")
        if got != tiles:
            named = (field.name for field in dataclasses.fields(got))
            limits = (f"{name}={getattr(got, name)}" for name in named if getattr(got, name) != getattr(tiles, name))
            raise ValueError(f"fits only with {', '.join(limits)}")
        return tiles

    def candidates(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, int]]:
        """What to measure for one problem: every listed candidate, with as many stages as fit, that can run here, has
        no more rows than twice the problem's, and is not the function's own choice."""
        base = self._choose(*args, **kwargs)
        rows = max(16, 2 * int(self.problem(*args, **kwargs)[1].get("m", 1 << 30)))
        seen = [] if base is None else [base]
        for wanted in self._candidates if base is not None else ():
            try:
                tiles = self._choose(*args, **kwargs, tiles=dataclasses.replace(base, **wanted))
                if tiles is None or tiles in seen or tiles.block_m > rows:
                    continue
                fitting = {**wanted, "num_stages": tiles.num_stages}
                if self.proposed(fitting, *args, **kwargs) == tiles:
                    seen.append(tiles)
                    yield fitting
            except ValueError:
                continue


TUNED: dict[str, Tuned] = {}
"""Every kernel whose tiles the tables may choose, by the name of its function."""


def tuned(*candidates: dict[str, int]) -> Callable[[Callable[..., Any]], Tuned]:
    """Make a function look its tiles up first; ``candidates`` are what tuning tries."""

    def decorate(choose: Callable[..., Any]) -> Tuned:
        TUNED[choose.__name__] = Tuned(choose, candidates)
        return TUNED[choose.__name__]

    return decorate


def skipped(device: Any) -> list[str]:
    """The entries that the tables hold for ``device`` and that cannot run on it, each with the reason."""
    reasons = []
    for table in (table for group in tables.current().about(device.described) for table in group):
        for kernel, entries in table.tiles.items():
            for entry in entries:
                try:
                    if kernel not in TUNED:
                        raise ValueError("there is no such kernel")
                    TUNED[kernel].proposed(entry.tiles, **TUNED[kernel].arguments(entry.at), device=device)
                except (ValueError, TypeError) as error:
                    at = " ".join(f"{name}={value}" for name, value in entry.at.items())
                    reasons.append(f"{table}: {kernel} at {at}: {error}")
    return reasons
