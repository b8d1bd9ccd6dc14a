"""Every mask pattern, compared with its area formula and, pair by pair, its definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import LIMIT_S
from paths import ROOT

from cpbench import masks
from cpbench.core import registry
from cpbench.core.registry import RegistrationError
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask

MANY = settings(max_examples=60, deadline=None)

UNCACHED_PLUGINS = masks._plugins.__wrapped__

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
    assert per_head or mask.overlap_area() == 0 or len(mask.slices) > 5000


# --- building ---------------------------------------------------------------------------------


def test_all_static_patterns_are_registered() -> None:
    expected = """block_causal_document causal causal_blockwise causal_document causal_document_long
        full full_document full_document_long global_sliding_window prefix_lm_causal
        prefix_lm_document share_question sliding_window sliding_window_causal streaming"""
    assert set(expected.split()) <= set(masks.names())
    assert list(masks.names()) == sorted(masks.names())


def test_describe_gives_summaries_and_defaults() -> None:
    info = masks.describe()["sliding_window_causal"]
    assert info.summary.startswith("0 <= i - j <= window")
    assert dict(info.params) == {"window": 1024}
    info = masks.describe()["prefix_lm_document"]
    assert list(info.params) == ["prefix_len", "doc_lens", "corpus", "seed", "file", "column"]
    assert (info.params["corpus"], info.params["seed"]) == ("pile", 0)


def test_equivalent_specs_build_the_same_mask() -> None:
    ways: list[Any] = [
        "sliding_window:window=7",
        {"name": "sliding_window", "window": 7},
        Spec.of("sliding_window", window=7),
    ]
    first = masks.build("sliding_window", seq_len=50, window=np.int64(7))
    for way in ways:
        assert masks.build(way, 50) is first  # from the cache
    listed = masks.build("full_document", 6, doc_lens=np.array([2, 4]))
    assert listed is masks.build("full_document:doc_lens=[2,4]", 6)
    assert masks.build("causal", 5, offset=None) is masks.build("causal", 5)


BAD: list[tuple[Any, Any, dict[str, Any], str]] = [
    ("casual", 8, {}, "no mask 'casual'; there are: block_causal_document, block_sparse_"),
    ("causal:window=3", 8, {}, "mask 'causal' has no parameter 'window'; it takes seq_q, offset"),
    ("full", 8, {"w": 1}, "mask 'full' has no parameter 'w'; it takes seq_q"),
    ("full", 0, {}, "seq_len must be an integer >= 1, not 0"),
    ("full", "8k", {}, "seq_len must be an integer >= 1, not '8k'"),
    ("full", True, {}, "seq_len must be an integer >= 1, not True"),
    ("full:seq_q=0", 8, {}, "seq_q must be an integer >= 1, not 0"),
    ("causal:offset=0.5", 8, {}, "offset must be an integer, not 0.5"),
    ("sliding_window:window=-1", 8, {}, "window must be an integer >= 0, not -1"),
    ("sliding_window:window=wide", 8, {}, "window must be an integer >= 0, not 'wide'"),
    ("sliding_window_causal", 8, {"window": 2.0}, "window must be an integer >= 0, not 2.0"),
    ("sliding_window_causal", 8, {"window": True}, "window must be an integer >= 0, not True"),
    ("sliding_window:window=3", 8, {"window": 3}, "'window' is given both in "),
    ("sliding_window", 8, {"window": {}}, "window must be a number, a string, a boolean or a list"),
    ("prefix_lm_causal:prefix_len=0", 8, {}, "prefix_len must be an integer >= 1, not 0"),
    ("prefix_lm_document:prefix_len=-3", 8, {}, "prefix_len must be an integer >= 1, not -3"),
    (
        "global_sliding_window:num_global=9",
        8,
        {},
        "num_global must be an integer >= 0 and <= 8 (seq_len), not 9",
    ),
    ("streaming:num_sinks=9", 8, {}, "num_sinks must be an integer >= 0 and <= 8 (seq_len), not 9"),
    ("block_causal_document:block_size=0", 8, {}, "block_size must be an integer >= 1, not 0"),
    ("share_question:doc_lens=[8]", 8, {}, "share_question needs at least 2 documents, not 1: "),
    ("full_document:doc_lens=[3,4]", 8, {}, "doc_lens must sum to seq_len = 8, not to 7"),
    ("full_document:doc_lens=[]", 8, {}, "doc_lens holds no lengths; give at least one"),
    ("full_document:doc_lens=8", 8, {}, "doc_lens must be a flat list of integers >= 1, not 0-D "),
    ("full_document", 8, {"doc_lens": [9, -1]}, "doc_lens must hold integers >= 1; number 2 is -1"),
    ("full_document", 8, {"doc_lens": [8.0]}, "doc_lens must be a number, a string, a boolean or"),
    ("full_document:corpus=web", 8, {}, "no corpus 'web'; there are: pile, prolong64k, prolong"),
    ("full_document_long:corpus=5", 8, {}, "no corpus 5; there are: pile, "),
    ("full_document:seed=-1", 8, {}, "seed must be an integer >= 0, not -1"),
    ("full_document_long:seed=x", 8, {}, "seed must be an integer >= 0, not 'x'"),
    (
        "full_document:corpus=pile,doc_lens=[8]",
        8,
        {},
        "document lengths come from one of doc_lens, corpus, file, not doc_lens and corpus",
    ),
    ("full_document:doc_lens=[8],seed=0", 8, {}, "seed goes with corpus, not with doc_lens"),
    ("full_document:column=n", 8, {}, "column goes with file (a .parquet file), and no file is"),
    ("full_document:file=no.txt", 8, {}, "there is no file 'no.txt' to read a mask from"),
    ("no.py:mine", 8, {}, "mask 'no.py:mine': there is no file 'no.py'"),
]


@pytest.mark.parametrize(("mask", "seq_len", "params", "message"), BAD)
def test_invalid_input_is_refused_in_one_line(
    mask: Any, seq_len: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        masks.build(mask, seq_len, **params)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_equal_values_of_other_types_are_refused() -> None:
    masks.build("sliding_window", 8, window=1)
    for value in (True, 1.0):
        with pytest.raises(ValueError, match="window must be an integer"):
            masks.build("sliding_window", 8, window=value)


def test_a_mask_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from cpbench.masks.attn_mask import AttnMask\n"
        "def diagonal(seq_len, *, shift=0):\n"
        '    """j = i + shift."""\n'
        "    rows = [(0, seq_len, 0, seq_len, shift, shift)]\n"
        "    return AttnMask.from_slices(seq_len, seq_len, rows)\n"
        "def bare(seq_len): pass\n"
    )
    name = f"{path}:diagonal"
    assert (masks.build(name, 5, shift=1).to_dense() == np.eye(5, k=1, dtype=bool)).all()
    assert list(masks.content_files(name)) == [str(path)]
    assert "diagonal" not in masks.names()
    with pytest.raises(ValueError, match="has no parameter 'x'; it takes shift"):
        masks.build(name, 5, x=1)
    with pytest.raises(ValueError, match="must be a function of seq_len with a docstring"):
        masks.build(f"{path}:bare", 5)


def _register_plugins(monkeypatch: pytest.MonkeyPatch, *functions: Any) -> None:
    class Point:
        value = "other_package:a_mask"

        def __init__(self, function: Any) -> None:
            self.load = lambda: function

    points = [Point(function) for function in functions]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setattr(masks, "_plugins", UNCACHED_PLUGINS)


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masks.GROUP == "cpbench.masks"

    def mine(seq_len: int, *, width: int = 2) -> AttnMask:
        """j < width."""
        return AttnMask.from_slices(seq_len, seq_len, [(0, seq_len, 0, width, -99, 99)])

    _register_plugins(monkeypatch, mine)
    assert "mine" in masks.names()
    assert masks.build("mine:width=3", 5).area == 15

    def causal(seq_len: int) -> AttnMask:
        """Another."""
        raise AssertionError

    _register_plugins(monkeypatch, causal)
    with pytest.raises(RegistrationError, match="'causal' is registered twice in "):
        masks.names()
    _register_plugins(monkeypatch, mine, mine)
    assert "mine" in masks.names()  # the same function twice
    _register_plugins(monkeypatch, 5)
    with pytest.raises(RegistrationError, match="is not a function: 5"):
        masks.names()


def test_pattern_refuses_taken_names_and_other_functions() -> None:
    def causal(seq_len: int) -> AttnMask:
        """Another."""
        raise AssertionError

    def no_default(seq_len: int, *, width: int) -> AttnMask:
        """Text."""
        raise AssertionError

    with pytest.raises(RegistrationError, match="'causal' is registered twice"):
        masks.pattern(causal)
    with pytest.raises(RegistrationError, match="'width' must be a keyword with a default"):
        masks.pattern(no_default)


def test_content_files_follow_content(tmp_path: Path) -> None:
    path = tmp_path / "lens.txt"
    path.write_text("2\n3\n")
    spec = f"full_document:file={path}"
    before = masks.content_files(spec)
    assert list(before) == [str(path)]
    assert len(before[str(path)]) == 64
    assert masks.build(spec, 5).area == 13
    assert masks.build("full_document", 5, file=path).area == 13
    path.write_text("1\n4\n")
    assert masks.content_files(spec) != before
    assert masks.build(spec, 5).area == 17
    assert masks.content_files("causal") == {}


def test_importing_masks_loads_no_heavy_package() -> None:
    heavy = ["torch", "matplotlib", "pandas", "pyarrow", "triton"]
    code = (
        "import sys; import cpbench.masks, cpbench.masks.convert, cpbench.masks.picture;"
        "cpbench.masks.build('causal_document', 4096);"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]"
