"""Tables of measurements: the files, the nearest shape, and what selection and the kernels make of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from fastlora import backends, tables
from fastlora.backends import Machine, Problem, select
from fastlora.tables import Class, Device, Table, Tables, Tiles, Times

H200 = Device("cuda", "NVIDIA H200", "9.0", 132)
H100 = Device("cuda", "NVIDIA H100 PCIe", "9.0", 114)
SLICE = Device("cuda", "NVIDIA H200 MIG 1g.18gb", "9.0", 16)
A100 = Device("cuda", "NVIDIA A100-SXM4-80GB", "8.0", 108)
MACHINE = Machine(None, None, "not built", (9, 0), gpu=H200, cpu=Device("cpu", "AVX512", "AVX512", 8))

FORWARD = Class("forward", "16-bit", "packed", 16)
BACKWARD = dataclasses.replace(FORWARD, direction="backward")
LAYER = Problem(64, 4096, 4096, 16)


def table(points: dict[tuple[int, int, int], dict[str, float]], cls: Class = FORWARD, **fields: Any) -> Table:
    return Table(**{"device": H200, "choices": {cls: {shape: Times(us) for shape, us in points.items()}}, **fields})


def found(known: Tables, m: int, n: int = 4096, k: int = 4096, device: Device = H200, cls: Class = FORWARD) -> Any:
    return known.choice(device, cls, m, n, k)


ONE = table({(64, 4096, 4096): {"torch": 90.0, "triton:decode": 50.0}})


class TestFile:
    def full(self) -> Table:
        times = {(1, 64, 32): Times({"torch": 80.125, "triton:library": 95.0}, {"torch": 20.0})}
        entry = Tiles({"m": 16, "r": 16, "dtype": "16-bit"}, {"block_m": 32}, {"built-in": 5.0, "chosen": 4.0})
        return Table(H200, {FORWARD: times, BACKWARD: times}, {"project": (entry,)}, {"torch": "2.11"})

    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "h200.json"
        self.full().write(path)
        got = tables.read(path)
        assert (got.device, got.made, got.path) == (H200, {"torch": "2.11"}, path)
        assert got.choices.keys() == {FORWARD, BACKWARD}
        assert got.choices[FORWARD][1, 64, 32].us == {"torch": 80.12, "triton:library": 95.0}  # to four digits
        assert got.choices[FORWARD][1, 64, 32].graph_us == {"torch": 20.0}
        assert got.tiles == self.full().tiles
        assert [file.name for file in path.parent.iterdir()] == ["h200.json"]

    def test_an_empty_table_is_one(self) -> None:
        assert tables.parse(json.loads(Table(H200).text())).choices == {}

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            (("version",), 2, r"table\.version should be 1, not 2"),
            (("device", "capability"), 9.0, r"device\.capability should be of type str"),
            (("device", "multiprocessors"), 0, r"device\.multiprocessors should be at least 1, not 0"),
            (("choices",), {}, r"table\.choices should be of type list"),
            (("choices", 0, "r"), None, r"choices\[0\]\.r should be of type int"),
            (("choices", 0, "points", 0, "m"), True, r"points\[0\]\.m should be of type int"),
            (("choices", 0, "points", 0, "us"), {}, r"us should be the times of one candidate"),
            (("choices", 0, "points", 0, "us"), {"torch": -1}, r"us\.torch should be a positive number"),
            (("choices", 0, "points", 0, "us"), {"torch": float("nan")}, r"us\.torch should be a positive number"),
            (("choices", 0, "points", 0, "us"), {"torch": 10**400}, r"us\.torch should be a positive number"),
            (("made",), "yesterday", r"table\.made should be of type dict"),
            (("choices", 0, "points", 0), 7, r"choices\[0\]\.points\[0\] should be an object"),
            (("tiles", "project"), 7, r"tiles\.project should be of type list"),
            (("tiles", "project", 0, "at", "m"), 1.5, r"tiles\.project\[0\]\.at\.m should be a size or a word"),
            (("tiles", "project", 0, "tiles", "block_m"), "16", r"tiles\.block_m should be of type int"),
        ],
    )
    def test_a_wrong_field_is_named(self, path: tuple[Any, ...], value: Any, message: str) -> None:
        record = json.loads(self.full().text())
        inner = record
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        with pytest.raises(ValueError, match=message):
            tables.parse(record)

    def test_a_missing_field_is_named(self) -> None:
        record = json.loads(self.full().text())
        del record["device"]["name"]
        with pytest.raises(ValueError, match=r"device\.name is missing"):
            tables.parse(record)

    def test_the_users_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTLORA_CACHE", "~/elsewhere")
        assert tables.folder() == Path.home() / "elsewhere"
        monkeypatch.delenv("FASTLORA_CACHE")
        assert tables.folder() == Path.home() / ".cache" / "fastlora"

    def test_files_that_cannot_be_read_are_named_once_and_ignored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ONE.write(tmp_path / "good.json")
        (tmp_path / "broken.json").write_text("{")
        (tmp_path / "list.json").write_text("[]")
        (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
        (tmp_path / "deep.json").write_text("[" * 100_000)
        monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
        monkeypatch.setattr(tables, "_SHIPPED", tmp_path / "none")
        tables.reload()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (only,) = tables.current().tables
            tables.current()
        assert only.user
        assert only.path == tmp_path / "good.json"
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == 4
        for name in ("broken", "list", "binary", "deep"):
            assert sum(f"{name}.json is ignored" in message for message in messages) == 1

    def test_merging_keeps_what_was_not_measured_again(self) -> None:
        old = table(
            {(1, 64, 64): {"torch": 1.0}, (2, 64, 64): {"torch": 2.0}},
            tiles={"project": (Tiles({"m": 16}, {"block_m": 16}), Tiles({"m": 64}, {"block_m": 32}))},
        )
        new = table({(2, 64, 64): {"torch": 9.0}}, tiles={"project": (Tiles({"m": 64}, {"block_m": 128}),)})
        merged = old.merged(new)
        assert {shape: times.us["torch"] for shape, times in merged.choices[FORWARD].items()} == {
            (1, 64, 64): 1.0,
            (2, 64, 64): 9.0,
        }
        assert [dict(entry.tiles) for entry in merged.tiles["project"]] == [{"block_m": 16}, {"block_m": 128}]


class TestRanking:
    def test_the_time_with_launches_decides(self) -> None:
        assert Times({"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 0.1, "b": 0.1, "c": 0.9}).ranking() == ["c", "b", "a"]

    def test_the_gpu_decides_between_ties(self) -> None:
        assert Times({"a": 100.0, "b": 102.0, "c": 104.0}, {"a": 9.0, "b": 8.0, "c": 1.0}).ranking() == ["b", "a", "c"]

    def test_one_without_a_gpu_time_is_not_overtaken(self) -> None:
        assert Times({"a": 100.0, "b": 102.0}, {"b": 8.0}).ranking() == ["a", "b"]


class TestNearest:
    def test_buckets(self) -> None:
        assert [tables.bucket(m) for m in (1, 2, 3, 16, 20, 24, 1000, 1500, 8192)] == [
            1, 2, 4, 16, 16, 32, 1024, 2048, 8192,
        ]  # fmt: skip
        assert [tables.rank_bucket(r) for r in (0, 1, 8, 16, 17, 64, 65)] == [0, 16, 16, 16, 32, 64, 128]

    def test_in_the_logarithms_of_all_three_sides(self) -> None:
        known = Tables((table({shape: {"torch": 1.0} for shape in ((16, 4096, 4096), (64, 1024, 4096))}),))
        assert found(known, 32).shape == (16, 4096, 4096)
        assert found(known, 64, 1024).shape == (64, 1024, 4096)
        assert found(known, 64, 1500).shape == (64, 1024, 4096)

    @pytest.mark.parametrize("order", [1, -1])
    def test_of_two_that_are_equally_near_the_larger(self, order: int) -> None:
        shapes = [(16, 4096, 4096), (64, 4096, 4096)][::order]
        assert found(Tables((table({shape: {"torch": 1.0} for shape in shapes}),)), 32).shape[0] == 64

    def test_not_beyond_reach(self) -> None:
        known = Tables((ONE,))
        assert found(known, 1024) is not None
        assert found(known, 2048) is None

    def test_within_a_class_and_the_nearest_rank(self) -> None:
        known = Tables((ONE, table({(64, 4096, 4096): {"torch": 1.0}}, dataclasses.replace(FORWARD, r=128))))
        assert found(known, 64, cls=BACKWARD) is None
        assert found(known, 64, cls=dataclasses.replace(FORWARD, weight="dense")) is None
        assert found(known, 64, cls=dataclasses.replace(FORWARD, dtype="float32")) is None
        assert [found(known, 64, cls=dataclasses.replace(FORWARD, r=r)).cls.r for r in (0, 8, 33, 500)] == [
            16, 16, 128, 128,
        ]  # fmt: skip

    def test_types(self) -> None:
        assert tables.dtype_class(torch.bfloat16, "cuda") == tables.dtype_class(torch.float16, "cuda") == "16-bit"
        assert tables.dtype_class(torch.bfloat16, "cpu") == "bfloat16"
        assert tables.dtype_class(torch.float32, "cuda") == "float32"

    def test_a_gpu_without_a_table_takes_the_most_alike_of_its_capability(self) -> None:
        own, slice_ = table({(64, 4096, 4096): {"torch": 1.0}}), table({(64, 4096, 4096): {"torch": 2.0}}, device=SLICE)
        known = Tables((slice_, own))
        assert found(known, 64).table is own
        assert found(known, 64, device=H100).table is own
        assert found(known, 64, device=dataclasses.replace(H100, multiprocessors=20)).table is slice_
        assert found(known, 64, device=A100) is None
        assert found(known, 64, device=dataclasses.replace(H200, type="cpu")) is None

    def test_names_may_be_patterns(self) -> None:
        alike = table({(64, 4096, 4096): {"torch": 1.0}}, device=dataclasses.replace(H100, multiprocessors=132))
        named = table({(64, 4096, 4096): {"torch": 2.0}}, device=dataclasses.replace(H200, name="NVIDIA H2*"))
        assert found(Tables((alike, named)), 64).table is named

    def test_the_users_measurement_wins_where_it_is_as_near(self) -> None:
        shipped = table({(64, 4096, 4096): {"torch": 1.0}, (1024, 4096, 4096): {"torch": 1.0}})
        user = table({(64, 4096, 4096): {"torch": 2.0}}, user=True)
        for known in (Tables((shipped, user)), Tables((user, shipped))):
            assert found(known, 64).table is user
            assert found(known, 1024).table is shipped


class TestSelect:
    def choose(self, known: Table | None, machine: Machine = MACHINE, **fields: Any) -> str:
        problem = dataclasses.replace(LAYER, **fields)
        return select(problem, machine=machine, known=Tables((known,) if known else ())).name

    def test_the_fastest_measured_runs(self) -> None:
        assert self.choose(None) == "torch"
        assert self.choose(ONE) == "triton"
        assert self.choose(ONE, r=8, quant_type="fp4", nested=False, dtype=torch.float16) == "triton"

    def test_the_built_in_rule_holds_elsewhere(self) -> None:
        for fields in ({"direction": "backward"}, {"quant_type": None}, {"dtype": torch.float32}):
            assert self.choose(ONE, **fields) == "torch"

    def test_one_that_cannot_run_is_passed_over(self) -> None:
        assert self.choose(ONE, dataclasses.replace(MACHINE, triton="triton is not installed")) == "torch"
        strange = table({(64, 4096, 4096): {"another": 1.0, "reference": 2.0, "torch": 3.0}})
        assert self.choose(strange) == "reference"
        assert self.choose(table({(64, 4096, 4096): {"another": 1.0}})) == "torch"

    def test_a_named_backend_asks_no_table(self) -> None:
        assert select(LAYER, "reference", MACHINE, Tables((ONE,))).name == "reference"

    def test_a_machine_that_is_not_described_has_no_table(self) -> None:
        assert self.choose(ONE, dataclasses.replace(MACHINE, gpu=None)) == "torch"

    def test_on_a_cpu(self) -> None:
        kind = Class("forward", "float32", "packed", 16)
        known = table({(64, 64, 64): {"reference": 1.0, "torch": 2.0}}, kind, device=MACHINE.cpu)
        fields = {"n": 64, "k": 64, "device_type": "cpu"}
        machine = dataclasses.replace(MACHINE, native_cpu="not built")
        assert self.choose(known, machine, dtype=torch.float32, **fields) == "reference"
        assert self.choose(known, machine, dtype=torch.bfloat16, **fields) == "torch"

    def test_operators_forget_their_choice_when_the_tables_change(self) -> None:
        machine = backends.this_machine()
        assert machine.cpu is not None
        kind = Class("forward", "float32", "dense", 0)
        known = Tables((table({(4, 8, 8): {"reference": 1.0}}, kind, device=machine.cpu),))
        names = []

        def watched(name: str) -> backends.Backend:
            backend = backends.BACKENDS[name]

            def forward(*args: Any) -> Any:
                names.append(name)
                return backend.forward(*args)

            return dataclasses.replace(backend, forward=forward)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "BACKENDS", {name: watched(name) for name in backends.BACKENDS})
            x, w = torch.randn(4, 8), torch.randn(8, 8)
            fastlora.lora_linear(x, w, None, None)
            with tables.use(known):
                fastlora.lora_linear(x, w, None, None)
            fastlora.lora_linear(x, w, None, None)
        assert names == ["torch", "reference", "torch"]


class TestNothingIsMeasured:
    def test_selection_and_a_step_read_no_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import time

        from fastlora.bench import timing

        def forbidden(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("measured")

        for module, name in (
            (timing, "measure"), (timing, "measure_graph"), (time, "perf_counter"), (time, "monotonic"),
            (torch.cuda, "synchronize"), (torch.cuda, "Event"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, forbidden)
        with tables.use(Tables((ONE,))):
            for m in (1, 64, 4096):
                for direction in ("forward", "backward"):
                    select(dataclasses.replace(LAYER, m=m, direction=direction), machine=MACHINE)
            backends.explain(LAYER, MACHINE)
            a, b = torch.randn(2, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
            fastlora.lora_linear(torch.randn(4, 8), torch.randn(8, 8), a, b).sum().backward()
        assert a.grad is not None

    def test_no_kernel_tunes_itself(self) -> None:
        for path in Path(fastlora.__file__).parent.glob("kernels/*.py"):
            assert "autotune(" not in path.read_text()

    def test_files_are_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ONE.write(tmp_path / "one.json")
        monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
        tables.reload()
        assert select(LAYER, machine=MACHINE).name == "triton"
        (tmp_path / "one.json").unlink()
        assert select(dataclasses.replace(LAYER, m=60), machine=MACHINE).name == "triton"
        tables.reload()
        monkeypatch.setattr(tables, "_SHIPPED", tmp_path)
        assert select(LAYER, machine=MACHINE).name == "torch"


class TestExplain:
    def test_the_entry_that_decided(self) -> None:
        known = dataclasses.replace(ONE, path=Path("fastlora/tables/nvidia-h200.json"))
        with tables.use(Tables((known,))):
            text = backends.explain(dataclasses.replace(LAYER, m=100), MACHINE)
        assert (
            "decided by nvidia-h200.json (shipped): forward 16-bit packed r=16 at M=64 N=4096 K=4096: "
            "triton:decode 50 us, torch 90 us" in text
        )
        assert "-> triton" in text
        assert "torch      can run when named; measured 90 us" in text
        assert "reference  can run when named; not measured here" in text
        assert "built-in rules: no table has a shape near this one for NVIDIA H200 (9.0, 132 multiprocessors)" in text

    def test_the_built_in_rules(self) -> None:
        text = backends.explain(LAYER, dataclasses.replace(MACHINE, gpu=None))
        assert text.count("decided by the built-in rules") == 2
        assert "an unknown device" in text

    def test_a_measured_gpu_stands_for_its_architecture(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ONE.write(tmp_path / "h200.json")
        monkeypatch.setattr(tables, "_SHIPPED", tmp_path)
        assert backends.measured_machine(MACHINE, (9, 0)).gpu == H200
        other = backends.measured_machine(MACHINE, (8, 0))
        assert (other.capability, other.gpu) == ((8, 0), None)


def test_shipped_tables_are_valid() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shipped = tables.shipped()
    for known in shipped.tables:
        assert not known.user
        for points in known.choices.values():
            for times in points.values():
                assert all(name.partition(":")[0] in (*backends.BACKENDS, "cuda", "cpu") for name in times.us)


class TestTiles:
    @pytest.fixture(autouse=True)
    def _triton(self) -> None:
        pytest.importorskip("triton")

    def known(self, kernel: str, *entries: tuple[dict[str, Any], dict[str, int]], **fields: Any) -> Tables:
        return Tables((Table(H200, tiles={kernel: tuple(Tiles(at, tiles) for at, tiles in entries)}, **fields),))

    def device(self, **fields: Any) -> Any:
        from fastlora.kernels import config

        return config.Device(**{"capability": (9, 0), "multiprocessors": 132, "name": "NVIDIA H200", **fields})

    AT: dict[str, Any] = {"m": 64, "r": 16, "dtype": "16-bit"}  # noqa: RUF012

    def test_an_entry_replaces_its_fields_only(self) -> None:
        from fastlora.kernels import config

        own = config.project(64, 16, torch.bfloat16, self.device())
        entry = {"block_m": 32, "block_k": 128, "num_warps": 8}
        with tables.use(self.known("project", (self.AT, entry))):
            got = config.project(64, 16, torch.bfloat16, self.device())
            assert got == dataclasses.replace(own, **entry)
            assert config.project(64, 16, torch.float16, self.device()) == got
            for changes in ({"name": ""}, {"capability": (8, 0)}):
                built_in = config.project(64, 16, torch.bfloat16, self.device(**changes))
                assert built_in.block_m == own.block_m
            for beyond_reach in ((64, 16, torch.float32), (64, 256, torch.bfloat16)):
                at = (*beyond_reach, self.device())
                assert config.project(*at) == config.project.own(*at)
        assert config.project(64, 16, torch.bfloat16, self.device()) == own

    def test_few_variants_whatever_m_is(self) -> None:
        from fastlora.kernels import config

        rest = {"block_k": 64, "num_warps": 4, "num_stages": 4}  # what of the built-in choice depends on m
        rows = ((16, 16), (256, 32), (4096, 128))
        entries = [({**self.AT, "m": m}, {"block_m": block, **rest}) for m, block in rows]
        with tables.use(self.known("project", *entries)):
            seen = {config.project(m, 16, torch.bfloat16, self.device()) for m in range(17, 20000, 7)}
            assert {tiles.block_m for tiles in seen} <= {16, 32, 64, 128}
            training = {config.project(m, 16, torch.bfloat16, self.device()) for m in range(1500, 16384)}
            assert len(training) == 1

    @pytest.mark.parametrize(
        ("at", "tiles", "reason"),
        [
            (AT, {"block_m": 48}, "block_m must be a power of two of at least 16, got 48"),
            (AT, {"block_m": 128, "block_k": 256, "num_stages": 4}, "fits only with num_stages="),
            (AT, {"block_r": 64}, "block_r cannot be chosen by a table"),
            (AT, {"block_m": 65536}, "accumulator registers a thread, more than 255"),
            ({**AT, "n": 64}, {"block_m": 32}, "is about dtype, m, n, r; the tiles depend on m, r, dtype"),
            ({**AT, "dtype": "int8"}, {"block_m": 32}, "dtype should be a size or one of 16-bit, float32, none"),
        ],
    )
    def test_one_that_cannot_run_is_skipped_with_the_reason(
        self, at: dict[str, Any], tiles: dict[str, int], reason: str
    ) -> None:
        from fastlora.kernels import config

        own = config.project(64, 16, torch.bfloat16, self.device())
        with tables.use(self.known("project", (at, tiles))):
            assert config.project(64, 16, torch.bfloat16, self.device()) == own
            text = backends.explain(LAYER, MACHINE)
        assert "skipped tiles: a table in memory (shipped): project at m=64" in text
        assert reason in text

    def test_a_kernel_that_is_not_there_is_said(self) -> None:
        with tables.use(self.known("conv", ({"m": 1}, {}))):
            assert "conv at m=1: there is no such kernel" in backends.explain(LAYER, MACHINE)

    @pytest.mark.parametrize("kernel", ["gemm", "buffer_gemm", "project", "gradient", "one_pass", "epilogue"])
    def test_every_candidate_can_run_somewhere_and_none_twice(self, kernel: str) -> None:
        from fastlora.kernels import config
        from fastlora.kernels.tuned import TUNED

        chooser = TUNED[kernel]
        running = set()
        for capability, m in itertools.product(((8, 0), (9, 0)), (16, 64, 4096)):
            given: dict[str, Any] = {
                "m": m,
                "n": 4096,
                "k": 4096,
                "r": 16,
                "direction": "forward",
                "blocksize": 64,
                "device": config.Device(capability, 108),
            }
            given |= dict.fromkeys(("dtype", "out_dtype"), torch.bfloat16)
            arguments = {name: given[name] for name in chooser._signature.parameters if name != "tiles"}
            fields = list(chooser.candidates(**arguments))
            proposed = [chooser.proposed(wanted, **arguments) for wanted in fields]
            assert len({*proposed, chooser.own(**arguments)}) == len(proposed) + 1 or not proposed
            if "m" in arguments:
                assert all(tiles.block_m <= max(16, 2 * m) for tiles in proposed)
            running |= {str({name: size for name, size in wanted.items() if name != "num_stages"}) for wanted in fields}
        listed = ({name: size for name, size in one.items() if name != "num_stages"} for one in chooser._candidates)
        assert running >= {str(one) for one in listed}

    def test_forms_by_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastlora.kernels import config

        device = torch.device("cuda", 0)
        points = {
            (64, 4096, 4096): {"torch": 1.0, "triton:decode": 2.0, "triton:library": 3.0},
            (8192, 4096, 4096): {"triton:library": 2.0, "triton:persistent": 3.0},
            (1, 64, 64): {"torch": 1.0, "triton:unheard": 2.0, "triton:library": 3.0},
        }
        monkeypatch.setattr(config.Device, "of", lambda _: self.device())
        dtype = torch.bfloat16
        with tables.use(Tables((table(points),))):
            assert config.form(64, 4096, 4096, dtype, device) == "decode"
            assert config.form(70, 4096, 4096, dtype, device) == "decode"
            assert config.form(8192, 4096, 4096, dtype, device) == "library"
            assert config.form(1, 64, 64, dtype, device) == "library"  # a form that is not there any more
            assert config.form(8192, 4096, 4096, dtype, device, 16, "backward") == "persistent"  # the built-in rule
            assert config.form(8192, 4096, 4096, dtype, device, 16, "forward", False) == "persistent"
        assert config.form(64, 4096, 4096, dtype, device) == "split"
        assert config.form(8192, 4096, 4096, dtype, device) == "persistent"

    def test_forms_within_for_graphs_are_those_that_take_the_gpu_the_least(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fastlora
        from fastlora.kernels import config

        times = Times(
            {"triton:library": 1.0, "triton:persistent": 2.0}, {"triton:library": 5.0, "triton:persistent": 3.0}
        )
        known = Table(H200, {FORWARD: {(8192, 1024, 4096): times}})
        monkeypatch.setattr(config.Device, "of", lambda _: self.device())
        arguments = (8192, 1024, 4096, torch.bfloat16, torch.device("cuda", 0))
        with tables.use(Tables((known,))):
            assert config.form(*arguments) == "library"
            with fastlora.for_graphs():
                assert config.form(*arguments) == "persistent"
            assert config.form(*arguments) == "library"
