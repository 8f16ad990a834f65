"""A matrix in 8 bits with one float32 scale a row: ``w = dtype(values * scales)``. The format of quantized adapters."""

from __future__ import annotations

import dataclasses

import torch

LEVELS = 127
"""Values lie in [-127, 127]: both signs reach as far."""


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Matrix:
    """A matrix (rows, columns) in 8 bits. The tensors are shared, never copied, and never require gradients."""

    values: torch.Tensor
    """(rows, columns), int8, contiguous."""
    scales: torch.Tensor
    """(rows, 1), float32, contiguous."""
    dtype: torch.dtype = torch.bfloat16
    """The type the matrix had before quantization; ``dequantize`` returns it unless told otherwise."""

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def numel(self) -> int:
        return self.values.numel()

    @classmethod
    def quantize(cls, w: torch.Tensor) -> Int8Matrix:
        """Each value of a matrix to the nearest multiple of its row's scale, which is the largest of the row / 127."""
        wide = w.detach().float()
        scales = wide.abs().amax(1, keepdim=True) / LEVELS
        # The scale of subnormal values is rounded so much that more of it may fit in one of them.
        values = torch.where(scales > 0, wide / scales, 0).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return cls(values, scales, w.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(rows, columns) in ``dtype``, each product rounded once."""
        if dtype == torch.float64:
            return self.values.double() * self.scales.double()
        out = torch.empty_like(self.values, dtype=dtype or self.dtype)
        return torch.mul(self.values, self.scales, out=out)
