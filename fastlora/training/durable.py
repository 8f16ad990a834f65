"""Files that are there whole or not at all, and that say when they have been changed.

A folder is written under another name, its files and their digests are flushed to the disk, and one rename puts it in
its place. What a trainer keeps beside the weights (moments, schedules, states of generators) is a safetensors file too:
nothing that is read back here can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastlora.training.errors import UserError, first_line

MANIFEST = "manifest.json"
"""Sizes and SHA-256 of the files beside it."""
WRITING = ".writing"
"""Folder, beside the finished ones, of what is being written or deleted."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CHUNK = 2**20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write a file under, so that it is at ``path`` whole or not at all."""
    part = path.with_name(path.name + ".part")
    yield part
    _sync(part)
    os.replace(part, path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, but for the manifest."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return [p for p in paths if p.relative_to(folder).as_posix() != MANIFEST]


def _digest(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def seal(folder: Path, suffix: str = "") -> None:
    """Write the manifest of the files whose names end in ``suffix`` and flush the whole folder."""
    names = [p for p in _files(folder) if p.name.endswith(suffix)]
    entries = {p.relative_to(folder).as_posix(): _digest(p) for p in names}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}, indent=1), encoding="utf-8")
    for path in (*_files(folder), folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(path)


def place(part: Path, final: Path) -> None:
    """Rename a sealed folder to its place; what is there already is deleted."""
    discard(final)
    os.rename(part, final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that no part of it is ever seen under its name."""
    if not folder.exists():
        return
    trash = folder.parent / WRITING / f"deleted-{folder.name}"
    shutil.rmtree(trash, ignore_errors=True)
    trash.parent.mkdir(exist_ok=True)
    os.rename(folder, trash)
    shutil.rmtree(trash.parent if not any(p != trash for p in trash.parent.iterdir()) else trash)


@contextlib.contextmanager
def whole_folder(final: Path, suffix: str = "") -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``final`` when the block ends, and is deleted when it raises.

    suffix: the manifest holds the files whose names end so.
    """
    writing = final.parent / WRITING
    part = writing / final.name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        seal(part, suffix)
        place(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            writing.rmdir()


def damage(folder: Path) -> str | None:
    """What differs between a folder and its manifest, as ``FILE is ...``; None where nothing does or there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{path} is damaged"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} is truncated or was changed: {file.stat().st_size} bytes, {entry['bytes']} were written"
        if _digest(file) != entry:
            return f"{file} was changed after it was written (its SHA-256 differs)"
    return None


def strangers(folder: Path) -> list[Path]:
    """Files of a sealed folder that its manifest does not know, but for hidden ones, which file managers leave."""
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    found = (p for p in _files(folder) if not p.name.startswith("."))
    return [p for p in found if p.relative_to(folder).as_posix() not in entries]


def _encode(value: Any, tensors: dict[str, torch.Tensor], known: dict[Any, str]) -> Any:
    """``value`` as JSON, its tensors moved to ``tensors``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        t = value.detach()
        identity = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) if t.numel() else None
        key = known.get(identity) if identity else None
        if key is None:
            key = f"t{len(tensors)}"
            # A copy where another tensor may lie in the same memory, which safetensors refuses.
            own = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
            tensors[key] = t.cpu() if own else t.contiguous().clone().cpu()
            if identity:
                known[identity] = key
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors, known), _encode(v, tensors, known)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, tensors, known) for item in value]}
    if type(value).__module__ == "numpy":
        return _encode(value.item() if value.ndim == 0 else torch.from_numpy(value.astype("int64")), tensors, known)
    raise TypeError(f"{type(value).__name__} has no safe form in a file")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in items}
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](_decode(item, tensors) for item in items)
    raise ValueError(f"unknown kind {kind!r}")


def save_tree(tree: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of numbers, texts and tensors to a safetensors file.

    Raises TypeError for anything else; arrays of numpy become int64 tensors.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encode(tree, tensors, {}))
    save_file(tensors, path, {"tree": text})


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote, on the CPU. Raises UserError, which names the file, when it cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return _decode(json.loads(file.metadata()["tree"]), tensors)
    except Exception as error:
        raise UserError(f"resume: cannot read {path} ({first_line(error)}): use another checkpoint") from error
