"""The ``fastlora`` command. `main` is its entry point; a bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

from fastlora.training.errors import (
    EXIT_INTERRUPTED,
    EXIT_LOST,
    UserError,
    first_line,
    is_out_of_memory,
    one_of,
    require,
)

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for a bad input, 130 when interrupted. Ends the
    process with 3 where another process of the run is gone."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # It reports an optional kernel package at import, which no one asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if arguments == ["info"]:  # says what is missing, so that it needs nothing itself
            info()
            return 0
        require("typer")
        return _run(arguments)
    except UserError as error:
        if error.alone or _first_process():
            print(f"fastlora: {error}", file=sys.stderr)
        if error.exit_code == EXIT_LOST:
            # At once: what is left of the collectives may wait for the process that is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_LOST)
        return error.exit_code
    except KeyboardInterrupt:
        if _first_process():
            print("fastlora: interrupted before there was anything to save", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = "pass --device cpu, ask for fewer tokens, or free the memory that other processes hold"
        print(f"fastlora: out of memory ({first_line(error)}): {advice}", file=sys.stderr)
        return UserError.exit_code


def _first_process() -> bool:
    """Whether this is the first process of those that a launcher has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(build())
    try:
        result = command.main(arguments, prog_name="fastlora", standalone_mode=False)
    except typer.Abort as stop:
        raise KeyboardInterrupt from stop
    except Exception as error:
        # What click raises for a bad command line; typer brings its own copy of click or uses the installed one.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message().rstrip(".")
        raise UserError(f"{message or 'no command'}: fastlora --help lists the commands and their options") from error
    if result == EXIT_INTERRUPTED:  # typer's own handling of Ctrl-C, which says nothing
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def build() -> typer.Typer:
    """The typer application."""
    app = typer.Typer(
        help="Fine-tune language models with fused QLoRA layers.", add_completion=False, pretty_exceptions_enable=False
    )
    app.command()(_train_command())
    for command in (search, generate, merge, quantize, dequantize, report, bench, info, explain, parameters, tune):
        app.command()(command)
    return app


def _train_command() -> Any:
    """``train`` with one flag for each field of the configuration, where pydantic is there to define them."""

    def train(config: Path | None = None, **flags: Any) -> None:
        """Train an adapter. A flag wins over the configuration file."""
        for package in ("pydantic", "yaml"):
            require(package)
        from fastlora.training.config import load

        resolved = load(config, {key: value for key, value in flags.items() if value is not None})
        from fastlora.training.train import train as run

        with _quiet():
            result = run(resolved)
        if _first_process():
            print(result.summary())

    argument = typer.Argument(help="YAML file; see examples/train.yaml", show_default=False)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("config", kind, default=None, annotation=Annotated[Path | None, argument])]
    try:
        from fastlora.training.config import TrainConfig

        parameters += [_flag(name, field) for name, field in TrainConfig.model_fields.items()]
    except ImportError:
        pass  # the command itself says which extra it needs
    train.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    train.__annotations__ = {p.name: p.annotation for p in parameters}
    return train


def _flag(name: str, field: Any) -> inspect.Parameter:
    """The option of one field. Its value stays text, so that the configuration alone decides what is valid."""
    flag = name.replace("_", "-")
    text = field.description
    if not field.is_required() and field.default is not None and "[default" not in text:
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        text += f" [default: {default}]"
    if field.annotation is bool:
        option = typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind in (int, float)]
        metavar = {int: "INTEGER", float: "NUMBER"}[kinds[0]] if kinds else "TEXT"
        annotation = Annotated[str | None, typer.Option(f"--{flag}", help=text, metavar=metavar, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def search(
    config: Annotated[Path, typer.Argument(help="YAML file of a training run, with a section search or without")],
    trials: Annotated[int | None, typer.Option(help="runs, with those of earlier calls [default: 20]", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="trials at a time, each in a process", min=1)] = 1,
    output_dir: Annotated[Path | None, typer.Option(help="folder [default: search/ in the run's]")] = None,
    final: Annotated[bool, typer.Option(help="compare the best with the file's settings on held-out data")] = True,
) -> None:
    """Search for the best settings of a training run; a second call goes on."""
    for package in ("pydantic", "yaml", "rich"):
        require(package)
    require("optuna", "search")
    require("matplotlib", "search")
    from fastlora.search import command

    with _quiet():
        command.run(config, trials=trials, jobs=jobs, folder=output_dir, final=final)


def generate(
    adapter: Annotated[str, typer.Argument(help="adapter folder, or output folder of a run")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; may be given several times")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file with one prompt a line")] = None,
    model: Annotated[str | None, typer.Option(help="base model [default: the one the adapter names]")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="length of a continuation")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from this share of the probability")] = 1.0,
    top_k: Annotated[int, typer.Option(help="sample from so many tokens; 0 for all")] = 0,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 42,
    beams: Annotated[int, typer.Option(help="continuations kept in a beam search; 1 for none")] = 1,
    chat: Annotated[bool | None, typer.Option(help="use the chat template [default: where there is one]")] = None,
    quantization: Annotated[str, typer.Option(help="4-bit type of the base: nf4, fp4 or none")] = "nf4",
    backend: Annotated[str, typer.Option(help="fastlora backend, or peft")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Continue prompts without and with an adapter, side by side."""
    from fastlora.training import generate as generation

    require("rich")
    one_of("quantization", quantization, ("nf4", "fp4", "none"))
    one_of("device", device, ("auto", "cpu", "cuda"))
    from rich.console import Console

    with _quiet():
        comparisons = generation.generate(
            adapter,
            [*(prompt or []), *_lines(prompts)],
            model=model,
            sampling=generation.Sampling(max_new_tokens, temperature, top_p, top_k, seed, beams),
            chat=chat,
            quantization=quantization,
            backend=backend,
            device=device,
        )
    Console(file=sys.stdout).print(generation.table(comparisons))


def merge(
    adapter: Annotated[str, typer.Argument(help="adapter folder, or output folder of a run")],
    output_dir: Annotated[Path, typer.Argument(help="new folder for the merged model")],
    model: Annotated[str | None, typer.Option(help="base model [default: the one the adapter names]")] = None,
    dtype: Annotated[str, typer.Option(help="type of the merged weights: bfloat16, float16 or float32")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    mode: Annotated[str, typer.Option(help="dense, or in 4 bits: error-aware or requantize")] = "dense",
    calibration: Annotated[
        str | None, typer.Option(help="error-aware: data (a file, or a hub data set) of what the model is for")
    ] = None,
) -> None:
    """Merge an adapter into its base model and save the model."""
    from fastlora.training.merge import merge as run

    one_of("device", device, ("auto", "cpu", "cuda"))
    with _quiet():
        folder = run(adapter, output_dir, model=model, dtype=dtype, device=device, mode=mode, calibration=calibration)
        print(f"merged model  {folder}")


def quantize(
    adapter: Annotated[str, typer.Argument(help="adapter folder, or output folder of a run")],
    output_dir: Annotated[Path, typer.Argument(help="new folder for the quantized adapter")],
    kind: Annotated[str, typer.Option("--type", help="int8 (one scale a row) or nf4")] = "int8",
) -> None:
    """Quantize the factors of a LoRA adapter for serving; report its size and the error of its output."""
    from fastlora.adapters import quantized

    one_of("type", kind, quantized.KINDS)
    print(
        _converted(
            adapter,
            output_dir,
            (quantized.PLAIN_FILE, "it may be quantized already"),
            lambda folder: quantized.quantize_file(folder, output_dir, kind),
        )
    )
    print(f"quantized adapter  {output_dir}")


def dequantize(
    adapter: Annotated[str, typer.Argument(help="folder of a quantized adapter")],
    output_dir: Annotated[Path, typer.Argument(help="new folder for the adapter, as PEFT reads it")],
) -> None:
    """Turn a quantized adapter back into one that PEFT reads."""
    from fastlora.adapters import quantized

    file = _converted(
        adapter,
        output_dir,
        (quantized.FILE, "it is not quantized"),
        lambda folder: quantized.dequantize_file(folder, output_dir),
    )
    print(f"adapter  {file}")


def _converted(adapter: str, output_dir: Path, needs: tuple[str, str], convert: Any) -> Any:
    """What ``convert`` makes of the folder of an adapter. needs: the file to be there, and what it means if not."""
    from fastlora.training import checkpoints
    from fastlora.training import model as models
    from fastlora.training.errors import disk_errors

    require("safetensors")
    folder = models.find_adapter(adapter)
    if not (folder / needs[0]).is_file():
        raise UserError(f"adapter: {folder} has no {needs[0]}: {needs[1]}")
    checkpoints.check_adapter_files(folder)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"output_dir: {output_dir} is not empty: name a new folder")
    checkpoints.make_writable(output_dir, "output_dir")
    try:
        with disk_errors(output_dir):
            return convert(folder)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"adapter: {first_line(error)}: use another adapter") from error
    except Exception as error:
        raise UserError(f"adapter: cannot read {folder} ({first_line(error)}): use another copy") from error


def report(
    runs: Annotated[list[Path], typer.Argument(help="output folders of runs, or folders that hold them")],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    plots: Annotated[Path | None, typer.Option(help="also write each picture as SVG and PNG to this folder")] = None,
    title: Annotated[str | None, typer.Option(help="heading of the page")] = None,
) -> None:
    """Show runs on one HTML page that needs no network: curves, settings, comparisons, layers."""
    require("safetensors")
    from fastlora.report.command import report as run

    print(*run(runs, out, plots, title), sep="\n")


SUITES = ("layer", "goals", "train", "distributed", "methods", "cpu", "drop-in", "merge", "runs", "tasks")
"""What `bench` measures."""


def bench(
    suite: Annotated[str | None, typer.Option(help=", ".join(SUITES))] = None,
    report: Annotated[bool, typer.Option("--report", help="write docs/benchmarks.md, plots and README tables")] = False,
    shapes: Annotated[str | None, typer.Option(help="layer: models, or MODEL PROJECTION, comma-separated")] = None,
    tokens: Annotated[str | None, typer.Option(help="layer: values of M, comma-separated")] = None,
    ranks: Annotated[str | None, typer.Option(help="layer: ranks, comma-separated")] = None,
    modes: Annotated[str | None, typer.Option(help="layer: of fwd, bwd, fwd+bwd and decode (M up to 256)")] = None,
    providers: Annotated[str | None, typer.Option(help="layer: who computes it, comma-separated")] = None,
    graph: Annotated[bool, typer.Option(help="layer: GPU time alone, from CUDA graphs, too")] = True,
    only: Annotated[str | None, typer.Option(help="train, drop-in, methods, tasks: parts, comma-separated")] = None,
    gpus: Annotated[int | None, typer.Option(help="distributed: processes, one a GPU [default: 2]")] = None,
    blocks: Annotated[int | None, typer.Option(help="distributed: blocks of the large model, at most")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="goals, train, distributed, methods, tasks: for a CPU")
    ] = False,
    out: Annotated[Path, typer.Option(help="folder of the records")] = Path("bench/results"),
) -> None:
    """Measure layers, training steps, methods or goals beside their peers, or turn records into tables and plots."""
    if report == (suite is not None):
        raise UserError(f"give either --suite {', '.join(SUITES)}, or --report")
    if report:
        require("matplotlib", "bench")
        from fastlora.bench import report as writer

        readme = Path("README.md")
        try:
            written = writer.write(out, Path("docs"), readme)
        except (OSError, ValueError) as error:
            raise UserError(f"{readme}: {first_line(error)}: run this in a checkout of the project") from error
        print(*written, sep="\n")
        return
    assert suite is not None
    one_of("suite", suite, SUITES)
    given = {"shapes": shapes, "tokens": tokens, "ranks": ranks, "modes": modes, "providers": providers}
    strange = [f"--{name}" for name, value in given.items() if value is not None and suite != "layer"]
    strange += ["--only"] * (only is not None and suite not in ("drop-in", "train", "methods", "tasks"))
    strange += ["--quick"] * (quick and suite not in ("goals", "train", "distributed", "methods", "tasks"))
    spread = {"gpus": gpus, "blocks": blocks}
    strange += [f"--{name}" for name, value in spread.items() if value is not None and suite != "distributed"]
    if strange:
        raise UserError(f"{strange[0]} is no option of --suite {suite}")
    for package in ("rich", "bitsandbytes", "peft"):
        require(package, "bench")
    with _quiet():
        if suite == "distributed":
            table, path = _run_distributed(gpus or 2, blocks, quick, out)
        else:
            table, path = _run_suite(suite, given, graph, only, quick, out)
    print(table, path, sep="\n")


def _run_distributed(gpus: int, blocks: int | None, quick: bool, out: Path) -> tuple[str, Path]:
    import torch

    from fastlora.bench import run

    require("transformers", "bench")
    visible = torch.cuda.device_count()
    if gpus < 2 or (blocks is not None and blocks < 1):
        raise UserError("gpus should be at least 2, and blocks at least 1")
    if visible < gpus and (visible or not quick):
        raise UserError(f"{gpus} GPUs are to be measured and {visible} are visible: --quick on a CPU tries tiny models")
    return run.distributed(quick=quick, out=out, world=gpus, blocks=blocks)


def _run_suite(
    suite: str, given: dict[str, str | None], graph: bool, only: str | None, quick: bool, out: Path
) -> tuple[str, Path]:
    from fastlora.bench import run

    if suite == "goals":
        if not quick and run.device().type != "cuda":
            raise UserError("the goals are those of a GPU, and there is none: --quick tries the suite on small layers")
        return run.goals(quick=quick, out=out)
    if suite == "cpu":
        return run.cpu(out=out)
    if suite == "train":
        require("transformers", "bench")
        from fastlora.bench import train_step

        if not quick and run.device().type != "cuda":
            raise UserError("training steps are measured on a GPU, and there is none: --quick tries tiny models")
        names = _listed("only", only, train_step.DEFAULT, train_step.NAMES)
        *before, last = run.train(names, quick=quick, out=out)
        return "\n".join([*(f"{table}\n{path}" for table, path in before), last[0]]), last[1]
    if suite == "methods":
        for package in ("transformers", "accelerate", "datasets", "pydantic"):
            require(package)
        from fastlora.bench import methods

        parts = tuple(methods.PARTS)
        return run.methods(_listed("only", only, parts, parts), quick=quick, out=out)
    if suite == "tasks":
        for package in ("transformers", "accelerate", "datasets", "pydantic"):
            require(package)
        from fastlora.bench import tasks

        parts = tuple(tasks.PARTS)
        return run.tasks(_listed("only", only, parts, parts), quick=quick, out=out)
    if suite == "merge":
        for package in ("transformers", "yaml", "gguf"):
            require(package, "demo")
        return run.merge(out=out)
    if suite == "runs":
        for package in ("transformers", "accelerate"):
            require(package, "train")
        return run.runs(out=out)
    if suite == "drop-in":
        require("transformers", "bench")
        from fastlora.bench import drop_in

        return run.drop_in(_listed("only", only, tuple(drop_in.PARTS), tuple(drop_in.PARTS)), out=out)
    from fastlora.bench import layer
    from fastlora.bench.providers import MODES, PROVIDERS

    names = _listed("shapes", given["shapes"], layer.DEFAULT_SHAPES, (*layer.MODELS, *layer.SHAPES))
    shapes = [shape for name in names for shape in layer.SHAPES if name in (shape, shape.split()[0])]
    return run.layer(
        tuple(shapes),
        _numbers("tokens", given["tokens"], layer.DEFAULT_TOKENS),
        _numbers("ranks", given["ranks"], layer.DEFAULT_RANKS),
        _listed("modes", given["modes"], layer.DEFAULT_MODES, MODES),
        _listed("providers", given["providers"], layer.DEFAULT_PROVIDERS, tuple(PROVIDERS)),
        graph=graph,
        out=out,
    )


def _listed(name: str, text: str | None, default: tuple[str, ...], choices: tuple[str, ...]) -> tuple[str, ...]:
    """The comma-separated words of an option."""
    words = default if text is None else tuple(word.strip() for word in text.split(","))
    for word in words:
        one_of(name, word, choices)
    return words


def _numbers(name: str, text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The comma-separated positive integers of an option."""
    words = [str(value) for value in default] if text is None else [word.strip() for word in text.split(",")]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"{name} should be positive integers with commas between them, not {word!r}")
    return tuple(int(word) for word in words)


def info() -> None:
    """Show versions, devices and backends, and why a missing one is missing."""
    from fastlora import backends

    print(backends.info())


def explain(
    m: Annotated[int | None, typer.Option(help="tokens", min=1)] = None,
    n: Annotated[int | None, typer.Option(help="out_features", min=1)] = None,
    k: Annotated[int | None, typer.Option(help="in_features", min=1)] = None,
    r: Annotated[int, typer.Option(help="rank of the adapter", min=0)] = 16,
    dtype: Annotated[str, typer.Option(help="type of the activations: bf16, fp16 or fp32")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    arch: Annotated[str | None, typer.Option(help="GPU to ask about, such as sm_90 [default: this one]")] = None,
    quant: Annotated[str, typer.Option(help="type of the base weight: nf4, fp4 or none")] = "nf4",
    blocksize: Annotated[int, typer.Option(help="weights that share one scale", min=1)] = 64,
    nested: Annotated[bool, typer.Option(help="quantized statistics (double quant)")] = True,
    model: Annotated[str | None, typer.Option(help="hub id, folder or name of a benchmark's model: its memory")] = None,
    batch: Annotated[int, typer.Option(help="model: sequences of a batch", min=1)] = 1,
    seq: Annotated[int, typer.Option(help="model: tokens of a sequence", min=1)] = 2048,
    checkpointing: Annotated[bool, typer.Option(help="model: recompute the blocks in the backward pass")] = False,
    blocks: Annotated[bool, typer.Option(help="model: fuse whole blocks")] = True,
    chunked_loss: Annotated[bool, typer.Option(help="model: head and loss some tokens at a time")] = True,
    kept_blocks: Annotated[int, typer.Option(help="model: last blocks that are not recomputed", min=0)] = 0,
    decoded_memory: Annotated[float, typer.Option(help="model: GiB for dense copies of 4-bit weights", min=0)] = 0.0,
) -> None:
    """Show which backend runs one layer, and why; or what memory a training step of a model takes."""
    one_of("quant", quant, ("nf4", "fp4", "none"))
    if model is not None:
        if given := next((name for name, value in (("m", m), ("n", n), ("k", k)) if value is not None), None):
            raise UserError(f"--{given} is of a layer: give it, or --model")
        if kept_blocks and not checkpointing:
            raise UserError("--kept-blocks are those that --checkpointing does not recompute: give both")
        chosen: dict[str, Any] = {"blocks": blocks, "chunked_loss": chunked_loss, "kept_blocks": kept_blocks}
        chosen["decoded_memory"] = decoded_memory
        print(_memory(model, batch, seq, r=r, checkpointing=checkpointing, quantized=quant != "none", **chosen))
        return
    if m is None or n is None or k is None:
        absent = next(name for name, value in (("m", m), ("n", n), ("k", k)) if value is None)
        raise UserError(f"--{absent} is missing: give --m, --n and --k of a layer, or --model")
    import torch

    from fastlora import backends
    from fastlora.nf4 import BLOCKSIZES

    one_of("dtype", dtype, (*DTYPES, *DTYPES.values()))
    one_of("device", device, ("auto", "cpu", "cuda"))
    one_of("blocksize", str(blocksize), map(str, BLOCKSIZES))
    machine = backends.this_machine()
    if arch is not None:
        match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)a?", arch)
        if match is None:
            raise UserError(f"arch: {arch!r} is no GPU architecture: write it as sm_90 or 9.0")
        machine = backends.measured_machine(machine, (int(match[1]), int(match[2])))
    if device == "auto":
        device = "cuda" if machine.capability is not None else "cpu"
    problem = backends.Problem(
        m=m,
        n=n,
        k=k,
        r=r,
        dtype=getattr(torch, DTYPES.get(dtype, dtype)),
        device_type=device,
        quant_type=None if quant == "none" else quant,
        blocksize=blocksize,
        nested=nested,
    )
    print(backends.explain(problem, machine))


def _memory(model: str, batch: int, seq: int, **options: Any) -> str:
    """The memory report of a model."""
    for package in ("transformers", "peft", "bitsandbytes"):
        require(package)
    from fastlora.bench import models
    from fastlora.training import memory

    if model in models.CONFIGS:
        config = models.config(model)
    else:
        for package in ("pydantic", "yaml"):
            require(package)
        from fastlora.training.model import load_config

        config = load_config(model)
    with _quiet():
        return memory.predict(config, batch, seq, **options).table()


def parameters(
    model: Annotated[str, typer.Argument(help="hub id, model folder, .gguf file or package:NAME")],
    r: Annotated[int, typer.Option(help="rank of a LoRA adapter; 0 for none", min=0)] = 0,
    target_modules: Annotated[str, typer.Option(help="its layers, by commas, or all-linear")] = "all-linear",
    task: Annotated[str, typer.Option(help="as for train")] = "causal-lm",
    depth: Annotated[int | None, typer.Option(help="of the deepest modules shown [default: all]", min=0)] = None,
) -> None:
    """Show the layers of a model: shapes, parameters, and what an adapter would train. Loads no weights."""
    for package in ("transformers", "peft", "pydantic", "yaml"):
        require(package)
    from fastlora.training.inspect import describe

    with _quiet():
        print(describe(model, r=r, target_modules=target_modules, task=task, depth=depth))


def tune(
    shapes: Annotated[list[str] | None, typer.Option(help="N,K of a layer; may be given several times")] = None,
    model: Annotated[str | None, typer.Option(help="take the layers of this transformers model or config.json")] = None,
    tokens: Annotated[list[str] | None, typer.Option(help="M to measure, such as 1,64,2048")] = None,
    ranks: Annotated[list[str] | None, typer.Option(help="ranks to measure, such as 16,64")] = None,
    dtype: Annotated[str, typer.Option(help="type of the activations: bf16, fp16 or fp32")] = "bf16",
    quant: Annotated[str, typer.Option(help="type of the base weight: nf4, fp4 or none")] = "nf4",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    backends: Annotated[list[str] | None, typer.Option(help="what to compare [default: all that can run]")] = None,
    kernels: Annotated[list[str] | None, typer.Option(help="kernels whose tiles to try, or none")] = None,
    quick: Annotated[bool, typer.Option(help="fewer sizes and rounds, no tiles")] = False,
    budget: Annotated[float | None, typer.Option(help="seconds after which the rest is left out")] = None,
    out: Annotated[
        Path | None, typer.Option(help="file of the table [default: the user's, which selection reads]")
    ] = None,
) -> None:
    """Measure which backend and which tiles are the fastest here, and write the table that selection reads."""
    import torch

    from fastlora.bench import tune as tuning

    require("rich")
    one_of("dtype", dtype, (*DTYPES, *DTYPES.values()))
    one_of("quant", quant, ("nf4", "fp4", "none"))
    one_of("device", device, ("auto", "cpu", "cuda"))
    plan = tuning.plan(
        shapes=shapes or (),
        model=model,
        tokens=tokens or (),
        ranks=ranks or (),
        dtype=getattr(torch, DTYPES.get(dtype, dtype)),
        quant_type=None if quant == "none" else quant,
        device=device,
        names=backends or (),
        kernels=kernels or (),
        quick=quick,
        budget=budget,
    )
    with _quiet():
        tuning.run(plan, out)


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: cannot read {path} ({first_line(error)}): name a text file") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings meant for programmers, and progress bars where there is no terminal, off stderr."""
    if not sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            import datasets
            import transformers

            datasets.disable_progress_bars()
            transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
