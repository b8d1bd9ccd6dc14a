"""Masks that differ between query heads, as in block-sparse and vertical-slash attention.

The mask of each head is an :class:`~cpbench.masks.attn_mask.AttnMask`, in which a kept block is a
slice.  They are supported by operators that take masks of kind ``heads``, under the strategy
``single``.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpbench.masks import living
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.slices import BoolArray, IntArray


@dataclass(frozen=True, eq=False, repr=False)
class HeadMasks(living.PickledByFields):
    """One mask per query head, the same for every batch.

    Attributes:
        masks: one per query head, of equal extents.

    Raises:
        ValueError: if the extents differ.
    """

    masks: tuple[AttnMask, ...]

    kind = "heads"

    def __repr__(self) -> str:
        distinct = len(set(self.masks))
        extents = f"{self.seq_q} x {self.seq_k}"
        return f"<HeadMasks {extents}, {self.heads} heads, {distinct} distinct, {self.density:.3%}>"

    @property
    def heads(self) -> int:
        return len(self.masks)

    def __post_init__(self) -> None:
        extents = {(mask.seq_q, mask.seq_k) for mask in self.masks}
        if len(extents) != 1:
            raise ValueError(f"masks of heads must have the same extents, not {sorted(extents)}")

    @property
    def seq_q(self) -> int:
        return self.masks[0].seq_q

    @property
    def seq_k(self) -> int:
        return self.masks[0].seq_k

    @functools.cached_property
    def area(self) -> float:
        """Visible pairs, mean over heads."""
        return sum(mask.area for mask in self.masks) / len(self.masks)

    @property
    def density(self) -> float:
        """``area`` as a fraction of all pairs."""
        return self.area / (self.seq_q * self.seq_k)

    @functools.cached_property
    def slices(self) -> IntArray:
        """``(n, 6)`` slices of all heads, concatenated."""
        return np.concatenate([mask.slices for mask in self.masks])

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the masks."""
        digests = ",".join(mask.digest for mask in self.masks)
        return living.register(self, hashlib.sha256(digests.encode()).hexdigest()[:16])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMasks) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dense(self) -> BoolArray:
        """``(heads, seq_q, seq_k)`` booleans, for small masks only."""
        return np.stack([mask.to_dense() for mask in self.masks])

    def empty_rows(self) -> BoolArray:
        """``(heads, seq_q)`` true for queries without visible keys."""
        return np.stack([mask.empty_rows() for mask in self.masks])

    def _map(self, function: Callable[[AttnMask], AttnMask]) -> HeadMasks:
        """Apply a function to the mask of each head."""
        return HeadMasks(tuple(function(mask) for mask in self.masks))

    def crop(self, q0: int, q1: int, k0: int, k1: int) -> HeadMasks:
        """See :meth:`AttnMask.crop`."""
        return self._map(lambda mask: mask.crop(q0, q1, k0, k1))

    def restrict(self, q_ranges: IntArray, k_ranges: IntArray) -> HeadMasks:
        """See :meth:`AttnMask.restrict`."""
        return self._map(lambda mask: mask.restrict(q_ranges, k_ranges))

    def transpose(self) -> HeadMasks:
        """See :meth:`AttnMask.transpose`."""
        return self._map(AttnMask.transpose)

    def simplify(self) -> HeadMasks:
        """See :meth:`AttnMask.simplify`."""
        return self._map(AttnMask.simplify)


SlicedMask = AttnMask | HeadMasks
Mask = SlicedMask | DilatedMask


def per_head(mask: Mask) -> HeadMasks | DilatedMask | None:
    """The mask itself if it differs between heads, else None."""
    return None if isinstance(mask, AttnMask) else mask


def distinct_masks(mask: SlicedMask) -> tuple[AttnMask, ...]:
    """The one mask that all heads share, or the mask of each head."""
    return (mask,) if isinstance(mask, AttnMask) else mask.masks
