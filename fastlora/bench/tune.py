"""Measure which backend, which form of it and which tiles are the fastest, and write that as a table.

Every candidate is compared with the reference before it is timed, the candidates of a point take turns, and weights are
rotated past the cache. Selection reads the tables that this writes (`fastlora.tables`) and never measures itself.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import importlib
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora import backends, native, reference, tables
from fastlora.backends import BACKENDS, Machine, Problem
from fastlora.bench import record, timing
from fastlora.nf4 import NF4Weight, Weight
from fastlora.training.errors import UserError, first_line, near

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
"""(N, K) of the projections of Llama-3-8B."""
TOKENS = (1, 16, 64, 256, 1024, 2048, 8192)
QUICK_TOKENS = (1, 64, 1024, 8192)
TILE_TOKENS = {"gemm": (16, 64, 256), "project": (16, 256, 4096), "epilogue": (16, 256, 4096), "buffer_gemm": (8192,)}
"""M at which the tiles of a kernel are tried; of one that is blind to M, at 4096."""
_KERNELS = ("buffer_gemm", "project", "gradient", "one_pass", "epilogue", "gemm")
"""By what their tiles gain for the seconds that it takes to compile them."""
_SCALE = 2.0
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
"""Relative Frobenius distance from the float32 reference: wide enough for any order of roundings, far too narrow for a
wrong term."""
_HOPELESS = 4.0
"""A candidate that a first look finds so many times slower than the fastest is not measured again."""
_TILES_SHARE = 0.4
"""Of the budget: choices of a backend gain more than tiles."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: tuple[tuple[int, int], ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    ranks: tuple[int, ...] = (16,)
    dtype: torch.dtype = torch.bfloat16
    quant_type: str | None = "nf4"
    device_type: str = "cuda"
    candidates: tuple[str, ...] | None = None
    """Names of backends, or of a backend and one of its forms; None for all that can run."""
    kernels: tuple[str, ...] = ()
    rounds: int = 7
    budget: float = math.inf
    """Seconds after which what is left is left out."""

    def problems(self) -> Iterator[Problem]:
        """Every point, those of one layer in a row."""
        for (n, k), r, m, direction in itertools.product(self.shapes, self.ranks, self.tokens, _DIRECTIONS):
            yield Problem(
                m, n, k, r, self.dtype, self.device_type, self.quant_type, 64, self.quant_type is not None, direction
            )


_DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass
class Outcome:
    """What was measured and what could not be."""

    choices: dict[tables.Class, dict[tables.Shape, tables.Times]] = dataclasses.field(default_factory=dict)
    tiles: dict[str, list[tables.Tiles]] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why a candidate has no time, by its name and problem."""
    left_out: int = 0

    def table(self, device: tables.Device, made: dict[str, Any]) -> tables.Table:
        """The table about ``device``."""
        about = dataclasses.replace(device, name=glob.escape(device.name))
        return tables.Table(about, self.choices, {name: tuple(entries) for name, entries in self.tiles.items()}, made)


# -- what is asked for -----------------------------------------------------------------------------------------------


def parse_shapes(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(N, K) of "N,K" words. Raises UserError for anything else."""
    shapes = []
    for word in (part for text in words for part in text.split()):
        match = re.fullmatch(r"([1-9]\d*)[,x]([1-9]\d*)", word)
        if match is None:
            raise UserError(
                f"shapes: {word!r} is no shape: write it as N,K (out_features,in_features), such as 14336,4096"
            )
        shapes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(shapes))


def parse_sizes(name: str, words: Sequence[str], smallest: int) -> tuple[int, ...]:
    """The sizes in words such as "1,16". Raises UserError for anything else."""
    sizes = []
    for word in (part for text in words for part in re.split(r"[,\s]+", text) if part):
        if not re.fullmatch(r"\d+", word) or int(word) < smallest:
            raise UserError(f"{name}: {word!r} is no size: write whole numbers from {smallest} on, such as 16,64")
        sizes.append(int(word))
    return tuple(dict.fromkeys(sizes))


def model_shapes(model: str) -> tuple[tuple[int, int], ...]:
    """(N, K) of the linear layers of a transformers model, less its output layer.

    ``model`` is a folder, a configuration file or a name that transformers knows; no weight is read.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # what a configuration can get wrong is up to transformers
        raise UserError(f"model: cannot make {model} ({first_line(error)}): name a folder with config.json") from error
    head = made.get_output_embeddings()
    layers = (module for module in made.modules() if isinstance(module, nn.Linear) and module is not head)
    shapes = tuple(dict.fromkeys((layer.out_features, layer.in_features) for layer in layers))
    if not shapes:
        raise UserError(f"model: {model} has no linear layers: name their sizes with --shapes N,K")
    return shapes


def _forms(name: str, problem: Problem) -> tuple[str, ...]:
    if name == "triton":
        config = importlib.import_module("fastlora.kernels.config")
        device = torch.device(problem.device_type)
        forms = config.forms(problem.m, problem.dtype, device, problem.quant_type is not None)
    elif name == "cuda":
        p, capability = problem, torch.cuda.get_device_capability()
        forms = native.forms(p.m, p.n, p.k, p.r, p.blocksize, capability, p.direction)
    else:
        return (name,)
    return tuple(f"{name}:{form}" for form in forms)


def candidates(plan: Plan, problem: Problem, machine: Machine) -> list[str]:
    """The backends, with their forms, to compare for ``problem``.

    Without names in the plan: all that can run on this device as what they are, so neither the reference nor
    interpreted kernels. Raises UserError for a name that is unknown or cannot run.
    """
    names: list[str] = []
    for name in plan.candidates or BACKENDS:
        backend = name.partition(":")[0]
        if backend not in BACKENDS:
            raise UserError(f"backends: there is no {name!r}; choose from {', '.join(BACKENDS)}")
        reasons = BACKENDS[backend].unsupported(problem, machine)
        if plan.candidates is None:
            if reasons or name == "reference" or (name == "triton" and plan.device_type != "cuda"):
                continue
        elif reasons:
            # A backend may be made for some of the sizes only.
            if not any(not BACKENDS[backend].unsupported(other, machine) for other in plan.problems()):
                raise UserError(f"backends: {name} cannot run {problem}: {'; '.join(reasons)}")
            continue
        forms = _forms(backend, problem)
        if name == backend:
            names += forms
        elif name in forms:
            names.append(name)
        elif not any(name in _forms(backend, other) for other in plan.problems()):
            raise UserError(f"backends: there is no {name!r} on this device; choose from {', '.join(forms)}")
    return list(dict.fromkeys(names))


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Layer:
    w: Weight
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None


def _copy(w: Weight) -> Weight:
    if not isinstance(w, NF4Weight):
        return w.clone()
    held = ((field.name, getattr(w, field.name)) for field in dataclasses.fields(w))
    cloned: dict[str, Any] = {name: t.clone() for name, t in held if isinstance(t, torch.Tensor)}
    return dataclasses.replace(w, **cloned)


@functools.lru_cache(maxsize=1)
def _layers(n: int, k: int, r: int, dtype: torch.dtype, device_type: str, quant_type: str | None) -> list[_Layer]:
    """One layer, as often as it takes that a call finds none of its weights in the cache."""
    device = torch.device(device_type)
    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, columns: int, size: float) -> torch.Tensor:
        return torch.randn(rows, columns, device=device, generator=generator).mul_(size).to(dtype)

    matrix = random(n, k, k**-0.5)
    w: Weight = matrix if quant_type is None else NF4Weight.quantize(matrix, quant_type=quant_type, nested=True)
    a, b = (random(r, k, k**-0.5), random(n, r, r**-0.5)) if r else (None, None)
    copies = timing.copies_past_cache(w.nbytes, device)
    return [_Layer(w, a, b), *(_Layer(_copy(w), a, b) for _ in range(copies - 1))]


def _rotated(layers: list[_Layer], m: int, dtype: torch.dtype) -> list[_Layer]:
    """Those of `_layers` that calls of m rows rotate among: the larger x and dy are, the sooner W leaves the cache."""
    w = layers[0].w
    return layers[: timing.copies_past_cache(w.nbytes + m * sum(w.shape) * dtype.itemsize, w.device)]


def _distance(results: Sequence[Any], truth: Sequence[Any]) -> float:
    """The largest relative Frobenius distance, infinite for anything that is not finite."""
    worst = 0.0
    for got, expected in zip(results, truth, strict=True):
        if expected is None or not expected.numel():
            continue
        away = ((got.float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        worst = max(worst, away if math.isfinite(away) else math.inf)
    return worst


def _seconds(call: timing.Call, device: torch.device) -> float:
    """A first look at how long a call takes, in a row of three."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(3):
        call(i)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 3


def measure_problem(problem: Problem, names: Sequence[str], rounds: int, absent: dict[str, str]) -> tables.Times | None:
    """Times of the candidates ``names``; what is wrong or fails goes to ``absent``, and None when all do."""
    device = torch.device(problem.device_type)
    layers = _layers(problem.n, problem.k, problem.r, problem.dtype, problem.device_type, problem.quant_type)
    generator = torch.Generator(device).manual_seed(1)
    x, dy = (
        torch.randn(problem.m, columns, device=device, generator=generator).to(problem.dtype)
        for columns in (problem.k, problem.n)
    )
    layers = _rotated(layers, problem.m, problem.dtype)
    a, b = layers[0].lora_a, layers[0].lora_b
    a32, b32 = (None if t is None else t.float() for t in (a, b))
    w = layers[0].w if isinstance(layers[0].w, NF4Weight) else layers[0].w.float()
    y32, u32 = reference.forward(x.float(), w, a32, b32, None, _SCALE, None)
    u = u32.to(problem.dtype)
    needs = (True, a is not None, a is not None)
    if problem.direction == "forward":
        truth: tuple[Any, ...] = (y32, u32)
    else:
        truth = reference.backward(dy.float(), x.float(), u.float(), w, a32, b32, _SCALE, None, needs)
    del y32

    def calling(name: str) -> timing.Call:
        backend, _, form = name.partition(":")
        run = BACKENDS[backend]

        def call(i: int) -> Any:
            if form:
                tables.forced_forms[backend] = form
            layer = layers[i % len(layers)]
            if problem.direction == "forward":
                return run.forward(x, layer.w, layer.lora_a, layer.lora_b, None, _SCALE, None)
            return run.backward(dy, x, u, layer.w, layer.lora_a, layer.lora_b, _SCALE, None, needs)

        return call

    calls: dict[str, timing.Call] = {}
    first: dict[str, float] = {}
    try:
        with torch.no_grad():
            for name in names:
                try:
                    call = calling(name)
                    away = _distance(call(0), truth)
                    if not away <= _TOLERANCE[problem.dtype]:
                        raise RuntimeError(f"wrong by {away:.2g}")
                    first[name] = _seconds(call, device)
                    calls[name] = call
                except Exception as error:  # one that cannot run is a line of the report, not the end of it
                    absent[f"{name}, {problem}"] = f"{type(error).__name__}: {first_line(error)}"
            if not calls:
                return None
            limit = _HOPELESS * min(first.values())
            close = {name: call for name, call in calls.items() if first[name] <= limit}
            us = {name: seconds * 1e6 for name, seconds in first.items() if name not in close}
            timed = timing.measure(close, device, rounds=rounds, budget_ms=4.0)
            us |= {name: times.p50 for name, times in timed.items()}
            graph: dict[str, float] = {}
            if device.type == "cuda":
                in_graph = timing.whole_rotations(max(2, min(20, int(4e3 / min(us.values())))), len(layers))
                try:
                    replayed = timing.measure_graph(close, calls=in_graph, rounds=rounds)
                    graph = {name: times.p50 for name, times in replayed.items()}
                except RuntimeError as error:  # the times with launches decide without it
                    absent[f"CUDA graph, {problem}"] = first_line(error)
    finally:
        tables.forced_forms.clear()
    return tables.Times({name: us[name] for name in calls}, {name: graph[name] for name in calls if name in graph})


_FORM = {"buffer_gemm": "persistent", "gemm": "decode"}
"""The form of the Triton backend that runs a kernel."""


def _runners(n: int, k: int, m: int, r: int, plan: Plan) -> dict[str, Callable[[int], Sequence[torch.Tensor | None]]]:
    """A call that contains each kernel, by the name of the function that chooses its tiles.

    The products are timed as the whole of a layer that runs them, so that what else shares their tiles has its say.
    """
    epilogue, lora = (importlib.import_module(f"fastlora.kernels.{name}") for name in ("epilogue", "lora"))
    triton = BACKENDS["triton"]
    layers = _layers(n, k, r, plan.dtype, plan.device_type, plan.quant_type)
    a, b = layers[0].lora_a, layers[0].lora_b
    assert a is not None
    assert b is not None
    device = torch.device(plan.device_type)
    generator = torch.Generator(device).manual_seed(1)
    x, dy, u = (torch.randn(m, size, device=device, generator=generator).to(plan.dtype) for size in (k, n, r))
    layers = _rotated(layers, m, plan.dtype)

    @functools.cache
    def sums() -> torch.Tensor:
        return torch.randn(m, n, device=device, generator=generator)

    def layer(form: str, i: int) -> Sequence[torch.Tensor | None]:
        return (*forward(form, i), *backward(form, i))

    def forward(form: str, i: int) -> Sequence[torch.Tensor | None]:
        tables.forced_forms["triton"] = form
        return triton.forward(x, layers[i % len(layers)].w, a, b, None, _SCALE, None)[:1]

    def backward(form: str, i: int) -> Sequence[torch.Tensor | None]:
        tables.forced_forms["triton"] = form
        return triton.backward(dy, x, u, layers[i % len(layers)].w, a, b, _SCALE, None, (True, True, True))

    def adapters(i: int) -> Sequence[torch.Tensor | None]:
        _, da, db = triton.backward(dy, x, u, layers[0].w, a, b, _SCALE, None, (False, True, True))
        return da, db

    return {
        "buffer_gemm forward": functools.partial(forward, _FORM["buffer_gemm"]),
        "buffer_gemm backward": functools.partial(backward, _FORM["buffer_gemm"]),
        "gemm": functools.partial(layer, _FORM["gemm"]),
        "project": lambda i: lora.project_x(x, a, _SCALE, None),
        "gradient": adapters,
        "one_pass": adapters,
        "epilogue": lambda i: (epilogue.finish(sums(), u, b, None, _SCALE, plan.dtype),),
    }


def tunable() -> list[str]:
    """Names of the kernels whose tiles can be measured; none without Triton."""
    if backends.this_machine().triton is not None:
        return []
    return list(_KERNELS)


@dataclasses.dataclass(frozen=True)
class TileJob:
    """Tiles to find: those of a kernel for M rows of one layer and a rank."""

    kernel: str
    m: int
    n: int
    k: int
    r: int
    direction: str = ""
    """Where the tiles of the two passes differ, which one."""

    def __str__(self) -> str:
        return (
            f"{self.kernel}{f' {self.direction}' if self.direction else ''} M={self.m} N={self.n} K={self.k} R={self.r}"
        )


def measure_tiles(job: TileJob, plan: Plan, absent: dict[str, str]) -> tables.Tiles | None:
    """The fastest tiles of a kernel; None where it does not run."""
    kernel, m, r = job.kernel, job.m, job.r
    chooser = importlib.import_module("fastlora.kernels.tuned").TUNED[kernel]
    device = torch.device(plan.device_type)
    if device.type == "cuda" and kernel in _FORM:
        config = importlib.import_module("fastlora.kernels.config")
        if _FORM[kernel] not in config.forms(m, plan.dtype, device, plan.quant_type is not None):
            return None
    call = _runners(job.n, job.k, m, r, plan)[f"{kernel} {job.direction}".strip()]
    problems: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def own(chooser: Any, *args: Any, **kwargs: Any) -> Any:
        problems.append((args, kwargs))
        return chooser.own(*args, **kwargs)

    def forcing(choose: Callable[..., Any]) -> timing.Call:
        def forced(i: int) -> Any:
            tables.forced_tiles[kernel] = choose
            return call(i)

        return forced

    try:
        with torch.no_grad():
            truth = [None if t is None else t.float() for t in forcing(own)(0)]
            if not problems:
                return None
            args, kwargs = problems[0]
            if chooser.own(*args, **kwargs) is None:
                return None
            variants = {"": forcing(lambda chooser, *args, **kwargs: chooser.own(*args, **kwargs))}
            fields: dict[str, dict[str, int]] = {"": {}}
            for wanted in chooser.candidates(*args, **kwargs):
                name = " ".join(f"{key}={value}" for key, value in wanted.items())
                variant = forcing(
                    lambda chooser, *args, wanted=wanted, **kwargs: chooser.proposed(wanted, *args, **kwargs)
                )
                try:
                    away = _distance(variant(0), truth)
                    if not away <= _TOLERANCE[plan.dtype]:
                        raise RuntimeError(f"wrong by {away:.2g}")
                    variants[name], fields[name] = variant, wanted
                except Exception as error:  # tiles that a compiler refuses are no choice
                    absent[f"{job} {name}"] = f"{type(error).__name__}: {first_line(error)}"
            if device.type == "cuda":
                # Tiles change nothing for the host: the time of the GPU alone decides.
                calls = max(2, min(20, int(4e-3 / _seconds(variants[""], device))))
                if kernel in _FORM:
                    layers = _layers(job.n, job.k, r, plan.dtype, plan.device_type, plan.quant_type)
                    calls = timing.whole_rotations(calls, len(_rotated(layers, m, plan.dtype)))
                times = timing.measure_graph(variants, calls=calls, rounds=plan.rounds)
            else:
                times = timing.measure(variants, device, rounds=plan.rounds, budget_ms=4.0)
    finally:
        tables.forced_tiles.clear()
        tables.forced_forms.clear()
    best = min(times, key=lambda name: times[name].p50)
    if times[""].p50 <= tables.TIE * times[best].p50:
        best = ""  # another variant to compile is not worth a difference that the next run may not show
    us = {"built-in": times[""].p50} | ({"chosen": times[best].p50} if best else {})
    return tables.Tiles(chooser.problem(*args, **kwargs)[1], fields[best], us)


def _tile_jobs(plan: Plan) -> list[TileJob]:
    if plan.dtype == torch.float32 and plan.device_type == "cuda":
        kernels: tuple[str, ...] = tuple(name for name in plan.kernels if name not in ("buffer_gemm", "epilogue"))
    else:
        kernels = plan.kernels
    ranks = [r for r in plan.ranks if r]
    jobs = []
    for kernel, r in itertools.product(kernels, ranks):
        # Only the largest products gain by tiles of their own shape and direction.
        own = kernel == "buffer_gemm"
        for m, direction in itertools.product(TILE_TOKENS.get(kernel, (4096,)), _DIRECTIONS if own else ("",)):
            jobs += [TileJob(kernel, m, n, k, r, direction) for n, k in (plan.shapes if own else plan.shapes[:1])]
    return jobs


def measure(plan: Plan, advance: Callable[[str], None] = lambda what: None) -> Outcome:
    """Everything in the plan, the tiles first: they change which backend is the fastest."""
    machine, outcome, begin = backends.this_machine(), Outcome(), time.monotonic()
    problems = [(problem, candidates(plan, problem, machine)) for problem in plan.problems()]
    for job in _tile_jobs(plan):
        advance(f"tiles of {job}")
        if time.monotonic() - begin > _TILES_SHARE * plan.budget:
            outcome.left_out += 1
            continue
        try:
            entry = measure_tiles(job, plan, outcome.absent)
        except Exception as error:  # one kernel that does not run here must not cost the rest of the table
            outcome.absent[str(job)] = f"{type(error).__name__}: {first_line(error)}"
            continue
        if entry is not None:
            outcome.tiles.setdefault(job.kernel, []).append(entry)
    device = machine.gpu if plan.device_type == "cuda" else machine.cpu
    assert device is not None
    # The candidates are to run with the tiles that were just found.
    found = dataclasses.replace(outcome.table(device, {}), user=True)
    known = tables.Tables((found, *tables.current().tables))
    with tables.use(known):
        for problem, names in problems:
            advance(str(problem))
            if time.monotonic() - begin > plan.budget:
                outcome.left_out += 1
                continue
            try:
                times = measure_problem(problem, names, plan.rounds, outcome.absent) if names else None
            except torch.OutOfMemoryError as error:
                outcome.absent[str(problem)] = first_line(error)
                times = None
            if times is not None:
                kind = backends.measured_class(problem)
                points = outcome.choices.setdefault(dataclasses.replace(kind, r=tables.rank_bucket(kind.r)), {})
                points[problem.m, problem.n, problem.k] = times
    _layers.cache_clear()
    return outcome


# -- the command -----------------------------------------------------------------------------------------------------


def plan(
    *, shapes: Sequence[str], model: str | None, tokens: Sequence[str], ranks: Sequence[str], dtype: torch.dtype,
    quant_type: str | None, device: str, names: Sequence[str], kernels: Sequence[str], quick: bool,
    budget: float | None,
) -> Plan:  # fmt: skip
    """The plan that the options of the command describe. Raises UserError, which names the option that is wrong."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA device is visible: a GPU's table is measured on that GPU (or --device cpu)")
    if budget is not None and budget <= 0:
        raise UserError(f"budget: {budget} s leave no time to measure anything")
    sizes = parse_shapes(shapes) + (model_shapes(model) if model else ())
    known = tunable()
    wanted = [name for text in kernels for name in re.split(r"[,\s]+", text) if name]
    for name in wanted:
        if name != "none" and name not in known:
            hint = near(name, known)
            raise UserError(
                f"kernels: there is no {name!r}; choose from none, {', '.join(known)}" + f" {hint}".rstrip()
            )
    if not wanted:
        wanted = known if device == "cuda" and not quick else []
    picked = tuple(name for text in names for name in re.split(r"[,\s]+", text) if name)
    return Plan(
        tuple(dict.fromkeys(sizes)) or SHAPES,
        parse_sizes("tokens", tokens, 1) or (QUICK_TOKENS if quick else TOKENS),
        parse_sizes("ranks", ranks, 0) or (16,),
        dtype,
        quant_type,
        device,
        picked or None,
        tuple(name for name in wanted if name != "none"),
        3 if quick else 7,
        budget or math.inf,
    )


def table_path(plan: Plan) -> Path:
    """Where the user's table of this device is."""
    return tables.folder() / f"{record.device_name() if plan.device_type == 'cuda' else 'cpu'}.json"


def run(plan: Plan, out: Path | None = None) -> Path:
    """Measure, write the table to ``out`` (by default, among the user's) and print what was found; returns the path.

    A table that is there keeps what this run did not measure again. Raises UserError for a path that cannot be written.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    path = out or table_path(plan)
    if path.suffix != ".json":
        raise UserError(f"out: {path} should be a file that ends in .json")
    machine = backends.this_machine()
    before = tables.shipped()
    columns: tuple[Any, ...] = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(_tile_jobs(plan)) + sum(1 for _ in plan.problems()))
        outcome = measure(plan, lambda what: progress.update(task, advance=1, description=what))
    if not outcome.choices and not outcome.tiles:
        reasons = "; ".join(f"{what}: {why}" for what, why in list(outcome.absent.items())[:2])
        raise UserError(f"nothing could be measured: {reasons or 'no backend can run these problems'}")
    device = machine.gpu if plan.device_type == "cuda" else machine.cpu
    assert device is not None
    table = outcome.table(device, record.environment())
    try:
        table = _joined(table, path)
        table.write(path)
    except OSError as error:
        raise UserError(f"out: cannot write {path} ({first_line(error)}): name another file with --out") from error
    tables.reload()
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    for part in report(plan, outcome, machine, before):
        console.print(part, markup=False, highlight=False)
    print(path)
    return path


def _joined(table: tables.Table, path: Path) -> tables.Table:
    try:
        old = tables.read(path)
    except FileNotFoundError:
        return table
    except ValueError:  # what no lookup can read is worth nothing
        return table
    return old.merged(table) if old.device == table.device else table


def report(plan: Plan, outcome: Outcome, machine: Machine, before: tables.Tables) -> Iterator[Any]:
    """The winners, what was chosen ``before`` where that differs, and what could not be measured."""
    from rich.table import Table

    name = record.device_name() if plan.device_type == "cuda" else "cpu"
    if outcome.choices:
        grid = Table("N x K", "R", "direction", "M", "fastest", "us", "GPU us", "next", "us", "before", box=None)
        for problem in plan.problems():
            kind = dataclasses.replace(backends.measured_class(problem), r=tables.rank_bucket(problem.r))
            times = outcome.choices.get(kind, {}).get((problem.m, problem.n, problem.k))
            if times is None:
                continue
            best, *rest = times.ranking()
            was = backends.decision(problem, machine, before)
            changed = was is not None and was not in (best, best.partition(":")[0])
            graph = f"{times.graph_us[best]:.4g}" if best in times.graph_us else ""
            row = (f"{problem.n} x {problem.k}", problem.r, problem.direction, problem.m, best, f"{times.us[best]:.4g}")
            after = (graph, *((rest[0], f"{times.us[rest[0]]:.4g}") if rest else ("", "")), was if changed else "")
            grid.add_row(*map(str, (*row, *after)))
        yield f"{name}, {str(plan.dtype).removeprefix('torch.')}, {plan.quant_type or 'dense'} weights"
        yield grid
    changed_tiles = []
    for kernel, entries in outcome.tiles.items():
        for entry in entries:
            at = " ".join(f"{key}={value}" for key, value in entry.at.items())
            if entry.tiles:
                fields = " ".join(f"{key}={value}" for key, value in entry.tiles.items())
                gain = entry.us["built-in"] / entry.us["chosen"]
                changed_tiles.append(f"tiles of {kernel} at {at}: {fields}, {gain:.2f}x faster than the built-in ones")
            else:
                changed_tiles.append(f"tiles of {kernel} at {at}: the built-in ones")
    yield from changed_tiles
    for what, why in outcome.absent.items():
        yield f"not measured: {what}: {why}"
    if outcome.left_out:
        yield f"left out: {outcome.left_out} points, because the budget of {plan.budget:g} s was spent"
