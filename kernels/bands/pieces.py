"""A mask divided into pieces that library kernels take, each with one call.

Library kernels take a window that is aligned at the bottom right: query i of n sees keys j of m
with ``-left <= j - i - (m - n) <= right``.  A canonical slice is a tight rectangle with tight
offsets, so a bound that hides something is never negative, and every slice is one such window.
Slices under the same window, one after another in queries and keys, are packed documents: a kernel
with variable-length calls takes them in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert_library import UNBOUNDED
from cpbench.masks.slices import HI, K0, K1, LO, Q0, Q1, IntArray, canonical, ragged_indices

Refusal = Callable[[AttnMask], str | None]


Tokens = range | IntArray  # adjacent ones, or their numbers in increasing order


class Piece(NamedTuple):
    """A part of a mask: ``mask`` between some of its queries and some of its keys."""

    queries: Tokens
    keys: Tokens
    mask: AttnMask


class Indivisible(ValueError):
    """A kernel takes neither a mask nor its single slices; the message is the kernel's."""


def divide(mask: AttnMask, refusal: Refusal) -> list[Piece]:
    """Divide a mask into as few pieces as this module can find that a kernel takes.

    Args:
        refusal: why the kernel does not take a mask, or None if it does.

    Raises:
        Indivisible: if it does not even take single slices.
    """
    if not mask.area:
        return []
    if refusal(mask) is None:
        return [Piece(range(mask.seq_q), range(mask.seq_k), mask)]
    try:
        return _divide_slices(mask.simplify().slices, refusal)
    except Indivisible:  # two documents of one token each are simpler as a diagonal
        return _divide_slices(mask.slices, refusal)


def _divide_slices(slices: IntArray, refusal: Refusal) -> list[Piece]:
    pieces = []
    for group in _documents(_strips(slices)):
        packed = _pack(group)
        if len(group) > 1 and refusal(packed.mask) is None:
            pieces.append(packed)
            continue
        for strip in group:
            piece = _pack(strip[None])
            if (reason := refusal(piece.mask)) is not None:
                raise Indivisible(reason)
            pieces.append(piece)
    # The result of one with all queries is what others are merged into.
    return sorted(pieces, key=lambda piece: -len(piece.queries))


def _pack(slices: IntArray) -> Piece:
    """The piece of slices that follow each other, without the tokens between them."""
    packed = slices.copy()
    tokens: list[Tokens] = []
    for first, end in ((Q0, Q1), (K0, K1)):
        starts, ends = slices[:, first], slices[:, end]
        packed[:, end] = np.cumsum(ends - starts)
        packed[:, first] = packed[:, end] - (ends - starts)
        if (starts[1:] == ends[:-1]).all():
            tokens.append(range(int(starts[0]), int(ends[-1])))
        else:
            document, number = ragged_indices(ends - starts)
            tokens.append(starts[document] + number)
    shift = (packed[:, K0] - slices[:, K0]) - (packed[:, Q0] - slices[:, Q0])
    packed[:, [LO, HI]] += shift[:, None]
    queries, keys = tokens
    return Piece(queries, keys, AttnMask.from_slices(len(queries), len(keys), packed))


def _strips(slices: IntArray) -> IntArray:
    """Slices that are single windows for any kernel: those with more queries than keys are cut.

    FlashAttention-2 treats a bound of at least as many tokens as there are keys as unbounded, and
    an unbounded right side beside a left bound as a bound of that many.  With more queries than
    keys that hides or shows too much, so the queries of such a slice that a bound cuts (fewer than
    there are keys) become slices of their own.
    """
    q0, q1, k0, k1, lo, hi = slices.T
    # Slices whose right bound the kernel would misread.
    misread = np.where(hi < k1 - 1 - q0, hi + q1 - k1, q1 - q0 - 1) >= k1 - k0
    # The first query that sees the last key, and the first that does not see the first key.
    cuts = np.clip([k1 - 1 - hi, k0 - lo + 1], q0, q1)
    edges = np.stack([q0, *np.where(misread, cuts, [q0, q1]), q1])
    strips = []
    for begin, end in pairwise(edges):
        strip = slices.copy()
        strip[:, Q0], strip[:, Q1] = begin, end
        strips.append(strip)
    return canonical(np.concatenate(strips))


def _documents(strips: IntArray) -> Iterator[IntArray]:
    """Groups of slices under the same window that follow each other in queries and in keys."""
    corner = strips[:, K1] - strips[:, Q1]
    left = np.where(
        strips[:, LO] > strips[:, K0] - strips[:, Q1] + 1, corner - strips[:, LO], UNBOUNDED
    )
    right = np.where(
        strips[:, HI] < strips[:, K1] - 1 - strips[:, Q0], strips[:, HI] - corner, UNBOUNDED
    )
    order = np.lexsort((strips[:, K0], strips[:, Q0], right, left))
    groups: list[list[int]] = []
    open_groups: list[list[int]] = []  # of the window at hand
    window = None
    for i in order.tolist():
        if window != (left[i], right[i]):
            window, open_groups = (left[i], right[i]), []
        for group in open_groups:
            last = strips[group[-1]]
            if strips[i, Q0] >= last[Q1] and strips[i, K0] >= last[K1]:
                group.append(i)
                break
        else:
            open_groups.append([i])
            groups.append(open_groups[-1])
    for group in groups:
        yield strips[group]
