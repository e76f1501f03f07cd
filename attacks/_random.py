"""Random numbers that belong to a sample, not to a batch.

Every draw is a hash of (key, counter, position), so a sample sees the same noise whatever its neighbours, the batch
size or the order of work, and rows can join and leave a running batch. The hash is SplitMix64 (Steele, Lea and Flood,
OOPSLA
2014).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def sample_keys(seed: int, stream: str, index: Tensor) -> Tensor:
    """One key per sample, (B,) int64, from a seed, the name of the stream and the number of the sample."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    root = int.from_bytes(digest[:8], "little", signed=True)
    return _mix(_mix(index.to(torch.int64) * _GOLDEN) ^ root)


def uniform(keys: Tensor, counter: Tensor | int, size: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, size) float32 with 24 random bits each.

    Args:
        keys: (B,) int64.
        counter: how many draws the sample has made before, (B,) or one number for all.
        size: numbers per sample.
    """
    base = _mix(keys + torch.as_tensor(counter, dtype=torch.int64, device=keys.device) * _SECOND)
    positions = torch.arange(1, size + 1, dtype=torch.int64, device=keys.device) * _GOLDEN
    bits = _mix(base.unsqueeze(1) + positions)
    return _shift(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def normal(keys: Tensor, counter: Tensor | int, size: int) -> Tensor:
    """Standard normal numbers, (B, size), by the Box-Muller transform of `uniform`."""
    half = (size + 1) // 2
    u = uniform(keys, counter, 2 * half)
    radius = (-2.0 * torch.log1p(-u[:, :half])).sqrt()
    angle = 2 * math.pi * u[:, half:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :size]
