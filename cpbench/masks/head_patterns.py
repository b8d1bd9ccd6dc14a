"""Named patterns that differ from head to head: functions of ``seq_len`` and ``num_heads``.

They return :class:`~cpbench.masks.head_masks.HeadMasks`.  What is drawn is drawn for each head
anew, from ``seed`` and the head alone: more heads, or a longer sweep, change nothing about the
first.

N = ``seq_len``; a block row is all queries of one block of queries.
"""

from __future__ import annotations

import numpy as np

from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.patterns import WIDE, pattern

MOST_KEPT = 1 << 22  # blocks of all heads: a slice each, at worst


@pattern
def block_sparse_uniform(
    seq_len: int,
    num_heads: int,
    *,
    block_size: int = 128,
    keep: float = 0.1,
    causal: bool = False,
    seed: int = 0,
) -> HeadMasks:
    """Each head: of each block row the ``keep`` share of key blocks with the highest random score.

    At least one; with ``causal`` of the blocks up to the diagonal, which is always kept.
    """
    _check(seq_len, num_heads, block_size, keep)
    edges = np.append(np.arange(0, seq_len, block_size), seq_len)
    return _heads(seq_len, num_heads, keep, causal, seed, lambda chance: edges)


@pattern
def block_sparse_variable(
    seq_len: int,
    num_heads: int,
    *,
    block_size: int = 128,
    least: int = 32,
    keep: float = 0.1,
    causal: bool = False,
    seed: int = 0,
) -> HeadMasks:
    """As block_sparse_uniform, over a random partition into blocks of ``block_size`` on average.

    Each head has a partition of its own, of queries and keys alike; no block is shorter than
    ``least`` tokens.
    """
    _check(seq_len, num_heads, block_size, keep)
    if not 1 <= least <= block_size:
        raise ValueError(f"least = {least} must be between 1 and block_size = {block_size}")
    count = max(seq_len // block_size, 1)

    def edges(chance: np.random.Generator) -> IntArray:
        spare = max(seq_len - count * least, 0)
        shares = np.sort(chance.integers(0, spare + 1, count - 1))
        cuts = shares + least * np.arange(1, count)
        return np.concatenate([[0], cuts[cuts < seq_len], [seq_len]]).astype(np.int64)

    return _heads(seq_len, num_heads, keep, causal, seed, edges)


@pattern
def vertical_slash(
    seq_len: int,
    num_heads: int,
    *,
    num_vertical: int = 64,
    num_slash: int = 64,
    seed: int = 0,
) -> HeadMasks:
    """Each head: j <= i and (j is a chosen column, or i - j a chosen diagonal).

    The main diagonal is always chosen; the others and the columns are drawn.
    """
    for name, value in (("num_vertical", num_vertical), ("num_slash", num_slash)):
        if not 0 <= value <= seq_len:
            raise ValueError(f"{name} = {value} must be between 0 and seq_len = {seq_len}")
    if num_heads * num_vertical * (num_slash + 1) > MOST_KEPT:
        raise ValueError(
            f"num_vertical * num_slash = {num_vertical * num_slash} for {num_heads} heads is more "
            f"than {MOST_KEPT} crossings"
        )
    masks = []
    for head in range(num_heads):
        chance = np.random.default_rng([seed, head])
        columns = _runs(np.sort(chance.choice(seq_len, num_vertical, replace=False)))
        diagonals = np.unique(np.append(chance.choice(seq_len, num_slash, replace=False), 0))
        slashes = _runs(diagonals)
        bands = np.array(
            [(0, seq_len, 0, seq_len, 1 - end, -begin) for begin, end in slashes], dtype=np.int64
        )
        # Columns are cut by the diagonals: what is left lies between two of them.
        gaps = [(a, b) for (_, a), (b, _) in zip(slashes, [*slashes[1:], (WIDE, 0)], strict=True)]
        rest = [(0, seq_len, k0, k1, 1 - end, -begin) for k0, k1 in columns for begin, end in gaps]
        rows = np.concatenate([bands, np.array(rest, dtype=np.int64).reshape(-1, 6)])
        masks.append(AttnMask.from_slices(seq_len, seq_len, rows))
    return HeadMasks(tuple(masks))


@pattern
def dilated(
    seq_len: int,
    num_heads: int,
    *,
    segment: int = 2048,
    branches: int = 3,
    ratio: int = 4,
    causal: bool = True,
) -> DilatedMask:
    """LongNet: branch b lets every ratio**b-th token see the like in segment * ratio**b tokens.

    Heads begin at different tokens.  A pair that several branches see counts as often.
    """
    for name, value in (("segment", segment), ("branches", branches), ("ratio", ratio)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if branches > 32 or segment * ratio ** (branches - 1) >= WIDE:
        raise ValueError(f"branches = {branches} with ratio = {ratio} reach past any sequence")
    steps = [ratio**b for b in range(branches)]
    return DilatedMask(seq_len, num_heads, tuple((segment * step, step) for step in steps), causal)


def _check(seq_len: int, num_heads: int, block_size: int, keep: float) -> None:
    if block_size < 1:
        raise ValueError(f"block_size = {block_size} must be at least 1")
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep} is a share of the blocks: above 0 and at most 1")
    blocks = -(-seq_len // block_size)
    if num_heads * blocks * max(1, keep * blocks) > MOST_KEPT:
        raise ValueError(
            f"block_size = {block_size} at {seq_len} tokens and {num_heads} heads keeps more than "
            f"{MOST_KEPT} blocks; make blocks larger"
        )


def _heads(
    seq_len: int, num_heads: int, keep: float, causal: bool, seed: int, edges_of: object
) -> HeadMasks:
    assert callable(edges_of)
    masks = []
    for head in range(num_heads):
        chance = np.random.default_rng([seed, head])
        edges = edges_of(chance)
        masks.append(_kept(seq_len, edges, chance.random((len(edges) - 1,) * 2), keep, causal))
    return HeadMasks(tuple(masks))


def _kept(
    seq_len: int, edges: IntArray, scores: np.typing.NDArray[np.float64], keep: float, causal: bool
) -> AttnMask:
    """The blocks of one head with the highest scores of their block row."""
    count = len(edges) - 1
    there = np.arange(1, count + 1) if causal else np.full(count, count)  # blocks to choose from
    if causal:
        scores = np.where(np.tri(count, dtype=bool), scores, -1.0)
        np.fill_diagonal(scores, 2.0)
    wanted = np.maximum(np.floor(keep * there + 0.5), 1).astype(np.int64)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    kept = np.pad(rank < wanted[:, None], ((0, 0), (1, 1)))
    row, begin = np.nonzero(kept[:, 1:] & ~kept[:, :-1])
    _, end = np.nonzero(kept[:, :-1] & ~kept[:, 1:])  # neighbours are one slice
    hi = 0 if causal else WIDE
    limits = np.broadcast_to([[-WIDE, hi]], (len(row), 2))
    slices = np.column_stack([edges[row], edges[row + 1], edges[begin], edges[end], limits])
    return AttnMask.from_slices(seq_len, seq_len, slices)


def _runs(values: IntArray) -> list[tuple[int, int]]:
    """Begin and end of the runs of consecutive integers in sorted ones."""
    if not len(values):
        return []
    breaks = np.flatnonzero(np.diff(values) > 1)
    begins = values[np.append(0, breaks + 1)]
    ends = values[np.append(breaks, len(values) - 1)] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
