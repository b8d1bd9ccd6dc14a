"""Fingerprints of results: signed sums over tiles, to compare all timed calls with the checked one.

The fingerprint of a tile of a head is the sum of its elements times fixed pseudo-random signs, one
per global token and one per lane of the head dimension, in float64.  Exchanged rows, a row of zeros
or a changed element show in it, and in float64 so does a change in the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.tolerance import LIMITS
from cpbench.masks.slices import IntArray
from cpbench.verify.check import as_matrices
from cpbench.verify.errors import Floats

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention

TILE = 64  # tokens of a rank
MIN_WEIGHT = 1e-3  # of the mean: tiles of smaller norm are compared at this
CHUNK_ROWS = 1 << 13  # rows (of D elements) that are converted to float64 at a time
BUCKETS = 8  # numbers that stand for a tensor in a record


@dataclass(frozen=True)
class TensorFingerprint:
    """Of one tensor of a rank: ``[B, tiles, heads]`` signed sums, and squared norms."""

    sums: Floats
    weights: Floats

    def difference(self, other: TensorFingerprint, tolerance: float) -> tuple[int, int, int] | None:
        """Batch, head and first local token of a tile in which another fingerprint differs by more
        than ``tolerance`` times the norm of the tile; None where there is none.  With a tolerance
        of 0, every difference counts."""
        weights = np.maximum(self.weights, MIN_WEIGHT * self.weights.mean())
        same = self.sums == other.sums
        if tolerance:
            same |= np.abs(self.sums - other.sums) <= tolerance * np.sqrt(weights)
        if same.all():
            return None
        b, tile, head = (int(index) for index in np.argwhere(~same)[0])
        return b, head, tile * TILE

    def summary(self) -> Floats:
        """``BUCKETS`` signed sums over the tiles of some heads each, and the squared norm: additive
        over ranks, and the same for every layout."""
        batches, _, heads = self.sums.shape
        bucket = np.arange(batches * heads) % BUCKETS
        by_bucket = np.bincount(bucket, self.sums.sum(1).reshape(-1), BUCKETS)
        return np.append(by_bucket, self.weights.sum())


Fingerprint = Mapping[str, TensorFingerprint]


class Fingerprinter:
    """Takes fingerprints of the results of one rank."""

    def __init__(self, work: Attention) -> None:
        queries, (keys, _) = (
            work.world.queries.positions(work.rank),
            work.world.held_keys(work.rank),
        )
        gates = [name for name, _ in work.problem.gates]
        self._positions = dict.fromkeys(("q", "dout", "out", "dq"), queries)
        self._positions |= dict.fromkeys(("k", "v", "dk", "dv"), keys)
        self._positions |= dict.fromkeys((*gates, *(f"d{name}" for name in gates)), keys)

    def take(
        self,
        tensors: Mapping[str, torch.Tensor],
        lane_signs: Mapping[str, torch.Tensor] | None = None,
    ) -> Fingerprint:
        """The fingerprints of inputs, out and gradients (lse and states are left out).

        Args:
            lane_signs: by tensor, ``[D]`` signs by which its lanes are multiplied first.
        """
        return {
            name: self._take(as_matrices(x), self._positions[name], (lane_signs or {}).get(name))
            for name, x in tensors.items()
            if name in self._positions
        }

    def _take(
        self, x: torch.Tensor, positions: IntArray, lane_signs: torch.Tensor | None
    ) -> TensorFingerprint:
        import torch

        b, s, h, d = x.shape
        lanes = torch.as_tensor(signs(np.arange(d), 1), device=x.device)
        if lane_signs is not None:
            lanes = lanes * lane_signs.double()
        tokens = torch.as_tensor(signs(positions, 2), device=x.device)
        tiles = -(-s // TILE)
        sums, weights = torch.zeros((2, b, tiles, h), dtype=torch.float64, device=x.device)
        step = max(1, CHUNK_ROWS // (h * TILE)) * TILE
        for batch in range(b):
            for start in range(0, s, step):
                rows = x[batch, start : start + step].double()
                along = (rows @ lanes) * tokens[start : start + step, None]
                for target, values in ((sums, along), (weights, rows.square().sum(-1))):
                    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % TILE))
                    by_tile = padded.view(-1, TILE, h).sum(1)
                    target[batch, start // TILE : start // TILE + len(by_tile)] = by_tile
        return TensorFingerprint(sums.cpu().numpy(), weights.cpu().numpy())


def describe_difference(expected: Fingerprint, actual: Fingerprint, tolerance: float) -> str | None:
    """Where two fingerprints differ by more than ``tolerance``, in words; None if nowhere."""
    for name, one in actual.items():
        where = expected[name].difference(one, tolerance)
        if where is not None:
            b, head, token = where
            return f"{name} differs, first in batch {b}, head {head}, local tokens from {token}"
    return None


def signs(indices: IntArray, salt: int) -> Floats:
    """A fixed pseudo-random sign for each index: a bit of SplitMix64."""
    x = (indices.astype(np.uint64) + np.uint64(salt << 40)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.where((x >> np.uint64(63)).astype(bool), 1.0, -1.0)


def tolerance(dtype: str, deterministic: bool) -> float:
    """The difference between two calls that is allowed, relative to the norm of a tile: none for
    operators that declare to be deterministic."""
    return 0.0 if deterministic else LIMITS[dtype][0] / 2
