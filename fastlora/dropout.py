"""LoRA dropout that is replayed from a seed, so that no mask is ever stored.

Element (m, k) of x is kept when ``philox4x32_10(key=seed, counter=(k // 4, m, 0, 0))[k % 4] >= p * 2**32``.
The function is the same in every backend: forward and backward, and one backend and another, see one mask.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import dataclasses

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@dataclasses.dataclass(frozen=True, eq=False)
class Dropout:
    """Drop each element of x with probability ``p`` in (0, 1]; scale the others by 1 / (1 - p)."""

    p: float
    seed: torch.Tensor
    """int64, one element, on x's device: read by the kernels, never by the host, so graph capture stays possible."""

    @property
    def threshold(self) -> int:
        """Random 32-bit words below this are dropped."""
        return min(round(self.p * 2**32), _MASK32)

    @property
    def gain(self) -> float:
        """What the kept elements are multiplied by."""
        return 0.0 if self.p >= 1 else 1 / (1 - self.p)

    def keep(self, m: int, k: int) -> torch.Tensor:
        """The mask (M, K), bool, on the seed's device."""
        if self.p >= 1:
            return torch.zeros(m, k, dtype=torch.bool, device=self.seed.device)
        return philox(self.seed, m, k) >= self.threshold

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Dropped and scaled x (M, K). Linear in x, so it is its own backward, too."""
        return x.masked_fill(~self.keep(*x.shape), 0) * self.gain


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed from ``device``'s default generator, which checkpointing restores for the recomputation."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def philox(seed: torch.Tensor, m: int, k: int) -> torch.Tensor:
    """(M, K) random 32-bit words as int64. 32-bit unsigned arithmetic, done in int64 whose overflow wraps."""
    device = seed.device
    c0 = torch.arange(-(-k // 4), device=device)[None, :].expand(m, -1)
    c1 = torch.arange(m, device=device)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((high >> 32) & _MASK32) ^ c1 ^ key0
        c2 = ((low >> 32) & _MASK32) ^ c3 ^ key1
        c1, c3 = high & _MASK32, low & _MASK32
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK32, (key1 + _KEY_STEPS[1]) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1).view(m, -1)[:, :k]
