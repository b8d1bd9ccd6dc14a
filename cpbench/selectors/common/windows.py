"""Masks by an interval of keys per query: a window near it, and runs of tokens before the window.

The window of a query reaches back to a multiple of a step, so that whole runs of tokens are before
it: it has ``window`` to ``window + step - 1`` keys, fewer only at the start of the sequence.
"""

from __future__ import annotations

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.patterns import WIDE
from cpbench.masks.slices import IntArray


def window_begins(tokens: int, window: int, step: int) -> IntArray:
    """``[T]``: the first key in the window of each query, a multiple of ``step``."""
    begins: IntArray = np.maximum((np.arange(1, tokens + 1) - window) // step * step, 0)
    return begins


def window_mask(begins: IntArray, num_sinks: int = 0) -> AttnMask:
    """Each query sees the keys from ``begins`` ``[T]`` to its own, and the first ``num_sinks``."""
    tokens = len(begins)
    q0, q1 = _runs(begins)
    first = np.maximum(begins[q0], num_sinks)
    rows = np.column_stack([q0, q1, first, q1, np.full(len(q0), -WIDE), np.zeros_like(q0)])
    sinks = np.array([[0, tokens, 0, num_sinks, -WIDE, 0]])
    return AttnMask.from_slices(tokens, tokens, np.concatenate([sinks, rows]))


def interval_mask(begins: IntArray, ends: IntArray, num_keys: int) -> AttnMask:
    """Each query sees the keys from ``begins`` to before ``ends``, ``[T]`` each."""
    q0, q1 = _runs(begins, ends)
    wide = np.full(len(q0), WIDE)
    rows = np.column_stack([q0, q1, begins[q0], ends[q0], -wide, wide])
    return AttnMask.from_slices(len(begins), num_keys, rows)


def keys_from(mask: AttnMask, begins: IntArray) -> AttnMask:
    """A mask without the keys before ``begins`` ``[S]`` of each query."""
    q0, q1 = _runs(begins)
    slices = mask.slices
    source, run = np.nonzero((slices[:, :1] < q1) & (slices[:, 1:2] > q0))
    rows = slices[source].copy()
    rows[:, 0] = np.maximum(rows[:, 0], q0[run])
    rows[:, 1] = np.minimum(rows[:, 1], q1[run])
    rows[:, 2] = np.maximum(rows[:, 2], begins[q0[run]])
    return AttnMask.from_slices(mask.seq_q, mask.seq_k, rows[rows[:, 2] < rows[:, 3]])


def _runs(*values: IntArray) -> tuple[IntArray, IntArray]:
    """The first query of each run of equal values, and the one after its last."""
    changes = np.any([np.diff(array) != 0 for array in values], axis=0)
    edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(values[0])]])
    return edges[:-1], edges[1:]
