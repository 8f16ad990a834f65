"""A and B in fewer bits, for serving: 8 with one scale a row, or NF4.

    int8   s = max |row| / 127,   values = round(row / s)        row = s * values
    nf4    as the base: blocks of 64 elements with one float32 scale each

A quantized factor stands where the ``nn.Linear`` of A or B stood. Without gradients products of few rows decode it, and
one launch decodes A and B for others (see `fastlora.packed`); to everything else it gives its ``weight`` in the type
that the layer computes in. Files are safetensors with PEFT's configuration beside them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora import ops
from fastlora.adapters import starts
from fastlora.adapters.variant import require_layers
from fastlora.backends import dense
from fastlora.int8 import Int8Matrix
from fastlora.nf4 import NF4Weight

KINDS = ("int8", "nf4")
FILE = "adapter_quantized.safetensors"
PLAIN_FILE = "adapter_model.safetensors"


class QuantizedFactor(nn.Module):
    """A matrix (rows, columns) in 8 bits or NF4, in place of an ``nn.Linear`` without bias. It does not learn.

    dtype: of `weight`, which is dequantized whenever it is asked for. Raises ValueError for an unknown kind and for
    values that are not finite.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(self, w: torch.Tensor, kind: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
        if not bool(w.isfinite().all()):
            raise ValueError("the adapter has values that are not finite: it seems to be broken")
        self.kind, self.dtype = kind, dtype or w.dtype
        self.out_features, self.in_features = w.shape
        if kind == "int8":
            rounded = Int8Matrix.quantize(w)
            values, scales = rounded.values, rounded.scales
        else:
            packed = NF4Weight.quantize(w.detach().float(), nested=False)
            assert packed.absmax is not None
            values, scales = packed.w_packed, packed.absmax
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)

    @property
    def packed(self) -> Int8Matrix | NF4Weight:
        """What kernels read: the same object for as long as the buffers are."""
        values, scales = self._buffers["values"], self._buffers["scales"]
        known: Any = self.__dict__.get("_known")
        if known is None or known[0] is not values or known[1] is not scales or known[2] != self.dtype:
            known = self.__dict__["_known"] = (values, scales, self.dtype, self._packed())
        made: Int8Matrix | NF4Weight = known[3]
        return made

    def _packed(self) -> Int8Matrix | NF4Weight:
        if self.kind == "int8":
            return Int8Matrix(self.values, self.scales, self.dtype)
        return NF4Weight(self.values, (self.out_features, self.in_features), 64, "nf4", self.dtype, absmax=self.scales)

    @property
    def weight(self) -> torch.Tensor:
        """(rows, columns)"""
        packed = self._packed()
        if isinstance(packed, Int8Matrix):
            return packed.dequantize()
        if ops.must_dispatch(self.values):
            return torch.ops.fastlora.dequantize(*ops.weight_args(packed), self.dtype)
        return dense(packed, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the values and their scales."""
        return self.values.nbytes + self.scales.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedFactor:
        scales, probe = self.scales, fn(torch.empty(0, dtype=self.dtype, device=self.scales.device))
        super()._apply(fn, recurse)
        self.dtype = probe.dtype  # .to(dtype) is about what is computed, not about what is stored
        self.scales = scales.to(self.values.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


@dataclasses.dataclass(frozen=True)
class Quality:
    """What quantizing an adapter costs and saves."""

    bytes_before: int
    bytes_after: int
    errors: dict[str, float]
    """Of each layer, ``|s B A - s B' A'| / |s B A|`` in the Frobenius norm: the relative error of its output for inputs
    that do not correlate."""

    def __str__(self) -> str:
        values = list(self.errors.values())
        return (
            f"{self.bytes_before / 2**20:.2f} MiB before, {self.bytes_after / 2**20:.2f} MiB after; relative error of "
            f"the output {sum(values) / len(values):.2e} on average, {max(values):.2e} at most"
        )


def _relative_error(a: torch.Tensor, b: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> float:
    """|b a - b2 a2| / |b a|, from the triangular factors alone: the products are as large as the base."""

    def norm(left: torch.Tensor, right: torch.Tensor) -> float:
        return float((torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T).norm())

    a, b, a2, b2 = (t.double() for t in (a, b, a2, b2))
    whole = norm(b, a)
    return norm(torch.cat((b, -b2), 1), torch.cat((a, a2))) / whole if whole else 0.0


@torch.no_grad()
def quantize(model: nn.Module, kind: str = "int8", adapter: str = "default") -> Quality:
    """Quantize ``adapter`` of every LoRA layer of ``model``, in place. The adapter no longer learns.

    Raises ValueError for an unknown kind, and where the adapter is quantized already or not finite.
    """
    layers = require_layers(model, adapter)
    made: dict[str, tuple[QuantizedFactor, QuantizedFactor]] = {}
    before, errors = 0, {}
    for name, layer in layers:
        parts = layer.lora_A[adapter], layer.lora_B[adapter]
        if any(isinstance(part, QuantizedFactor) for part in parts):
            raise ValueError(f"{name}: the adapter is quantized already: dequantize it first")
        if any(part.bias is not None for part in parts):
            raise ValueError(f"{name}: lora_B has a bias, which is not quantized: train without lora_bias")
        a, b = (part.weight for part in parts)
        made[name] = QuantizedFactor(a, kind), QuantizedFactor(b, kind)
        before += a.nbytes + b.nbytes
        errors[name] = _relative_error(a, b, *(q.weight for q in made[name]))
    for name, layer in layers:
        layer.lora_A[adapter], layer.lora_B[adapter] = made[name]
    return Quality(before, sum(q.nbytes for pair in made.values() for q in pair), errors)


@torch.no_grad()
def dequantize(model: nn.Module, adapter: str = "default") -> int:
    """Undo `quantize`, but for the rounding. Returns how many layers changed."""
    count = 0
    for _, layer in require_layers(model, adapter):
        for parts in (layer.lora_A, layer.lora_B):
            q = parts[adapter]
            if isinstance(q, QuantizedFactor):
                linear = nn.Linear(q.in_features, q.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(q.weight.clone())
                parts[adapter] = linear
                count += parts is layer.lora_A
    return count


def _is_factor(key: str) -> bool:
    return key.endswith((".lora_A.weight", ".lora_B.weight"))


def quantize_file(adapter: str | Path, output_dir: str | Path, kind: str = "int8") -> Quality:
    """Quantize the factors of a saved PEFT adapter; what else it holds is copied.

    adapter: its folder. output_dir: a folder, which is made. Raises ValueError for an unknown kind, an adapter without
    LoRA factors of linear layers, and values that are not finite; OSError where a file is missing.
    """
    from safetensors.torch import load_file, save_file

    adapter, output_dir = Path(adapter), Path(output_dir)
    weights = load_file(adapter / PLAIN_FILE)
    if not any(_is_factor(key) for key in weights):
        raise ValueError(f"{adapter} has no LoRA factors of linear layers to quantize")
    tensors, types = {}, {}
    errors = {}
    for key, t in weights.items():
        if not _is_factor(key):
            tensors[key] = t
            continue
        q = QuantizedFactor(t, kind)
        tensors[f"{key}.values"], tensors[f"{key}.scales"] = q.values, q.scales
        types[key] = [str(t.dtype).removeprefix("torch."), *t.shape]
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            b = weights[f"{name}.lora_B.weight"]
            errors[name] = _relative_error(t, b, q.weight, QuantizedFactor(b, kind).weight)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output_dir / FILE, {"kind": kind, "factors": json.dumps(types)})
    _copy_the_rest(adapter, output_dir)
    sizes = [sum(t.nbytes for t in state.values()) for state in (weights, tensors)]
    return Quality(sizes[0], sizes[1], errors)


def _read(folder: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, tuple[torch.dtype, int, int]]]:
    """The kind, the tensors, and the type and shape of each factor of a file that `quantize_file` wrote."""
    from safetensors import safe_open

    with safe_open(folder / FILE, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    factors = {key: (getattr(torch, d), n, k) for key, (d, n, k) in json.loads(metadata["factors"]).items()}
    return metadata["kind"], tensors, factors


def _factor(kind: str, tensors: Mapping[str, torch.Tensor], key: str, dtype: torch.dtype, n: int, k: int) -> Any:
    q = QuantizedFactor.__new__(QuantizedFactor)
    nn.Module.__init__(q)
    q.kind, q.dtype, q.out_features, q.in_features = kind, dtype, n, k
    q.register_buffer("values", tensors[f"{key}.values"])
    q.register_buffer("scales", tensors[f"{key}.scales"])
    return q


def weights_of_file(adapter: str | Path) -> dict[str, torch.Tensor]:
    """The adapter's weights as PEFT's file would have them, of a folder that `quantize_file` wrote."""
    kind, tensors, factors = _read(Path(adapter))
    whole = {key: _factor(kind, tensors, key, *form).weight for key, form in factors.items()}
    return whole | {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in factors}


def dequantize_file(adapter: str | Path, output_dir: str | Path) -> Path:
    """Write an adapter that `quantize_file` wrote as PEFT's file again. Returns the file."""
    from safetensors.torch import save_file

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(weights_of_file(adapter), output_dir / PLAIN_FILE, {"format": "pt"})
    _copy_the_rest(Path(adapter), output_dir)
    return output_dir / PLAIN_FILE


def _copy_the_rest(adapter: Path, output_dir: Path) -> None:
    """The configuration, and the base weights that the start of the adapter has changed, without which it is wrong."""
    shutil.copy(adapter / "adapter_config.json", output_dir)
    if (adapter / starts.FILE).is_file():
        shutil.copy(adapter / starts.FILE, output_dir)


def load(model: nn.Module, adapter: str | Path) -> Any:
    """A PEFT model of ``model`` and an adapter that `quantize_file` wrote, which stays quantized."""
    import peft
    from peft.utils import set_peft_model_state_dict

    folder = Path(adapter)
    kind, tensors, factors = _read(folder)
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = peft.get_peft_model(model, config)
    rest = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in factors}
    if rest:
        set_peft_model_state_dict(wrapped, rest)
    for name, layer in require_layers(wrapped):
        for part in ("lora_A", "lora_B"):
            key = f"{name}.{part}.weight"
            present = getattr(layer, part)["default"].weight
            q = _factor(kind, tensors, key, *factors[key]).to(present.device)
            getattr(layer, part)["default"] = q
    return wrapped.eval()
