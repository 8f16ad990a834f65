"""Selection and its explanations, asked about machines that are made up."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import NF4Weight, backends, tables
from fastlora.backends import BACKENDS, Backend, Machine, Problem, dequantizer, explain, select

H100 = Machine(triton=None, native_cpu=None, native_cuda=None, capability=(9, 0))
A100 = dataclasses.replace(H100, capability=(8, 0))
T4 = dataclasses.replace(H100, capability=(7, 5))
WITHOUT_TRITON = dataclasses.replace(H100, triton="triton is not installed (extra: triton)")
LAPTOP = Machine(
    "triton is not installed (extra: triton)", "fastlora._C is not built", "fastlora._C is not built", None
)
INTERPRETER = Machine(None, None, "no CUDA device", None, triton_interpreted=True)

STEP = Problem(4096, 14336, 4096, 16)
ON_CPU = dataclasses.replace(STEP, device_type="cpu")


class TestSelect:
    @pytest.mark.parametrize("machine", [H100, A100, T4, WITHOUT_TRITON], ids=str)
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_auto_finds_a_backend_on_every_gpu(self, direction: str, machine: Machine) -> None:
        problem = dataclasses.replace(STEP, direction=direction)
        chosen = select(problem, machine=machine)
        assert not chosen.unsupported(problem, machine)
        assert chosen.preferred(problem, machine)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
    @pytest.mark.parametrize(
        ("machine", "direction", "dtype", "name"),
        [
            (H100, "forward", torch.bfloat16, "triton"),
            (H100, "forward", torch.float16, "triton"),
            (A100, "forward", torch.bfloat16, "cuda"),
            (H100, "backward", torch.bfloat16, "triton"),
            (A100, "backward", torch.float16, "cuda"),
            (dataclasses.replace(A100, native_cuda="not built"), "forward", torch.float16, "triton"),
            (dataclasses.replace(A100, native_cuda="not built"), "backward", torch.float16, "torch"),
            (H100, "forward", torch.float32, "torch"),
            (H100, "forward", torch.float64, "torch"),
            (T4, "forward", torch.float16, "torch"),
            (WITHOUT_TRITON, "forward", torch.bfloat16, "cuda"),
        ],
    )
    def test_auto_on_a_gpu(
        self, machine: Machine, direction: str, dtype: torch.dtype, name: str, quant_type: str | None
    ) -> None:
        problem = dataclasses.replace(STEP, direction=direction, dtype=dtype, quant_type=quant_type)
        if quant_type is None and name == "cuda":  # takes packed weights only
            name = "torch" if machine.triton or direction == "backward" else "triton"
        assert select(problem, machine=machine).name == name

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("m", [1, 16])
    def test_auto_leaves_small_outputs_on_a_gpu_to_the_library(self, m: int, direction: str) -> None:
        machine = dataclasses.replace(H100, native_cuda="not built")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            problem = dataclasses.replace(STEP, m=m, direction=direction, dtype=dtype)
            assert select(problem, machine=machine).name == "torch"

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("m", [1, 64, 256])
    def test_auto_takes_the_fewest_calls_where_they_are_the_cost(self, m: int, direction: str) -> None:
        few = dataclasses.replace(STEP, m=m, direction=direction)
        assert select(few, machine=H100).name == "cuda"
        assert select(dataclasses.replace(few, dropout=True), machine=H100).name == "cuda"
        others: list[dict[str, Any]] = [{"quant_type": None}, {"dtype": torch.float32}]
        for change in others:
            assert select(dataclasses.replace(few, **change), machine=H100).name != "cuda", change

    def test_a_graph_is_judged_by_the_time_of_the_gpu(self) -> None:
        few = dataclasses.replace(STEP, m=64)
        assert select(few, machine=H100).name == "cuda"
        assert select(dataclasses.replace(few, captured=True), machine=H100).name == "triton"
        assert select(dataclasses.replace(few, captured=True, m=1), machine=H100).name == "cuda"
        assert select(dataclasses.replace(few, captured=True, direction="backward"), machine=H100).name == "cuda"

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_auto_decodes_in_tiles_where_they_fill_the_device(self, direction: str) -> None:
        machine = dataclasses.replace(H100, gpu=tables.Device("cuda", "A GPU", "9.0", 132))
        for m, name in ((1024, "cuda"), (1280, "triton"), (2048, "cuda"), (8192, "triton")):
            problem = dataclasses.replace(STEP, m=m, n=4096, k=4096, direction=direction, captured=True)
            assert select(problem, machine=machine, known=tables.Tables()).name == name

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("machine", [INTERPRETER, H100], ids=str)
    def test_auto_on_cpu_tensors(self, machine: Machine, dtype: torch.dtype, direction: str) -> None:
        problem = dataclasses.replace(ON_CPU, dtype=dtype, direction=direction)
        assert select(problem, machine=machine).name == "cpu"
        with_amx = select(problem, machine=dataclasses.replace(machine, amx=True))
        assert with_amx.name == ("torch" if dtype == torch.bfloat16 else "cpu")
        assert select(dataclasses.replace(problem, dropout=True), machine=machine).name == "cpu"
        others: list[dict[str, Any]] = [
            {"quant_type": None},
            {"dtype": torch.float16},
            {"dtype": torch.float64},
            {"n": 0},
        ]
        for change in others:
            assert select(dataclasses.replace(problem, **change), machine=machine).name == "torch", change

    def test_auto_on_cpu_tensors_without_the_extension(self) -> None:
        assert select(ON_CPU, machine=LAPTOP).name == "torch"
        with pytest.raises(RuntimeError, match=r"fastlora\._C is not built"):
            select(ON_CPU, "cpu", LAPTOP)

    @pytest.mark.parametrize("name", BACKENDS)
    def test_a_named_backend_is_the_one_that_runs(self, name: str) -> None:
        problem = dataclasses.replace(STEP, m=4, device_type="cpu" if name == "cpu" else "cuda")
        assert select(problem, name, H100) is BACKENDS[name]

    def test_interpreted_triton_runs_when_named(self) -> None:
        assert select(dataclasses.replace(ON_CPU, dtype=torch.float32), "triton", INTERPRETER).name == "triton"

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(
            ValueError, match=r"unknown backend 'cublas'; choose from auto, cuda, triton, cpu, torch, reference"
        ):
            select(STEP, "cublas", H100)

    def test_the_error_holds_every_reason(self) -> None:
        problem = dataclasses.replace(ON_CPU, dtype=torch.float64)
        with pytest.raises(RuntimeError) as error:
            select(problem, "triton", LAPTOP)
        message = str(error.value)
        assert "backend 'triton' cannot run forward M=4096 N=14336 K=4096 R=16, float64 on cpu" in message
        for reason in ("triton is not installed", "run on cuda, not on cpu", "float64 is not a type of these kernels"):
            assert reason in message

    @pytest.mark.parametrize(
        ("name", "machine", "reason"),
        [
            ("triton", T4, r"needs compute capability 8\.0, this GPU has 7\.5"),
            ("triton", WITHOUT_TRITON, r"triton is not installed \(extra: triton\)"),
            ("triton", LAPTOP, r"no CUDA device"),
            ("torch", LAPTOP, r"no CUDA device"),
            ("reference", LAPTOP, r"no CUDA device"),
        ],
    )
    def test_a_named_backend_raises_its_reason(self, name: str, machine: Machine, reason: str) -> None:
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run .*{reason}"):
            select(STEP, name, machine)

    def test_auto_raises_where_nothing_can_run(self) -> None:
        with pytest.raises(RuntimeError, match=r"no backend can run forward M=4096 .* on cuda"):
            select(STEP, machine=LAPTOP)

    def test_auto_takes_the_first_that_is_supported_and_preferred(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def backend(name: str, reasons: list[str], preferred: bool) -> Backend:
            return dataclasses.replace(
                BACKENDS["torch"], name=name, unsupported=lambda p, m: reasons, preferred=lambda p, m: preferred
            )

        order = [
            backend("cannot", ["a reason"], True),
            backend("slow", [], False),
            backend("first", [], True),
            backend("second", [], True),
        ]
        monkeypatch.setattr(backends, "BACKENDS", {b.name: b for b in order})
        assert select(STEP, machine=H100).name == "first"
        monkeypatch.setattr(backends, "BACKENDS", {b.name: b for b in order[:2]})
        with pytest.raises(RuntimeError, match="no backend"):  # never one that nobody measured to be the fastest
            select(STEP, machine=H100)

    def test_selection_asks_only_the_machine_that_it_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden() -> Machine:
            raise AssertionError("looked at the real machine")

        monkeypatch.setattr(backends, "this_machine", forbidden)
        for machine in (H100, T4, WITHOUT_TRITON):
            select(STEP, machine=machine)
            explain(STEP, machine)


class TestDequantizer:
    @pytest.mark.parametrize(
        ("device_type", "machine", "name"),
        [
            ("cuda", H100, "triton"),
            ("cuda", WITHOUT_TRITON, "native"),
            ("cuda", dataclasses.replace(WITHOUT_TRITON, native_cuda="not built"), "portable"),
            ("cpu", H100, "native"),
            ("cpu", LAPTOP, "portable"),
            ("cpu", INTERPRETER, "native"),
        ],
    )
    def test_choice(self, device_type: str, machine: Machine, name: str) -> None:
        assert dequantizer(device_type, machine) == name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("nested", [True, False])
    def test_every_choice_gives_the_same_bits(self, nested: bool, dtype: torch.dtype, device: str) -> None:
        w = NF4Weight.quantize(torch.randn(9, 70, device=device), nested=nested)
        assert torch.equal(backends.dequantize(w, dtype), w.dequantize(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_out_may_be_part_of_a_larger_buffer(self, dtype: torch.dtype, device: str) -> None:
        w = NF4Weight.quantize(torch.randn(9, 70, device=device))
        buffer = torch.full((9, 80), 7.0, dtype=dtype, device=device)
        out = backends.dequantize(w, dtype, buffer[:, 2:72])
        assert out.data_ptr() == buffer[:, 2:].data_ptr()
        assert torch.equal(buffer[:, 2:72], w.dequantize(dtype))
        assert (buffer[:, :2] == 7).all()
        assert (buffer[:, 72:] == 7).all()


class TestExplain:
    def test_both_directions_and_every_backend(self) -> None:
        lines = explain(STEP, H100).splitlines()
        heads = [i for i, line in enumerate(lines) if not line.startswith(" ")]
        assert [lines[i].split()[0] for i in heads] == ["forward", "backward"]
        for head in heads:
            block = lines[head + 1 : head + 1 + len(BACKENDS)]
            assert [line.removeprefix("  -> ").split()[0] for line in block] == list(BACKENDS)
            assert sum(line.startswith("  -> ") for line in block) == 1

    def test_reasons_and_the_dequantizer(self) -> None:
        text = explain(ON_CPU, LAPTOP)
        assert "triton     cannot run: triton is not installed (extra: triton); Triton kernels run on cuda" in text
        assert "-> torch      runs: dequantize" in text
        assert "reference  can run when named; not the fastest measured here" in text
        assert text.count("dequantizer: portable") == 2

    def test_a_dense_base_needs_no_dequantizer(self) -> None:
        text = explain(dataclasses.replace(ON_CPU, quant_type=None), LAPTOP)
        assert "dense base" in text
        assert "dequantizer" not in text

    def test_where_nothing_can_run(self) -> None:
        text = explain(STEP, LAPTOP)
        assert "->" not in text
        assert text.count("no CUDA device") == 2 * (len(BACKENDS) - 1)
        assert text.count("these kernels run on cpu, not on cuda") == 2

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({}, "forward M=4096 N=14336 K=4096 R=16, bfloat16 on cuda, nf4/64 nested base"),
            ({"quant_type": "fp4", "blocksize": 128, "nested": False}, "bfloat16 on cuda, fp4/128 base"),
            ({"quant_type": None, "dtype": torch.float16}, "float16 on cuda, dense base"),
        ],
    )
    def test_problem_in_words(self, changes: dict, words: str) -> None:
        assert str(dataclasses.replace(STEP, **changes)).endswith(words)


class TestInfo:
    def test_versions_devices_and_backends(self) -> None:
        text = backends.info()
        assert torch.__version__ in text
        for name in BACKENDS:
            for device_type in ("cuda", "cpu"):
                assert f"backend {name:<10} {device_type}: " in text
        if not torch.cuda.is_available():
            assert "no CUDA device" in text

    def test_missing_parts_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_package(name: str) -> str:
            raise backends.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(backends, "this_machine", lambda: LAPTOP)
        monkeypatch.setattr(backends.importlib.metadata, "version", no_package)
        text = backends.info()
        assert "peft             not installed" in text
        assert "extension, cpu   fastlora._C is not built" in text
        assert "backend triton     cpu: triton is not installed (extra: triton); Triton kernels run on cuda" in text
        assert "dequantizer      cpu: portable" in text


def test_this_machine_gives_a_reason_for_whatever_is_missing() -> None:
    machine = backends.this_machine()
    for reason in (machine.triton, machine.native_cpu, machine.native_cuda):
        assert reason is None or reason.strip()
    assert (machine.capability is None) == (not torch.cuda.is_available())


def run_python(code: str) -> str:
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fastlora_imports_nothing_optional() -> None:
    optional = "triton peft transformers bitsandbytes accelerate trl datasets typer pydantic rich yaml"
    out = run_python(
        "import sys, torch; before = set(sys.modules); import fastlora\n"
        f"optional = {optional.split()!r}\n"
        "print(sorted(name for name in set(sys.modules) - before if name.split('.')[0] in optional))\n"
        "print(torch.cuda.is_initialized(), 'fastlora._C' in sys.modules)"
    )
    assert out.split("\n")[:2] == ["[]", "False False"]


def test_accelerate_without_peft_names_the_extra() -> None:
    out = run_python(
        "import sys; sys.modules['peft'] = None\n"
        "import fastlora\n"
        "try: fastlora.accelerate\n"
        "except ImportError as error: print(error)"
    )
    assert out.strip() == "fastlora.accelerate needs PEFT: pip install 'fastlora-kernels[train]'"
