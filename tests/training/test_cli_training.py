"""fastlora train, generate and merge as a user calls them."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="peft is missing (extra: train)")
pytest.importorskip("typer", reason="typer is missing (extra: train)")

from fastlora.cli import main


def flags(options: dict[str, Any], **values: Any) -> list[str]:
    words = ["train"]
    for key, value in (options | values).items():
        name = key.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def assert_one_line(capsys: pytest.CaptureFixture[str], code: int, *words: str, expected: int = 2) -> str:
    error = capsys.readouterr().err
    assert code == expected, error
    assert error.startswith("fastlora: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    assert all(word in error for word in words), error
    return error


def test_from_training_to_a_merged_model(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
    assert main(["train", str(path), "--max-steps", "2", "--eval-steps", "1", "--no-packing"]) == 0
    shown = capsys.readouterr().out
    assert "14 of 14 LoRA layers fused" in shown
    assert "step 2/2  loss " in shown
    assert " tokens/s  " in shown
    assert " GiB" in shown
    assert "evaluation loss  " in shown
    folder = options["output_dir"]
    assert f"adapter          {folder}/adapter" in shown

    (tmp_path / "prompts.txt").write_text("the fox\n\n")
    prompts = ["--prompt", "the sky", "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4"]
    assert main(["generate", folder, *prompts, "--device", "cpu", "--temperature", "0.7"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("prompt", "before", "after", "the sky", "the fox"))

    assert main(["merge", folder, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": -1}, ["r should be greater", "-1"]),
        ({"r": 0}, ["r should be greater"]),
        ({"lr": "fast"}, ["lr should be a valid number"]),
        ({"data": "nothing.jsonl"}, ["data: no such file"]),
        ({"eval_data": "nothing.jsonl"}, ["eval_data: no such file"]),
        ({"text_column": "tekst"}, ["no column 'tekst'", "did you mean text?"]),
        ({"target_modules": "q_prj,v_proj"}, ["'q_prj'", "did you mean q_proj"]),
        ({"target_modules": "all-linaer"}, ["did you mean all-linear"]),
        ({"optim": "adamw_anyprecision"}, ["optim: adamw_anyprecision: Please install"]),
        ({"optim": "adamw_anyprecision", "method": "lora-plus"}, ["optim: adamw_anyprecision: Please install"]),
        ({"model": "./no/such/model"}, ["model: no such folder"]),
        ({"model": "someone/no-such-model"}, ["neither a local folder nor a model"]),
        ({"backend": "tritn"}, ["did you mean triton"]),
        ({"backend": "cuda"}, ["backend"]),
        ({"quantization": "int4"}, ["nf4, fp4, none"]),
        ({"resume": True}, ["no finished checkpoint"]),
        ({"template": "chat"}, ["template: chat needs messages", "'text'"]),
        ({"output_dir": "/proc/fastlora"}, ["output_dir: cannot write"]),
    ],
)
def test_bad_training_input_is_one_line(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], values: dict[str, Any], words: list[str]
) -> None:
    assert_one_line(capsys, main(flags(options, **values)), *words)


def test_one_line_is_all_of_stderr(options: dict[str, Any]) -> None:
    """In a process of its own, where the libraries say at import what they like to say."""
    words = flags(options, target_modules="qproj")
    script = "import sys; from fastlora.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("fastlora: target_modules: no linear layer is called 'qproj'; did you mean q_proj")
    assert result.stderr.count("\n") == 1


def test_empty_data(options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.jsonl", ""), ("b.jsonl", '{"text": ""}\n' * 3), ("c.csv", "text\n"), ("d.txt", "\n\n\n")):
        (tmp_path / name).write_text(text)
        assert_one_line(capsys, main(flags(options, data=tmp_path / name)), "data")


def test_broken_configuration_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("model: [a\n")
    assert_one_line(capsys, main(["train", str(tmp_path / "c.yaml")]), "not valid YAML")
    (tmp_path / "d.yaml").write_text("model: a\ndata: b\nlora_rank: 3\n")
    assert_one_line(capsys, main(["train", str(tmp_path / "d.yaml")]), "unknown key 'lora_rank'")
    assert_one_line(capsys, main(["train", str(tmp_path / "e.yaml")]), "no such configuration file")
    assert_one_line(capsys, main(["train"]), "model is missing", "data is missing")


def test_disk_full(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastlora.training import durable

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "save_tree", full)
    assert_one_line(capsys, main(flags(options, max_steps=1)), "is full", "--resume")


def test_interrupt_and_resume(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastlora.training.callbacks import Meter

    measure = Meter.on_step_end

    def press_ctrl_c(self: Meter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        measure(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Meter, "on_step_end", press_ctrl_c)
    assert_one_line(capsys, main(flags(options)), "saved", "checkpoint-2", "--resume", expected=130)
    assert_one_line(capsys, main(flags(options)), "--resume to go on")
    assert_one_line(capsys, main(flags(options, resume=True, r=8)), "of another run", "r was 4 and is 8")
    assert main(flags(options, resume=True)) == 0
    assert (Path(options["output_dir"]) / "adapter" / "adapter_model.safetensors").is_file()


def test_interrupt_before_training(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastlora.training import model

    def press_ctrl_c(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "load_base", press_ctrl_c)
    assert_one_line(capsys, main(flags(options)), "interrupted", expected=130)


def test_bad_adapters(trained: Any, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other, new = str(trained.output_dir), str(other_model), str(tmp_path / "new")
    prompt = ["--prompt", "x", "--device", "cpu"]
    assert_one_line(capsys, main(["generate", folder, *prompt, "--model", other]), "is for another model")
    assert_one_line(capsys, main(["merge", folder, new, "--model", other]), "is for another model")
    assert_one_line(capsys, main(["generate", "nowhere", *prompt]), "no such folder")
    assert_one_line(capsys, main(["generate", folder, "--device", "cpu"]), "--prompt")
    assert_one_line(capsys, main(["generate", folder, *prompt, "--temperature", "-1"]), "temperature")
    assert_one_line(capsys, main(["generate", folder, *prompt, "--quantization", "nf"]), "nf4, fp4, none")
    assert_one_line(capsys, main(["generate", folder, "--prompts", "gone.txt"]), "prompts", "gone.txt")
    assert_one_line(capsys, main(["merge", folder, new, "--dtype", "int8"]), "bfloat16")


@pytest.mark.parametrize(
    ("package", "extra"), [("peft", "train"), ("transformers", "train"), ("tensorboard", "train"), ("trl", "trl")]
)
def test_missing_package_names_its_extra(
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    extra: str,
) -> None:
    find = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return find(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)
    words = flags(options, tensorboard=True, trainer="trl" if package == "trl" else "transformers")
    assert_one_line(capsys, main(words), f"{package} is not installed", f"fastlora-kernels[{extra}]")
