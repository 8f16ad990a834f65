"""Files that are whole or absent, and damage that is named: without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="safetensors is missing (extra: train)")

from fastlora.training import durable
from fastlora.training.errors import UserError


def filled(folder: Path) -> Path:
    with durable.whole_folder(folder) as part:
        (part / "a.txt").write_text("one")
        (part / "inner").mkdir()
        (part / "inner" / "b.bin").write_bytes(bytes(5000))
        (part / "inner" / ".hidden").write_text("counts too")
    return folder


def test_a_folder_is_whole_or_what_it_was(tmp_path: Path) -> None:
    folder = filled(tmp_path / "f")
    assert durable.damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["f"]

    def cut_short() -> None:
        with durable.whole_folder(folder) as part:
            (part / "a.txt").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert (folder / "a.txt").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with durable.whole_folder(folder) as part:
        (part / "c.txt").write_text("three")
    assert sorted(p.name for p in folder.iterdir()) == ["c.txt", durable.MANIFEST]


def test_every_change_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path / "f")
    for name in ("a.txt", "inner/b.bin", "inner/.hidden"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        assert f"{folder / name} is truncated" in str(durable.damage(folder))
        (folder / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        assert f"{folder / name} was changed" in str(durable.damage(folder))
        (folder / name).unlink()
        assert durable.damage(folder) == f"{folder / name} is missing"
        (folder / name).write_bytes(whole)
    assert durable.damage(folder) is None
    (folder / ".DS_Store").touch()
    assert durable.strangers(folder) == []
    (folder / "inner" / "d.bin").touch()
    assert durable.strangers(folder) == [folder / "inner" / "d.bin"]
    manifest = folder / durable.MANIFEST
    manifest.write_text(manifest.read_text()[:-9])
    assert durable.damage(folder) == f"{manifest} is damaged"
    manifest.unlink()
    assert durable.damage(folder) is None, "a folder without a manifest promises nothing"


def test_text_is_whole(tmp_path: Path) -> None:
    durable.write_text(tmp_path / "t", "one")
    durable.write_text(tmp_path / "t", "two")
    assert (tmp_path / "t").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_trees_come_back(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    shared = torch.arange(3.0)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": shared}, 1: {"m": shared, "part": torch.arange(8)[2:4]}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "none": None, "flag": True}],
        "python": random.getstate(),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "inf": float("inf"),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "numpy": (numpy.uint32([1, 2**32 - 1]), numpy.float64(0.1)),
    }
    durable.save_tree(tree, tmp_path / "t.safetensors")
    back = durable.load_tree(tmp_path / "t.safetensors")
    assert back["python"] == tree["python"]
    assert back["groups"] == tree["groups"]
    assert back["inf"] == float("inf")
    assert list(back["state"]) == [0, 1], "keys keep their type"
    assert torch.equal(back["state"][0]["m"], shared)
    assert torch.equal(back["state"][1]["part"], torch.tensor([2, 3]))
    assert torch.equal(back["transposed"], tree["transposed"])
    assert back["empty"].dtype == torch.bfloat16
    assert back["numpy"][0].tolist() == [1, 2**32 - 1]
    assert back["numpy"][1] == 0.1


def test_trees_hold_nothing_that_could_run(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Path has no safe form"):
        durable.save_tree({"a": Path()}, tmp_path / "t")
    torch.save({"optimizer": {}}, tmp_path / "p")
    with pytest.raises(UserError, match=f"cannot read {tmp_path / 'p'}"):
        durable.load_tree(tmp_path / "p")


def test_deleted_folders_leave_nothing(tmp_path: Path) -> None:
    durable.discard(filled(tmp_path / "f"))
    durable.discard(tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_manifest_counts_what_it_is_told(tmp_path: Path) -> None:
    with durable.whole_folder(tmp_path / "f", ".safetensors") as part:
        (part / "w.safetensors").write_bytes(b"x")
        (part / "README.md").write_text("may be edited")
    (tmp_path / "f" / "README.md").write_text("was edited")
    assert list(json.loads((tmp_path / "f" / durable.MANIFEST).read_text())["files"]) == ["w.safetensors"]
    assert durable.damage(tmp_path / "f") is None
