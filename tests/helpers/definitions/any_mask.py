"""Hypothesis strategies for masks."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st

from cpbench.masks.attn_mask import AttnMask

MANY = settings(max_examples=120, deadline=None)


@st.composite
def masks(draw: st.DrawFn, low: int = 1, high: int = 22) -> AttnMask:
    """A mask of disjoint slices: some cells of a random grid, each with a random band."""
    seq_q, seq_k = draw(st.integers(low, high)), draw(st.integers(low, high))
    q_cuts = sorted(draw(st.sets(st.integers(0, seq_q), min_size=1, max_size=4)))
    k_cuts = sorted(draw(st.sets(st.integers(0, seq_k), min_size=1, max_size=4)))
    offsets = st.integers(-seq_q - 2, seq_k + 2)
    slices = []
    for q0, q1 in itertools.pairwise(q_cuts):
        for k0, k1 in itertools.pairwise(k_cuts):
            if draw(st.booleans()):
                slices.append((q0, q1, k0, k1, draw(offsets), draw(offsets)))
    return AttnMask.from_slices(seq_q, seq_k, slices)
