"""The 4-bit weight format of bitsandbytes: NF4 and FP4, flat and nested statistics.

Layout. A matrix (N, K) is flattened row by row. Byte j of ``w_packed`` holds elements 2j (high nibble)
and 2j + 1 (low nibble); a nibble is an index into the 16 entries of ``code``. Elements
[b * blocksize, (b + 1) * blocksize) share one statistic ``absmax[b]``; a block may straddle rows.

    flat    a = absmax[b]                                                      float32
    nested  a = fp32(absmax_code[absmax_q[b]] * absmax_scale[b // 256]) + absmax_offset
    w = dtype(fp32(code[nibble] * a))

Every product and sum above is rounded to float32 on its own (no fused multiply-add), and the result once more
to the output type, which makes all dequantizers of this package agree with bitsandbytes bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCKSIZE = 256
"""Statistics that share one ``absmax_scale``; bitsandbytes knows no other size."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(v / 12.0 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
CODES = {"nf4": _NF4, "fp4": _FP4 + tuple(0.0 - v for v in _FP4)}  # both zeros are +0.0, as in bitsandbytes
"""The 16 values of a nibble, in the order of their bit patterns. NF4: Dettmers et al., QLoRA (2023), appendix E."""

# Elements that the portable dequantizer handles at once: it bounds the float32 temporaries to 16 MiB.
_CHUNK = 1 << 22


def version(t: torch.Tensor | None) -> int:
    """What a change of ``t`` in place changes. Tensors that were made in inference mode do not count theirs."""
    return -1 if t is None or t.is_inference() else t._version


_Table = TypeVar("_Table", bound=Callable[..., torch.Tensor])


def _kept(make: _Table) -> _Table:
    """`functools.cache`, but within a dispatch mode, whose tensors, fake ones for instance, are its own."""
    known = functools.cache(make)

    @functools.wraps(make)
    def table(*args: Any) -> torch.Tensor:
        return make(*args) if is_in_torch_dispatch_mode() else known(*args)

    return table  # type: ignore[return-value]


@_kept
def code_table(quant_type: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 float32 values of ``quant_type`` on ``device``."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@_kept
def _byte_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """(256, 2) float32: the two values that each byte stands for."""
    code, byte = code_table(quant_type, device), torch.arange(256, device=device)
    return torch.stack((code[byte >> 4], code[byte & 15]), dim=1)


@_kept
def absmax_code_table(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 256 float32 values of the signed dynamic 8-bit type that nested statistics are stored in.

    For each exponent e in 0..6 the type has 2**e values of either sign, the midpoints of 2**e equal parts of
    [0.1, 1], times 10**(e - 6); zero and one complete it (Dettmers, "8-bit approximations", 2015).
    """
    # Whatever the default device and type are: another device may round otherwise.
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32, device="cpu")
        mid = 10 ** (e - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [mid, -mid]
    return torch.cat(values).sort().values.to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Weight:
    """A matrix (N, K) in 4 bits. The tensors are shared, never copied, and never require gradients.

    Exactly one form of the statistics is set: ``absmax``, or the four ``absmax_*`` of the nested form.
    """

    w_packed: torch.Tensor
    """Packed nibbles, uint8, ceil(N * K / 2) elements in one dimension."""
    shape: tuple[int, int]
    blocksize: int = 64
    quant_type: str = "nf4"
    dtype: torch.dtype = torch.bfloat16
    """The type the weight had before quantization; ``dequantize`` returns it unless told otherwise."""
    absmax: torch.Tensor | None = None
    """Flat statistics, float32, one per block."""
    absmax_q: torch.Tensor | None = None
    """Nested statistics, uint8, one per block."""
    absmax_scale: torch.Tensor | None = None
    """float32, one per 256 blocks."""
    absmax_code: torch.Tensor | None = None
    """float32, 256 values."""
    absmax_offset: torch.Tensor | None = None
    """float32, no dimensions."""

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what calls keep beside them belongs to this process and these tensors."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def nested(self) -> bool:
        return self.absmax_q is not None

    @property
    def code(self) -> torch.Tensor:
        """The 16 float32 values of a nibble, on the weight's device."""
        return code_table(self.quant_type, self.w_packed.device)

    @property
    def device(self) -> torch.device:
        return self.w_packed.device

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        return -(-self.numel() // self.blocksize)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight and its statistics take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are set, by field name."""
        names = ("w_packed", "absmax", "absmax_q", "absmax_scale", "absmax_code", "absmax_offset")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on ``device``; types never change."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def check(self) -> NF4Weight:
        """Return self, or raise ValueError that names the field, what it is and what it must be."""
        n, k = self.shape
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        blocks = self.blocks
        wanted: dict[str, tuple[torch.dtype, int]] = {"w_packed": (torch.uint8, -(-n * k // 2))}
        if self.nested:
            if self.absmax is not None:
                raise ValueError("set either absmax (flat) or the absmax_* fields (nested), not both")
            wanted |= {
                "absmax_q": (torch.uint8, blocks),
                "absmax_scale": (torch.float32, -(-blocks // NESTED_BLOCKSIZE)),
                "absmax_code": (torch.float32, 256),
                "absmax_offset": (torch.float32, 1),
            }
        else:
            wanted |= {"absmax": (torch.float32, blocks)}
        for name, (dtype, numel) in wanted.items():
            t = getattr(self, name)
            if t is None:
                raise ValueError(f"{name} is missing")
            if t.dtype != dtype or t.numel() != numel or not t.is_contiguous() or t.device != self.device:
                raise ValueError(
                    f"{name} must be a contiguous {dtype} tensor of {numel} elements on {self.device} for a "
                    f"{n} x {k} weight with blocksize {self.blocksize}; "
                    f"got {t.dtype}, {tuple(t.shape)}, {t.device}"
                )
        return self

    def flat_absmax(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Statistics of blocks [start, stop) in float32, un-nested in two roundings."""
        if self.absmax is not None:
            return self.absmax[start:stop]
        assert self.absmax_q is not None and self.absmax_scale is not None
        assert self.absmax_code is not None and self.absmax_offset is not None
        stop = self.blocks if stop is None else stop
        group = torch.arange(start, stop, device=self.device) // NESTED_BLOCKSIZE
        values = self.absmax_code[self.absmax_q[start:stop].int()]
        return values * self.absmax_scale[group] + self.absmax_offset

    def dequantize(self, dtype: torch.dtype | None = None, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The dense matrix (N, K), or its rows [rows[0], rows[1]), in ``dtype``. Portable and exact, not fast."""
        n, k = self.shape
        first, last = (0, n) if rows is None else rows
        if not 0 <= first <= last <= n:
            raise ValueError(f"rows must lie in [0, {n}], got {rows}")
        out = torch.empty((last - first) * k, dtype=dtype or self.dtype, device=self.device)
        table, packed = _byte_table(self.quant_type, self.device), self.w_packed.reshape(-1)
        start, stop = first * k, last * k
        step = max(_CHUNK, self.blocksize)
        for lo in range(start - start % self.blocksize, stop, step):
            hi = min(lo + step, self.numel())
            values = table[packed[lo // 2 : -(-hi // 2)].int()].reshape(-1)
            blocks = -(-(hi - lo) // self.blocksize)
            missing = blocks * self.blocksize - values.numel()
            if missing > 0:  # the last block of the matrix may be short
                values = torch.nn.functional.pad(values, (0, missing))
            b = lo // self.blocksize
            scaled = values[: blocks * self.blocksize].view(blocks, -1) * self.flat_absmax(b, b + blocks)[:, None]
            begin, end = max(lo, start), min(hi, stop)
            out[begin - start : end - start] = scaled.view(-1)[begin - lo : end - lo]
        return out.view(last - first, k)

    @classmethod
    def quantize(
        cls, w: torch.Tensor, *, blocksize: int = 64, quant_type: str = "nf4", nested: bool = True
    ) -> NF4Weight:
        """Quantize a floating-point matrix (N, K) as bitsandbytes does.

        Each value goes to the nearest code of ``w / absmax`` (a tie to the smaller one).
        Raises ValueError for a wrong type, shape, blocksize or quant_type.
        """
        if w.dim() != 2 or not w.is_floating_point():
            raise ValueError(f"w must be a floating-point matrix (N, K), got {w.dtype} of shape {tuple(w.shape)}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
        if quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type must be one of {QUANT_TYPES}, got {quant_type!r}")
        if w.numel() == 0:
            raise ValueError(f"w has no elements: shape {tuple(w.shape)}")
        flat, numel = w.detach().reshape(-1), w.numel()
        # Stable: FP4 has two zeros, whose order would otherwise depend on the device.
        order = code_table(quant_type, w.device).argsort(stable=True)
        code = code_table(quant_type, w.device)[order]
        bounds = (code[:-1] + code[1:]) / 2
        packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device=w.device)
        absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=w.device)
        step = max(_CHUNK, blocksize)
        for lo in range(0, numel, step):
            part = flat[lo : lo + step].float()
            missing = -part.numel() % blocksize
            part = torch.nn.functional.pad(part, (0, missing)).view(-1, blocksize)
            peak = part.abs().amax(dim=1)
            absmax[lo // blocksize : lo // blocksize + peak.numel()] = peak
            # The clamp only spares a block of zeros the division by zero.
            scaled = (part * (1.0 / peak.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
            nibble = order[torch.bucketize(scaled.view(-1), bounds, out_int32=True)].to(torch.uint8).view(-1, 2)
            both = (nibble[:, 0] << 4) | nibble[:, 1]
            end = min(lo + step, numel)
            packed[lo // 2 : -(-end // 2)] = both[: -(-(end - lo) // 2)]
        n, k = w.shape
        weight = cls(packed, (n, k), blocksize, quant_type, w.dtype, absmax=absmax)
        return weight.nest() if nested else weight

    def nest(self) -> NF4Weight:
        """Quantize flat statistics to 8 bits ("double quantization", QLoRA section 3). Nested ones return self."""
        if self.absmax is None:
            return self
        offset = self.absmax.mean()
        code = absmax_code_table(self.device)
        part = torch.nn.functional.pad(self.absmax - offset, (0, -self.blocks % NESTED_BLOCKSIZE))
        part = part.view(-1, NESTED_BLOCKSIZE)
        scale = part.abs().amax(dim=1)
        scaled = part * (1.0 / scale.clamp(min=1e-38))[:, None]
        absmax_q = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
        return dataclasses.replace(
            self,
            absmax=None,
            absmax_q=absmax_q.to(torch.uint8).view(-1)[: self.blocks].clone(),
            absmax_scale=scale,
            absmax_code=code.clone(),
            absmax_offset=offset,
        )

    def flatten(self) -> NF4Weight:
        """The same weight with float32 statistics. Dequantizes to the same bits."""
        if not self.nested:
            return self
        nothing: dict[str, Any] = dict.fromkeys(("absmax_q", "absmax_scale", "absmax_code", "absmax_offset"))
        return dataclasses.replace(self, absmax=self.flat_absmax(), **nothing)

    @classmethod
    def from_bitsandbytes(cls, weight: torch.Tensor, quant_state: QuantState | None = None) -> NF4Weight:
        """Share the bytes of a bitsandbytes ``Params4bit`` (or any tensor with its ``QuantState``).

        Any quant_storage type is read as bytes, never cast. Raises ValueError when the tensor carries no
        4-bit state, is not a matrix, or was repacked for CPU inference.
        """
        state: Any = quant_state if quant_state is not None else getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("the weight carries no quant_state: it is not quantized (move the model to its device)")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes repacked this weight for CPU inference, which loses statistics; reload the model and set "
                "support_avx512bf16_for_cpu = False on its Linear4bit layers before the first forward in eval mode"
            )
        if state.shape is None or len(state.shape) != 2:
            raise ValueError(f"only matrices are supported, got a 4-bit tensor of shape {state.shape}")
        statistics: dict[str, torch.Tensor] = {}
        if state.state2 is None:
            statistics["absmax"] = state.absmax.float()
        else:
            if state.state2.blocksize != NESTED_BLOCKSIZE:
                raise ValueError(f"nested statistics must use blocks of 256, got {state.state2.blocksize}")
            statistics["absmax_q"] = state.absmax
            statistics["absmax_scale"] = state.state2.absmax.float()
            statistics["absmax_code"] = state.state2.code.float()
            statistics["absmax_offset"] = state.offset.float()
        n, k = state.shape
        return cls(
            weight.detach().view(torch.uint8).reshape(-1),
            (n, k),
            state.blocksize,
            state.quant_type,
            state.dtype,
            **statistics,
        )

    def to_bitsandbytes(self, quant_storage: torch.dtype = torch.uint8) -> Params4bit:
        """A bitsandbytes ``Params4bit`` over the same bytes, its ``quant_state`` set.

        Raises ImportError without bitsandbytes, ValueError when the bytes do not fill ``quant_storage`` elements.
        """
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        itemsize = torch.empty(0, dtype=quant_storage).element_size()
        if self.w_packed.numel() % itemsize:
            raise ValueError(f"{self.w_packed.numel()} packed bytes do not fill {quant_storage} elements")
        state2 = None
        if self.nested:
            state2 = QuantState(
                absmax=self.absmax_scale, code=self.absmax_code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
            )
        state = QuantState(
            absmax=self.absmax_q if self.nested else self.absmax,
            shape=torch.Size(self.shape),
            code=self.code.clone(),  # safetensors refuses to save tensors that layers share
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.absmax_offset,
            state2=state2,
        )
        return Params4bit(
            self.w_packed.view(quant_storage).view(-1, 1),
            requires_grad=False,
            quant_state=state,
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
            quant_storage=quant_storage,
            bnb_quantized=True,
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The statistics under bitsandbytes' names, without the packed weight itself (whose key they follow)."""
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        out: dict[str, torch.Tensor] = {"quant_map": self.code}
        if self.nested:
            assert self.absmax_q is not None and self.absmax_scale is not None
            assert self.absmax_code is not None and self.absmax_offset is not None
            out |= {
                "absmax": self.absmax_q,
                "nested_absmax": self.absmax_scale,
                "nested_quant_map": self.absmax_code.clone(),
            }
            meta |= {
                "nested_blocksize": NESTED_BLOCKSIZE,
                "nested_dtype": "float32",
                "nested_offset": self.absmax_offset.item(),
            }
        else:
            assert self.absmax is not None
            out["absmax"] = self.absmax
        text = json.dumps(meta).encode()
        out[f"quant_state.bitsandbytes__{self.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
        return out

    @classmethod
    def from_state_dict(cls, w_packed: torch.Tensor, state: dict[str, torch.Tensor]) -> NF4Weight:
        """The inverse of ``state_dict``; reads what bitsandbytes saved, too.

        Raises ValueError for what is not the state of one weight, KeyError for a part of it that is missing.
        """
        packed_keys = [key for key in state if key.startswith("quant_state.bitsandbytes__")]
        if len(packed_keys) != 1 or "absmax" not in state:
            raise ValueError(f"not the state of one 4-bit weight: {sorted(state)}")
        meta = json.loads(bytes(state[packed_keys[0]].tolist()))
        statistics: dict[str, torch.Tensor] = {"absmax": state["absmax"]}
        if "nested_absmax" in state:
            statistics = {
                "absmax_q": state["absmax"],
                "absmax_scale": state["nested_absmax"],
                "absmax_code": state["nested_quant_map"],
                "absmax_offset": torch.tensor(meta["nested_offset"], dtype=torch.float32, device=w_packed.device),
            }
        shape, dtype = meta["shape"], getattr(torch, str(meta["dtype"]), None)
        if not isinstance(shape, list) or len(shape) != 2 or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a 4-bit weight has a shape (N, K) and a type, got {shape} and {meta['dtype']!r}")
        n, k = shape
        packed = w_packed.view(torch.uint8).reshape(-1)
        return cls(packed, (n, k), meta["blocksize"], meta["quant_type"], dtype, **statistics)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        *,
        blocksize: int = 64,
        quant_type: str = "nf4",
        nested: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "meta",
    ) -> NF4Weight:
        """A weight of the right sizes with no content, for deferred loading (``device="meta"``)."""
        numel = math.prod(shape)
        blocks = -(-numel // blocksize)

        def make(count: int, kind: torch.dtype) -> torch.Tensor:
            return torch.empty(count, dtype=kind, device=device)

        statistics = {"absmax": make(blocks, torch.float32)}
        if nested:
            statistics = {
                "absmax_q": make(blocks, torch.uint8),
                "absmax_scale": make(-(-blocks // NESTED_BLOCKSIZE), torch.float32),
                "absmax_code": make(256, torch.float32),
                "absmax_offset": torch.empty((), dtype=torch.float32, device=device),
            }
        packed = make(-(-numel // 2), torch.uint8)
        return cls(packed, shape, blocksize, quant_type, dtype, **statistics).check()


Weight = NF4Weight | torch.Tensor
"""A base weight (N, K): packed in 4 bits, or dense."""
