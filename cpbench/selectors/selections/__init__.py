"""Selections: masks that a selector computes from queries and keys, on their device.

:class:`Blocks` keeps blocks of keys per block of queries (of one query for kind ``"rows"``); those
of :class:`LandmarkBlocks` are weighted by their landmarks; :class:`Lines` keeps columns and
diagonals; :class:`Tokens` lists single keys per query.  All are subsets of an
:class:`~cpbench.masks.attn_mask.AttnMask`.  Kernels declare the kinds of selections they take in
``OperatorInfo.masks``, beside the kinds of static masks.
"""

from cpbench.selectors.selections.blocks import Blocks, one_block_each
from cpbench.selectors.selections.grid import (
    Grid,
    block_grid,
    dense_mask_rows,
    slices_by_block,
    visible_end,
)
from cpbench.selectors.selections.landmarks import LandmarkBlocks
from cpbench.selectors.selections.lines import Lines
from cpbench.selectors.selections.tokens import Tokens

Selection = Blocks | Lines | Tokens
SELECTIONS = ("blocks", "landmarks", "lines", "rows", "tokens")  # kinds of selections
BY_HEAD = ("blocks", "lines")  # those that are static masks of heads, too

__all__ = [
    "BY_HEAD",
    "SELECTIONS",
    "Blocks",
    "Grid",
    "LandmarkBlocks",
    "Lines",
    "Selection",
    "Tokens",
    "block_grid",
    "dense_mask_rows",
    "one_block_each",
    "slices_by_block",
    "visible_end",
]
