"""Every mask pattern, compared with its area formula and, pair by pair, its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.masks.attn_mask import AttnMask

MANY = settings(max_examples=60, deadline=None)


LENS = st.lists(st.integers(1, 17), min_size=1, max_size=7)


def T(x: int) -> int:
    """The triangular number."""
    return x * (x + 1) // 2


def check(mask: AttnMask, visible: np.ndarray, area: int | None = None) -> None:
    """Compare a mask with the definition of its pattern and, if given, with the area formula."""
    assert (mask.to_dense() == visible).all()
    assert mask.area == visible.sum()
    assert mask.overlap_area() == 0
    if area is not None:
        assert mask.area == area


def grid(seq: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(seq)[:, None], np.arange(seq)[None, :]


def documents(lens: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """i, j, and the document of each token and its position in it."""
    i, j = grid(sum(lens))
    doc = np.array([d for d, length in enumerate(lens) for _ in range(length)])
    position = np.array([p for length in lens for p in range(length)])
    return i, j, doc, position


# --- without documents ------------------------------------------------------------------------


@MANY
@given(st.integers(1, 40), st.integers(1, 40))
def test_full(seq: int, seq_q: int) -> None:
    check(masks.build("full", seq), np.ones((seq, seq), bool), seq**2)
    check(masks.build("full", seq, seq_q=seq_q), np.ones((seq_q, seq), bool), seq_q * seq)


@MANY
@given(st.integers(1, 40), st.integers(1, 40), st.integers(-50, 50))
def test_causal(seq: int, seq_q: int, offset: int) -> None:
    i, j = grid(seq)
    check(masks.build("causal", seq), j <= i, T(seq))
    i = np.arange(seq_q)[:, None]
    check(masks.build("causal", seq, seq_q=seq_q, offset=offset), j <= i + offset)
    aligned = masks.build("causal", seq, seq_q=seq_q)
    check(aligned, j <= i + seq - seq_q)
    assert aligned.to_dense()[-1].all()  # the last query sees the last key


@MANY
@given(st.integers(1, 40), st.integers(0, 60))
def test_sliding_window(seq: int, w: int) -> None:
    i, j = grid(seq)
    area = (2 * w + 1) * seq - w * (w + 1) if w < seq else seq**2
    check(masks.build("sliding_window", seq, window=w), abs(i - j) <= w, area)


@MANY
@given(st.integers(1, 40), st.integers(0, 60))
def test_sliding_window_causal(seq: int, w: int) -> None:
    i, j = grid(seq)
    area = (w + 1) * seq - w * (w + 1) // 2 if w < seq else T(seq)
    mask = masks.build("sliding_window_causal", seq, window=w)
    check(mask, (i - j >= 0) & (i - j <= w), area)
    assert mask.row_counts()[-1] == min(w + 1, seq)


@MANY
@given(st.integers(1, 40), st.integers(1, 60))
def test_prefix_lm_causal(seq: int, p: int) -> None:
    i, j = grid(seq)
    c = min(p, seq)
    area = c**2 + (seq - c) * (seq + c + 1) // 2
    check(masks.build("prefix_lm_causal", seq, prefix_len=p), (j <= i) | (j < p), area)


@MANY
@given(st.integers(1, 40), st.data())
def test_global_sliding_window(seq: int, data: st.DataObject) -> None:
    g, w = data.draw(st.integers(0, seq)), data.draw(st.integers(0, 50))
    i, j = grid(seq)
    r = seq - g
    area = seq**2 - r**2 + (2 * w + 1) * r - w * (w + 1) if w < r else None
    mask = masks.build("global_sliding_window", seq, num_global=g, window=w)
    check(mask, (i < g) | (j < g) | (abs(i - j) <= w), area)


@MANY
@given(st.integers(1, 40), st.data())
def test_streaming(seq: int, data: st.DataObject) -> None:
    s, w = data.draw(st.integers(0, seq)), data.draw(st.integers(0, 50))
    i, j = grid(seq)
    area = None
    if s <= seq - w:
        area = (w + 1) * seq - w * (w + 1) // 2 + s * (seq - w - 1) - s * (s - 1) // 2
    mask = masks.build("streaming", seq, num_sinks=s, window=w)
    check(mask, (j <= i) & ((j < s) | (i - j <= w)), area)


# --- with documents ---------------------------------------------------------------------------


@MANY
@given(LENS)
def test_documents(lens: list[int]) -> None:
    i, j, doc, _ = documents(lens)
    same = doc[:, None] == doc[None, :]
    seq = sum(lens)
    check(masks.build("full_document", seq, doc_lens=lens), same, sum(x * x for x in lens))
    mask = masks.build("causal_document", seq, doc_lens=lens)
    check(mask, same & (j <= i), sum(map(T, lens)))


@MANY
@given(LENS, st.integers(1, 20))
def test_prefix_lm_document(lens: list[int], p: int) -> None:
    i, j, doc, position = documents(lens)
    visible = (doc[:, None] == doc[None, :]) & ((j <= i) | (position[None, :] < p))
    capped = [(length, min(p, length)) for length in lens]
    area = sum(c * c + (length - c) * (length + c + 1) // 2 for length, c in capped)
    check(masks.build("prefix_lm_document", sum(lens), doc_lens=lens, prefix_len=p), visible, area)


@MANY
@given(st.lists(st.integers(1, 17), min_size=2, max_size=7))
def test_share_question(lens: list[int]) -> None:
    i, j, doc, _ = documents(lens)
    visible = (j <= i) & ((doc[:, None] == doc[None, :]) | (doc[None, :] == 0))
    question, answer, *others = lens
    rows = sum(lens) - question - answer  # of the other answers
    area = T(question + answer) + rows * question + sum(map(T, others))
    check(masks.build("share_question", sum(lens), doc_lens=lens), visible, area)


@MANY
@given(LENS)
def test_causal_blockwise(lens: list[int]) -> None:
    i, j, doc, _ = documents(lens)
    last = doc[:, None] == len(lens) - 1
    visible = (j <= i) & ((doc[:, None] == doc[None, :]) | last)
    seq, end = sum(lens), lens[-1]
    area = sum(map(T, lens[:-1])) + end * (2 * seq - end + 1) // 2
    check(masks.build("causal_blockwise", seq, doc_lens=lens), visible, area)


@MANY
@given(LENS, st.integers(1, 20))
def test_block_causal_document(lens: list[int], b: int) -> None:
    _, _, doc, position = documents(lens)
    block = position // b
    visible = (doc[:, None] == doc[None, :]) & (block[None, :] <= block[:, None])
    area = sum(b * b * T(length // b) + length % b * length for length in lens)
    mask = masks.build("block_causal_document", sum(lens), doc_lens=lens, block_size=b)
    check(mask, visible, area)


@pytest.mark.parametrize("seq", [1, 2, 5, 700, 1500])
@pytest.mark.parametrize("seed", [0, 3])
def test_long_documents(seq: int, seed: int) -> None:
    from cpbench.masks.documents import long_mixture

    lens = long_mixture(seq, "prolong64k", seed).tolist()
    i, j, doc, _ = documents(lens)
    same = doc[:, None] == doc[None, :]
    params: dict[str, Any] = {"corpus": "prolong64k", "seed": seed}
    check(masks.build("full_document_long", seq, **params), same, sum(x * x for x in lens))
    mask = masks.build("causal_document_long", seq, **params)
    check(mask, same & (j <= i), sum(map(T, lens)))


@pytest.mark.parametrize("name", masks.names())
def test_defaults_build_at_every_scale(name: str) -> None:
    per_head = masks.pattern_info(name).per_head
    for seq in (1024, 8192, 1 << (16 if per_head else 20)):
        mask = masks.build_heads(name, seq, 2)
        assert (mask.seq_q, mask.seq_k) == (seq, seq)
        assert 0 < mask.area <= seq**2
    assert per_head or len(mask.slices) > 5000 or mask.overlap_area() == 0
