"""The drop-in's curves: what their rows compare, and the rounding that is put in and taken out again."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing (extra: bench)")
pytest.importorskip("peft", reason="peft is missing (extra: bench)")
pytest.importorskip("transformers", reason="transformers is missing (extra: bench)")

from fastlora import backends
from fastlora.bench import drop_in
from fastlora.nf4 import NF4Weight

CPU = torch.device("cpu")


def test_rows_of_the_curves() -> None:
    offsets = {"peft": 0.0, "flipped": 0.1, "halves": -0.1, "fastlora": 0.5, drop_in.APART: 0.15, "float32": 0.4}
    curves = {name: [1.0 + offset, 2.0 + offset] for name, offset in offsets.items()}
    rows = {row.metric: row for row in drop_in.curve_rows("c", curves)}
    floor = rows["rms distance between PEFT runs that sum in other orders"]
    assert floor.value == pytest.approx(0.2)
    ours = rows["rms distance from PEFT's curve"]
    assert (ours.value, ours.goal, ours.ok) == (pytest.approx(0.5), floor.value, False)
    apart = rows["rms distance from PEFT's curve, rounded apart as PEFT does"]
    assert (apart.value, apart.goal, apart.ok) == (pytest.approx(0.15), floor.value, True)
    exact = rows["rms distance from float32's curve"]
    assert (exact.value, exact.goal, exact.ok) == (pytest.approx(0.1), pytest.approx(0.4), True)


def test_rounding_apart_rounds_the_base_product_and_is_undone() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((8, 64), (32, 64), (4, 64), (32, 4))
    )
    weight = NF4Weight.quantize(w)
    before = dict(backends.BACKENDS)
    y_once, u_once = backends.BACKENDS["torch"].forward(x, weight, a, b, None, 0.5, None)
    with drop_in.rounding_apart():
        y, u = backends.BACKENDS["torch"].forward(x, weight, a, b, None, 0.5, None)
        assert backends.BACKENDS["torch"].backward is before["torch"].backward
    assert torch.equal(y, (x @ weight.dequantize(torch.bfloat16).T).addmm_(u, b.T, alpha=0.5))
    assert torch.equal(u, u_once)
    assert not torch.equal(y, y_once)
    with pytest.raises(KeyError), drop_in.rounding_apart():
        raise KeyError
    assert dict(backends.BACKENDS) == before
    assert list(backends.BACKENDS) == list(before)


def test_curves_start_together_and_differ_where_they_should() -> None:
    rows, curves = drop_in.loss_curve(CPU, steps=2, hidden=128, length=8)
    assert tuple(curves) == drop_in.CURVES
    assert all(len(curve) == 2 and math.isfinite(sum(curve)) for curve in curves.values())
    # B is zero at first: only the types and the order of sums can differ.
    assert max(curve[0] for curve in curves.values()) - min(curve[0] for curve in curves.values()) < 0.01
    assert curves["float32"][0] != curves["peft"][0]
    assert curves["fastlora"] != curves[drop_in.APART]
    assert len(rows) == 9


def test_update_reaches_the_loss() -> None:
    rows = drop_in.first_update(CPU, hidden=128, length=8)
    assert rows[0].value
    assert [row.goal is None for row in rows] == [True, True, False]


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["drop_in", "--only", "sped"])
    with pytest.raises(SystemExit):
        drop_in.main()
    assert "sped" in capsys.readouterr().err
