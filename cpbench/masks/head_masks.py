"""A mask for each query head: block-sparse attention, vertical lines and slashes.

Each head's mask is an :class:`~cpbench.masks.attn_mask.AttnMask`; a kept block is a slice.
Operators that take masks of kind ``heads`` compute them, under the strategy ``single``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpbench.masks.attn_mask import AttnMask, BoolArray, IntArray
from cpbench.masks.dilated_mask import DilatedMask


@dataclass(frozen=True, eq=False)
class HeadMasks:
    """Which query sees which key, head by head; every batch alike.

    Attributes:
        masks: one for each query head, of equal extents.
    """

    masks: tuple[AttnMask, ...]

    kind = "heads"

    @property
    def heads(self) -> int:
        return len(self.masks)

    def __post_init__(self) -> None:
        extents = {(mask.seq_q, mask.seq_k) for mask in self.masks}
        if len(extents) != 1:
            raise ValueError(f"masks of heads must have one extent, not {sorted(extents)}")

    @property
    def seq_q(self) -> int:
        return self.masks[0].seq_q

    @property
    def seq_k(self) -> int:
        return self.masks[0].seq_k

    @functools.cached_property
    def area(self) -> float:
        """Visible pairs per head, on average."""
        return sum(mask.area for mask in self.masks) / len(self.masks)

    @property
    def density(self) -> float:
        return self.area / (self.seq_q * self.seq_k)

    @functools.cached_property
    def slices(self) -> IntArray:
        """The slices of all heads, one head after another."""
        return np.concatenate([mask.slices for mask in self.masks])

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the content."""
        parts = ",".join(mask.digest for mask in self.masks)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMasks) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dense(self) -> BoolArray:
        """``(heads, seq_q, seq_k)`` booleans: for small masks only."""
        return np.stack([mask.to_dense() for mask in self.masks])

    def empty_rows(self) -> BoolArray:
        """``(heads, seq_q)`` true for queries that see nothing."""
        return np.stack([mask.empty_rows() for mask in self.masks])

    def _each(self, change: Callable[[AttnMask], AttnMask]) -> HeadMasks:
        return HeadMasks(tuple(change(mask) for mask in self.masks))

    def crop(self, q0: int, q1: int, k0: int, k1: int) -> HeadMasks:
        """See :meth:`AttnMask.crop`."""
        return self._each(lambda mask: mask.crop(q0, q1, k0, k1))

    def restrict(self, q_ranges: IntArray, k_ranges: IntArray) -> HeadMasks:
        """See :meth:`AttnMask.restrict`."""
        return self._each(lambda mask: mask.restrict(q_ranges, k_ranges))

    def transpose(self) -> HeadMasks:
        """See :meth:`AttnMask.transpose`."""
        return self._each(AttnMask.transpose)

    def simplify(self) -> HeadMasks:
        """See :meth:`AttnMask.simplify`."""
        return self._each(AttnMask.simplify)


SlicedMask = AttnMask | HeadMasks
Mask = SlicedMask | DilatedMask


def per_head(mask: Mask) -> HeadMasks | DilatedMask | None:
    """A mask that differs from head to head, or None."""
    return None if isinstance(mask, AttnMask) else mask


def distinct(mask: SlicedMask) -> tuple[AttnMask, ...]:
    """The mask of all heads, or that of each."""
    return (mask,) if isinstance(mask, AttnMask) else mask.masks
