"""Independent standard normals, a pure function of (seed, tensor, batch, token, head).

That tuple is mixed to 64 bits a row, those with the lane to 32 bits, and each pair of lanes goes
through Box-Muller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import TENSORS, Wanted

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case

GOLDEN = 0x9E3779B97F4A7C15
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_CHUNK = 1 << 16  # elements made at a time on CPUs, so that temporaries stay in cache


class Normal:
    """Independent standard normals."""

    def check(self, case: Case) -> None:
        """Any case will do."""

    def make(self, wanted: Wanted) -> torch.Tensor:
        return normal_rows(wanted, wanted.problem.dtype)


def normal_rows(wanted: Wanted, dtype: str) -> torch.Tensor:
    """The rows that are wanted, in a dtype of one's choice."""
    import torch

    return normal(
        wanted.name,
        wanted.seed,
        wanted.positions,
        batches=wanted.batches,
        heads=wanted.heads,
        head_dim=wanted.problem.head_dim,
        dtype=getattr(torch, dtype),
        device=wanted.device,
    )


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
    lane = torch.arange(-(-head_dim // 2), device=device, dtype=torch.int32) * _signed32(GOLDEN)
    out = torch.empty(
        (len(batches), len(positions), len(heads), head_dim), dtype=dtype, device=device
    )
    step = max(1, (_CHUNK if device == "cpu" else 64 * _CHUNK) // (len(heads) * head_dim))
    for place, b in enumerate(batches):
        start = signed64(_mix_int(base + b))
        for t in range(0, len(positions), step):
            row = mix64((token[t : t + step, None] + head) * signed64(GOLDEN) + start)
            out[place, t : t + step] = _gaussian(_mix32(row, lane))[..., :head_dim]
    return out


def mix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, which wraps as unsigned would: one word a row."""
    for shift, factor in _SPLITMIX:
        x = (x ^ shifted(x, shift, 64)) * signed64(factor)
    return x ^ shifted(x, 31, 64)


def _mix32(row: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
    """One int32 a lane, from both halves of the row's word (the mixer lowbias32)."""
    import torch

    x = row.to(torch.int32).unsqueeze(-1) + lane
    x ^= shifted(x, 16, 32)
    x *= _signed32(0x7FEB352D)
    x ^= (row >> 32).to(torch.int32).unsqueeze(-1)
    x ^= shifted(x, 15, 32)
    x *= _signed32(0x846CA68B)
    return x.bitwise_xor_(shifted(x, 16, 32))


def _gaussian(bits: torch.Tensor) -> torch.Tensor:
    """Box-Muller: 16 bits of radius, 16 of angle, two normals."""
    import torch

    radius = (bits & 0xFFFF).float().add_(0.5).mul_(2.0**-16)  # in (0, 1): the log is finite
    radius.log_().mul_(-2.0).sqrt_()
    angle = (bits >> 16).float().mul_(2.0**-16 * 2 * math.pi)
    return torch.cat([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)], dim=-1)


def shifted(x: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (width - bits)) - 1)  # logical, not arithmetic


def _mix_int(x: int) -> int:
    x = (x + GOLDEN) % 2**64
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 31)


def signed64(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


def _signed32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31
