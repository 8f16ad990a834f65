"""An adapter merged into its base model: a dense model of 16 or 32 bits, or one in 4 bits."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastlora
from fastlora.training import checkpoints, data
from fastlora.training import model as models
from fastlora.training.config import load
from fastlora.training.errors import UserError, disk_errors, first_line, one_of, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODES = ("dense", "error-aware", "requantize")
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CALIBRATION_BLOCKS, CALIBRATION_LENGTH = 32, 512
"""Of the calibration text: how many blocks are read, and tokens of a block."""


def merge(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    dtype: str = "bfloat16",
    device: str = "cpu",
    mode: str = "dense",
    calibration: str | None = None,
) -> Path:
    """Writes ``base + scale * B A`` of every adapted layer, and the rest of the base, to ``output_dir``.

    adapter: the folder of an adapter or of a finished run. model: the base, by default the one the adapter names.
    dtype: bfloat16, float16 or float32. mode: "dense" loads the base dense, so that the merged weights are rounded to
    ``dtype`` and nothing coarser; "error-aware" and "requantize" write a model in NF4 that computes in ``dtype``: see
    `fastlora.merge`. calibration: for "error-aware", data of the kind that the model is for, read as `fastlora train`
    reads it, of which the first 16 thousand tokens are used.

    Raises UserError for an adapter that is missing, damaged or for another model, for data that cannot be read, and for
    a full disk.
    """
    dtype = ALIASES.get(dtype, dtype)
    one_of("dtype", dtype, DTYPES)
    one_of("mode", mode, MODES)
    if calibration is not None:
        if mode != "error-aware":
            raise UserError(f"calibration: mode {mode} does not use data: set mode error-aware")
        data.check_source(calibration, "calibration")
    output_dir = Path(output_dir).expanduser()
    folder = models.find_adapter(adapter)
    if (method := models.own_method(folder)) is not None:
        raise UserError(
            f"adapter: {folder} cannot be merged: method {method} has no factors; "
            "fastlora.training.methods.load_own puts it into a model"
        )
    source = models.find(models.base_of(folder, model))
    if output_dir.is_dir() and any(output_dir.iterdir()):
        raise UserError(f"output_dir: {output_dir} is not empty: name a new folder")
    target = models.pick_device(device)
    skeleton = models.skeleton(source)
    models.check_adapter(folder, source, skeleton)
    checkpoints.make_writable(output_dir, "output_dir")
    size = sum(p.numel() for p in skeleton.parameters()) * DTYPES[dtype].itemsize
    checkpoints.check_space(output_dir, size, "output_dir")

    require("peft")
    tokenizer = models.load_tokenizer(source)
    quantization = "none" if mode == "dense" else "nf4"
    base = models.load_base(source, quantization=quantization, device=target, dtype=DTYPES[dtype])
    batches = None if calibration is None else _batches(calibration, tokenizer, base.config, target)
    try:
        merged = fastlora.merge(
            models.load_adapter(base, folder), mode, calibration=batches, progress=sys.stderr.isatty()
        )
    except ValueError as error:
        raise UserError(f"adapter: {folder} cannot be merged ({first_line(error)}): use another checkpoint") from error
    merged.config.use_cache = True
    with disk_errors(output_dir):
        merged.save_pretrained(str(output_dir))
        tokenizer.save_pretrained(str(output_dir))
    return output_dir


def _batches(
    source: str, tokenizer: PreTrainedTokenizerBase, model: Any, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """The first blocks of the calibration data, one a batch."""
    length = min(CALIBRATION_LENGTH, getattr(model, "max_position_embeddings", CALIBRATION_LENGTH))
    config = load(overrides={"model": "base", "data": source, "eval_fraction": 0.0, "max_length": length})
    rows = itertools.islice(data.prepare(config, tokenizer).train, CALIBRATION_BLOCKS)
    names = ("input_ids", "attention_mask")
    return [{name: torch.tensor([row[name]], device=device) for name in names} for row in rows]
