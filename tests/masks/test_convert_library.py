"""Conversions of masks for attention libraries: equal to the dense mask, or refused."""

from __future__ import annotations

from typing import Any

import mask_cases
import numpy as np
import pytest
from any_mask import MANY
from any_mask import masks as any_mask
from hypothesis import given
from hypothesis import strategies as st

from cpbench import masks
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert_library import (
    Bsr,
    FlashMaskColumns,
    Unconvertible,
    Varlen,
    to_bsr,
    to_flashmask,
    to_varlen,
)
from cpbench.sweep.verification.cases import DOCUMENTS, MASKS, SEQ_LEN

CASES = [*mask_cases.CASES, *((case, SEQ_LEN) for case in MASKS)]


def _convert(convert: Any, mask: AttnMask) -> Any:
    """The result of a conversion, or the reason of its refusal, in one line."""
    try:
        return convert(mask)
    except Unconvertible as refusal:
        reason = str(refusal)
    assert len(reason.splitlines()) == 1
    return reason


def _varlen(mask: AttnMask) -> Varlen | None:
    varlen = _convert(to_varlen, mask)
    if isinstance(varlen, str):
        assert "a variable-length call supports consecutive documents" in varlen
        return None
    assert (varlen.to_dense() == mask.to_dense()).all()
    lengths = ((varlen.cu_seqlens_q, varlen.max_q), (varlen.cu_seqlens_k, varlen.max_k))
    for cu_seqlens, longest in lengths:
        assert cu_seqlens.dtype == np.int32
        assert np.diff(cu_seqlens).max() == longest
    return varlen


def _flashmask(mask: AttnMask) -> FlashMaskColumns | None:
    columns = _convert(to_flashmask, mask)
    if isinstance(columns, str):
        hidden = np.diff(np.pad(~mask.to_dense(), ((1, 1), (0, 0))).astype(int), axis=0) == 1
        assert hidden.sum(axis=0).max() > 2
        return None
    assert columns.startend.dtype == np.int32
    assert columns.startend.shape[:3] == (1, 1, mask.seq_k)
    assert columns.startend.min(initial=0) >= 0
    assert columns.startend.max(initial=0) <= mask.seq_q
    assert (columns.to_dense(mask.seq_q) == mask.to_dense()).all()
    return columns


def _bsr(mask: AttnMask, block_q: int, block_k: int) -> Bsr:
    bsr = to_bsr(mask, block_q, block_k)
    dense = mask.to_dense()
    assert (bsr.to_dense() == dense).all()
    assert bsr.indptr.dtype == bsr.indices.dtype == np.int32
    assert len(bsr.indptr) == -(-mask.seq_q // block_q) + 1
    rows = [bsr.indices[a:b] for a, b in zip(bsr.indptr[:-1], bsr.indptr[1:], strict=True)]
    for r, columns in enumerate(rows):
        strip = dense[r * block_q : (r + 1) * block_q]
        blocks = (strip[:, k0 : k0 + block_k] for k0 in range(0, mask.seq_k, block_k))
        kept = [c for c, block in enumerate(blocks) if block.any()]
        assert columns.tolist() == kept
    if bsr.packed is None:
        assert mask.seq_k % block_k == 0 or not len(bsr.indices) or dense[:, -1].sum() == 0
    else:
        assert bsr.packed.dtype == np.uint8
        assert len(bsr.packed) == -(-len(bsr.indices) * block_q * block_k // 8)
        assert not bsr.blocks()[:, : mask.seq_q].all()
    return bsr


@pytest.mark.parametrize(("case", "seq_len"), CASES)
def test_patterns(case: str, seq_len: int) -> None:
    mask = masks.build(case, seq_len)
    _varlen(mask)
    _flashmask(mask)
    for blocks in ((16, 16), (24, 7), (1, 3), (128, 64)):
        _bsr(mask, *blocks)


@MANY
@given(any_mask(), st.integers(1, 9), st.integers(1, 9))
def test_any_mask(mask: AttnMask, block_q: int, block_k: int) -> None:
    _varlen(mask)
    _flashmask(mask)
    _bsr(mask, block_q, block_k)


@MANY
@given(mask_cases.single_slices())
def test_any_band(mask: AttnMask) -> None:
    _varlen(mask)
    assert _flashmask(mask) is not None  # a band hides at most two intervals of each key


@st.composite
def documents(draw: st.DrawFn) -> tuple[AttnMask, list[tuple[int, int]], int, int]:
    """A mask of random documents under one window, with their (queries, keys) and its bounds."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
    left, right = draw(st.integers(-1, 6)), draw(st.integers(-1, 6))
    rows, q0, k0 = [], 0, 0
    for n, m in sizes:
        low = -99 if left < 0 else k0 - q0 + m - n - left
        high = 99 if right < 0 else k0 - q0 + m - n + right
        rows.append((q0, q0 + n, k0, k0 + m, low, high))
        q0, k0 = q0 + n, k0 + m
    return AttnMask.from_slices(q0, k0, rows), sizes, left, right


@MANY
@given(documents())
def test_documents_under_a_window_always_convert(
    case: tuple[AttnMask, list[tuple[int, int]], int, int],
) -> None:
    mask, sizes, left, right = case
    varlen = _varlen(mask)
    assert varlen is not None
    if varlen.documents == len(sizes):  # neighbours may merge, such as single tokens
        assert np.diff(varlen.cu_seqlens_q).tolist() == [n for n, _ in sizes]
        assert np.diff(varlen.cu_seqlens_k).tolist() == [m for _, m in sizes]
        cut_left = [left >= 0 and left < m - 1 for _, m in sizes]
        cut_right = [right >= 0 and right < n - 1 for n, _ in sizes]
        assert varlen.left == (left if any(cut_left) else -1)
        assert varlen.right == (right if any(cut_right) else -1)


@pytest.mark.parametrize(
    ("case", "seq_len", "expected"),
    [
        ("full", 9, (1, -1, -1)),
        ("full:seq_q=4", 9, (1, -1, -1)),
        ("causal", 9, (1, -1, 0)),
        ("causal:seq_q=4", 9, (1, -1, 0)),
        ("causal:seq_q=12", 5, (1, -1, 0)),
        ("sliding_window:window=2", 9, (1, 2, 2)),
        ("sliding_window_causal:window=3", 9, (1, 3, 0)),
        ("full_document:doc_lens=[1,4,3]", 8, (3, -1, -1)),
        ("causal_document:doc_lens=[1,4,3]", 8, (3, -1, 0)),
    ],
)
def test_windows_and_documents(case: str, seq_len: int, expected: tuple[int, int, int]) -> None:
    varlen = to_varlen(masks.build(case, seq_len))
    assert (varlen.documents, varlen.left, varlen.right) == expected
    assert varlen.causal == (expected[2] == 0)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("prefix_lm_causal:prefix_len=50", "share queries or keys"),
        ("streaming:num_sinks=4,window=37", "share queries or keys"),
        ("global_sliding_window:num_global=9,window=33", "share queries or keys"),
        (f"share_question:{DOCUMENTS}", "share queries or keys"),
        (f"prefix_lm_document:prefix_len=30,{DOCUMENTS}", "share queries or keys"),
        ("causal:offset=-5", "last query or key"),
        ("causal:offset=5", ""),
    ],
)
def test_masks_that_a_variable_length_call_cannot_express(case: str, reason: str) -> None:
    mask = masks.build(case, SEQ_LEN)
    if not reason:
        assert to_varlen(mask).right == 5
        return
    with pytest.raises(Unconvertible, match=reason):
        to_varlen(mask)


def test_documents_that_differ_are_refused() -> None:
    two = [(0, 4, 0, 4, -9, 1), (4, 8, 4, 8, -9, 2)]
    with pytest.raises(Unconvertible, match="see 1 and 2 tokens ahead"):
        to_varlen(AttnMask.from_slices(8, 8, two))
    mixed = [(0, 4, 0, 4, -9, 0), (4, 8, 4, 8, -9, 9)]
    with pytest.raises(Unconvertible, match="some documents see 0 tokens ahead, others all"):
        to_varlen(AttnMask.from_slices(8, 8, mixed))
    with pytest.raises(Unconvertible, match="no visible pairs"):
        to_varlen(AttnMask.from_slices(8, 8, []))
    for rows in ([(0, 4, 0, 8, -9, 9)], [(0, 8, 0, 4, -9, 9)]):
        with pytest.raises(Unconvertible, match="last query or key"):
            to_varlen(AttnMask.from_slices(8, 8, rows))
    for rows in ([(4, 8, 0, 8, -9, 9)], [(0, 8, 4, 8, -9, 9)]):
        with pytest.raises(Unconvertible, match="some queries or keys have no visible pairs"):
            to_varlen(AttnMask.from_slices(8, 8, rows))


def test_a_document_in_several_slices_is_merged() -> None:
    rows = [(0, 3, 0, 3, -9, 9), (3, 5, 0, 3, -9, 9), (0, 5, 3, 5, -9, 9), (5, 9, 5, 9, -9, 9)]
    assert to_varlen(AttnMask.from_slices(9, 9, rows)).cu_seqlens_q.tolist() == [0, 5, 9]


def test_swapped_or_shifted_window_bounds_give_another_mask() -> None:
    varlen = to_varlen(masks.build("sliding_window_causal:window=3", 9))
    correct = varlen.to_dense()
    for left, ahead in ((0, 3), (2, 0), (4, 0), (3, 1), (3, -1)):
        wrong = Varlen(
            varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_q, varlen.max_k, left, ahead
        )
        assert (wrong.to_dense() != correct).any()
    bottom_right = to_varlen(masks.build("causal:seq_q=4", 9)).to_dense()
    assert bottom_right[0].tolist() == [True] * 6 + [False] * 3


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("full", (False, 2)),
        ("causal", (True, 1)),
        ("causal:seq_q=40", (True, 1)),
        ("causal:offset=-5", (True, 2)),
        ("causal:offset=5", (False, 2)),
        ("sliding_window:window=40", (False, 2)),
        ("sliding_window_causal:window=40", (True, 1)),
        (f"full_document:{DOCUMENTS}", (False, 2)),
        (f"causal_document:{DOCUMENTS}", (True, 1)),
        ("prefix_lm_causal:prefix_len=50", (False, 2)),
        (f"share_question:{DOCUMENTS}", (True, 1)),
        (f"causal_blockwise:{DOCUMENTS}", (True, 2)),
        ("global_sliding_window:num_global=9,window=33", (False, 4)),
        (f"block_causal_document:block_size=32,{DOCUMENTS}", (False, 2)),
        ("streaming:num_sinks=4,window=37", (True, 1)),
    ],
)
def test_flashmask_uses_the_fewest_numbers_per_key(case: str, form: tuple[bool, int]) -> None:
    columns = to_flashmask(masks.build(case, SEQ_LEN))
    assert (columns.causal, columns.startend.shape[3]) == form


def test_the_columns_of_flashmask() -> None:
    def columns(case: str, seq_len: int = 5) -> list[list[int]]:
        startend: list[list[int]] = (
            to_flashmask(masks.build(case, seq_len)).startend[0, 0].T.tolist()
        )
        return startend

    assert columns("causal") == [[5] * 5]
    assert columns("full") == [[5] * 5, [0] * 5]
    assert columns("sliding_window_causal:window=1") == [[2, 3, 4, 5, 5]]
    assert columns("sliding_window:window=1") == [[2, 3, 4, 5, 5], [0, 0, 1, 2, 3]]
    assert columns("causal_document:doc_lens=[2,3]") == [[2, 2, 5, 5, 5]]


def test_three_hidden_intervals_are_refused() -> None:
    rows = [(1, 2, 0, 3, -9, 9), (3, 4, 0, 3, -9, 9)]
    with pytest.raises(Unconvertible, match="key 0 is hidden from 3 intervals of queries"):
        to_flashmask(AttnMask.from_slices(6, 4, rows))
    columns = _flashmask(AttnMask.from_slices(6, 4, [(0, 1, 0, 3, -9, 9), (3, 4, 0, 3, -9, 9)]))
    assert columns is not None
    assert columns.startend[0, 0, 0].tolist() == [4, 6, 1, 3]


def test_bits_are_stored_only_if_a_block_is_partial() -> None:
    assert to_bsr(masks.build("full", 32), 8, 8).packed is None
    assert (
        to_bsr(masks.build("full", 32, seq_q=27), 8, 8).packed is None
    )  # queries may end inside a block
    assert to_bsr(masks.build("full", 30), 8, 8).packed is not None
    bsr = to_bsr(masks.build("causal", 4), 2, 2)
    assert bsr.indptr.tolist() == [0, 1, 3]
    assert bsr.indices.tolist() == [0, 0, 1]
    assert bsr.packed is not None
    assert bsr.packed.tolist() == [0b11111101, 0b1101]
    assert to_bsr(AttnMask.from_slices(4, 4, []), 2, 2).indptr.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 1"):
        to_bsr(masks.build("full", 4), 0, 2)


def test_a_long_mask_is_expanded_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = to_bsr(masks.build("causal", 400), 8, 16)
    monkeypatch.setattr("cpbench.masks.convert_library._MAX_CELLS", 8 * 16 * 24)
    in_chunks = to_bsr(masks.build("causal", 400), 8, 16)
    assert at_once.packed is not None
    assert in_chunks.packed is not None
    assert (at_once.packed == in_chunks.packed).all()


def test_long_masks_convert_without_a_dense_one() -> None:
    mask = masks.build("causal_document:corpus=prolong64k", 1 << 18)
    assert to_varlen(mask).cu_seqlens_q[-1] == 1 << 18
    assert to_flashmask(mask).startend.shape == (1, 1, 1 << 18, 1)
