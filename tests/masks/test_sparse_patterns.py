"""Sparse patterns, compared pair by pair with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.masks.head_masks import HeadMasks
from cpbench.masks.patterns import WIDE

MANY = settings(max_examples=60, deadline=None)
SMALL = st.integers(0, 6)


def grid(seq: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(seq)[:, None], np.arange(seq)[None, :]


def dense(name: str, seq: int, **params: object) -> np.ndarray:
    mask = masks.build(name, seq, **params)
    visible = mask.to_dense()
    assert mask.overlap_area() == 0
    assert mask.area == visible.sum()
    return visible


@MANY
@given(st.integers(1, 90), st.integers(1, 20), SMALL, SMALL, SMALL, st.booleans())
def test_bigbird(seq: int, b: int, glob: int, near: int, drawn: int, causal: bool) -> None:
    i, j = grid(seq)
    params = {"block_size": b, "num_global": glob, "window": near, "causal": causal}
    blocks = -(-seq // min(b, seq))
    certain = abs(i // b - j // b) <= near
    certain |= (i // b < glob) | (j // b < glob)
    certain &= (j <= i) | (not causal)
    assert (dense("bigbird", seq, num_random=0, **params) == certain).all()
    visible = dense("bigbird", seq, num_random=drawn, seed=3, **params)
    assert (visible >= certain).all()
    extra = (visible & ~certain)[::b, :]  # the first query of each block row
    for row, keys in enumerate(extra):
        added = np.unique(np.flatnonzero(keys) // b)
        assert len(added) <= drawn
        whole = visible[row * b : (row + 1) * b]
        assert (whole[0] == whole[-1]).all() or causal
    assert (visible == dense("bigbird", seq, num_random=drawn, seed=3, **params)).all()
    if blocks > 20 and drawn == 6 and not near and not glob:
        assert (visible != dense("bigbird", seq, num_random=6, seed=4, **params)).any()


@MANY
@given(st.integers(1, 90), st.integers(1, 20), SMALL, st.booleans())
def test_random(seq: int, b: int, drawn: int, causal: bool) -> None:
    i, j = grid(seq)
    visible = dense("random", seq, block_size=b, num_random=drawn, causal=causal)
    own = (i // b == j // b) & ((j <= i) | (not causal))
    assert (visible >= own).all()
    assert not (causal and (visible & (j > i)).any())
    for row in visible[::b]:
        assert len(np.unique(np.flatnonzero(row) // b)) <= drawn + 1


def test_random_blocks_reach_everywhere() -> None:
    """Of 40 blocks all are drawn, and by causal rows all up to their own."""
    for causal in (False, True):
        visible = dense("random", 400, block_size=10, num_random=20, causal=causal)
        blocks = visible[9::10, ::10]
        assert blocks.any(0).all()
        assert 0.3 < blocks[-1].mean() < 0.5  # 1 - (1 - 1/40)**20 is 0.4


@MANY
@given(st.integers(1, 60), st.integers(1, 80))
def test_strided(seq: int, stride: int) -> None:
    i, j = grid(seq)
    visible = dense("strided", seq, stride=stride)
    s = min(stride, seq)
    assert (visible == ((j <= i) & ((i - j < s) | ((i - j) % s == 0)))).all()
    if s > 1:
        triangle = s * (s + 1) // 2
        area = triangle + (seq - s) * s + sum(seq - m for m in range(s, seq, s))
        assert visible.sum() == area


@MANY
@given(st.integers(1, 60), st.integers(0, 9), st.integers(1, 80), st.integers(0, 70))
def test_meta_tokens(seq: int, meta: int, every: int, window: int) -> None:
    i, j = grid(seq)
    visible = dense("meta_tokens", seq, num_meta=meta, every=every, window=window)
    stretch = min(every, seq)
    assert (visible == ((j <= i) & ((i - j <= window) | (j % stretch < meta)))).all()
    if every >= seq and meta <= seq:
        same = dense("streaming", seq, num_sinks=meta, window=window)
        assert (visible == same).all()


@MANY
@given(st.integers(1, 40), st.sampled_from([1, 2, 4]), st.floats(0, 1), st.integers(0, 5))
def test_retrieval_heads(seq: int, group: int, share: float, seed: int) -> None:
    params = {"share": share, "group": group, "num_sinks": min(2, seq), "window": 3, "seed": seed}
    built = masks.build_heads("retrieval_heads", seq, 8, **params)
    assert isinstance(built, HeadMasks)
    whole = masks.build("causal", seq)
    local = masks.build("streaming", seq, num_sinks=min(2, seq), window=3)
    is_whole = np.array([mask is built.masks[0] or mask == whole for mask in built.masks])
    if whole != local:
        is_whole = np.array([mask == whole for mask in built.masks])
        assert is_whole.sum() == round(share * (8 // group)) * group
        assert (is_whole.reshape(-1, group).all(1) == is_whole.reshape(-1, group).any(1)).all()
        assert all(mask == local for mask in np.array(built.masks, object)[~is_whole])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("bigbird:block_size=0", "block_size must be an integer >= 1"),
        ("bigbird:num_random=-1", "num_random must be an integer >= 0"),
        ("bigbird:block_size=1,num_random=100000", "slices are more than"),
        ("random:num_random=x", "num_random must be an integer >= 0"),
        ("strided:stride=0", "stride must be an integer >= 1"),
        ("meta_tokens:every=0", "every must be an integer >= 1"),
        ("retrieval_heads:share=1.5", "share = 1.5 is a share of the heads"),
        ("retrieval_heads:group=3", "group = 3 must divide the number of heads, 8"),
    ],
)
def test_what_is_not_allowed(text: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        masks.build_heads(text, 1 << 17, 8)


def test_long_sequences_are_cheap() -> None:
    """A million tokens: as many slices as blocks, and windows beyond the sequence."""
    mask = masks.build("bigbird", 1 << 20)
    assert len(mask.slices) < 1 << 17
    assert masks.build("meta_tokens", 1 << 20, window=WIDE).area == (1 << 19) * ((1 << 20) + 1)
