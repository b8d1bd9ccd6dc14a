"""The selection of a head in a binary tree of blocks of queries: what the blocks of a node share.

Legend: X blocks of queries, Y blocks of w keys; U units, keys or blocks of them; N nodes of a
level, from single blocks of queries up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.gathered.blocks import hidden_table, partial_blocks
from cpbench.selectors.selections import Grid

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

EIGHT = 0x0101010101010101  # eight booleans that are True


class MaskView(NamedTuple):
    """The mask in blocks: ``[X, Y]`` allowed and entirely visible ones; for each block of queries
    ``[X]`` the block of keys in which query i sees the first i + 1, -1 for none."""

    allowed: BoolArray
    full: BoolArray
    diagonal: IntArray


def mask_view(grid: Grid) -> MaskView:
    """The mask of a grid in blocks, computed once."""
    if "mask_view" not in grid.cache:
        allowed = grid.allowed.cpu().numpy()
        full = allowed & ~partial_blocks(grid).cpu().numpy()  # and without padding
        diagonal = np.full(len(allowed), -1)
        if grid.block_q == grid.block_k:
            index, hidden_pairs = (x.cpu().numpy() for x in hidden_table(grid))
            above = np.triu(np.ones(hidden_pairs.shape[1:], dtype=np.bool_), 1)
            rows = np.arange(grid.block_q) < grid.block_lengths[0].cpu().numpy()[-1]
            for x, y in zip(*np.nonzero(allowed & ~full), strict=True):
                wrong = hidden_pairs[index[x, y]] != above
                if not (wrong[rows] if x == len(allowed) - 1 else wrong).any():
                    diagonal[x] = y
        grid.cache["mask_view"] = MaskView(allowed, full, diagonal)
    view: MaskView = grid.cache["mask_view"]
    return view


class Level(NamedTuple):
    """What the blocks of queries of each node have.

    Attributes:
        shared, united: ``[N, U]`` units that all of them have whole, and that some have.
        cut: ``[N, Y]`` blocks of keys that the mask cuts for some.
        run_start, offset: ``[2, N]`` the least and the greatest of two numbers of theirs: the first
            of the selected blocks of keys that end in the diagonal one without a gap (Y without a
            diagonal one, or where another one is cut or after it), and the number of the diagonal
            block of keys less their own.
    """

    shared: BoolArray
    united: BoolArray
    cut: BoolArray
    run_start: IntArray
    offset: IntArray

    def above(self) -> Level:
        """The next level; a last node without a neighbour stays."""
        both, either = np.logical_and, np.logical_or
        return Level(
            _pairs(both, self.shared),
            _pairs(either, self.united),
            _pairs(either, self.cut),
            _extremes(self.run_start),
            _extremes(self.offset),
        )


class Head:
    """The selection of a head.

    Attributes:
        selected: ``[X, U]`` selected units.
        unit: keys of a unit.
        whole: ``[X, U]`` selected units that all queries of a block see.
        cut: ``[X, Y]`` blocks with selected keys that the mask hides from some of the queries.
        entire: ``[X, Y]`` blocks of which all keys are selected.
        levels: from single blocks of queries to all of them; none without queries.
    """

    def __init__(self, selected: BoolArray, unit: int, grid: Grid) -> None:
        """``selected`` is ``[X, U]``, and ignored where the mask does not allow it."""
        self.grid, self.view, self.unit = grid, mask_view(grid), unit
        by_block = selected.reshape(*self.view.full.shape, -1)
        self.selected = (by_block & self.view.allowed[..., None]).reshape(selected.shape)
        self.whole = (by_block & self.view.full[..., None]).reshape(selected.shape)
        self.cut = self.blocks_of(self.selected) & ~self.view.full
        self.entire = self.blocks_of(self.selected, entire=True)
        place = np.arange(len(selected))
        run_start = np.broadcast_to(self._run_starts(), (2, len(selected)))
        offset = np.broadcast_to(self.view.diagonal - place, (2, len(selected)))
        self.levels = [Level(self.whole, self.whole, self.cut, run_start, offset)]
        while len(self.levels[-1].shared) > 1:
            self.levels.append(self.levels[-1].above())

    def _run_starts(self) -> IntArray:
        """See :class:`Level`."""
        columns = np.arange(self.entire.shape[1])
        is_diagonal = columns == self.view.diagonal[:, None]
        gaps = (columns < self.view.diagonal[:, None]) & ~(self.entire & self.view.full)
        after_last_gap = np.where(gaps.any(1), len(columns) - gaps[:, ::-1].argmax(1), 0)
        others = self.cut & ~is_diagonal
        others |= self.blocks_of(self.selected) & (columns > self.view.diagonal[:, None])
        alone = (self.entire & is_diagonal).any(1) & ~others.any(1)
        starts: IntArray = np.where(alone, after_last_gap, len(columns))
        return starts

    @functools.cached_property
    def others(self) -> list[BoolArray]:
        """Blocks of keys with units that some blocks of queries of a node have, but not all, by
        level ``[N, Y]``."""
        above = [self.blocks_of(level.united & ~level.shared) for level in self.levels[1:]]
        return [np.zeros_like(self.cut), *above]

    @functools.cached_property
    def squares(self) -> list[BoolArray]:
        """The nodes of each level ``[N]`` whose queries select a causal square and else only what
        all of them select."""
        squares = []
        for height, (level, others) in enumerate(zip(self.levels, self.others, strict=True)):
            nodes = np.arange(len(others)) << height
            begin = level.offset[0] + nodes
            end = begin + np.minimum(1 << height, len(self.selected) - nodes)
            column = np.arange(others.shape[1])
            inside = (column >= begin[:, None]) & (column < end[:, None])
            squares.append(
                (level.offset[0] == level.offset[1])
                & (level.run_start[1] <= begin)
                & ~(others & ~inside).any(1)
            )
        return squares

    @functools.cached_property
    def divided(self) -> list[BoolArray]:
        """The nodes of each level ``[N]`` that have something that some of their queries do not
        see."""
        levels = zip(self.levels, self.others, strict=True)
        either = np.logical_or.reduce
        return [either(level.cut, 1) | either(others, 1) for level, others in levels]

    def blocks_of(self, units: BoolArray, entire: bool = False) -> BoolArray:
        """The blocks that hold some of the units, or with ``entire`` all of their units,
        ``[..., Y]``."""
        width = self.grid.block_k // self.unit
        if width == 1:
            return units
        words, every = np.ascontiguousarray(units).view(np.uint8), 1
        if width % 8 == 0:  # eight at once
            words, every, width = words.view(np.uint64), EIGHT, width // 8
        blocks = words.reshape(*words.shape[:-1], words.shape[-1] // width, width)
        found: BoolArray
        if entire:
            found = np.logical_and.reduce(blocks == every, -1)
        else:
            found = np.logical_or.reduce(blocks != 0, -1)
        return found


def _pairs(combine: np.ufunc, x: BoolArray) -> BoolArray:
    """Combine adjacent rows; a last one without a neighbour stays."""
    even, odd = x[::2], x[1::2]
    combined: BoolArray = combine(even[: len(odd)], odd)
    return combined if len(even) == len(odd) else np.concatenate([combined, even[-1:]])


def _extremes(x: IntArray) -> IntArray:
    """The minimum and maximum ``[2, N]`` of pairs of nodes."""
    return np.stack([_pairs(np.minimum, x[0]), _pairs(np.maximum, x[1])])
