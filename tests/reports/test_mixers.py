"""Reports of sequence mixers: beside attention, never ranked with it."""

from __future__ import annotations

from made_records import record, report_text, run_of, section_lines

from cpbench.reports.collection import merge_runs
from cpbench.reports.tables.selection import mixer_rows
from cpbench.reports.tables.summary import method_name, rank_methods
from cpbench.results.record import Record

LENGTHS = {1024: 0.5, 4096: 2.0, 16384: 9.0}  # times of attention over those of the mixer


def records() -> list[Record]:
    made = []
    for tokens, ratio in LENGTHS.items():
        made += [
            record("ssd", 1.0, seq_len=tokens, computes="ssd"),
            record("ssd:kernel=triton", 2.0, seq_len=tokens, computes="ssd"),
            record("bands", ratio, seq_len=tokens),
            record("flex", 3 * ratio, seq_len=tokens),
        ]
    return made


def test_mixers_are_ranked_with_those_of_their_recurrence_alone() -> None:
    rankings = rank_methods(merge_runs({"x": run_of(*records())}).table)
    found = {
        (one.problem["computes"], one.problem["seq_len"]): [
            method_name(row) for _, row in one.rows.iterrows()
        ]
        for one in rankings
    }
    assert found == {
        (what, tokens): names
        for tokens in LENGTHS
        for what, names in (
            ("attention", ["bands", "flex"]), ("ssd", ["ssd", "ssd:kernel=triton"])
        )
    }  # fmt: skip


def test_the_length_from_which_a_mixer_is_faster() -> None:
    table = merge_runs({"x": run_of(*records())}).table
    ours, triton = mixer_rows(table, ["tokens", "computes"])
    assert ours == {
        "method": "ssd",
        "faster from": "4k",
        "speedup over attention": "1k: 0.50x, 4k: 2.00x, 16k: 9.00x",
        # 64 + 64 elements of 4 bytes a token, over 64 x 64 elements of 4 bytes
        "KV over state": "1k: 32x, 4k: 128x, 16k: 512x",
    }
    assert triton["faster from"] == "16k"
    text = report_text(*records())
    lines = section_lines(text, "Sequence mixers: length from which each is faster than exact")
    assert any("ssd" in line and "4k" in line for line in lines)


def test_a_report_of_attention_says_nothing_of_mixers() -> None:
    text = report_text(*(one for one in records() if one.computes == "attention"))
    assert "mixer" not in text
    assert "computes" not in text
