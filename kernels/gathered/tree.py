"""Selections of kinds ``"blocks"`` and ``"lines"`` as calls of torch's fused kernel for CPUs.

The blocks of queries of a head are the leaves of a binary tree.  A node is one call with the keys
that all of its queries select and no node above it has computed, if that saves more than a call
costs; so what adjacent queries share is gathered once, in large products.  What is left for a leaf
is XX
Legend: B batch, H query heads; X blocks of m queries, Y blocks of w keys; U units, keys if there
are columns and else blocks of them; n rows of a call, c keys of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cpbench.kernels.gathered.blocks import hidden_table, partial_blocks
from cpbench.kernels.gathered.calls import Bias, Call, Plan
from cpbench.selectors.common.selection import Blocks, Grid

if TYPE_CHECKING:
    import torch

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

MAX_BIAS = 1 << 18  # elements of the bias of a call, to stay in a cache
MAX_LEAF_ROWS = 512

# Times in those of a pair in a large product (head_dim 64, one thread of an AMD EPYC).
CALL_COST = 10000  # of a call, and
ROW_COST = 20  # for each row of it: merging, and smaller products
KEY_COST = 12  # for each key of it: gathering, and smaller products
BIAS_COST = 0.25  # for each pair with a bias
GATHERING_COST = 2.5  # for each pair where ``gathered.blocks`` computes the selection


def plan(selection: Blocks, scale: float, required: bool = True) -> Plan | None:
    """Divide the selection of every head into calls.

    Args:
        required: return a plan even if ``gathered.blocks`` is expected to be faster.
    """
    grid = selection.grid
    view = _mask_view(grid)
    trees, total_cost, pairs = [], 0.0, 0
    for kept, columns in _by_head(selection):
        head = _Head(kept, columns, grid, view)
        costs = [head.cost(level) for level in range(head.max_leaf_level + 1)]
        pairs += int(head.kept.sum()) * grid.block_q * grid.block_k
        total_cost += min(costs)
        trees.append(_Tree(head, costs.index(min(costs)), selection.kept.device))
    if not required and total_cost > GATHERING_COST * pairs:
        return None
    return Plan(scale, grid, tuple(tuple(tree.calls()) for tree in trees))


def _by_head(selection: Blocks) -> Iterator[tuple[BoolArray, BoolArray | None]]:
    """Booleans of the selected blocks ``[X, Y]``, and of columns ``[Y * w]``, of each head."""
    import torch

    kept = selection.kept.flatten(0, 1).cpu().numpy()
    if selection.columns is None:
        yield from ((kept_XY, None) for kept_XY in kept)
        return
    missing = kept.shape[2] * selection.grid.block_k - selection.seq_k
    columns = torch.nn.functional.pad(selection.columns.flatten(0, 1), (0, missing))
    for kept_XY, columns_T in zip(kept, columns.cpu().numpy(), strict=True):
        yield kept_XY, columns_T if columns_T.any() else None


class _MaskView(NamedTuple):
    """The mask in blocks: ``[X, Y]`` allowed and entirely visible ones; for each block of queries
    ``[X]`` the block of keys in which query i sees the first i + 1, -1 for none."""

    allowed: BoolArray
    full: BoolArray
    diagonal: IntArray


def _mask_view(grid: Grid) -> _MaskView:
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
        grid.cache["mask_view"] = _MaskView(allowed, full, diagonal)
    view: _MaskView = grid.cache["mask_view"]
    return view


class _Head:
    """The selection of a head.

    Attributes:
        kept: ``[X, Y]`` selected blocks.
        whole: ``[X, U]`` selected units that all queries of a block see.
        cut: ``[X, Y]`` blocks with selected keys that the mask hides from some of the queries.
        unit: keys of a unit.
        levels: for each level of the tree, from single blocks of queries up: units that all blocks
            of a node have whole, that some have, and blocks of keys that some have cut.
    """

    def __init__(
        self, kept: BoolArray, columns: BoolArray | None, grid: Grid, view: _MaskView
    ) -> None:
        self.grid, self.view, self.columns = grid, view, columns
        self.kept = kept & view.allowed
        self.whole, selected, self.unit = self.kept & view.full, self.kept, grid.block_k
        if columns is not None:
            by_block = columns.reshape(-1, grid.block_k)
            self.whole = (self.whole[:, :, None] | (view.full[:, :, None] & by_block)).reshape(
                len(kept), -1
            )
            selected, self.unit = self.kept | (view.allowed & by_block.any(1)), 1
        self.cut = selected & ~view.full
        self.levels = [(self.whole, self.whole, self.cut)]
        while len(self.levels[-1][0]) > 1:
            shared, united, cut = self.levels[-1]
            either = np.logical_or
            self.levels.append(
                (_pairs(np.logical_and, shared), _pairs(either, united), _pairs(either, cut))
            )
        self.max_leaf_level = (
            min(max(MAX_LEAF_ROWS // grid.block_q, 1).bit_length(), len(self.levels)) - 1
        )

    def blocks_of(self, units: BoolArray) -> BoolArray:
        """The blocks that hold some of the units, ``[..., Y]``."""
        if self.unit > 1:
            return units
        return _any(units.reshape(*units.shape[:-1], -1, self.grid.block_k), -1)

    def cost(self, level: int) -> float:
        """Time of the nodes of a level as leaves, without those above them."""
        shared, united, cut = self.levels[level]
        others = self.blocks_of(united & ~shared) | cut
        rows, w = self.grid.block_q << level, self.grid.block_k
        keys = int(shared.sum()) * self.unit, int(others.sum()) * w
        calls = int(shared.any(1).sum()) + int(others.any(1).sum())
        pairs = rows * (keys[0] + (1 + BIAS_COST) * keys[1])
        return calls * (CALL_COST + ROW_COST * rows) + KEY_COST * sum(keys) + pairs


def _any(x: BoolArray, axis: int) -> BoolArray:
    found: BoolArray = np.logical_or.reduce(x, axis)
    return found


def _pairs(combine: np.ufunc, x: BoolArray) -> BoolArray:
    """Combine adjacent rows; a last one without a neighbour stays."""
    even, odd = x[::2], x[1::2]
    combined: BoolArray = combine(even[: len(odd)], odd)
    return combined if len(even) == len(odd) else np.concatenate([combined, even[-1:]])


class _Tree:
    """The calls of a head, with the nodes of a level as leaves."""

    def __init__(self, head: _Head, leaf_level: int, device: torch.device) -> None:
        self.head, self.leaf_level, self.device = head, leaf_level, device

    def calls(self) -> Iterator[Call]:
        """The calls, those of a node before those below it."""
        if len(self.head.kept):
            yield from self._node(len(self.head.levels) - 1, 0, np.zeros_like(self.head.whole[0]))

    def _node(self, level: int, i: int, done: BoolArray) -> Iterator[Call]:
        x0, x1 = i << level, min((i + 1) << level, len(self.head.kept))
        shared, united = (x[i] & ~done for x in self.head.levels[level][:2])
        square = self._square(x0, x1, united & ~shared)
        rows = (x1 - x0) * self.head.grid.block_q
        keys = int(shared.sum()) * self.head.unit
        if square is not None:
            yield from self._whole_call(x0, x1, shared)
            if square.stop > square.start:
                yield Call(x0, x1, square, 1, causal=True)
        elif level == self.leaf_level:
            # One call with a bias costs less than two if they share little.
            if keys * rows * BIAS_COST > CALL_COST:
                yield from self._whole_call(x0, x1, shared)
                done = done | shared
            yield from self._biased_calls(x0, x1, done)
        else:
            if keys * KEY_COST > CALL_COST + ROW_COST * rows:
                yield from self._whole_call(x0, x1, shared)
                done = done | shared
            yield from self._node(level - 1, 2 * i, done)
            if 2 * i + 1 < len(self.head.levels[level - 1][0]):
                yield from self._node(level - 1, 2 * i + 1, done)

    def _square(self, x0: int, x1: int, others: BoolArray) -> slice | None:
        """The keys of a causal square if that, besides the keys shared, is all that blocks of
        queries select; empty if nothing is left, None if something else is.

        Args:
            others: ``[U]`` units that some of the blocks select, but not all.
        """
        head, (_, full, diagonal) = self.head, self.head.view
        cut = head.cut[x0:x1]
        if not cut.any() and not others.any():
            return slice(0, 0)
        n, y0 = x1 - x0, int(diagonal[x0])
        if y0 < 0 or cut.sum() != n or (diagonal[x0:x1] != y0 + np.arange(n)).any():
            return None
        inside = slice(y0, y0 + n)
        lower = head.kept[x0:x1, inside] & (full[x0:x1, inside] | np.eye(n, dtype=np.bool_))
        outside = head.blocks_of(others).copy()
        outside[inside] = False
        if outside.any() or not (lower | np.triu(np.ones_like(lower), 1)).all():
            return None
        begin = y0 * head.grid.block_k
        return slice(begin, begin + self._rows(x0, x1))

    def _rows(self, x0: int, x1: int) -> int:
        """Number of queries of blocks."""
        return (
            min(x1 * self.head.grid.block_q, self.head.grid.mask.seq_q)
            - x0 * self.head.grid.block_q
        )

    def _whole_call(self, x0: int, x1: int, units: BoolArray) -> Iterator[Call]:
        """The call of blocks of queries that see all keys of some units, if there are any."""
        numbers = np.flatnonzero(units)
        if len(numbers):
            yield Call(x0, x1, self._keys(numbers, self.head.unit), self.head.unit)

    def _biased_calls(self, x0: int, x1: int, done: BoolArray) -> Iterator[Call]:
        """Calls for all that blocks of queries select, except for units that are done."""
        import torch

        head, w = self.head, self.head.grid.block_k
        left, cut = head.whole[x0:x1] & ~done, head.cut[x0:x1]
        blocks = np.flatnonzero(head.blocks_of(_any(left, 0)) | cut.any(0))
        step = max(1, MAX_BIAS // ((x1 - x0) * head.grid.block_q * w))
        for begin in range(0, len(blocks), step):
            part = blocks[begin : begin + step]
            row, slot = np.nonzero(cut[:, part])
            if head.columns is None:
                visible = (left | cut)[:, part].repeat(w, 1)
            else:
                columns = head.columns.reshape(-1, w)[part]
                of_cut = head.kept[x0:x1, part, None] | columns
                visible = left.reshape(len(left), -1, w)[:, part] | (cut[:, part, None] & of_cut)
            places = (torch.as_tensor(x, device=self.device) for x in (row, slot, part[slot]))
            visible_n1c = torch.as_tensor(visible.reshape(len(left), 1, -1), device=self.device)
            yield Call(x0, x1, self._keys(part, w), w, bias=Bias(visible_n1c, *places))

    def _keys(self, numbers: IntArray, width: int) -> slice | torch.Tensor:
        """Units by their numbers, as keys if they are adjacent."""
        import torch

        first, last = int(numbers[0]), int(numbers[-1])
        if last - first == len(numbers) - 1:
            return slice(first * width, (last + 1) * width)
        return torch.as_tensor(numbers, device=self.device)
