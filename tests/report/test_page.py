"""``fastlora report``: what is read, computed, drawn and written."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is missing (extra: train)")
pytest.importorskip("yaml", reason="yaml is missing (extra: train)")
pytest.importorskip("typer", reason="typer is missing (extra: train)")

from run_files import LAYERS, STEPS, write_adapter, write_run

from fastlora.cli import main
from fastlora.report import chart, norms, page
from fastlora.report import runs as reading
from fastlora.training.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"


class Outside(HTMLParser):
    """Collects every reference of a page, and whether its tags close."""

    VOID = frozenset({"meta", "br", "rect", "circle", "path", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.references += [v for k, v in values.items() if k in ("src", "href", "data", "action") and v]
        if tag == "svg":
            self.pictures.append(values)
        if tag not in self.VOID or tag == "rect" or tag == "circle":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_singular_values_are_those_of_the_product() -> None:
    a, b = torch.randn(5, 40, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    expected = torch.linalg.svdvals(0.5 * b @ a)[:5]
    torch.testing.assert_close(norms.singular_values(a, b, 0.5), expected)
    wide = norms.singular_values(torch.randn(9, 4), torch.randn(6, 9))
    assert wide.shape == (4,), "a rank above a side of the layer"


@pytest.mark.parametrize(("values", "rank"), [([1.0, 1.0, 1.0, 0.0], 3.0), ([7.0], 1.0), ([0.0, 0.0], 0.0)])
def test_effective_rank_of_known_spectra(values: list[float], rank: float) -> None:
    assert norms.effective_rank(torch.tensor(values)) == pytest.approx(rank)


def test_layers_of_an_adapter(tmp_path: Path) -> None:
    weights = write_adapter(tmp_path / "a", 4, alpha=8, use_rslora=True, alpha_pattern={"q_proj": 2})
    found = {change.layer: change for change in norms.of_adapter(tmp_path / "a")}
    assert list(found) == LAYERS, "in the order of the blocks"
    for layer, change in found.items():
        a, b = (weights[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
        scale = (2 if "q_proj" in layer else 8) / 2
        assert change.norm == pytest.approx((scale * b.double() @ a.double()).norm().item(), rel=1e-9)
        assert change.rank == 4
    assert (found[LAYERS[0]].block, found[LAYERS[0]].kind) == (0, "q_proj")
    assert found[LAYERS[-1]].effective_rank == 0.0
    assert 1 < found[LAYERS[0]].effective_rank <= 4
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "a" / "adapter_model.safetensors"))):
        norms.of_adapter(tmp_path / "a")


def test_layers_of_adalora_and_convolutions(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "a"
    folder.mkdir()
    a, e, b = torch.randn(3, 8), torch.tensor([[2.0], [0.0], [1.0]]), torch.randn(6, 3)
    kernel, mix = torch.randn(2, 4, 3, 3), torch.randn(5, 2, 1, 1)
    save_file(
        {
            "base_model.model.x.1.fc.lora_A": a,
            "base_model.model.x.1.fc.lora_E": e,
            "base_model.model.x.1.fc.lora_B": b,
            "base_model.model.conv.lora_A.weight": kernel,
            "base_model.model.conv.lora_B.weight": mix,
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "init_r": 12}))
    found = {change.layer: change for change in norms.of_adapter(folder)}
    assert found["x.1.fc"].norm == pytest.approx(0.5 * (b @ (a * e)).norm().item(), rel=1e-5)
    assert found["x.1.fc"].effective_rank < 2.01
    assert found["conv"].norm == pytest.approx(3.0 * (mix.flatten(1) @ kernel.flatten(1)).norm().item(), rel=1e-5)


def test_runs_are_found_and_named(runs: Path, tmp_path: Path) -> None:
    found, unread = reading.find([runs])
    assert unread == []
    assert [run.name for run in found] == ["a", "b", "c", "d <&> e"]
    assert [run.failed for run in found] == ["", "", "", "not finished"]
    assert found[0].series("loss")[-1][0] == STEPS
    assert found[0].measures == ["eval_loss"]
    other = write_run(tmp_path / "others" / "a")
    assert [run.name for run in reading.find([runs / "a", other, runs / "a"])[0]] == ["runs/a", "others/a"]
    assert set(reading.differing(found)) == {"method", "r", "lr"}
    assert reading.score(found) == reading.Score("eval_loss", False)


def test_logs_of_crashes_and_divergence(runs: Path) -> None:
    log = runs / "d <&> e" / "log.jsonl"
    log.write_text(log.read_text() + '{"loss": NaN, "step": 41}\n{"loss": 1.0, "st')
    run = reading.read(log.parent)
    assert run.failed == "the loss is no number"
    assert run.steps == 41
    assert all(y == y for _, y in run.series("loss"))
    assert "It ended: the loss is no number." in page.html(page.make([run]), "t")
    log.write_text('{"loss": NaN, "step": 1}\n{"loss": 2.0, "step": null}\n{"loss": "x"}\n{"loss": "1", "step": "a"}\n')
    run = reading.read(log.parent)
    assert (run.steps, run.series("loss"), run.failed) == (1, [], "the loss is no number")
    assert "It ended: the loss is no number." in page.html(page.make([run]), "t")
    log.write_text("{\n" + log.read_text())
    with pytest.raises(UserError, match=re.escape(f"{log} line 1")):
        reading.read(log.parent)
    log.unlink()
    with pytest.raises(UserError, match="holds no run"):
        reading.find([log.parent])


@pytest.mark.parametrize(("name", "text"), [("config.yaml", ""), ("config.yaml", "- a\n"), ("result.json", "[1]")])
def test_files_of_another_form_are_named(runs: Path, name: str, text: str) -> None:
    (runs / "a" / name).write_text(text)
    with pytest.raises(UserError, match=rf"cannot read .*{name} \(it holds a \w+, not keys and values\)"):
        reading.read(runs / "a")


def test_a_damaged_run_does_not_take_the_others(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "a" / "result.json").write_text("{")
    found, (reason,) = reading.find([runs])
    assert [run.name for run in found] == ["b", "c", "d <&> e"]
    assert reason.startswith(f"Left out: cannot read {runs / 'a' / 'result.json'} (")
    assert main(["report", str(runs), "--out", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().err == reason + "\n"
    assert html.escape(reason) in (tmp_path / "r.html").read_text()
    with pytest.raises(UserError, match="cannot read"):
        reading.find([runs / "a"])


def test_layers_of_one_name_in_a_block_stay_on_the_grid() -> None:
    names = ("attention.output.dense", "intermediate.dense", "output.dense")
    layers = ["bert.pooler.dense", *(f"bert.encoder.layer.{i}.{name}" for i in range(2) for name in names)]
    norm, _ = page._heats([norms.LayerChange(name, 1.0 + i, 1.0, 4) for i, name in enumerate(layers)], "k")
    assert norm.columns == ["0", "1", "-"]
    assert norm.rows == ["bert.pooler.dense", *names]
    assert norm.values == [[None, None, 1.0], [2.0, 5.0, None], [3.0, 6.0, None], [4.0, 7.0, None]]


def test_a_score_that_all_have_comes_first(runs: Path) -> None:
    found = reading.find([runs])[0]
    for i, run in enumerate(found):
        run.log.append({"eval_accuracy": 0.5 + i / 10, "step": STEPS})
    measure = reading.score(found)
    assert measure == reading.Score("eval_accuracy", True)
    best = measure.best(found)
    assert best is not None
    assert best.name == "d <&> e"


def test_the_page_is_whole_and_alone(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(runs), "--out", str(out), "--title", "A < B"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(text)
    assert parser.open == []
    assert parser.references == []
    assert "@import" not in text
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert all(picture["role"] == "img" and len(picture["aria-label"] or "") > 20 for picture in parser.pictures)
    assert "<title>A &lt; B</title>" in text
    assert "d &lt;&amp;&gt; e" in text
    assert "d <&> e" not in text
    assert "The best is <strong>b</strong> with evaluation loss <strong>1.5</strong>" in text
    titles = re.findall(r"<figcaption>(.*?)(?: <small>|<)", text)
    curves = ["Training loss", "Evaluation loss", "Gradient norm", "Learning rate", "Tokens a second", "Memory"]
    compared = [f"{what} against evaluation loss" for what in ("Rank", "Learning rate", "Method")]
    assert titles == compared + curves + ["Norm of the change", "Effective rank"] * 3
    marked = re.findall(r'<td class="differs">(.*?)</td>', text)
    assert marked[:3] == ["lora", "16", "0.001"], "settings that differ stand out, the best run first"


def test_one_run_alone(runs: Path) -> None:
    made = page.make(*reading.find([runs / "b"]))
    text = page.html(made, "b")
    assert made.comparisons == []
    assert "differs" not in text.partition("<main>")[2]
    assert "Methods" not in text.partition("<main>")[2]
    assert f"{STEPS} steps of lora" in text


def test_many_runs_stay_readable(tmp_path: Path) -> None:
    for i in range(9):
        write_run(tmp_path / "s" / f"t{i}", r=2**i, end=1 + i / 10, finished=False)
    made = page.make(*reading.find([tmp_path / "s"]))
    colours = [series.colour for series in made.curves[0].series]
    assert colours == [0, 1, 2, 3, 4, 5, None, None, None]
    assert "3 others" in page.html(made, "s")


def test_pictures_as_files(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is missing (extra: bench)")
    out, plots = tmp_path / "p.html", tmp_path / "plots"
    assert main(["report", str(runs), "--out", str(out), "--plots", str(plots)]) == 0
    names = {path.name for path in plots.iterdir()}
    assert {"loss.svg", "loss.png", "r-score.svg", "method-score.png", "layers-1-effective-rank.svg"} <= names
    assert {name.removesuffix(".svg") for name in names if name.endswith(".svg")} == {
        name.removesuffix(".png") for name in names if name.endswith(".png")
    }
    for path in plots.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.find(f"{SVG}title") is not None
        assert "var(" not in (root.findtext(f"{SVG}style") or ""), "not every viewer knows custom properties"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.glob("*.png"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0.0, 0.25, 0.5, 0.75, 1.0]), (3.2, 9.7, [2.0, 4.0, 6.0, 8.0, 10.0]), (5, 5, [5.0, 5.2, 5.4, 5.6])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert chart.ticks(low, high) == pytest.approx(expected)


def test_thin_keeps_the_extremes() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    points[3210] = (3210.0, 9.0)
    points[4321] = (4321.0, -9.0)
    thinned = chart.thin(points)
    assert len(thinned) <= 320
    assert {9.0, -9.0} <= {y for _, y in thinned}
    assert thinned == sorted(thinned)


def test_lines_lie_where_the_values_are() -> None:
    series = [chart.Series("a", [(0.0, 1.0), (10.0, 4.0)], 0)]
    x, _, y, _ = chart.axes(chart.Chart("k", "t", "step", "loss", series))
    assert (x(0), x(10)) == (chart.LEFT, chart.WIDTH - chart.RIGHT)
    assert y(4.0) < y(1.0) <= chart.HEIGHT - chart.BOTTOM
    log, _, _, _ = chart.axes(chart.Chart("k", "t", "r", "loss", [chart.Series("a", [(2, 1), (8, 2)])], log_x=True))
    assert log(4) == pytest.approx((log(2) + log(8)) / 2)


def test_alternative_texts_say_what_is_seen(runs: Path) -> None:
    made = page.make(*reading.find([runs]))
    assert made.curves[1].alt == (
        "evaluation loss against step. b goes from 6 to 1.5; c goes from 6 to 2.5; a goes from 6 to 3; "
        "d <&> e goes from 6 to 4."
    )
    assert made.layers["b"][0].alt.startswith(
        "Norm of the change by layer and block: from 0 in down_proj of block 2 to"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report"], "Missing argument 'runs'"),
        (["report", "nowhere"], "no such folder: nowhere"),
        (["report", "{}", "--out", "{}"], "is a folder"),
        (["report", "{}/a", "--out", "{}/a/log.jsonl/x.html"], "out: cannot write"),
        (["report", "{}/a/adapter"], "holds no run"),
    ],
)
def test_mistakes_are_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([word.format(runs) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastlora: ")
    assert error.count("\n") == 1
    assert words in error
