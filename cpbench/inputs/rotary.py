"""Rotary position embedding (RoPE) of queries and keys.

Pair i of a head of even size D, its elements i and i + D/2, is turned by the angle
``position * theta_i`` with ``theta_i = base ** (-2 i / D)``, so that the score of a query and a key
depends on the distance of their positions alone.  To go beyond the positions that a model was
trained on by a factor s:

- ``pi``: theta / s (position interpolation);
- ``ntk``: base * s ** (D / (D - 2)), which divides the slowest frequency by s and keeps the
  fastest;
- ``yarn``: pairs that turn 32 times and more within the original length L keep their frequency,
  those that turn once and less have it divided by s, with a linear ramp between:
  ``g theta + (1 - g) theta / s``, where ``g = clip((L theta / 2 pi - 1) / 31, 0, 1)``; cosine and
  sine are multiplied by ``1 + 0.1 ln s``.

Sources: RoFormer (arXiv 2104.09864), position interpolation (2306.15595), NTK-aware scaling and
YaRN (2309.00071).  Elements i and i + D/2 make a pair, as in GPT-NeoX and Hugging Face's Llama.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

BASE = 10000.0
SCALINGS = ("pi", "ntk", "yarn")
YARN_TURNS = 1.0, 32.0  # within the original length: those of the ends of the ramp
MAX_BASE = 1e300  # powers of larger ones overflow

Floats = npt.NDArray[np.float64]


def frequencies(
    head_dim: int,
    base: float = BASE,
    scaling: str | None = None,
    factor: float | None = None,
    original_length: int = 0,
) -> tuple[Floats, float]:
    """``[head_dim / 2]`` radians per position, and the factor of cosine and sine.

    Args:
        head_dim: even.
        base, scaling, factor, original_length: see :func:`rope`.

    Raises:
        ValueError: for a value that is not allowed.
    """
    for key, value in (("base", base), ("factor", factor), ("original_length", original_length)):
        kind, what = (Integral, "an integer") if key == "original_length" else (Real, "a number")
        missing = key == "factor" and value is None
        if isinstance(value, bool) or not (isinstance(value, kind) or missing):
            raise ValueError(f"rope: {key} = {value!r} is not {what}")
    return _frequencies(head_dim, base, scaling, factor, original_length)


@functools.lru_cache(maxsize=256)
def _frequencies(
    head_dim: int, base: float, scaling: str | None, factor: float | None, original_length: int
) -> tuple[Floats, float]:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope takes an even head_dim, not {head_dim}")
    if not 1 < base <= MAX_BASE:
        raise ValueError(f"rope: base = {base:g} must be above 1, and at most {MAX_BASE:g}")
    if scaling is not None and scaling not in SCALINGS:
        raise ValueError(f"rope: scaling = {scaling!r} is not one of {', '.join(SCALINGS)}")
    if factor is None:
        if scaling is not None:
            raise ValueError(f"rope: {scaling} needs the factor by which it scales, e.g. factor=8")
        factor = 1.0
    if not 1 <= factor < math.inf:
        raise ValueError(f"rope: factor = {factor:g} must be at least 1")
    if scaling is None and factor != 1:
        raise ValueError(f"rope: factor = {factor:g} needs a scaling: {', '.join(SCALINGS)}")
    if (scaling == "yarn") != (original_length > 0):
        raise ValueError(
            f"rope: original_length = {original_length}: yarn needs that of the training, in "
            "tokens, and nothing else takes one"
        )
    if scaling == "ntk" and head_dim > 2:
        base *= factor ** (head_dim / (head_dim - 2))
    theta: Floats = base ** (-2 * np.arange(head_dim // 2) / head_dim)
    magnitude = 1.0
    if scaling == "pi":
        theta = theta / factor
    elif scaling == "yarn":
        slow, fast = YARN_TURNS
        turns = original_length * theta / (2 * math.pi)
        kept = np.clip((turns - slow) / (fast - slow), 0, 1)
        theta = kept * theta + (1 - kept) * theta / factor
        magnitude = 1 + 0.1 * math.log(factor)
    theta.flags.writeable = False  # it is shared by all callers
    return theta, magnitude


def rope(
    x: torch.Tensor,
    positions: torch.Tensor | npt.NDArray[np.int64] | Sequence[int] | None = None,
    *,
    base: float = BASE,
    scaling: str | None = None,
    factor: float | None = None,
    original_length: int = 0,
) -> torch.Tensor:
    """Rotary position embedding of queries or keys; differentiable.

    Angles are formed in float64, and only their cosines and sines are rounded: with float32 angles,
    scores are wrong by 4e-3 at position 131,072 and by 0.4 at 16 million (normals, D = 128).

    Args:
        x: ``[B, S, heads, D]`` of a floating dtype; D is even.
        positions: ``[S]`` integers, the position of each token; of a rank those that its layout
            gives, ``layout.positions(rank)``.  ``0, 1, …`` unless given.
        base: of the frequencies, above 1.
        scaling: None, ``"pi"``, ``"ntk"`` or ``"yarn"``, see :mod:`cpbench.inputs.rotary`.
        factor: how far beyond the training, at least 1; of a scaling, which needs it.
        original_length: tokens of the training; of ``"yarn"`` only, which needs it.

    Returns:
        A tensor like ``x``, computed in float32 (of float64 tensors in float64).

    Raises:
        ValueError: for a value that is not allowed, in one line.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"rope takes a floating tensor [B, S, heads, D], not {x.dtype} {list(x.shape)}"
        )
    theta, magnitude = frequencies(x.shape[3], base, scaling, factor, original_length)
    return rotate(x, range(x.shape[1]) if positions is None else positions, theta, magnitude)


def rotate(
    x: torch.Tensor,
    positions: torch.Tensor | npt.NDArray[np.int64] | Sequence[int],
    theta: Floats,
    magnitude: float = 1.0,
) -> torch.Tensor:
    """Turn the pairs of ``[B, S, heads, D]`` by ``positions * theta``, times ``magnitude``.

    Raises:
        ValueError: if ``positions`` are not S integers.
    """
    import torch

    at = torch.as_tensor(positions, device=x.device)
    if at.shape != x.shape[1:2] or at.is_floating_point() or at.is_complex():
        raise ValueError(
            f"rope takes {x.shape[1]} integer positions, not {at.dtype} {list(at.shape)}"
        )
    frequency = torch.as_tensor(theta.copy(), device=x.device)
    angles = at.to(torch.float64)[:, None, None] * frequency  # [S, 1, D / 2]
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (part.mul(magnitude).to(precise) for part in (angles.cos(), angles.sin()))
    first, second = x.to(precise).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
