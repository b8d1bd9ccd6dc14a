"""Ranks as a mesh of named axes, and which of them share a node.

Ranks are numbered node by node.  The last axis of a mesh varies fastest, so it is the one whose
groups are neighbours: inside a node as far as they fit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from cpbench.masks.attn_mask import IntArray


@dataclass(frozen=True)
class Mesh:
    """Named axes, outermost first, one of which may be moved innermost.

    Attributes:
        names, sizes: of the axes, in the order that counts ranks of the strategy; the sizes
            multiply to the number of ranks.
        inside: the axis whose groups are neighbours; "" for the last one.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    inside: str = ""

    @classmethod
    def of(cls, axes: dict[str, int], inside: str = "") -> Mesh:
        """A mesh of ``axes``.

        Raises:
            ValueError: when ``inside`` is no axis.
        """
        if inside and inside not in axes:
            raise ValueError(f"no mesh axis {inside!r}; there are: {', '.join(axes)}")
        return cls(tuple(axes), tuple(axes.values()), inside)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ only along ``axes``, the last of which varies fastest.

        Groups come in the order of the other axes, the last of which varies fastest.
        """
        return _groups(self, axes)

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group of one rank along ``axes``."""
        return self.groups(*axes)[_places(self, axes)[rank]]

    def _along(self, axes: tuple[str, ...]) -> IntArray:
        physical = sorted(range(len(self.names)), key=lambda i: self.names[i] == self.inside)
        ranks = np.arange(math.prod(self.sizes)).reshape([self.sizes[i] for i in physical])
        ranks = ranks.transpose(np.argsort(physical))
        others = [i for i, name in enumerate(self.names) if name not in axes]
        along = [self.names.index(name) for name in axes]
        size = math.prod(self.sizes[i] for i in along)
        table: IntArray = ranks.transpose(*others, *along).reshape(-1, size)
        return table


@functools.lru_cache(maxsize=16)
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in mesh._along(axes).tolist())


@functools.lru_cache(maxsize=16)
def _places(mesh: Mesh, axes: tuple[str, ...]) -> dict[int, int]:
    """Which group each rank is in."""
    return {rank: i for i, group in enumerate(_groups(mesh, axes)) for rank in group}


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
