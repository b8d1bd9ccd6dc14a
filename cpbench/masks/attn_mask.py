"""``AttnMask``, the representation of attention masks: a list of disjoint band slices.

A band slice is six integers ``(q0, q1, k0, k1, lo, hi)``: query ``i`` sees key ``j`` when
``q0 <= i < q1``, ``k0 <= j < k1`` and ``lo <= j - i <= hi``.  Offsets are in the coordinates of the
whole mask, so cropping only clips rectangles, and every shard of a mask is again such a list.
All operations are exact integer arithmetic on ``(n, 6)`` int64 arrays.  Nothing is S x S, except
``AttnMask.to_dense``, which is for tests and pictures.

Slices are kept canonical (tight rectangles, tight finite offsets, none empty, sorted), so masks
that are built in the same way compare equal.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cpbench.core.untraced import untraced
from cpbench.masks import living
from cpbench.masks.slices import (
    HI,
    K0,
    K1,
    LO,
    Q0,
    Q1,
    BoolArray,
    IntArray,
    areas,
    as_slices,
    canonical,
    canonical_indexed,
    cut_axis,
    local_starts,
    merged,
    row_overlaps,
    shifted,
    strided,
    transposed,
    visible_keys_per_query,
)


@dataclass(frozen=True, eq=False, repr=False)
class AttnMask(living.PickledByFields):
    """An attention mask, as canonical band slices.

    Create one with :meth:`from_slices` (which canonicalises) or with ``cpbench.masks.build``.

    Attributes:
        seq_q: number of queries.
        seq_k: number of keys.
        slices: ``(n, 6)`` int64, canonical, pairwise disjoint, read-only.
    """

    seq_q: int
    seq_k: int
    slices: IntArray

    def __repr__(self) -> str:
        extents = f"{self.seq_q} x {self.seq_k}"
        return f"<AttnMask {extents}, {self.kind}, {len(self.slices)} slices, {self.density:.3%}>"

    @classmethod
    @untraced
    def from_slices(
        cls, seq_q: int, seq_k: int, slices: IntArray | Iterable[Sequence[int]]
    ) -> AttnMask:
        """A mask from any slices, which are clipped to ``seq_q x seq_k`` and made canonical.

        The slices must be disjoint; :meth:`overlap_area` checks it.

        Raises:
            ValueError: for anything but integers.
        """
        raw = as_slices(slices)
        raw = np.column_stack(
            [
                np.maximum(raw[:, Q0], 0),
                np.minimum(raw[:, Q1], seq_q),
                np.maximum(raw[:, K0], 0),
                np.minimum(raw[:, K1], seq_k),
                raw[:, LO],
                raw[:, HI],
            ]
        )
        return cls._from_canonical(seq_q, seq_k, canonical(raw))

    @classmethod
    def _from_canonical(cls, seq_q: int, seq_k: int, slices: IntArray) -> AttnMask:
        """A mask from slices that are canonical except for their order."""
        if len(slices) > 1:
            slices = slices[np.lexsort((slices[:, LO], slices[:, K0], slices[:, Q0]))]
        slices = np.ascontiguousarray(slices)
        slices.setflags(write=False)
        return cls(int(seq_q), int(seq_k), slices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttnMask) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    # --- properties ---------------------------------------------------------------------------

    @functools.cached_property
    def area(self) -> int:
        """Exact number of visible (query, key) pairs."""
        return int(areas(self.slices).sum())

    @property
    def density(self) -> float:
        """Visible pairs as a fraction of all pairs (0 if there are none)."""
        pairs = self.seq_q * self.seq_k
        return self.area / pairs if pairs else 0.0

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the extents and slices."""
        header = f"{self.seq_q},{self.seq_k};".encode()
        digest = hashlib.sha256(header + self.slices.tobytes()).hexdigest()[:16]
        return living.register(self, digest)

    @functools.cached_property
    def kind(self) -> str:
        """``"empty"``, ``"full"``, ``"causal"`` (square, j <= i) or ``"bands"``."""
        if len(self.slices) == 0:
            return "empty"
        if self.area == self.seq_q * self.seq_k:
            return "full"
        n = self.seq_q
        causal = [0, n, 0, n, 1 - n, 0]
        square = self.seq_q == self.seq_k and len(self.slices) == 1
        return "causal" if square and self.slices[0].tolist() == causal else "bands"

    @functools.cached_property
    def hull(self) -> tuple[int, int, int, int]:
        """``(q0, q1, k0, k1)``, the bounding rectangle of the visible pairs."""
        if not len(self.slices):
            return (0, 0, 0, 0)
        low, high = self.slices.min(axis=0), self.slices.max(axis=0)
        return (int(low[Q0]), int(high[Q1]), int(low[K0]), int(high[K1]))

    @functools.cached_property
    def native_core(self) -> AttnMask | None:
        """The mask inside the hull, if that is full or causal and this is not."""
        if self.kind != "bands":
            return None
        core = self.crop(*self.hull)
        return core if core.kind in ("full", "causal") else None

    def row_counts(self) -> IntArray:
        """``(seq_q,)`` number of visible keys of each query, in O(slices + seq_q)."""
        return visible_keys_per_query(self.slices, self.seq_q)

    def empty_rows(self) -> BoolArray:
        """``(seq_q,)`` true for queries without visible keys."""
        empty: BoolArray = self.row_counts() == 0
        return empty

    def overlap_area(self) -> int:
        """(query, key) pairs in two slices, summed over pairs of slices; 0 if all are disjoint."""
        first, second = row_overlaps(self.slices)
        a, b = self.slices[first], self.slices[second]
        intersections = np.column_stack(
            [
                np.maximum(a[:, c], b[:, c]) if c in (Q0, K0, LO) else np.minimum(a[:, c], b[:, c])
                for c in range(6)
            ]
        )
        return int(areas(canonical(intersections)).sum())

    def diagonal_blocks(self) -> IntArray:
        """``(n,)`` starts of the diagonal blocks: no visible pair has its tokens in two of them.

        For a document mask these are the documents; 0 alone if the mask does not decompose.
        Tokens without visible pairs belong to the block before them.
        """
        if self.seq_q != self.seq_k or not len(self.slices):
            return np.zeros(1, dtype=np.int64)
        start = np.minimum(self.slices[:, Q0], self.slices[:, K0])
        end = np.maximum(self.slices[:, Q1], self.slices[:, K1])
        order = np.argsort(start, kind="stable")
        start, max_end = start[order], np.maximum.accumulate(end[order])
        block_starts = np.append(0, start[1:][start[1:] >= max_end[:-1]])
        return block_starts.astype(np.int64)

    @functools.cached_property
    def causal_documents(self) -> tuple[int, ...] | None:
        """First tokens of the documents, if the mask is causal in each of them; None for others."""
        if self.seq_q != self.seq_k or (self.slices[:, HI] > 0).any():
            return None
        starts = self.diagonal_blocks()
        lengths = np.diff(starts, append=self.seq_q)
        seen = int((lengths * (lengths + 1) // 2).sum())
        return tuple(starts.tolist()) if self.area == seen else None

    def to_dense(self) -> BoolArray:
        """``(seq_q, seq_k)`` booleans, for tests and pictures of small masks only."""
        dense = np.zeros((self.seq_q, self.seq_k), dtype=np.bool_)
        for q0, q1, k0, k1, lo, hi in self.slices:
            offset = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            dense[q0:q1, k0:k1] |= (offset >= lo) & (offset <= hi)
        return dense

    # --- derived masks ------------------------------------------------------------------------

    @untraced
    def crop(self, q0: int, q1: int, k0: int, k1: int) -> AttnMask:
        """The mask of queries ``[q0, q1)`` and keys ``[k0, k1)``, in local coordinates.

        Raises:
            ValueError: for ranges outside the mask.
        """
        if not (0 <= q0 <= q1 <= self.seq_q and 0 <= k0 <= k1 <= self.seq_k):
            raise ValueError(
                f"crop [{q0}, {q1}) x [{k0}, {k1}) is outside the mask, {self.seq_q} x {self.seq_k}"
            )
        return self.restrict(np.array([[q0, q1 - q0]]), np.array([[k0, k1 - k0]]))

    @untraced
    def restrict(self, q_ranges: IntArray, k_ranges: IntArray) -> AttnMask:
        """The mask of subsets of queries and keys, in local coordinates.

        Args:
            q_ranges: ``(a, 2)`` rows ``(start, length)``: the local queries are these disjoint
                global ranges, concatenated in this order.  Ranges may extend past the end of the
                mask, into padding tokens without visible pairs.
            k_ranges: ``(b, 2)``, the same for keys.
        """
        cut, _, q_range = cut_axis(self.slices, q_ranges, axis=0)
        cut, source, k_range = cut_axis(cut, k_ranges, axis=1)
        shift_q = (local_starts(q_ranges) - q_ranges[:, 0])[q_range[source]]
        shift_k = (local_starts(k_ranges) - k_ranges[:, 0])[k_range]
        moved = shifted(cut, shift_q, shift_k)
        return AttnMask._from_canonical(int(q_ranges[:, 1].sum()), int(k_ranges[:, 1].sum()), moved)

    @untraced
    def stride(self, step: int, q_phase: int, k_phases: IntArray | Sequence[int]) -> AttnMask:
        """The mask between queries ``q_phase + step * i`` and keys ``k_phase + step * j``.

        Local keys are those of the first phase, then of the second, and so on,
        ``ceil(seq_k / step)`` each (so the last may be padding).  This is the mask of a rank in
        striped sharding; since ``j - i`` changes in multiples of ``step``, bands stay bands.
        """
        local_q, local_k = -(-self.seq_q // step), -(-self.seq_k // step)
        phases = np.asarray(k_phases, dtype=np.int64)
        repeated = np.repeat(self.slices, len(phases), axis=0)
        phase = np.tile(phases, len(self.slices))
        slot = np.tile(np.arange(len(phases)), len(self.slices))
        kept, index = canonical_indexed(strided(repeated, step, q_phase, phase))
        moved = shifted(kept, np.zeros(len(kept), np.int64), slot[index] * local_k)
        return AttnMask._from_canonical(local_q, local_k * len(phases), moved)

    @untraced
    def transpose(self) -> AttnMask:
        """The mask with queries and keys exchanged."""
        return AttnMask._from_canonical(self.seq_k, self.seq_q, transposed(self.slices))

    @untraced
    def simplify(self) -> AttnMask:
        """The same mask with neighbouring slices merged where possible.

        Two disjoint slices form one slice exactly if their hull (bounding rectangle, widest band)
        has the same area as both together.  Neighbours in row order and in column order are tried
        until nothing merges.
        """
        if len(self.slices) <= 1:
            return self
        return AttnMask._from_canonical(self.seq_q, self.seq_k, merged(self.slices))
