"""Per-head mask patterns: functions of ``seq_len`` and ``num_heads``.

They return :class:`~cpbench.masks.head_masks.HeadMasks` (``dilated``:
:class:`~cpbench.masks.dilated_mask.DilatedMask`).  Random patterns of a head depend only on
``seed`` and the number of the head, not on the number of heads.

A block row is the queries of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.patterns import WIDE, pattern
from cpbench.masks.slices import IntArray

MAX_SLICES = 1 << 22  # of all heads; a kept block may need a slice


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
    """Each head keeps a share (keep) of the key blocks of each block row, at random.

    At least one block is kept.  With ``causal``, blocks are those up to the diagonal, which is
    always kept.
    """
    _check_blocks(seq_len, num_heads, block_size, keep)
    edges = np.append(np.arange(0, seq_len, block_size), seq_len)
    return _build_heads(seq_len, num_heads, keep, causal, seed, lambda rng: edges)


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
    """Like block_sparse_uniform, with random block lengths of block_size on average.

    Each head has its own partition, the same for queries and keys; no block is shorter than
    ``least`` tokens.
    """
    _check_blocks(seq_len, num_heads, block_size, keep)
    if not 1 <= least <= block_size:
        raise ValueError(f"least = {least} must be between 1 and block_size = {block_size}")
    count = max(seq_len // block_size, 1)

    def edges(rng: np.random.Generator) -> IntArray:
        spare = max(seq_len - count * least, 0)
        offsets = np.sort(rng.integers(0, spare + 1, count - 1))
        cuts = offsets + least * np.arange(1, count)
        return np.concatenate([[0], cuts[cuts < seq_len], [seq_len]]).astype(np.int64)

    return _build_heads(seq_len, num_heads, keep, causal, seed, edges)


@pattern
def vertical_slash(
    seq_len: int,
    num_heads: int,
    *,
    num_vertical: int = 64,
    num_slash: int = 64,
    seed: int = 0,
) -> HeadMasks:
    """Each head: j <= i and (j in random columns, or i - j in random diagonals).

    The main diagonal is always included.
    """
    for name, value in (("num_vertical", num_vertical), ("num_slash", num_slash)):
        if not 0 <= value <= seq_len:
            raise ValueError(f"{name} = {value} must be between 0 and seq_len = {seq_len}")
    if num_heads * num_vertical * (num_slash + 1) > MAX_SLICES:
        raise ValueError(
            f"num_vertical * num_slash = {num_vertical * num_slash} with {num_heads} heads is more "
            f"than {MAX_SLICES} crossings"
        )
    masks = []
    for head in range(num_heads):
        rng = np.random.default_rng([seed, head])
        columns = _runs(np.sort(rng.choice(seq_len, num_vertical, replace=False)))
        diagonals = np.unique(np.append(rng.choice(seq_len, num_slash, replace=False), 0))
        slashes = _runs(diagonals)
        bands = np.array(
            [(0, seq_len, 0, seq_len, 1 - end, -begin) for begin, end in slashes], dtype=np.int64
        )
        # The diagonals cut the columns: their slices lie between two runs of diagonals.
        gaps = [(a, b) for (_, a), (b, _) in zip(slashes, [*slashes[1:], (WIDE, 0)], strict=True)]
        pieces = [
            (0, seq_len, k0, k1, 1 - end, -begin) for k0, k1 in columns for begin, end in gaps
        ]
        slices = np.concatenate([bands, np.array(pieces, dtype=np.int64).reshape(-1, 6)])
        masks.append(AttnMask.from_slices(seq_len, seq_len, slices))
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
    """LongNet: branch b has every ratio**b-th token of segments of segment * ratio**b tokens.

    The tokens of a branch attend to each other inside their segment.  Heads start at different
    tokens.  A pair in several branches counts several times.
    """
    for name, value in (("segment", segment), ("branches", branches), ("ratio", ratio)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if branches > 32 or segment * ratio ** (branches - 1) >= WIDE:
        raise ValueError(f"branches = {branches} with ratio = {ratio} reach past any sequence")
    dilations = [ratio**branch for branch in range(branches)]
    lengths = tuple((segment * dilation, dilation) for dilation in dilations)
    return DilatedMask(seq_len, num_heads, lengths, causal)


def _check_blocks(seq_len: int, num_heads: int, block_size: int, keep: float) -> None:
    """Raise ``ValueError`` for invalid parameters or too many blocks."""
    if block_size < 1:
        raise ValueError(f"block_size = {block_size} must be at least 1")
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep} is a share of the blocks: it must be in (0, 1]")
    blocks = -(-seq_len // block_size)
    if num_heads * blocks * max(1, keep * blocks) > MAX_SLICES:
        raise ValueError(
            f"block_size = {block_size} at {seq_len} tokens and {num_heads} heads keeps more than "
            f"{MAX_SLICES} blocks; increase block_size"
        )


def _build_heads(
    seq_len: int,
    num_heads: int,
    keep: float,
    causal: bool,
    seed: int,
    block_edges: Callable[[np.random.Generator], IntArray],
) -> HeadMasks:
    """Block-sparse masks of all heads; ``block_edges`` returns the partition of a head."""
    masks = []
    for head in range(num_heads):
        rng = np.random.default_rng([seed, head])
        edges = block_edges(rng)
        scores = rng.random((len(edges) - 1,) * 2)
        masks.append(_keep_highest(seq_len, edges, scores, keep, causal))
    return HeadMasks(tuple(masks))


def _keep_highest(
    seq_len: int, edges: IntArray, scores: np.typing.NDArray[np.float64], keep: float, causal: bool
) -> AttnMask:
    """The mask of one head: in each block row, the blocks with the highest scores."""
    count = len(edges) - 1
    available = np.arange(1, count + 1) if causal else np.full(count, count)
    if causal:
        scores = np.where(np.tri(count, dtype=bool), scores, -1.0)
        np.fill_diagonal(scores, 2.0)
    budget = np.maximum(np.floor(keep * available + 0.5), 1).astype(np.int64)
    rank = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1, kind="stable")
    kept = np.pad(rank < budget[:, None], ((0, 0), (1, 1)))
    row, begin = np.nonzero(kept[:, 1:] & ~kept[:, :-1])
    _, end = np.nonzero(kept[:, :-1] & ~kept[:, 1:])  # one slice per run of blocks
    hi = 0 if causal else WIDE
    limits = np.broadcast_to([[-WIDE, hi]], (len(row), 2))
    slices = np.column_stack([edges[row], edges[row + 1], edges[begin], edges[end], limits])
    return AttnMask.from_slices(seq_len, seq_len, slices)


def _runs(values: IntArray) -> list[tuple[int, int]]:
    """``(begin, end)`` of each run of consecutive integers in sorted values."""
    if not len(values):
        return []
    breaks = np.flatnonzero(np.diff(values) > 1)
    begins = values[np.append(0, breaks + 1)]
    ends = values[np.append(breaks, len(values) - 1)] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))
