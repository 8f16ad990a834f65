"""The command line without any training package: info, explain, and its mistakes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("typer", reason="typer is missing (extra: train)")

from fastlora import backends
from fastlora.cli import main

LAYER = ["--m", "4096", "--n", "14336", "--k", "4096", "--r", "16"]


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*backends.BACKENDS, "torch", "python", "triton"))


def test_explain_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *LAYER, "--arch", "sm_90"]) == 0
    shown = capsys.readouterr().out
    assert "M=4096 N=14336 K=4096 R=16, bfloat16 on cuda, nf4/64 nested" in shown
    assert shown.count("->") == 2
    assert all(name in shown for name in backends.BACKENDS)


def test_explain_takes_every_part_of_the_problem(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dtype", "fp32", "--device", "cpu", "--quant", "fp4", "--blocksize", "128", "--no-nested"]
    assert main(["explain", *LAYER, *words]) == 0
    assert "float32 on cpu, fp4/128 base" in capsys.readouterr().out
    assert main(["explain", *LAYER, "--device", "cpu", "--quant", "none"]) == 0
    assert "dense base" in capsys.readouterr().out


def test_explain_an_old_gpu_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *LAYER, "--arch", "sm_75"]) == 0
    shown = capsys.readouterr().out
    assert "triton     cannot run" in shown
    assert "8.0" in shown


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["explain", "--m", "4096"], "--n"),
        (["explain", "--m", "x", "--n", "1", "--k", "1"], "--m"),
        (["explain", "--m", "0", "--n", "1", "--k", "1"], "--m"),
        (["explain", *LAYER, "--arch", "hopper"], "sm_90"),
        (["explain", *LAYER, "--dtype", "int8"], "bf16"),
        (["explain", *LAYER, "--quant", "nf3"], "did you mean nf4?"),
        (["explain", *LAYER, "--blocksize", "63"], "64, 128"),
        (["explain", *LAYER, "--model", "llama-3-8b"], "--m is of a layer"),
        (["explain", "--model", "llama-3-8b", "--kept-blocks", "1"], "--checkpointing"),
        (["explian"], "explian"),
        (["train", "--ranks", "3"], "--ranks"),
        ([], "--help"),
    ],
)
def test_bad_command_line_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora: ")
    assert error.count("\n") == 1
    assert word in error


def test_help_lists_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("train", "generate", "merge", "info", "explain"))
    assert main(["train", "--help"]) == 0
    assert "--lora-alpha" in capsys.readouterr().out


def run_without(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a Python in which ``packages`` cannot be imported."""
    script = f"""
        import sys
        for name in {packages!r}:
            sys.modules[name] = None
        from fastlora.cli import main
        sys.exit(main({list(arguments)!r}))
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)


TRAIN_EXTRA = ["transformers", "peft", "bitsandbytes", "accelerate", "datasets", "yaml", "tensorboard"]


def test_without_the_train_extra() -> None:
    assert run_without(TRAIN_EXTRA, "explain", *LAYER).returncode == 0
    result = run_without(TRAIN_EXTRA, "train", "c.yaml")
    assert result.returncode == 2
    assert result.stderr == "fastlora: yaml is not installed: pip install 'fastlora-kernels[train]'\n"


def test_without_typer() -> None:
    result = run_without(["typer"], "info")
    assert (result.returncode, result.stderr) == (0, "")
    assert "backend torch" in result.stdout
    result = run_without(["typer"], "explain", *LAYER)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fastlora: typer is not installed: pip install 'fastlora-kernels[train]'\n"
