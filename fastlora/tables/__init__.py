"""What was measured where: tables of the fastest backends and tiles, and the lookup of the nearest shape.

A table is a JSON file about one device. Those beside this module are shipped; ``fastlora tune`` writes the user's own
into `folder`, and they win. Nothing here measures anything: a lookup reads what was written before. This module knows
neither backends nor kernels; both ask it by name.

    {"version": 1,
     "device": {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132},
     "made": {...},
     "choices": [{"direction": "forward", "dtype": "16-bit", "weight": "packed", "r": 16, "points": [
         {"m": 1, "n": 4096, "k": 4096, "us": {"torch": 80.1, "triton:library": 95.0}, "graph_us": {...}}]}],
     "tiles": {"project": [{"at": {"m": 16, "r": 16, "dtype": "16-bit"}, "tiles": {"block_m": 32}, "us": {...}}]}}

``name`` may hold the wildcards * and ?. ``us`` is the time of a call in a row of layers, launches included,
``graph_us`` the time of the GPU alone; the names are those of a backend, or of a backend and one of its forms.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

VERSION = 1
REACH = 4.0
"""How far away, in factors of two, a measured shape may be and still say which backend is the fastest."""
TILE_REACH = 2.0
"""The same for tiles, which are made for a range of M."""
TIE = 1.03
"""Times within this factor are one time: medians of two runs differ as much."""

PERSISTENT = 2**34
"""Without a table: multiplications from which on the persistent product of compute capability 9 and 10 takes less GPU
time than a library product with its side passes, as measured on an H200."""
PERSISTENT_WITH_LAUNCHES = 2**36
"""The same where its launches, which cost the host more, count."""
STACKED = 2**35
"""Without a table: multiplications from which on projections of one x take less GPU time stacked than one by one. q, k
and v of 2048 rows have 2^35.6 of them; half the rows leave a quarter of the multiprocessors without a tile."""
TILE_ROWS = range(17, 513)
"""Without a table: rows for which a tensor core product that decodes the weight in its tiles (compute capability 9.0)
takes less time than the kernels for fewer rows, and than making the weight dense for library products, as measured on
an H200."""
FULL_TILE_ROWS = range(513, 2049)
"""The same where the tiles of that product, of 128 outputs by 256 rows, leave few multiprocessors idle in their last
wave. Decoding inside of them costs a wave a fifth of its time, decoding before costs the same for any number of rows:
on an H200 both cost the same at about 2048 rows."""
TILE_FILL = 0.8
"""The part of the multiprocessors' time, over all waves, that has to have a tile."""
SPLIT_ROWS = range(9, 129)
"""Without a table: rows for which Triton's product that reads the packed weight once, its reduced side split among
programs, takes the GPU less time than C++, though its launches cost the host more. Its tiles hold no more rows than
these, and of Triton's own products it was measured to be the fastest for any fewer."""

_SHIPPED = Path(__file__).parent
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Device:
    """What a table is about, and what a lookup is made for."""

    type: str
    """cuda or cpu."""
    name: str
    """Of the GPU; in a table it may be a pattern. Of the CPU, its vector extension."""
    capability: str
    """Compute capability ("9.0"), or again the vector extension."""
    multiprocessors: int
    """Threads on a CPU."""

    def __str__(self) -> str:
        unit = "multiprocessors" if self.type == "cuda" else "threads"
        return f"{self.name} ({self.capability}, {self.multiprocessors} {unit})"


@dataclasses.dataclass(frozen=True)
class Class:
    """Problems whose measurements are comparable."""

    direction: str
    dtype: str
    weight: str
    """packed or dense."""
    r: int

    def __str__(self) -> str:
        return f"{self.direction} {self.dtype} {self.weight} r={self.r}"


Shape = tuple[int, int, int]
"""(M, N, K)"""


@dataclasses.dataclass(frozen=True)
class Times:
    """Median microseconds of each candidate at one shape."""

    us: Mapping[str, float]
    graph_us: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def ranking(self, captured: bool = False) -> list[str]:
        """The candidates, best first; ``captured``: for a CUDA graph, where the time of the GPU alone counts.

        A training step is a row of layers on a queue, where a call takes the longer of what it costs the host and
        the GPU: ``us`` is measured so and decides. Among candidates that tie there (all bound by the host, as a rule)
        the one that leaves the GPU earlier is first: it gains as soon as the host is no longer the bottleneck.
        """
        if captured and self.graph_us:
            return sorted(self.us, key=lambda name: (self.graph_us.get(name, math.inf), self.us[name], name))
        order = sorted(self.us, key=lambda name: (self.us[name], name))
        fastest = self.us[order[0]]
        ties = [name for name in order if self.us[name] <= TIE * fastest and name in self.graph_us]
        if ties and order[0] in ties:
            best = min(ties, key=lambda name: self.graph_us[name])
            order.remove(best)
            order.insert(0, best)
        return order


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The best fields of one kernel's tiles at one problem."""

    at: Mapping[str, int | str]
    """The arguments that the choice depends on, by name."""
    tiles: Mapping[str, int]
    us: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Of the tiles and of the built-in choice."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """One file."""

    device: Device
    choices: Mapping[Class, Mapping[Shape, Times]] = dataclasses.field(default_factory=dict)
    tiles: Mapping[str, tuple[Tiles, ...]] = dataclasses.field(default_factory=dict)
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Versions and commit of the measurement, for readers."""
    path: Path | None = None
    user: bool = False

    def __str__(self) -> str:
        name = self.path.name if self.path else "a table in memory"
        return f"{self.path if self.user and self.path else name}{'' if self.user else ' (shipped)'}"

    def merged(self, newer: Table) -> Table:
        """This table with everything that ``newer`` measured in place of what it measured before."""
        choices = {cls: dict(points) for cls, points in self.choices.items()}
        for cls, points in newer.choices.items():
            choices.setdefault(cls, {}).update(points)
        tiles = {kernel: {_key(entry): entry for entry in entries} for kernel, entries in self.tiles.items()}
        for kernel, entries in newer.tiles.items():
            tiles.setdefault(kernel, {}).update({_key(entry): entry for entry in entries})
        joined = {kernel: tuple(entries.values()) for kernel, entries in tiles.items()}
        return dataclasses.replace(newer, choices=choices, tiles=joined)

    def text(self) -> str:
        """The file's content: a line for every measured point."""
        choices = []
        for cls, points in sorted(self.choices.items(), key=lambda item: dataclasses.astuple(item[0])):
            head = json.dumps(dataclasses.asdict(cls))[:-1]
            lines = ",\n   ".join(
                json.dumps({"m": m, "n": n, "k": k, "us": _rounded(times.us), "graph_us": _rounded(times.graph_us)})
                for (m, n, k), times in sorted(points.items(), key=lambda item: (item[0][1:], item[0][0]))
            )
            choices.append(f'{head}, "points": [\n   {lines}]}}')
        tiles = []
        for kernel, entries in sorted(self.tiles.items()):
            lines = ",\n   ".join(
                json.dumps({"at": dict(entry.at), "tiles": dict(entry.tiles), "us": _rounded(entry.us)})
                for entry in sorted(entries, key=_key)
            )
            tiles.append(f"{json.dumps(kernel)}: [\n   {lines}]")
        parts = (
            f'{{"version": {VERSION}',
            f'"device": {json.dumps(dataclasses.asdict(self.device))}',
            f'"made": {json.dumps(dict(self.made))}',
            '"choices": [\n  ' + ",\n  ".join(choices) + "]",
            '"tiles": {\n  ' + ",\n  ".join(tiles) + "}}",
        )
        return ",\n ".join(parts) + "\n"

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, so that no other process reads half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(self.text(), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Found:
    """The measured point that answers a question."""

    table: Table
    cls: Class
    shape: Shape
    times: Times
    distance: float

    def __str__(self) -> str:
        m, n, k = self.shape
        times = ", ".join(f"{name} {self.times.us[name]:.4g} us" for name in self.times.ranking())
        return f"{self.table}: {self.cls} at M={m} N={n} K={k}: {times}"


def _rounded(times: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in times.items()}


def _key(entry: Tiles) -> tuple[tuple[str, str], ...]:
    return tuple(
        sorted((name, f"{value:012}" if isinstance(value, int) else value) for name, value in entry.at.items())
    )


# -- reading ---------------------------------------------------------------------------------------------------------


def _expect(ok: bool, where: str, what: str) -> None:
    if not ok:
        raise ValueError(f"{where} should be {what}")


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    _expect(isinstance(record, dict), where, "an object")
    if name not in record:
        raise ValueError(f"{where}.{name} is missing")
    value = record[name]
    _expect(isinstance(value, kind) and not isinstance(value, bool), f"{where}.{name}", f"of type {kind.__name__}")
    return value


def _size(record: Any, name: str, where: str, smallest: int = 1) -> int:
    value = _field(record, name, int, where)
    _expect(value >= smallest, f"{where}.{name}", f"at least {smallest}, not {value}")
    return value


def _times(record: Any, name: str, where: str) -> dict[str, float]:
    times = _field(record, name, dict, where)
    for key, value in times.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # An integer may be larger than any float.
        _expect(number and 0 < value <= sys.float_info.max, f"{where}.{name}.{key}", "a positive number")
    return times


def parse(record: Any, path: Path | None = None, user: bool = False) -> Table:
    """The table in what `json` has read. Raises ValueError, which names the field that is wrong."""
    version = _field(record, "version", int, "table")
    _expect(version == VERSION, "table.version", f"{VERSION}, not {version}")
    device = _field(record, "device", dict, "table")
    kind, name, capability = (_field(device, key, str, "device") for key in ("type", "name", "capability"))
    about = Device(kind, name, capability, _size(device, "multiprocessors", "device"))
    choices: dict[Class, dict[Shape, Times]] = {}
    for i, choice in enumerate(_field(record, "choices", list, "table")):
        where = f"choices[{i}]"
        direction, dtype, weight = (_field(choice, key, str, where) for key in ("direction", "dtype", "weight"))
        points = choices.setdefault(Class(direction, dtype, weight, _size(choice, "r", where, 0)), {})
        for j, point in enumerate(_field(choice, "points", list, where)):
            at = f"{where}.points[{j}]"
            us = _times(point, "us", at)
            _expect(bool(us), f"{at}.us", "the times of one candidate at least")
            graph = _times(point, "graph_us", at) if "graph_us" in point else {}
            points[_size(point, "m", at), _size(point, "n", at), _size(point, "k", at)] = Times(us, graph)
    tiles: dict[str, tuple[Tiles, ...]] = {}
    for kernel, entries in _field(record, "tiles", dict, "table").items():
        _expect(isinstance(entries, list), f"tiles.{kernel}", "of type list")
        made = []
        for i, entry in enumerate(entries):
            where = f"tiles.{kernel}[{i}]"
            at = _field(entry, "at", dict, where)
            for name, value in at.items():
                good = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
                _expect(good, f"{where}.at.{name}", "a size or a word")
            fields = _field(entry, "tiles", dict, where)
            sizes = {name: _size(fields, name, f"{where}.tiles") for name in fields}
            made.append(Tiles(at, sizes, _times(entry, "us", where) if "us" in entry else {}))
        tiles[kernel] = tuple(made)
    notes = _field(record, "made", dict, "table") if "made" in record else {}
    return Table(about, choices, tiles, notes, path, user)


def read(path: Path, user: bool = False) -> Table:
    """The table in a file. Raises OSError and ValueError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return parse(record, path, user)


def folder() -> Path:
    """Where the user's tables are: ``$FASTLORA_CACHE``, else ~/.cache/fastlora."""
    named = os.environ.get("FASTLORA_CACHE")
    return Path(named).expanduser() if named else Path(os.path.expanduser("~")) / ".cache" / "fastlora"


def _tables_in(directory: Path, user: bool) -> list[Table]:
    tables = []
    try:
        paths = sorted(directory.glob("*.json"))
    except OSError:
        return []
    for path in paths:
        try:
            tables.append(read(path, user))
        except (OSError, ValueError) as error:
            warnings.warn(f"the table {path} is ignored: {error}", stacklevel=2)
    return tables


# -- looking up ------------------------------------------------------------------------------------------------------


def tiles_gain(m: int, side: int, multiprocessors: int) -> bool:
    """Whether, without a table, m rows are left to the tiles of `TILE_ROWS`; ``side``: columns of the result."""
    if m not in FULL_TILE_ROWS:
        return m in TILE_ROWS
    tiles = -(-m // 256) * -(-side // 128)
    return tiles >= TILE_FILL * -(-tiles // multiprocessors) * multiprocessors


def bucket(m: int) -> int:
    """The nearest power of two: M varies from step to step, what is chosen by it should not."""
    return 1 << round(math.log2(m)) if m > 1 else m


def rank_bucket(r: int) -> int:
    """The rank that stands for ``r`` in a table: kernels pad ranks to a power of two of at least 16."""
    return max(16, 1 << (r - 1).bit_length()) if r else 0


def dtype_class(dtype: object, device_type: str) -> str:
    """Types that share measurements: GPUs multiply both 16-bit types at one rate, CPUs do not."""
    name = str(dtype).removeprefix("torch.")
    return "16-bit" if device_type == "cuda" and name in ("bfloat16", "float16") else name


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(max(a, 1)) - math.log2(max(b, 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """Every table that a process uses."""

    tables: tuple[Table, ...] = ()

    def about(self, device: Device) -> list[list[Table]]:
        """The tables that say something about ``device``, in groups, the closest device first.

        A GPU without a table of its own takes that of the same capability with the nearest number of multiprocessors.
        Within a group, which is about one device, the user's tables come first.
        """
        groups: dict[tuple[Any, ...], list[Table]] = {}
        for table in self.tables:
            other = table.device
            if (other.type, other.capability) == (device.type, device.capability):
                named = fnmatch.fnmatchcase(device.name, other.name)
                away = abs(other.multiprocessors - device.multiprocessors)
                groups.setdefault((away, not named, other.multiprocessors, other.name), []).append(table)
        return [sorted(groups[key], key=lambda table: not table.user) for key in sorted(groups)]

    def choice(self, device: Device, cls: Class, m: int, n: int, k: int) -> Found | None:
        """The nearest point that was measured for such a problem, None where there is none within `REACH`."""
        return _choice(self, device, dataclasses.replace(cls, r=rank_bucket(cls.r)), bucket(m), n, k)

    def tile(self, device: Device, kernel: str, at: Mapping[str, int | str]) -> tuple[Table, Tiles] | None:
        """The nearest entry of a kernel's tiles, None where there is none within `TILE_REACH`."""
        for group in self.about(device):
            near = []
            for order, table in enumerate(group):
                for entry in table.tiles.get(kernel, ()):
                    distance = _tile_distance(entry.at, at)
                    if distance is not None and distance <= TILE_REACH:
                        near.append((distance, _Descending(_key(entry)), order, table, entry))
            if near:
                *_, table, entry = min(near, key=lambda item: item[:3])
                return table, entry
        return None


@functools.total_ordering
class _Descending:
    """Of two shapes that are equally near, the larger: tiles for more rows run fewer programs."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and self.key == other.key

    def __lt__(self, other: _Descending) -> bool:
        return self.key > other.key


def _tile_distance(measured: Mapping[str, int | str], asked: Mapping[str, int | str]) -> float | None:
    if measured.keys() != asked.keys():
        return None
    squares = 0.0
    for name, value in asked.items():
        other = measured[name]
        if isinstance(value, int) and isinstance(other, int):
            squares += _octaves(value, other) ** 2
        elif value != other:
            return None
    return math.sqrt(squares)


_clear: list[Callable[[], None]] = []
_replaced = 0


def cached(maxsize: int) -> Callable[[_Function], _Function]:
    """`functools.lru_cache` for a function whose answer depends on the tables: emptied when they change."""

    def decorate(function: _Function) -> _Function:
        wrapped = functools.lru_cache(maxsize)(function)
        _clear.append(wrapped.cache_clear)
        return wrapped  # type: ignore[return-value]

    return decorate


@cached(maxsize=4096)
def _choice(tables: Tables, device: Device, cls: Class, m: int, n: int, k: int) -> Found | None:
    for group in tables.about(device):
        near = []
        for order, table in enumerate(group):
            for other, points in table.choices.items():
                if dataclasses.replace(other, r=cls.r) != cls:
                    continue
                for shape, times in points.items():
                    distance = math.hypot(*(_octaves(a, b) for a, b in zip(shape, (m, n, k), strict=True)))
                    if distance <= REACH:
                        key = (_octaves(other.r, cls.r), distance, _Descending(shape), order)
                        near.append((key, Found(table, other, shape, times, distance)))
        if near:
            return min(near, key=lambda item: item[0])[1]
    return None


def fastest_form(
    backend: str, able: Sequence[str], device: Device, cls: Class, m: int, n: int, k: int, captured: bool
) -> str | None:
    """The form of ``backend``, one of ``able``, that was the fastest at the nearest measured shape, if one was;
    ``captured``: for a CUDA graph."""
    found = current().choice(device, cls, m, n, k)
    for name in found.times.ranking(captured) if found else ():
        other, _, form = name.partition(":")
        if other == backend and form in able:
            return form
    return None


_current: Tables | None = None


def shipped() -> Tables:
    """The tables of this package alone."""
    return Tables(tuple(_tables_in(_SHIPPED, user=False)))


def current() -> Tables:
    """The user's and the shipped tables, read when they are first asked for."""
    global _current
    if _current is None:
        _current = Tables((*_tables_in(folder(), user=True), *shipped().tables))
    return _current


def reload() -> None:
    """Forget what was read, so that the files are read again."""
    _replace(None)


def _replace(tables: Tables | None) -> None:
    global _current, _replaced
    _current = tables
    _replaced += 1
    for clear in _clear:
        clear()


@contextlib.contextmanager
def use(tables: Tables) -> Iterator[None]:
    """Let ``tables`` be the ones that every lookup of this process asks."""
    before = _current
    _replace(tables)
    try:
        yield
    finally:
        _replace(before)


# -- what counts -----------------------------------------------------------------------------------------------------

_scopes_for_graphs = 0


def captured() -> bool:
    """Whether the GPU's time alone counts now, as within `fastlora.for_graphs`."""
    return _scopes_for_graphs > 0


def state() -> int:
    """A number that changes whenever what the tables and `captured` say may change: a key for other caches."""
    return 2 * _replaced + (_scopes_for_graphs > 0)


@contextlib.contextmanager
def for_graphs() -> Iterator[None]:
    """Within it, ``backend="auto"`` chooses by the GPU's time alone, as is right for calls captured in a CUDA graph.

    To be entered around the warm-up as well: a kernel that runs for the first time inside a capture would have to be
    compiled there. It holds for every thread of the process, since a backward pass runs in another one.
    """
    global _scopes_for_graphs
    _scopes_for_graphs += 1
    try:
        yield
    finally:
        _scopes_for_graphs -= 1


# -- what a measurement forces ---------------------------------------------------------------------------------------

forced_forms: dict[str, str] = {}
"""The form that a backend must use, whatever the tables say. Set while candidates are measured, empty otherwise."""
forced_tiles: dict[str, Callable[..., Any]] = {}
"""The same for tiles, by the kernel's name: called with what chooses them and with its arguments."""
