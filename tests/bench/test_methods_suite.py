"""The suite of the methods: rows, tables, the page."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("pydantic")

from fastlora.bench import methods, record, report
from fastlora.bench.record import Row
from fastlora.training.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")


def test_plans_are_of_every_method() -> None:
    from fastlora.training.methods import METHODS

    named = {plan.options.get("method", name) for name, plan in methods.PLANS.items()}
    assert named == set(METHODS) - {"full", "head"}  # no adapters: what the tasks are measured beside


def test_rows_of_the_shape() -> None:
    names = ("lora", "vera", "delta-lora", "bottleneck")
    rows = [row for found in methods.shape(CPU, methods.SMALL, names) for row in found]
    metrics: dict[str, set[str]] = {}
    for row in rows:
        metrics.setdefault(row.case.split(",")[0], set()).add(row.metric)
    assert list(metrics) == list(names)
    assert metrics["lora"] == {"trained parameters (1000)", "step ms", "inference ms", "speed-up over PEFT"}
    assert metrics["vera"] == metrics["lora"] | {"times plain LoRA"}
    assert metrics["delta-lora"] == {"trained parameters (1000)", "step ms", "inference ms", "times plain LoRA"}
    assert all(row.value is not None and row.value > 0 for row in rows)
    by = {(row.case.split(",")[0], row.metric): row for row in rows}
    assert by["vera", "times plain LoRA"].goal == 1.3
    assert "r = 256" in by["vera", "times plain LoRA"].note
    assert by["lora", "trained parameters (1000)"].value == 4 * (4 * 64 + 2 * 96 + 3 * 192) / 1e3


def test_fused_and_stock_are_one_model() -> None:
    base = methods.base_model(methods.SMALL, CPU)
    for name in ("adalora", "prefix", "vera"):
        stepper = methods.Stepper(name, base, methods.SMALL, CPU)
        stepper.model.eval()
        losses = []
        for on in (True, False, True):
            stepper.fused(on)
            ours = any(type(m).__module__.startswith("fastlora") for m in stepper.model.modules())
            assert ours == on
            losses.append(stepper.model(input_ids=stepper.ids, labels=stepper.ids).loss.item())
        assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_step_after_a_change_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes again what layers keep: a step that is slow after each change must not show in the ratio."""
    calls: list[str] = []

    class Fake:
        def fused(self, on: bool) -> None:
            self.on = on
            calls.append("fused" if on else "stock")

        def __call__(self, _: int = 0) -> None:
            calls.append("step")

    fake = Fake()

    def wall(call: Any, count: int, device: torch.device) -> float:
        first = calls[-1] != "step"
        call()
        return 1e6 if first else (10.0 if fake.on else 30.0)

    monkeypatch.setattr(methods.timing, "_wall", wall)
    (row,) = methods._against_peft("case", fake, methods.SMALL, CPU)  # type: ignore[arg-type]
    assert row.value == 3.0
    assert calls.count("step") == 4 * methods.SMALL.rounds
    assert calls[-1] == "fused"


def test_table_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Row("lora, here", "step ms", 12.0),
        Row("vera, here", "step ms", 1234.5),
        Row("vera, here", "times plain LoRA", 1.5, 1.3),
    ]
    text = methods.table({"": rows})
    assert "| method | step ms | times plain LoRA |" in text
    assert "| lora | 12 | - |" in text
    assert "| vera | 1,234 | **1.5** |" in text
    record.write("methods", rows, {"quick": False}, tmp_path / "results")
    assert "0 of 1 goals reached" in report.methods(tmp_path / "results")
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in report.README_BLOCKS)
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "methods.md"
    page.write_text("<!-- methods:begin -->\nold\n<!-- methods:end -->\n")
    assert page in report.write(tmp_path / "results", tmp_path / "docs", tmp_path / "README.md")
    assert "| vera |" in page.read_text()
    assert "old" not in page.read_text()
    modes = Row("task switching, here", "us a layer", 2.0, 1000.0)
    record.write("methods", [*rows, modes], {"quick": False}, tmp_path / "results")
    text = report.methods(tmp_path / "results")
    assert "| task switching, here | us a layer | 2 | <= 1000 | pass |" in text
    assert "| task switching" not in text.split("\n\n")[1]
    quick = tmp_path / "quick"
    record.write("methods", rows, {"quick": True}, quick)
    assert report.methods(quick).startswith("Not measured yet")


def test_one_line_a_method_for_all_runs(tmp_path: Path) -> None:
    """The shape of a large model on a GPU, and the task on a CPU, beside each other."""
    shape = [
        Row("lora, 8 blocks", "step ms", 80.0),
        Row("dora, 8 blocks", "step ms", 90.0),
        Row("dora, 8 blocks", "times plain LoRA", 1.125, 1.15),
    ]
    task = [
        Row(f"{name}, SmolLM2-135M", "loss after", value)
        for name, value in (("dora", 3.0), ("lora", 3.5), ("pissa", 3.25))
    ]
    for folder, rows, gpu in (("cpu", task, None), ("h200", shape, "NVIDIA H200")):
        path = tmp_path / folder / "methods.json"
        path.parent.mkdir()
        data = {"gpu": gpu, "cpu": "x", "threads": 2, "torch": "2", "commit": "c", "rows": [vars(row) for row in rows]}
        path.write_text(json.dumps(data))
    head, text = report.methods(tmp_path).split("\n\n")
    assert head.splitlines()[0].startswith("- (1) 8 blocks: NVIDIA H200")
    assert "1 of 1 goals reached" in head.splitlines()[0]
    assert head.splitlines()[1].startswith("- (2) SmolLM2-135M: CPU (x, 2 threads)")
    assert text.splitlines()[0] == "| method | (1) step ms | (1) times plain LoRA | (2) loss after |"
    assert text.splitlines()[2:] == [
        "| lora | 80 | - | 3.5 |",
        "| pissa | as lora | as lora | 3.25 |",
        "| dora | 90 | 1.125 | 3 |",
    ]


def test_rows_of_the_modes() -> None:
    rows = [row for found in methods.PARTS["modes"](CPU, methods.QUICK["modes"]) for row in found]
    by = {(row.case.split(",")[0], row.metric): row for row in rows}
    assert by["task switching", "us a layer"].goal == 1000
    assert by["task switching", "us a layer, in place"].ok
    assert by["chunked MLPs", "relative error of gradients"].value < 1e-4  # type: ignore[operator]
    assert by["int8 adapter", "MiB"].value > by["nf4 adapter", "MiB"].value  # type: ignore[operator]
    assert 0 < by["int8 adapter", "relative error of its output"].value < 0.02  # type: ignore[operator]
    assert all(row.value is not None and row.value > 0 for row in rows)
    assert not any(row.case.split(",")[0] in methods.PLANS for row in rows)


def test_the_task_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="in a checkout"):
        next(methods.task(CPU))


@pytest.mark.parametrize("arguments", [["--suite", "methods", "--only", "goals"], ["--suite", "cpu", "--only", "task"]])
def test_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from fastlora.cli import main

    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastlora.cli import main

    def shape(device: Any, *size: Any) -> Any:
        assert size == (methods.SMALL,)
        yield [Row("lora, x", "step ms", 1.0)]

    monkeypatch.setitem(methods.PARTS, "shape", shape)
    assert main(["bench", "--suite", "methods", "--only", "shape", "--quick", "--out", str(tmp_path)]) == 0
    assert "lora, x" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/methods.json")
    assert json.loads(path.read_text())["quick"] is True
    assert "| lora | 1 |" in path.with_suffix(".md").read_text()
    assert '<th scope="row">lora</th><td>1</td>' in path.with_suffix(".html").read_text()


def test_score_and_time_of_inference() -> None:
    """Of a model that always guesses one token, and puts two virtual ones before."""

    class Model(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            assert not self.training
            logits = torch.zeros(*input_ids.shape, 5)
            logits[..., 3] = 1
            return types.SimpleNamespace(logits=torch.cat((torch.zeros(1, 2, 5), logits), 1))

    batches = [{"input_ids": torch.ones(1, 4).long(), "labels": torch.tensor([[3, -100, 3, 3 - i]])} for i in (0, 1)]
    model = Model().train()
    found = methods._tested(model, batches, CPU)
    assert found["score %"] == 75.0
    assert found["inference ms"] > 0
    assert model.training


def test_a_page_of_tables() -> None:
    from fastlora.report.page import tables

    text = tables("a & b", [("here", ("method", "x"), [("lora", "**1**"), ("<i>", "2")])])
    assert "<h1>a &amp; b</h1>" in text
    assert "<td><strong>1</strong></td>" in text
    assert "&lt;i&gt;" in text
