"""Document lengths: seeds, statistics of the corpora, files, and invalid input."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench import masks
from cpbench.masks import documents

CORPORA = ("pile", "prolong64k", "prolong512k")


def _digest(lens: np.ndarray) -> str:
    return hashlib.sha256(lens.astype("<i8").tobytes()).hexdigest()[:12]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 200_000), st.sampled_from(CORPORA), st.integers(0, 1 << 40))
def test_lengths_tile_the_sequence(seq_len: int, corpus: str, seed: int) -> None:
    for sample in (documents.from_corpus, documents.long_mixture):
        lens = sample(seq_len, corpus, seed)
        assert lens.dtype == np.int64
        assert lens.ndim == 1
        assert lens.min() >= 1
        assert lens.sum() == seq_len
        assert (sample(seq_len, corpus, seed) == lens).all()


def test_a_longer_sequence_starts_with_the_same_documents() -> None:
    short = documents.from_corpus(20_000, "prolong64k", 5)
    longer = documents.from_corpus(900_000, "prolong64k", 5)
    assert len(short) > 10
    assert (short[:-1] == longer[: len(short) - 1]).all()
    assert short[-1] <= longer[len(short) - 1]


def test_seeds_differ() -> None:
    assert len({_digest(documents.from_corpus(8192, "pile", seed)) for seed in range(20)}) == 20


# If these change, so do all benchmarks with document masks.
FROZEN = {
    ("from_corpus", "pile", 0): "20e237ba7250",
    ("from_corpus", "prolong64k", 1): "7829f10ff9fb",
    ("from_corpus", "prolong512k", 12345): "fea86db6ddb1",
    ("long_mixture", "pile", 0): "6a48f2d4ecc5",
}


@pytest.mark.parametrize("which", FROZEN)
def test_lengths_of_a_seed_never_change(which: tuple[str, str, int]) -> None:
    function, corpus, seed = which
    assert _digest(getattr(documents, function)(131_072, corpus, seed)) == FROZEN[which]


@pytest.mark.parametrize("corpus", CORPORA)
def test_sampled_lengths_follow_the_histogram(corpus: str) -> None:
    bins = documents._histogram(corpus)
    lens = documents.from_corpus(1 << 31, corpus, 7)[:-1]
    low = np.maximum(bins[:, 0], 1)
    counts = np.histogram(lens, bins=[*low, bins[-1, 1]])[0]
    share = bins[:, 2] / bins[:, 2].sum()
    # Binomial counts are within five standard deviations in every bin.
    error = abs(counts - share * len(lens)) / np.sqrt(len(lens) * share * (1 - share))
    assert len(lens) > 50_000
    assert error.max() < 5
    for n in np.flatnonzero(share > 0.01):  # lengths are uniform inside a bin
        inside = lens[(lens >= low[n]) & (lens < bins[n, 1])]
        spread = (bins[n, 1] - low[n]) / np.sqrt(12 * len(inside))
        assert abs(inside.mean() - (low[n] + bins[n, 1] - 1) / 2) < 5 * spread


def test_one_mask_seed_is_not_enough_for_a_benchmark() -> None:
    # Area of causal_document over causal at 48K tokens, 10th and 90th percentile over seeds: about
    # 0.03 and 0.5 (for the pile, whose documents are shorter, 0.04 and 0.17).
    seq_len = 48 * 1024
    ratios = []
    for seed in range(400):
        lens = documents.from_corpus(seq_len, "prolong64k", seed)
        ratios.append((lens * (lens + 1)).sum() / (seq_len * (seq_len + 1)))
    low, high = np.percentile(ratios, [10, 90])
    assert 0.02 < low < 0.04
    assert 0.4 < high < 0.7


def test_long_mixture_shares() -> None:
    seq_len = 1 << 20
    lens = documents.long_mixture(seq_len, "prolong64k", 0)
    short = documents.from_corpus(seq_len - seq_len * 6 // 10, "prolong64k", 0)
    long = sorted(lens.tolist())
    for length in short.tolist():
        long.remove(length)
    assert sum(long) == seq_len * 6 // 10
    assert all(8192 <= length < 30_720 for length in long[1:])  # one is truncated
    assert long[0] < 30_720
    half = len(lens) // 2
    assert max(lens[:half]) >= 8192
    assert max(lens[half:]) >= 8192


@pytest.mark.parametrize("seq_len", [1, 2, 10, 4096, 13_000])
def test_long_mixture_of_few_tokens_has_one_truncated_long_document(seq_len: int) -> None:
    lens = documents.long_mixture(seq_len, "pile", 3)
    assert lens.sum() == seq_len
    if seq_len > 1:
        assert seq_len * 6 // 10 in lens


def test_vectorised_over_documents() -> None:
    # The number of Python calls must not grow with the number of documents.
    import cProfile
    import pstats

    def calls(seq_len: int) -> int:
        profile = cProfile.Profile()
        profile.runcall(lambda: masks.patterns.block_causal_document(seq_len, corpus="pile"))
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls(1000)
    assert calls(4_000_000) < 2 * calls(40_000) + 200


# --- files ------------------------------------------------------------------------------------


def _write(folder: Path, kind: str, lens: list[int]) -> str:
    path = folder / f"lens.{kind}"
    if kind == "txt":
        path.write_text("\n".join(map(str, lens)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(lens))
    elif kind == "jsonl":
        path.write_text("".join(f'{{"tokens": {n}, "name": "a"}}\n' for n in lens) + "\n")
    elif kind == "csv":
        path.write_text("name,tokens\n" + "".join(f'"a,b",{n}\n' for n in lens))
    elif kind == "npy":
        np.save(path, np.array(lens, dtype=np.int32))
    else:
        pd = pytest.importorskip("pandas")
        pd.DataFrame({"tokens": lens, "name": ["a"] * len(lens)}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("kind", ["txt", "json", "jsonl", "npy", "csv", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    file = _write(tmp_path, kind, [5, 1, 4])
    column = "tokens" if kind in ("jsonl", "csv", "parquet") else None
    for seq_len, expected in [
        (10, [5, 1, 4]),
        (8, [5, 1, 2]),
        (6, [5, 1]),
        (3, [3]),
        (23, [5, 1, 4, 5, 1, 4, 3]),
    ]:
        lens = documents.from_file(seq_len, file, column)
        assert lens.dtype == np.int64
        assert lens.tolist() == expected
    spec = f"causal_document:file={file}" + (f",column={column}" if column else "")
    assert masks.build(spec, 10).area == 15 + 1 + 10


def test_the_only_column_of_a_parquet_file_needs_no_name(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    path = tmp_path / "one.parquet"
    pd.DataFrame({"n": [3, 4]}).to_parquet(path)
    assert documents.from_file(7, str(path)).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xls", b"1\n", "must end in one of .txt, .json, .jsonl, .npy, .csv, .parquet"),
        ("a.csv", b"", "needs column=\u2026, one of: "),
        ("a.csv", b"n\n3\nx\n", "line 3: n = 'x' is no integer"),
        ("a.csv", b"n,m\n3,4\n", "needs column=\u2026, one of: n, m"),
        ("a.jsonl", b"3\n[4]\n", "line 2: [4] is no integer"),
        ("a.jsonl", b"3\ntrue\n", "line 2: True is no integer"),
        ("a.jsonl", b'{"n": 3, "m": 4}\n', "needs column=\u2026, one of: n, m"),
        ("a.jsonl", b"{\n", "cannot be read: "),
        ("a.txt", b"", "holds no lengths; give at least one"),
        ("a.txt", b"\n \n", "holds no lengths; give at least one"),
        ("a.txt", b"3\n0\n", "must hold integers from 1 to 2**40; number 2 is 0"),
        ("a.txt", b"3\n\n-4\n", "must hold integers from 1 to 2**40; number 2 is -4"),
        ("a.txt", b"3\n\n4.5\n", "line 3: '4.5' is not an integer; write one length per line"),
        ("a.txt", b"3 4\n", "line 1: '3 4' is not an integer"),
        ("a.txt", b"99999999999999999999\n", "a length that does not fit 64 bits"),
        ("a.txt", b"\xff\xfe\n", "cannot be read: "),
        ("a.json", b"[]", "holds no lengths; give at least one"),
        ("a.json", b"[1, 2.5]", "must hold one JSON list of integers"),
        ("a.json", b'{"a": 1}', "must hold one JSON list of integers"),
        ("a.json", b"[1, true]", "must hold one JSON list of integers"),
        ("a.json", b"[1, 2", "cannot be read: "),
        ("a.npy", b"nonsense", "cannot be read: "),
        ("a.parquet", b"nonsense", "cannot be read: "),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    _refused(message, 10, str(path))


def _refused(message: str, *args: Any) -> None:
    with pytest.raises(ValueError) as caught:
        documents.from_file(*args)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert repr(args[1]) in text  # names the file


def test_bad_arrays_and_columns(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    file = str(tmp_path / "a.npy")
    np.save(file, np.ones((2, 2), dtype=np.int64))
    _refused("must be a flat list of integers >= 1, not a 2-D array of integers", 10, file)
    np.save(file, np.ones(2))
    _refused("must be a flat list of integers >= 1, not floats", 10, file)
    _refused("column goes with .jsonl, .csv, .parquet files", 10, file, "n")
    file = str(tmp_path / "a.parquet")
    pd.DataFrame({"n": [1, 2], "text": ["a", "b"], "gap": [1, None]}).to_parquet(file)
    _refused("needs column=…, one of: n, text, gap", 10, file)
    _refused("has no column 'm'; it has n, text, gap", 10, file, "m")
    _refused("must be a flat list of integers >= 1, not text", 10, file, "text")
    _refused("column 'gap' holds 1 nulls", 10, file, "gap")
    _refused("there is no file", 10, str(tmp_path / "none.json"))


def test_sources_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of doc_lens, corpus, file, not corpus and file$"):
        documents.lengths(8, corpus="pile", file="x.txt")
    with pytest.raises(ValueError, match="seed goes with corpus, not with file"):
        documents.lengths(8, file="x.txt", seed=1)


def test_default_is_the_pile_with_seed_0() -> None:
    expected = documents.from_corpus(5000, "pile", 0)
    for params in ({}, {"corpus": "pile"}, {"seed": 0}, {"corpus": "pile", "seed": 0}):
        assert (documents.lengths(5000, **params) == expected).all()  # type: ignore[arg-type]
    assert documents.corpora() == CORPORA
    assert documents.starts(expected)[0] == 0


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        (np.array([2**63 + 5, 3], dtype=np.uint64), "number 1 is 9223372036854775813"),
        (np.array([3, 2**64 - 1], dtype=np.uint64), "number 2 is 18446744073709551615"),
        ([2**40] * 3, "must sum to at most 2**40"),
        ([2**63 - 1, 2**63 - 1, 10], "number 1 is 9223372036854775807"),
        ([2**64, 3], "must be a flat list of integers"),
    ],
)
def test_lengths_that_do_not_fit_64_bits_are_refused(lens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        documents.from_list(8, lens)


def test_unsigned_lengths() -> None:
    for dtype in (np.uint8, np.uint32, np.uint64, np.int16):
        assert documents.from_list(8, np.array([5, 3], dtype=dtype)).tolist() == [5, 3]


def test_masks_from_cumulative_lengths() -> None:
    mask = masks.from_cu_seqlens(np.array([0, 5, 5, 8], dtype=np.uint64))
    assert mask == masks.build("causal_document", 8, doc_lens=[5, 3])
    assert masks.from_cu_seqlens([0, 5, 8], causal=False) == masks.build(
        "full_document", 8, doc_lens=[5, 3]
    )
    aligned = masks.from_cu_seqlens([0, 2, 3], [0, 4, 9])
    assert aligned.to_dense().astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("cumulative", "message"),
    [
        ([0, 5, 3, 8], "must start at 0 and never fall, unlike [0, 5, 3, 8]"),
        ([1, 5], "must start at 0"),
        (np.array([0, 2**63 + 1], dtype=np.uint64), "integers up to 2**40"),
        ([0.0, 4.0], "integers up to 2**40"),
        ([0], "at least two"),
    ],
)
def test_cumulative_lengths_that_are_refused(cumulative: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        masks.from_cu_seqlens(cumulative)


@pytest.mark.parametrize(
    "slices", [[[0, 4, 0, 4, 0.5, 1]], [[0, 4, 0, 4, -(2**62), 0]], [[0, 4, 0]], [["a"] * 6]]
)
def test_slices_that_are_refused(slices: Any) -> None:
    with pytest.raises(ValueError, match="six integers"):
        masks.AttnMask.from_slices(4, 4, slices)


@pytest.mark.parametrize(
    ("seq_len", "expected", "how"),
    [(7, [3, 4], None), (6, [3, 3], "cut"), (2, [2], "cut"), (17, [3, 4, 3, 4, 3], "repeated")],
)
def test_one_list_for_several_lengths(seq_len: int, expected: list[int], how: str | None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert documents.from_list(seq_len, [3, 4]).tolist() == expected
    texts = [str(warning.message) for warning in caught]
    said = f"doc_lens are 7 tokens, seq_len is {seq_len}: the list is {how}"
    assert texts == ([said] if how else [])
