"""Write tests/data/golden.safetensors with bitsandbytes: ``python tests/make_golden.py``.

For each case: the weight, the packed bytes and statistics under bitsandbytes' own names, and the dequantized matrices.
The dequantized matrices come from bitsandbytes' portable implementation; test_nf4.py says why.
"""

from __future__ import annotations

from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "data" / "golden.safetensors"
SHAPES = (
    # n, k, blocksize
    (8, 64, 64),
    (5, 33, 32),  # odd K: rows begin in the middle of a byte, the last block is short, the last nibble is unused
    (3, 100, 64),  # blocks straddle rows
    (2, 257, 128),
    (3, 171, 256),
    (1, 1, 64),
)
LARGE = (
    # n, k, blocksize, quant_type, nested
    (2, 2731, 4096, "nf4", False),
    (2, 2731, 4096, "fp4", True),
    (81, 103, 32, "nf4", True),  # more than 256 blocks: two nested scales, the second of a short group
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def make(
    name: str, n: int, k: int, blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, outputs: int
) -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    w = torch.randn(n, k) * 0.05
    if n * k >= 2 * blocksize:
        w.view(-1)[blocksize : blocksize + min(blocksize, 64)] = 0
    w = w.to(dtype)
    packed, state = functional.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested)
    tensors = {f"{name}/w": w, f"{name}/w_packed": packed.reshape(-1)}
    tensors |= {f"{name}/state/{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
    for out_dtype in DTYPES[:outputs]:
        tensors[f"{name}/dequantized/{str(out_dtype).removeprefix('torch.')}"] = dequantize(packed, state, out_dtype)
    return tensors


def dequantize(packed: torch.Tensor, state: object, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes' portable implementation makes of ``packed``, in eager mode."""
    from bitsandbytes import functional
    from bitsandbytes.backends.default import ops

    absmax = state.absmax  # type: ignore[attr-defined]
    if state.nested:  # type: ignore[attr-defined]
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset  # type: ignore[attr-defined]
    # The undecorated function: torch.compile would recompile it for every shape.
    compute = getattr(ops._dequantize_4bit_compute, "__wrapped__", ops._dequantize_4bit_compute)
    flat = packed.view(torch.uint8).reshape(-1)
    return compute(flat, absmax, state.code, state.blocksize, state.shape, dtype)  # type: ignore[attr-defined]


def main() -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            for i, (n, k, blocksize) in enumerate(SHAPES):
                name = f"{quant_type}-{'nested' if nested else 'flat'}-{n}x{k}-{blocksize}"
                tensors |= make(name, n, k, blocksize, quant_type, nested, DTYPES[i % 3], outputs=3)
    for n, k, blocksize, quant_type, nested in LARGE:
        name = f"{quant_type}-{'nested' if nested else 'flat'}-{n}x{k}-{blocksize}"
        tensors |= make(name, n, k, blocksize, quant_type, nested, torch.bfloat16, outputs=2)
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, GOLDEN)
    print(f"{GOLDEN}: {len(tensors)} tensors, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
