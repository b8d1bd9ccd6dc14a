"""Meshes of ranks with named axes, and their placement on nodes.

Ranks are numbered node by node.  The last axis of a mesh varies fastest, so its groups consist of
neighbouring ranks: inside a node as far as they fit.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from cpbench.masks.slices import IntArray


@dataclass(frozen=True)
class Mesh:
    """A mesh of ranks with named axes, outermost first, one of which may be placed innermost.

    Attributes:
        names, sizes: of the axes, in the strategy's logical order; the product of the sizes is the
            number of ranks.
        innermost: the axis whose groups consist of neighbouring ranks; "" for the last axis.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    innermost: str = ""

    @classmethod
    def of(cls, axes: dict[str, int], innermost: str = "") -> Mesh:
        """A mesh of ``axes``.

        Raises:
            ValueError: if ``innermost`` is not an axis.
        """
        if innermost and innermost not in axes:
            raise ValueError(f"no mesh axis {innermost!r}; there are: {', '.join(axes)}")
        return cls(tuple(axes), tuple(axes.values()), innermost)

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """Groups of the ranks that differ only along ``axes``, the last of which varies fastest.

        The groups are ordered by the other axes, the last of which varies fastest.
        """
        return _groups(self, axes)

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The group of one rank along ``axes``."""
        return self.groups(*axes)[_group_indices(self, axes)[rank]]

    def _ranks_along(self, axes: tuple[str, ...]) -> IntArray:
        """The groups along ``axes`` as rows of a table of ranks."""
        physical = sorted(range(len(self.names)), key=lambda i: self.names[i] == self.innermost)
        ranks = np.arange(math.prod(self.sizes)).reshape([self.sizes[i] for i in physical])
        ranks = ranks.transpose(np.argsort(physical))
        others = [i for i, name in enumerate(self.names) if name not in axes]
        along = [self.names.index(name) for name in axes]
        size = math.prod(self.sizes[i] for i in along)
        table: IntArray = ranks.transpose(*others, *along).reshape(-1, size)
        return table


@functools.lru_cache(maxsize=16)
def _groups(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(group) for group in mesh._ranks_along(axes).tolist())


@functools.lru_cache(maxsize=16)
def _group_indices(mesh: Mesh, axes: tuple[str, ...]) -> dict[int, int]:
    """The index of each rank's group along ``axes``."""
    return {rank: index for index, group in enumerate(_groups(mesh, axes)) for rank in group}


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
