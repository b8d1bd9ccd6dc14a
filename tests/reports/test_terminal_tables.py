"""Tables for a terminal: wrapped headings, broken names, further tables, labels."""

from __future__ import annotations

from cpbench.reports.tables.markup import MARKUPS
from cpbench.reports.tables.terminal import fit_table, fit_tables


def test_a_table_for_a_terminal() -> None:
    rows = [{"name": "a", "n": "1.5", "empty": ""}, {"name": "bb", "n": "10", "empty": ""}]
    table = fit_table(rows, 80)
    assert [table.head, *table.bodies] == [["name    n", "----  ---"], ["a     1.5"], ["bb     10"]]
    assert MARKUPS["table"].table([{"x": ["a", "b"]}]) == ["x", "---", "a b", ""]


def test_headings_are_wrapped_before_texts_and_names_stay_whole() -> None:
    rows = [{"name": "full by rows", "fastest on": "3"}]
    assert fit_table(rows, 28).lines == ["name          fastest on", f"{'-' * 12}  {'-' * 10}",
                                         "full by rows           3"]  # fmt: skip
    assert fit_table(rows, 21).lines == ["name          fastest", f"{'':12}       on",
                                         f"{'-' * 12}  {'-' * 7}",
                                         "full by rows        3"]  # fmt: skip
    assert fit_table(rows, 18).bodies == [["full by          3", "rows"]]
    narrow = fit_table(rows, 3)
    assert not narrow.fits
    assert max(map(len, narrow.head)) == 13  # words are not broken


def test_names_are_broken_inside_only_where_slashes_do_not_suffice() -> None:
    rows = [{"method": "ring_flash_attn.zigzag/zigzag bands", "v": "x_1.5 flash_attn.3"}]
    assert fit_table(rows, 40).bodies == [
        ["ring_flash_attn.zigzag/  x_1.5", "zigzag bands             flash_attn.3"]
    ]
    assert not fit_table(rows, 32).fits
    (table,) = fit_tables(rows, 32)
    assert table.bodies == [
        ["ring_flash_      x_1.5 flash_", "attn.zigzag/     attn.3", "zigzag bands"]
    ]


def test_columns_that_do_not_fit_are_in_further_tables() -> None:
    rows = [
        {"method": f"usp:ulysses={n}/zigzag bands", "empty": "", "ms": "1234.5", "MB": "1,234.5",
         "from": f"moba:top_k={n}", "peak": "1.0"}
        for n in (8, 16)
    ]  # fmt: skip
    (whole,) = fit_tables(rows, 80)
    assert whole == fit_table(rows, 80)
    first, second = fit_tables(rows, 26)
    assert [first.head[0].split(), second.head[0].split()] == [
        ["method", "ms", "MB"], ["method", "from", "peak"]
    ]  # fmt: skip
    assert first.bodies[0][0].endswith("  1,234.5")
    assert second.bodies[1][0].endswith("   1.0")
    assert not first.legend
    assert second.legend == {
        "usp#1": "usp:ulysses=8", "usp#2": "usp:ulysses=16", "moba#1": "moba:top_k=8",
        "moba#2": "moba:top_k=16",
    }  # fmt: skip
    assert max(len(line) for table in (first, second) for line in table.lines) <= 26


def test_long_names_get_labels_with_a_legend() -> None:
    rows = [
        {"mask": mask, "method": f"usp:ulysses=8/{layout} bands", "ms": "1.5"}
        for mask in ("sliding_window:window=512", "sliding_window:window=1024", "causal",
                     "share_question:doc_lens=[1,2,3]")
        for layout in ("zigzag", "dispatch")
    ]  # fmt: skip
    assert not fit_table(rows, 120).legend
    table = fit_table(rows, 48)
    assert table.fits
    assert table.legend == {
        "sliding_window#1": "sliding_window:window=512",
        "sliding_window#2": "sliding_window:window=1024",
        "share_question": "share_question:doc_lens=[1,2,3]",
        "usp": "usp:ulysses=8",
    }
    assert table.bodies[0] == ["sliding_window#1  usp/zigzag bands    1.5"]
    assert max(map(len, table.lines)) <= 48
    assert "usp: usp:ulysses=8" in table.lines
    with_plain = fit_table([*rows, {"mask": "share_question", "method": "x", "ms": "1"}], 48)
    assert with_plain.legend["share_question#1"] == "share_question:doc_lens=[1,2,3]"
