"""``fastlora tune``: what it asks for, measures, refuses and writes. On CPU tensors, with tiny layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer", reason="typer is missing (extra: train)")
pytest.importorskip("rich", reason="rich is missing (extra: train)")

from fastlora import backends, native, tables
from fastlora.backends import BACKENDS, Problem
from fastlora.bench import timing, tune
from fastlora.bench.timing import Times
from fastlora.bench.tune import Plan, parse_shapes, parse_sizes
from fastlora.cli import main
from fastlora.training.errors import UserError

TINY = Plan(
    shapes=((8, 16),), tokens=(2,), ranks=(4,), dtype=torch.float32, device_type="cpu", candidates=("torch",), rounds=2
)
COMMAND = ["tune", "--device", "cpu", "--shapes", "8,16", "--tokens", "2,4", "--ranks", "4", "--dtype", "fp32"]
TWO = [*COMMAND, "--backends", "torch,reference"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, and no shipped table."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "_SHIPPED", tmp_path / "none")
    return tmp_path / "cache"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A clock by which a call takes what this says, 1 us unless said."""
    said: dict[str, float] = {}

    def measure(variants: Any, device: torch.device, **options: Any) -> dict[str, Times]:
        for call in variants.values():
            call(0)
        return {name: Times(*(3 * (said.get(name, 1.0),))) for name in variants}

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(tune, "_seconds", lambda call, device: 1e-6)
    return said


def broken(name: str, monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], **functions))


class TestAsking:
    def test_shapes(self) -> None:
        assert parse_shapes(["14336,4096", "64x32 8,8", "8,8"]) == ((14336, 4096), (64, 32), (8, 8))
        for bad in ("4096", "4096,", "0,4", "a,b", "1,2,3", "-1,2"):
            with pytest.raises(UserError, match=r"shapes: .* write it as N,K"):
                parse_shapes([bad])

    def test_sizes(self) -> None:
        assert parse_sizes("tokens", ["1,16", "64 2"], 1) == (1, 16, 64, 2)
        assert parse_sizes("ranks", ["0"], 0) == (0,)
        for bad in ("0", "1.5", "x", "-4"):
            with pytest.raises(UserError, match=r"tokens: .* from 1 on"):
                parse_sizes("tokens", [bad], 1)

    @pytest.mark.parametrize("name", ["config.json", "."])
    def test_the_layers_of_a_model(self, name: str, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, **sizes}
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        assert tune.model_shapes(str(tmp_path / name)) == ((32, 32), (16, 32), (88, 32), (32, 88))

    def test_a_model_that_is_none(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match=r"model: cannot make .*nowhere"):
            tune.model_shapes(str(tmp_path / "nowhere"))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--shapes", "4096"], "shapes: '4096' is no shape: write it as N,K"),
            (["--tokens", "many"], "tokens: 'many' is no size"),
            (["--ranks", "-1"], "ranks: '-1' is no size"),
            (["--dtype", "int8"], "dtype should be one of"),
            (["--quant", "int4"], "quant should be one of"),
            (["--backends", "cublas"], "backends: there is no 'cublas'; choose from cuda, triton"),
            (["--backends", "torch:fast"], "backends: there is no 'torch:fast' on this device; choose from torch"),
            (["--kernels", "gem"], "did you mean gemm"),
            (["--budget", "0"], "budget: 0.0 s leave no time"),
            (["--out", "table.txt"], "out: table.txt should be a file that ends in .json"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], cache: Path
    ) -> None:
        if "--kernels" in arguments:
            pytest.importorskip("triton")
        assert main([*COMMAND, *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert not cache.exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tune", "--device", "cuda"]) == 2
        assert "device: no CUDA device is visible" in capsys.readouterr().err

    def test_a_backend_that_cannot_run_gives_its_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken("torch", monkeypatch, unsupported=lambda problem, machine: ["too old"])
        problem = next(TINY.problems())
        with pytest.raises(UserError, match=r"backends: torch cannot run forward M=2 .*: too old"):
            tune.candidates(TINY, problem, backends.this_machine())

    def test_a_backend_for_some_sizes_is_compared_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        broken("torch", monkeypatch, unsupported=lambda problem, machine: ["too long"] if problem.m > 2 else [])
        plan = dataclasses.replace(TINY, tokens=(2, 4))
        machine = backends.this_machine()
        found = {problem.m: tune.candidates(plan, problem, machine) for problem in plan.problems()}
        assert found == {2: ["torch"], 4: []}

    def test_all_that_can_run_as_what_they_are(self) -> None:
        plan = dataclasses.replace(TINY, candidates=None)
        machine = dataclasses.replace(backends.this_machine(), native_cpu=None)
        assert tune.candidates(plan, next(plan.problems()), machine) == ["cpu", "torch"]
        machine = dataclasses.replace(machine, native_cpu="not built")
        assert tune.candidates(plan, next(plan.problems()), machine) == ["torch"]

    def test_forms_are_candidates(self) -> None:
        pytest.importorskip("triton")
        gpu = tables.Device("cuda", "NVIDIA H200", "9.0", 132)
        machine = backends.Machine(None, None, None, (9, 0), triton_interpreted=True, gpu=gpu)
        plan = dataclasses.replace(TINY, candidates=("triton", "torch"))
        assert tune.candidates(plan, next(plan.problems()), machine) == ["triton:decode", "torch"]


class TestMeasuring:
    def test_fewer_weights_take_turns_where_x_is_larger(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "copies_past_cache", lambda nbytes, device: max(1, 60_000 // nbytes))
        tune._layers.cache_clear()
        layers = tune._layers(48, 64, 4, torch.bfloat16, "cpu", None)  # 6144 bytes
        tune._layers.cache_clear()
        assert len(layers) == 9
        assert [len(tune._rotated(layers, m, torch.bfloat16)) for m in (1, 32, 256, 8192)] == [9, 4, 1, 1]

    def test_the_table_decides_afterwards(
        self, cache: Path, clock: dict[str, float], capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock |= {"torch": 5.0, "reference": 2.0}
        assert main(TWO) == 0
        shown = capsys.readouterr().out
        path = cache / "cpu.json"
        assert shown.splitlines()[-1] == str(path)
        before = "cpu" if native.available("cpu") is None else "torch"
        assert sum("reference  2" in line and line.rstrip().endswith(before) for line in shown.splitlines()) == 4
        (only,) = tables.current().tables
        assert only.user
        assert only.device == backends.this_machine().cpu
        problem = Problem(3, 8, 16, 4, torch.float32, "cpu")
        assert backends.select(problem).name == "reference"
        assert f"decided by {path}: forward float32 packed r=16 at M=4 N=8 K=16: reference 2 us" in backends.explain(
            problem
        )

    def test_a_second_run_adds_to_the_table(self, cache: Path, clock: dict[str, float]) -> None:
        assert main(TWO) == 0
        clock["torch"] = 9.0
        assert main([*TWO, "--tokens", "4,32"]) == 0
        points = tables.read(cache / "cpu.json").choices[tables.Class("forward", "float32", "packed", 16)]
        assert {m: times.us["torch"] for (m, _, _), times in points.items()} == {2: 9.0, 4: 9.0, 32: 9.0}
        assert main([*TWO, "--tokens", "64", "--quant", "none"]) == 0
        assert {cls.weight for cls in tables.read(cache / "cpu.json").choices} == {"packed", "dense"}

    def test_another_file(self, cache: Path, tmp_path: Path, clock: dict[str, float]) -> None:
        out = tmp_path / "deep" / "mine.json"
        out.parent.mkdir()
        out.write_text("{")  # of no use to anybody
        assert main([*COMMAND, "--out", str(out)]) == 0
        assert tables.read(out).device == backends.this_machine().cpu
        assert not cache.exists()

    def test_an_unwritable_file(self, cache: Path, tmp_path: Path, clock: Any, capsys: Any) -> None:
        (tmp_path / "file").write_text("")
        assert main([*COMMAND, "--out", str(tmp_path / "file" / "t.json")]) == 2
        assert "out: cannot write" in capsys.readouterr().err

    @pytest.mark.parametrize("rank", [0, 4])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
    def test_by_the_real_clock(self, quant_type: str | None, rank: int) -> None:
        plan = dataclasses.replace(TINY, candidates=("torch", "reference"), quant_type=quant_type, ranks=(rank,))
        outcome = tune.measure(plan)
        assert outcome.absent == {}
        assert len(outcome.choices) == 2
        for points in outcome.choices.values():
            assert points[2, 8, 16].us.keys() == {"torch", "reference"}

    def test_a_wrong_result_has_no_time(self, monkeypatch: pytest.MonkeyPatch, clock: dict[str, float]) -> None:
        right = BACKENDS["reference"].forward

        def wrong(*args: Any) -> Any:
            y, u = right(*args)
            y[0, 0] += 1
            return y, u

        broken("reference", monkeypatch, forward=wrong)
        outcome = tune.measure(dataclasses.replace(TINY, candidates=("torch", "reference")))
        kinds = {cls.direction: set(points[2, 8, 16].us) for cls, points in outcome.choices.items()}
        assert kinds == {"forward": {"torch"}, "backward": {"torch", "reference"}}
        ((what, why),) = outcome.absent.items()
        assert what.startswith("reference, forward M=2")
        assert "wrong by" in why

    def test_a_gradient_that_is_not_finite_has_no_time(self, monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
        right = BACKENDS["torch"].backward

        def wrong(*args: Any) -> Any:
            dx, da, db = right(*args)
            db[0, 0] = float("nan")
            return dx, da, db

        broken("torch", monkeypatch, backward=wrong)
        outcome = tune.measure(TINY)
        assert [cls.direction for cls in outcome.choices] == ["forward"]

    def test_a_failure_is_a_line_of_the_report(
        self, monkeypatch: pytest.MonkeyPatch, clock: Any, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fails(*args: Any) -> Any:
            raise RuntimeError("no such instruction\nat 0x1")

        broken("reference", monkeypatch, forward=fails)
        assert main(TWO) == 0
        assert "not measured: reference, forward M=2" in (shown := capsys.readouterr().out.replace("\n", " "))
        assert "RuntimeError: no such instruction" in shown
        broken("torch", monkeypatch, forward=fails, backward=fails)
        assert main([*COMMAND, "--backends", "torch"]) == 2
        assert "nothing could be measured" in capsys.readouterr().err

    def test_a_spent_budget_leaves_the_rest_out(self, monkeypatch: pytest.MonkeyPatch, clock: Any) -> None:
        now = iter(range(0, 1000, 10))
        monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
        plan = dataclasses.replace(TINY, tokens=(1, 2, 4, 8), budget=35.0)
        outcome = tune.measure(plan)
        assert sum(len(points) for points in outcome.choices.values()) == 3
        assert outcome.left_out == 5
        assert "left out: 5 points" in list(tune.report(plan, outcome, backends.this_machine(), tables.Tables()))[-1]

    def test_the_hopeless_are_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = iter((1e-6, 1e-3))
        monkeypatch.setattr(tune, "_seconds", lambda call, device: next(first))
        seen = []

        def measure(variants: Any, device: torch.device, **options: Any) -> dict[str, Times]:
            seen.append(set(variants))
            return dict.fromkeys(variants, Times(1.0, 1.0, 1.0))

        monkeypatch.setattr(timing, "measure", measure)
        times = tune.measure_problem(next(TINY.problems()), ("torch", "reference"), 2, {})
        assert seen == [{"torch"}]
        assert times is not None
        assert times.us == {"torch": 1.0, "reference": pytest.approx(1e3)}

    def test_nothing_stays_forced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")

        def fails(*args: Any, **options: Any) -> Any:
            assert tables.forced_forms == {"triton": "decode"}
            raise KeyboardInterrupt

        monkeypatch.setattr(timing, "measure", fails)
        monkeypatch.setattr(tune, "_seconds", lambda call, device: 1e-6)
        with pytest.raises(KeyboardInterrupt):
            tune.measure_problem(next(TINY.problems()), ("triton:decode",), 2, {})
        assert tables.forced_forms == {}


class TestTiles:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("made for the interpreter")
        monkeypatch.setattr(tune, "TILE_TOKENS", {**dict.fromkeys(tune._KERNELS, (16,)), "buffer_gemm": (64,)})

    PLAN = dataclasses.replace(TINY, dtype=torch.float16, shapes=((48, 64),))

    def test_every_kernel_can_be_tuned(self) -> None:
        from fastlora.kernels import config  # noqa: F401
        from fastlora.kernels.tuned import TUNED

        assert set(tune.tunable()) == set(TUNED)

    @pytest.mark.parametrize("kernel", tune._KERNELS)
    def test_the_fastest_is_written_and_used(self, kernel: str, clock: dict[str, float]) -> None:
        clock[""] = 1.02
        job = tune._tile_jobs(dataclasses.replace(self.PLAN, kernels=(kernel,)))[0]
        entry = tune.measure_tiles(job, self.PLAN, absent := {})
        assert absent == {}
        assert entry is not None
        assert (entry.tiles, entry.us) == ({}, {"built-in": 1.02})  # as fast as the best, to what runs differ
        clock[""] = 2.0
        entry = tune.measure_tiles(job, self.PLAN, {})
        assert entry is not None
        assert entry.tiles
        assert entry.us == {"built-in": 2.0, "chosen": 1.0}
        assert entry.at["r"] == 16
        assert tables.forced_tiles == {}

    def test_wrong_tiles_are_no_choice(self, monkeypatch: pytest.MonkeyPatch, clock: dict[str, float]) -> None:
        from fastlora.kernels import config

        clock[""] = 2.0
        right = BACKENDS["triton"].backward

        def wrong(*args: Any) -> Any:
            dx, da, db = right(*args)
            if config.gradient(4, torch.float16, config.Device()).block_m == 32:
                da *= 2
            return dx, da, db

        broken("triton", monkeypatch, backward=wrong)
        entry = tune.measure_tiles(tune.TileJob("gradient", 16, 48, 64, 4), self.PLAN, absent := {})
        assert entry is not None
        assert entry.tiles["block_m"] != 32
        ((what, why),) = absent.items()
        assert "gradient M=16 N=48 K=64 R=4 block_m=32" in what
        assert "wrong by" in why

    def test_they_are_measured_before_the_backends(self, clock: dict[str, float], monkeypatch: Any) -> None:
        steps: list[str] = []
        clock[""] = 2.0
        plan = dataclasses.replace(self.PLAN, kernels=("project",))
        outcome = tune.measure(plan, steps.append)
        assert steps[0] == "tiles of project M=16 N=48 K=64 R=4"
        assert [step.split()[0] for step in steps[1:]] == ["forward", "backward"]
        text = [str(part) for part in tune.report(plan, outcome, backends.this_machine(), tables.Tables())]
        assert any("tiles of project at m=16 r=16 dtype=16-bit: block_m=" in part and "2.00x" in part for part in text)

    def test_a_kernel_that_fails_costs_the_rest_nothing(self, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: Any) -> Any:
            raise RuntimeError("does not compile")

        monkeypatch.setattr(tune, "_runners", fails)
        outcome = tune.measure(dataclasses.replace(self.PLAN, kernels=("project",)))
        assert outcome.absent == {"project M=16 N=48 K=64 R=4": "RuntimeError: does not compile"}
        assert outcome.choices


@pytest.mark.gpu
def test_on_a_gpu(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "256,512", "--tokens", "16,256", "--kernels", "project", "--budget", "60"]
    assert main(["tune", *arguments]) == 0
    assert "not measured" not in capsys.readouterr().out
    (only,) = tables.current().tables
    assert only.path is not None
    assert only.path.parent == cache
    assert len(only.tiles["project"]) == 3
    assert len(only.choices) == 2
    for points in only.choices.values():
        assert points.keys() == {(16, 256, 512), (256, 256, 512)}
        for times in points.values():
            assert "torch" in times.us
            assert times.graph_us.keys() <= times.us.keys()
    layer = Problem(300, 256, 512, 16)
    assert f"decided by {only.path}" in backends.explain(layer)
