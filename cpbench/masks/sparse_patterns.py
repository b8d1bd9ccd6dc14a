"""Sparse mask patterns: windows, global tokens, random blocks, strides, heads of two kinds.

Random blocks depend on ``seed`` and the number of the block row only; they are the same for all
heads (``block_sparse_uniform`` draws them for each).
"""

from __future__ import annotations

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.patterns import MAX_BLOCKS, WIDE, checked_int, pattern, streaming
from cpbench.masks.slices import IntArray


@pattern
def bigbird(
    seq_len: int,
    *,
    block_size: int = 64,
    num_global: int = 1,
    window: int = 1,
    num_random: int = 3,
    causal: bool = False,
    seed: int = 0,
) -> AttnMask:
    """Blocks: the first num_global, up to window on each side, and num_random at random.

    The queries of the global blocks see all blocks.  ``num_global``, ``window`` and ``num_random``
    count blocks of ``block_size`` tokens; random blocks are drawn per block row and may coincide
    with others.  With ``causal``, only j <= i.  Source: BigBird (arXiv:2007.14062), ITC.
    """
    b = _block_size(block_size, seq_len)
    rows = np.arange(-(-seq_len // b))
    glob, near, drawn = (
        min(checked_int(name, value, low=0), len(rows))
        for name, value in (
            ("num_global", num_global), ("window", window), ("num_random", num_random),
        )
    )  # fmt: skip
    kept = glob + 2 * near + 1 + drawn
    _check_count(len(rows) * kept + glob * len(rows), "num_global, window or num_random")
    columns = np.concatenate(
        [
            np.broadcast_to(np.arange(glob), (len(rows), glob)),
            rows[:, None] + np.arange(-near, near + 1),
            _random_blocks(len(rows), drawn, causal, seed),
        ],
        axis=1,
    )
    columns[:glob] = -1  # all keys are added below
    slices = _block_slices(columns, b, seq_len, causal)
    hi = 0 if causal else WIDE
    top = (0, min(glob * b, seq_len), 0, seq_len, -WIDE, hi)
    return AttnMask.from_slices(seq_len, seq_len, np.concatenate([[top], slices]))


@pattern
def random(
    seq_len: int,
    *,
    block_size: int = 64,
    num_random: int = 8,
    causal: bool = False,
    seed: int = 0,
) -> AttnMask:
    """The own block, and num_random blocks at random per block row.

    Random blocks may coincide with each other or with the own one.  With ``causal``, only j <= i.
    Source: the random part of BigBird (arXiv:2007.14062).
    """
    b = _block_size(block_size, seq_len)
    rows = np.arange(-(-seq_len // b))
    drawn = min(checked_int("num_random", num_random, low=0), len(rows))
    _check_count(len(rows) * (drawn + 1), "num_random")
    columns = np.column_stack([rows, _random_blocks(len(rows), drawn, causal, seed)])
    return AttnMask.from_slices(seq_len, seq_len, _block_slices(columns, b, seq_len, causal))


@pattern
def strided(seq_len: int, *, stride: int = 128) -> AttnMask:
    """j <= i and (i - j < stride, or i - j is a multiple of stride).

    Area T(s) + (N-s)s + Σ_{m>=1} (N - m·s) for s <= N.  Source: Sparse Transformer
    (arXiv:1904.10509), both of its strided heads in one.
    """
    s = min(checked_int("stride", stride, low=1), seq_len)
    distances = np.arange(s, seq_len, s) if s > 1 else np.arange(0)
    near = seq_len if s == 1 else s
    _check_count(len(distances), "seq_len, or increase stride")
    zero, end = np.zeros_like(distances), np.full_like(distances, seq_len)
    diagonals = np.column_stack([zero, end, zero, end, -distances, -distances])
    band = (0, seq_len, 0, seq_len, 1 - near, 0)
    return AttnMask.from_slices(seq_len, seq_len, np.concatenate([[band], diagonals]))


@pattern
def meta_tokens(
    seq_len: int, *, num_meta: int = 16, every: int = 4096, window: int = 1024
) -> AttnMask:
    """j <= i, and i - j <= window or j is among the first num_meta of every ``every`` tokens.

    The keys of meta tokens stay visible to all later queries.  With ``every`` at least N it is
    ``streaming``.  Source: meta tokens of Hymba (arXiv:2411.13676), placed anew in each stretch.
    """
    stretch = min(checked_int("every", every, low=1), seq_len)
    meta = min(checked_int("num_meta", num_meta, low=0), stretch)
    w = checked_int("window", window, low=0)
    first = np.arange(0, seq_len, stretch)
    _check_count(len(first), "seq_len, or increase every")
    columns = np.column_stack(
        [
            np.zeros_like(first), np.full_like(first, seq_len), first,
            np.minimum(first + meta, seq_len), np.full_like(first, -WIDE),
            np.full_like(first, -w - 1),
        ]
    )  # fmt: skip
    band = (0, seq_len, 0, seq_len, -w, 0)
    return AttnMask.from_slices(seq_len, seq_len, np.concatenate([[band], columns]))


@pattern
def retrieval_heads(
    seq_len: int,
    num_heads: int,
    *,
    share: float = 0.25,
    group: int = 1,
    num_sinks: int = 4,
    window: int = 1024,
    seed: int = 0,
) -> HeadMasks:
    """A share of the heads is causal, the others are streaming.

    ``share`` of the heads, rounded, drawn with ``seed``, have the mask ``causal``; the others
    ``streaming:num_sinks=...,window=...``.  ``group`` heads in a row, those of one key/value head,
    are of one kind.  Source: DuoAttention (arXiv:2410.10819).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share = {share} is a share of the heads: it must be in [0, 1]")
    heads_of_group = checked_int("group", group, low=1)
    if num_heads % heads_of_group:
        raise ValueError(f"group = {group} must divide the number of heads, {num_heads}")
    groups = num_heads // heads_of_group
    drawn = np.random.default_rng(seed).permutation(groups)[: round(share * groups)]
    retrieval = np.repeat(np.isin(np.arange(groups), drawn), heads_of_group)
    slices = [(0, seq_len, 0, seq_len, -WIDE, 0)]
    whole = AttnMask.from_slices(seq_len, seq_len, slices)
    local = streaming(seq_len, num_sinks=num_sinks, window=window)
    return HeadMasks(tuple(whole if far else local for far in retrieval))


def _block_size(value: object, seq_len: int) -> int:
    return min(checked_int("block_size", value, low=1), seq_len)


def _check_count(count: int, what: str) -> None:
    if count > MAX_BLOCKS:
        raise ValueError(f"{count} slices are more than {MAX_BLOCKS}: reduce {what}")


def _random_blocks(rows: int, count: int, causal: bool, seed: int) -> IntArray:
    """``(rows, count)`` numbers of blocks, of those up to the row's own if causal."""
    rng = np.random.default_rng(seed)
    most = np.arange(1, rows + 1) if causal else np.full(rows, rows)
    return np.floor(rng.random((rows, count)) * most[:, None]).astype(np.int64)


def _block_slices(columns: IntArray, block: int, seq_len: int, causal: bool) -> IntArray:
    """Slices of the blocks that each block row keeps, in runs.

    Args:
        columns: ``(rows, n)`` numbers of blocks, repeated or outside of the mask at will.
    """
    count = len(columns)
    ends = np.arange(count)[:, None] if causal else np.full((count, 1), count - 1)
    inside = (columns >= 0) & (columns <= ends)
    beyond = 2 * count + 2  # no neighbour of any block
    ordered = np.sort(np.where(inside, columns, beyond), axis=1)
    known = ordered < count
    before = np.column_stack([np.full(count, -2), ordered[:, :-1]])
    row, at = np.nonzero(known & (ordered > before + 1))  # where a run begins
    column = ordered[row, at]
    after = np.column_stack([ordered[:, 1:], np.full(count, 2 * beyond)])
    last_row, last_at = np.nonzero(known & (after > ordered + 1))
    end = ordered[last_row, last_at] + 1
    hi = 0 if causal else WIDE
    limits = np.broadcast_to([[-WIDE, hi]], (len(row), 2))
    edges = [np.minimum(x * block, seq_len) for x in (row, row + 1, column, end)]
    return np.column_stack([*edges, limits])
