"""Seeded inputs, a pure function of the global token index.

Whatever the layout, the world size and the subset of heads, token t of head h of tensor "k" has
the same values: every way of computing a problem computes the same problem, and a check can
regenerate just the rows and heads that it needs.

Values are standard normal: (seed, tensor, batch, token, head) is mixed to 64 bits a row, those with
the lane to 32 bits, and each pair of lanes goes through Box-Muller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

TENSORS = ("q", "k", "v", "dout")
_GOLDEN = 0x9E3779B97F4A7C15
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 16  # elements made at a time on CPUs, so that temporaries stay in cache


def normal(
    tensor: str,
    seed: int,
    positions: np.typing.NDArray[np.int64],
    *,
    batches: Sequence[int],
    heads: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    device: str,
) -> torch.Tensor:
    """``[len(batches), len(positions), len(heads), head_dim]`` of normals.

    Args:
        tensor: ``"q"``, ``"k"``, ``"v"`` or ``"dout"``.
        seed: any integer.
        positions: global token indices.
        batches, heads: global batch and head indices.
    """
    import torch

    base = _mix_int(seed * len(TENSORS) + TENSORS.index(tensor))
    head = torch.as_tensor(list(heads), device=device)
    token = torch.as_tensor(positions, device=device) * (1 << 20)
    lane = torch.arange(-(-head_dim // 2), device=device, dtype=torch.int32) * _signed32(_GOLDEN)
    out = torch.empty(
        (len(batches), len(positions), len(heads), head_dim), dtype=dtype, device=device
    )
    step = max(1, (_CHUNK if device == "cpu" else 64 * _CHUNK) // (len(heads) * head_dim))
    for place, b in enumerate(batches):
        start = _signed64(_mix_int(base + b))
        for t in range(0, len(positions), step):
            row = _mix64((token[t : t + step, None] + head) * _signed64(_GOLDEN) + start)
            out[place, t : t + step] = _gaussian(_mix32(row, lane))[..., :head_dim]
    return out


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, which wraps as unsigned would: one word a row."""
    for shift, factor in _SPLITMIX:
        x = (x ^ _shifted(x, shift, 64)) * _signed64(factor)
    return x ^ _shifted(x, 31, 64)


def _mix32(row: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """One int32 a lane, from both halves of the row's word (the mixer lowbias32)."""
    import torch

    x = row.to(torch.int32).unsqueeze(-1) + lane
    x ^= _shifted(x, 16, 32)
    x *= _signed32(0x7FEB352D)
    x ^= (row >> 32).to(torch.int32).unsqueeze(-1)
    x ^= _shifted(x, 15, 32)
    x *= _signed32(0x846CA68B)
    return x.bitwise_xor_(_shifted(x, 16, 32))


def _gaussian(bits: torch.Tensor) -> torch.Tensor:
    """Box-Muller: 16 bits of radius, 16 of angle, two normals."""
    import torch

    radius = (bits & 0xFFFF).float().add_(0.5).mul_(2.0**-16)  # in (0, 1): the log is finite
    radius.log_().mul_(-2.0).sqrt_()
    angle = (bits >> 16).float().mul_(2.0**-16 * 2 * math.pi)
    return torch.cat([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)], dim=-1)


def _shifted(x: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (width - bits)) - 1)  # logical, not arithmetic


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) % 2**64
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 31)


def _signed64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _signed32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31
