"""``fastlora bench``: options, mistakes, missing extras."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer", reason="typer is missing (extra: bench)")
pytest.importorskip("rich", reason="rich is missing (extra: bench)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")

from fastlora.cli import main


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--report"),
        (["--suite", "layer", "--report"], "--report"),
        (["--suite", "goal"], "did you mean goals?"),
        (["--suite", "layer", "--tokens", "1,x"], "'x'"),
        (["--suite", "layer", "--ranks", "0"], "'0'"),
        (["--suite", "layer", "--modes", "fwd,backward"], "fwd+bwd"),
        (["--suite", "layer", "--providers", "pefd bf16"], "PEFT bf16"),
        (["--suite", "layer", "--shapes", "llama"], "llama-3-8b"),
        (["--suite", "layer", "--quick"], "--quick"),
        (["--suite", "goals", "--tokens", "1"], "--tokens"),
        (["--suite", "drop-in", "--only", "sped"], "did you mean speed?"),
        (["--suite", "layer", "--only", "speed"], "--only"),
    ],
)
def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], word: str) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora: ")
    assert error.count("\n") == 1
    assert word in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_goals_want_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "goals"]) == 2
    assert "--quick" in capsys.readouterr().err


def test_report_wants_a_checkout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: bench)")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--report"]) == 2
    assert "README.md" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["bitsandbytes", "peft", "rich", "matplotlib"])
def test_a_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = ["--report"] if package == "matplotlib" else ["--suite", "layer"]
    assert main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert error == f"fastlora: {package} is not installed: pip install 'fastlora-kernels[bench]'\n"


def test_layer_suite_measures_the_chosen_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "smollm2-135m k/v", "--tokens", "1,4", "--ranks", "4", "--modes", "decode"]
    chosen = ["--providers", "bare GEMMs,fastlora torch", "--out", str(tmp_path)]
    assert main(["bench", "--suite", "layer", *options, *chosen]) == 0
    (path,) = tmp_path.glob("*/layer.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["m"], line["provider"]) for line in lines] == [
        (m, name) for m in (1, 4) for name in ("bare GEMMs", "fastlora torch")
    ]
    for line in lines:
        assert line["absent"] is None
        assert line["wall_us"]["p50"] > 0
        assert line["host_us"]["p50"] > 0
        assert (line["gpu_us"] is None) == (line["gpu"] is None)
        assert line["ceilings"]["bytes_per_second"] > 0
    shown = capsys.readouterr()
    assert "fastlora torch" in shown.out
    assert "2/2" in shown.err
