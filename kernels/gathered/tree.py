"""Selections of kinds ``"blocks"`` and ``"lines"`` as calls: on CPUs of torch's fused kernel.

The blocks of queries of a head are the leaves of a binary tree.  A node is one call with the keys
that all of its queries select and no node above it has computed, if that saves more than a call
costs; so what adjacent queries share is gathered once, in large products.  What is left for a leaf
is a causal square, of which those of one size are computed together, or calls with a bias.

Legend: X blocks of queries, Y blocks of w keys; n rows of a call, c keys of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpbench.kernels.gathered.calls import Bias, Call, Plan, Units, join_squares, units
from cpbench.kernels.gathered.levels import BoolArray, Head
from cpbench.selectors.selections import Blocks, Lines

MAX_BIAS = 1 << 18  # elements of the bias of a call, to stay in a cache
MAX_LEAF_ROWS = 512
MAX_GATHERED = 1 << 12  # keys that are gathered at once, to stay in a cache

# Times in those of a pair in a large product (head_dim 64, one thread of an AMD EPYC).
CALL_COST = 10000  # of a call, and
ROW_COST = 20  # for each row of it: merging, and smaller products
KEY_COST = 8  # for each key of it: gathering, and smaller products
BIAS_COST = 0.25  # for each pair with a bias
SQUARE_COST = 2  # for each pair of a causal square, of which many are one call
GATHERING_COST = 2.5  # for each pair where ``gathered.blocks`` computes the selection


def plan(selection: Blocks | Lines, scale: float) -> Plan:
    """Divide the selection of every head into calls."""
    if not selection.grid.areas.numel():
        return Plan(scale, selection.grid, ((),) * (selection.batch * selection.heads))
    # By ``map``, which keeps one head at a time in memory.
    return Plan(scale, selection.grid, tuple(map(_calls, _heads(selection))))


def plan_if_faster(selection: Blocks, scale: float) -> Plan | None:
    """As :func:`plan`; None if ``gathered.blocks`` is expected to be faster."""
    grid = selection.grid
    pairs = int((selection.kept & grid.allowed).sum()) * grid.block_q * grid.block_k
    if pairs and sum(map(min, map(_costs, _heads(selection)))) > GATHERING_COST * pairs:
        return None
    return plan(selection, scale)


def _heads(selection: Blocks | Lines) -> Iterator[Head]:
    """The selection of each head of each batch."""
    grid = selection.grid
    if isinstance(selection, Blocks):
        for kept in selection.kept.flatten(0, 1).cpu().numpy():
            yield Head(kept, grid.block_k, grid)
        return
    padding = -selection.seq_k % grid.block_k
    for keys in selection.by_head():
        # Keys after the last one are hidden; so its block is selected whole if its keys are.
        yield Head(np.pad(keys.cpu().numpy(), ((0, 0), (0, padding)), mode="edge"), 1, grid)


def _calls(head: Head) -> tuple[Call, ...]:
    costs = _costs(head)
    return _Tree(head, costs.index(min(costs))).calls()


def _costs(head: Head) -> list[float]:
    """Time by the level of the leaves."""
    blocks = max(MAX_LEAF_ROWS // head.grid.block_q, 1)
    levels = min(blocks.bit_length(), len(head.levels))
    return [_cost_of_leaves(head, level) for level in range(levels)]


def _cost_of_leaves(head: Head, level: int) -> float:
    """Time of the nodes of a level as leaves, without those above them."""
    shared, cut, square = head.levels[level].shared, head.levels[level].cut, head.squares[level]
    others = (head.others[level] | cut) & ~square[:, None]
    rows, w = head.grid.block_q << level, head.grid.block_k
    keys = np.count_nonzero(shared) * head.unit, np.count_nonzero(others) * w
    calls = np.count_nonzero(shared.any(1)) + np.count_nonzero(others.any(1))
    pairs = rows * (keys[0] + (1 + BIAS_COST) * keys[1])
    squares = np.count_nonzero(square) * rows * (ROW_COST + SQUARE_COST * rows)
    return calls * (CALL_COST + ROW_COST * rows) + KEY_COST * sum(keys) + pairs + squares


class _Tree:
    """The calls of a head, with the nodes of a level as leaves."""

    def __init__(self, head: Head, leaf_level: int) -> None:
        self.head, self.leaf_level = head, leaf_level
        self.device = head.grid.areas.device

    def calls(self) -> tuple[Call, ...]:
        nothing = np.zeros_like(self.head.whole[0])
        calls = self._node(len(self.head.levels) - 1, 0, nothing)
        return join_squares(calls, self.device)

    def _node(self, height: int, i: int, done: BoolArray) -> Iterator[Call]:
        """The calls of a node, those of all of its queries before those of some."""
        head, level = self.head, self.head.levels[height]
        x0, x1 = i << height, min((i + 1) << height, len(head.selected))
        shared = level.shared[i] & ~done
        rows, keys = (x1 - x0) * head.grid.block_q, np.count_nonzero(shared) * head.unit
        if head.squares[height][i]:
            yield from self._whole_calls(x0, x1, shared)
            yield self._square(x0, x1)
        elif not head.divided[height][i]:
            yield from self._whole_calls(x0, x1, shared)
        elif height == self.leaf_level:
            # One call with a bias costs less than two if they share little.
            if keys * rows * BIAS_COST > CALL_COST:
                yield from self._whole_calls(x0, x1, shared)
                done = done | shared
            yield from self._biased_calls(x0, x1, done)
        else:
            if keys * KEY_COST > CALL_COST + ROW_COST * rows:
                yield from self._whole_calls(x0, x1, shared)
                done = done | shared
            yield from self._node(height - 1, 2 * i, done)
            if 2 * i + 1 < len(head.levels[height - 1].shared):
                yield from self._node(height - 1, 2 * i + 1, done)

    def _queries(self, x0: int, x1: int) -> Units:
        return Units(slice(x0 * self.head.grid.block_q, self._end(x1)))

    def _end(self, x: int) -> int:
        """The end of the queries before a block."""
        return min(x * self.head.grid.block_q, self.head.grid.mask.seq_q)

    def _square(self, x0: int, x1: int) -> Call:
        """The causal square of blocks of queries."""
        begin = int(self.head.view.diagonal[x0]) * self.head.grid.block_k
        keys = slice(begin, begin + self._end(x1) - self._end(x0))
        return Call(self._queries(x0, x1), Units(keys), causal=True)

    def _whole_calls(self, x0: int, x1: int, shared: BoolArray) -> Iterator[Call]:
        """The calls of blocks of queries that see all keys of some units, if there are any."""
        numbers = np.flatnonzero(shared)
        if not len(numbers):
            return
        step = max(1, MAX_GATHERED // self.head.unit)
        if len(numbers) > step and numbers[-1] - numbers[0] == len(numbers) - 1:
            step = len(numbers)  # a range is not gathered
        for begin in range(0, len(numbers), step):
            keys = units(numbers[begin : begin + step], self.head.unit, self.device)
            yield Call(self._queries(x0, x1), keys)

    def _biased_calls(self, x0: int, x1: int, done: BoolArray) -> Iterator[Call]:
        """Calls for all that blocks of queries select, except for units that are done."""
        import torch

        head, w = self.head, self.head.grid.block_k
        left, cut = head.whole[x0:x1] & ~done, head.cut[x0:x1]
        any_left = np.logical_or.reduce(left)
        blocks = np.flatnonzero(head.blocks_of(any_left) | cut.any(0))
        step = max(1, MAX_BIAS // ((x1 - x0) * head.grid.block_q * w))
        for begin in range(0, len(blocks), step):
            part = blocks[begin : begin + step]
            row, slot = np.nonzero(cut[:, part])
            of_blocks = part if head.unit > 1 else (part[:, None] * w + np.arange(w)).reshape(-1)
            of_cut = cut[:, part].repeat(w // head.unit, 1) & head.selected[x0:x1, of_blocks]
            visible = (left[:, of_blocks] | of_cut).repeat(head.unit, 1)
            places = row, slot, x0 + row, part[slot]
            visible_n1c, *cut_blocks = (
                torch.as_tensor(x, device=self.device)
                for x in (visible.reshape(len(left), 1, -1), *places)
            )
            keys = units(part, w, self.device)
            yield Call(self._queries(x0, x1), keys, bias=Bias(visible_n1c, *cut_blocks))
