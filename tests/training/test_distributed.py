"""Two gloo processes: what is trained, saved and resumed is what one process does with the whole batch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastlora.cli import main
from fastlora.training import distributed
from fastlora.training.config import load
from fastlora.training.errors import UserError
from fastlora.training.train import train


class KillAt(TrainerCallback):
    """Ends this process at once in the middle of a step, as the kernel does when memory is out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run_command(rank: int, words: list[str]) -> int:
    return main(words)


def run_and_die(rank: int, values: dict[str, Any]) -> int:
    callbacks = [KillAt(3)] if rank == 1 else []
    try:
        train(load(None, values), callbacks)
    except UserError as error:
        print(f"fastlora: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # as the command does
    return 0


def flags(values: dict[str, Any]) -> list[str]:
    words = ["train"]
    for key, value in values.items():
        flag = key.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


@pytest.fixture
def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Two optimizer steps that are a function of the batches alone."""
    return options | {"lora_dropout": 0.0, "max_steps": 3, "eval_fraction": 0.0, "max_grad_norm": 1.0, "save_steps": 3}


def adapter(folder: Any) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def one_process(plain: dict[str, Any], tmp_path: Path) -> Any:
    """What one process learns of the same batches."""
    return train(load(None, plain | {"output_dir": str(tmp_path / "one"), "batch_size": 2 * plain["batch_size"]}))


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "more",
    [
        {"distributed": "ddp", "blocks": False},
        {"distributed": "fsdp", "gradient_checkpointing": True},
    ],
    ids=["ddp", "fsdp"],
)
def test_two_processes_learn_what_one_does(
    plain: dict[str, Any], one_process: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    results = processes.run(run_command, flags(plain | more), folder=tmp_path)
    processes.check(results)
    assert_close(adapter(plain["output_dir"]), adapter(one_process.output_dir))
    printed = [re.sub(r"\S*Failed to load CPU.*\n|\[Gloo\] .*\n", "", text) for _, text in results]
    assert "loss" in printed[0]
    assert printed[1].strip() == ""


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_run_and_resume_goes_on(plain: dict[str, Any], tmp_path: Path, kind: str) -> None:
    values = plain | {"distributed": kind, "max_steps": 5, "save_steps": 2}
    dead, alive = processes.run(run_and_die, values, folder=tmp_path)[::-1]
    assert dead[0] == -signal.SIGKILL
    assert alive[0] == 3, alive[1]
    folder = Path(plain["output_dir"])
    assert "another process of the run has ended" in alive[1]
    assert f"saved {folder / 'checkpoint-2'}; the same command with --resume goes on" in alive[1]
    assert (folder / "checkpoint-2" / "optimizer").is_dir() == (kind == "fsdp")

    processes.check(processes.run(run_command, flags(values | {"resume": True}), folder=tmp_path))
    whole = {"output_dir": str(tmp_path / "whole"), "distributed": "auto", "batch_size": 2 * plain["batch_size"]}
    assert_close(adapter(folder), adapter(train(load(None, values | whole)).output_dir))

    one = train(load(None, values | {"distributed": "auto", "resume": True, "max_steps": 6}))
    assert one.steps == 6, "one process goes on from what two have saved"


def run_train(rank: int, values: dict[str, Any]) -> int:
    result = train(load(None, values))
    assert result.processes == processes.WORLD
    return 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_learn_what_one_does(plain: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """Over NCCL, in float32, and on from a checkpoint."""
    if torch.cuda.device_count() < processes.WORLD:
        pytest.skip(f"needs {processes.WORLD} GPUs")
    # A schedule that knows the last step would be another one for the first part of the run.
    values = plain | {"device": "cuda", "bf16": False, "blocks": True, "distributed": kind, "scheduler": "constant"}
    processes.check(processes.run(run_train, values, folder=tmp_path))
    more = values | {"resume": True, "max_steps": 5}
    processes.check(processes.run(run_train, more, folder=tmp_path))
    one = values | {"distributed": "auto", "batch_size": 2 * plain["batch_size"], "max_steps": 5}
    wanted = train(load(None, one | {"output_dir": str(tmp_path / "one")}))
    found = adapter(plain["output_dir"])
    # Adam makes a whole step even of rounding: directions are compared, of what began at zero.
    for name, t in adapter(wanted.output_dir).items():
        if "lora_B" in name:
            assert torch.cosine_similarity(found[name].flatten(), t.flatten(), dim=0) > 0.999, name


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--dynamo_backend=no"),
        *("--mixed_precision=no", "--main_process_port=0"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_command_under_its_launchers(
    plain: dict[str, Any], tiny_model: Path, tmp_path: Path, launcher: str
) -> None:
    """`fastlora train` as a user starts it, and what it leaves, read by PEFT alone."""
    values = plain | {"distributed": "fsdp" if launcher == "torchrun" else "ddp", "max_steps": 1}
    file = tmp_path / "run.yaml"
    file.write_text(load(None, values).to_yaml())
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "fastlora.cli", "train", str(file)]
    environment = {name: value for name, value in os.environ.items() if name not in processes.LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation loss") == 0
    assert done.stdout.count("step 1/1") == 1, "one process alone prints"
    assert done.stdout.count("speed") == 1
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, plain["output_dir"] + "/adapter")
    trained = adapter(plain["output_dir"])
    assert trained
    state = {name.replace(".default", ""): t for name, t in model.state_dict().items()}
    assert all(torch.equal(state[name], t) for name, t in trained.items())


@pytest.mark.parametrize(
    ("environment", "values", "words"),
    [
        ({"WORLD_SIZE": ""}, {"distributed": "fsdp"}, "needs several processes and there is one"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, {"distributed": "ddp"}, "needs several processes and there is one"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "ZeRO-3 cannot partition 4-bit weights"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"distributed": "ddp"}, "accelerate was told to use FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "cannot wait on the CPU"),
        ({"ACCELERATE_USE_TP": "true"}, {}, "tensor parallelism is not supported"),
        ({}, {"method": "adalora"}, "adalora changes the layers"),
        ({}, {"step": "compile"}, "set step eager"),
        ({}, {"method": "vera", "distributed": "fsdp"}, "not under vera"),
        ({}, {"init": "pissa", "distributed": "fsdp"}, "init pissa changes base weights"),
        ({}, {"decoded_memory": 1, "distributed": "fsdp"}, "keeps weights whole, which fsdp shards"),
        ({}, {"trainer": "trl", "distributed": "fsdp"}, "set trainer transformers"),
    ],
)
def test_what_does_not_fit_together(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], values: dict[str, Any], words: str
) -> None:
    if environment.get("WORLD_SIZE") != "":
        environment = processes.launcher_environment(1, 1) | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.resolve(load(None, {"model": "m", "data": "d"} | values))


@pytest.mark.parametrize(
    ("environment", "value", "kind"),
    [({}, "auto", "ddp"), ({"ACCELERATE_USE_FSDP": "true"}, "auto", "fsdp"), ({}, "fsdp", "fsdp")],
)
def test_the_kind_of_parallelism(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], value: str, kind: str
) -> None:
    for name, text in (processes.launcher_environment(1, 1) | environment).items():
        monkeypatch.setenv(name, text)
    world = distributed.resolve(load(None, {"model": "m", "data": "d", "distributed": value}))
    assert world == distributed.World(kind, 1, 1, 2)
    assert not world.main


def test_only_the_first_process_says_what_all_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, shown in ((0, 1), (1, 0)):
        for name, text in processes.launcher_environment(rank, 1).items():
            monkeypatch.setenv(name, text)
        assert main(["train", "--model", "m", "--data", "no.jsonl", "--step", "compile"]) == 2
        assert capsys.readouterr().err.count("fastlora:") == shown
