"""Masks by name: registration, specs, files, plugins, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import LIMIT_S
from paths import ROOT

from cpbench import masks
from cpbench.core import registry
from cpbench.core.registry import RegistrationError
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask

UNCACHED_PLUGINS = masks._plugins.__wrapped__


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
    ("casual", 8, {}, "no mask 'casual'; there are: bigbird, block_causal_document, block_"),
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
    ("full_document:doc_lens=[]", 8, {}, "doc_lens holds no lengths; give at least one"),
    (
        "full_document:doc_lens=8",
        8,
        {},
        "doc_lens must be a flat list of integers >= 1, not a single value (8)",
    ),
    (
        "full_document",
        8,
        {"doc_lens": [9, -1]},
        "doc_lens must hold integers from 1 to 2**40; number 2 is",
    ),
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
    ("full_document:column=n", 8, {}, "column goes with file (a table), and no file is"),
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
