"""Specs of every mask pattern, and a hypothesis strategy for single bands."""

from __future__ import annotations

from hypothesis import strategies as st

from cpbench.masks.attn_mask import AttnMask

# (spec, seq_len) of every pattern; sizes are not multiples of a block.
CASES = [
    ("full", 97),
    ("full:seq_q=40", 97),
    ("causal", 97),
    ("causal:seq_q=40", 97),
    ("causal:seq_q=97", 41),
    ("causal:offset=-5", 70),
    ("sliding_window:window=13", 101),
    ("sliding_window_causal:window=19", 101),
    ("sliding_window_causal:window=0", 33),
    ("prefix_lm_causal:prefix_len=37", 101),
    ("global_sliding_window:num_global=11,window=9", 103),
    ("streaming:num_sinks=5,window=21", 99),
    ("bigbird:block_size=8,num_random=2,causal=true", 101),
    ("random:block_size=8,num_random=3", 101),
    ("strided:stride=12", 101),
    ("meta_tokens:num_meta=3,every=30,window=9", 101),
    ("full_document:doc_lens=[1,40,7,33,16]", 97),
    ("causal_document:doc_lens=[1,40,7,33,16]", 97),
    ("full_document_long:seed=1", 121),
    ("causal_document_long:seed=1", 121),
    ("prefix_lm_document:doc_lens=[1,40,7,33,16],prefix_len=9", 97),
    ("share_question:doc_lens=[9,40,7,25,16]", 97),
    ("causal_blockwise:doc_lens=[9,40,7,25,16]", 97),
    ("block_causal_document:doc_lens=[9,40,7,25,16],block_size=6", 97),
]


@st.composite
def single_slices(draw: st.DrawFn) -> AttnMask:
    """A mask of one band slice, with random offsets."""
    seq_q, seq_k = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    lo, hi = draw(st.integers(-seq_q, seq_k)), draw(st.integers(-seq_q, seq_k))
    return AttnMask.from_slices(seq_q, seq_k, [(0, seq_q, 0, seq_k, lo, hi)])
