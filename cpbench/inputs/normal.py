"""Independent standard normals, a pure function of (seed, tensor, batch, token, head).

The tuple is hashed to 64 bits per row; each pair of elements of a row gets 32 bits of those and its
index, which Box-Muller turns into two normals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import TENSORS, InputRequest

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, the increment of SplitMix64
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
TOKEN = 1 << 20  # hashes are of TOKEN * token + head
_CHUNK = 1 << 16  # elements at a time on CPUs, so that temporaries stay in cache


class Normal:
    """Independent standard normals."""

    def check(self, case: Case) -> None:
        """Every case is supported."""

    def make(self, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem."""
        return normal_rows(request, request.problem.dtype)


def normal_rows(request: InputRequest, dtype: str) -> torch.Tensor:
    """The requested rows, in another dtype."""
    import torch

    return normal(
        request.name,
        request.seed,
        request.positions,
        batches=request.batches,
        heads=request.heads,
        head_dim=request.head_dim,
        dtype=getattr(torch, dtype),
        device=request.device,
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
    """``[len(batches), len(positions), len(heads), head_dim]`` independent standard normals.

    Args:
        tensor: ``"q"``, ``"k"``, ``"v"`` or ``"dout"``.
        seed: any integer.
        positions: global token indices.
        batches, heads: global batch and head indices.
    """
    import torch

    initialise_vector_math()
    base = mix_int(seed * len(TENSORS) + TENSORS.index(tensor))
    head = torch.as_tensor(list(heads), device=device)
    token = torch.as_tensor(positions, device=device) * TOKEN
    pair = torch.arange(-(-head_dim // 2), device=device, dtype=torch.int32) * _signed32(GOLDEN)
    out = torch.empty(
        (len(batches), len(positions), len(heads), head_dim), dtype=dtype, device=device
    )
    step = max(1, (_CHUNK if device == "cpu" else 64 * _CHUNK) // (len(heads) * head_dim))
    for i, batch in enumerate(batches):
        start = signed64(mix_int(base + batch))
        for t in range(0, len(positions), step):
            row = mix64((token[t : t + step, None] + head) * signed64(GOLDEN) + start)
            out[i, t : t + step] = _gaussian(_mix32(row, pair))[..., :head_dim]
    return out


def mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 on int64, which wraps around like uint64."""
    for shift, factor in _SPLITMIX:
        x = (x ^ logical_shift(x, shift, 64)) * signed64(factor)
    return x ^ logical_shift(x, 31, 64)


def _mix32(row: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """int32 hash of each row (int64) and pair of elements, by the mixer lowbias32."""
    import torch

    x = row.to(torch.int32).unsqueeze(-1) + pair
    x ^= logical_shift(x, 16, 32)
    x *= _signed32(0x7FEB352D)
    x ^= (row >> 32).to(torch.int32).unsqueeze(-1)
    x ^= logical_shift(x, 15, 32)
    x *= _signed32(0x846CA68B)
    return x.bitwise_xor_(logical_shift(x, 16, 32))


def _gaussian(bits: torch.Tensor) -> torch.Tensor:
    """Two normals from 32 bits by Box-Muller: 16 bits for the radius, 16 for the angle."""
    import torch

    radius = (bits & 0xFFFF).float().add_(0.5).mul_(2.0**-16)  # in (0, 1), so the log is finite
    radius.log_().mul_(-2.0).sqrt_()
    angle = (bits >> 16).float().mul_(2.0**-16 * 2 * math.pi)
    return torch.cat([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)], dim=-1)


def logical_shift(x: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Shift integers of ``width`` bits to the right, filling with zeros."""
    return (x >> bits) & ((1 << (width - bits)) - 1)


def mix_int(x: int) -> int:
    """SplitMix64 of a Python integer."""
    x = (x + GOLDEN) % 2**64
    for shift, factor in _SPLITMIX:
        x = (x ^ (x >> shift)) * factor % 2**64
    return x ^ (x >> 31)


def signed64(x: int) -> int:
    """The int64 with the bits of ``x`` modulo 2**64."""
    return (x + 2**63) % 2**64 - 2**63


def _signed32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


@functools.cache
def initialise_vector_math() -> None:
    """Call torch's vector functions on CPUs once, on one thread.

    A first call that several threads make together may be less exact: with two threads on a busy
    machine, that of float32 ``log`` had errors of 4e-5 in about 1 of 1,000 new processes (torch
    2.13 for CPUs).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        x = torch.ones(8, dtype=dtype)
        for name in ("log", "log1p", "log2", "exp", "expm1", "sin", "cos", "tanh", "erf", "sqrt"):
            getattr(torch, name)(x)
            getattr(x.clone(), f"{name}_")()
