"""Reports of synthetic records: rankings, ties, sections, and lossless exports."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from made_records import record, report_text, section_lines, table_of

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.reports.columns import COLUMNS
from cpbench.reports.frame import load
from cpbench.reports.labels import format_megabytes, split_common_words, three_digits, wrap_name
from cpbench.reports.tables import render
from cpbench.reports.tables.markup import MARKUPS
from cpbench.reports.tables.summary import rank_methods


def test_fastest_and_lead() -> None:
    table = table_of(record("slow", 3.0), record("quick", 2.0), record("slower", 5.0))
    (ranking,) = rank_methods(table)
    assert list(ranking.rows["operator"]) == ["quick", "slow", "slower"]
    assert ranking.lead == pytest.approx(1.5)
    assert ranking.verdict == "won"


@pytest.mark.parametrize(
    ("ms", "noise", "verdict"),
    [(2.0, 0.01, "tie"), (2.01, 0.01, "tie"), (2.05, 0.01, "won"), (2.05, 0.05, "tie")],
)
def test_tie_within_noise(ms: float, noise: float, verdict: str) -> None:
    (ranking,) = rank_methods(table_of(record("a", 2.0, noise), record("b", ms, noise)))
    assert ranking.verdict == verdict


def test_code_files_are_ranked_and_data_files_define_the_problem() -> None:
    mine = record("./mine.py:OP", 2.0, content=(("./mine.py:OP", "abc"),))
    table = table_of(mine, record("bands", 3.0))
    (ranking,) = rank_methods(table)
    assert list(ranking.rows["operator"]) == ["./mine.py:OP", "bands"]
    assert list(ranking.rows["code"]) == ["abc", None]
    lengths = [record("bands", 1.0, content=(("lengths.json", digest),)) for digest in "xy"]
    assert len(rank_methods(table_of(*lengths))) == 2


def test_exposed_communication_has_a_spread() -> None:
    """100 ms, of which communication adds 20; alone it takes 80."""
    modes = {"whole": [98e3, 100e3, 102e3], "compute": [80e3] * 3, "transfer": [80e3] * 3}
    ring = record("bands", 100.0, strategy="ring", layout="zigzag", world_size=2)
    ring.exposure_us = {mode: {"fwd": [times, [1.0] * 3]} for mode, times in modes.items()}
    row = table_of(ring).iloc[0]
    assert (row["compute_ms"], row["transfer_ms"], row["exposed_ms"]) == (80.0, 80.0, 20.0)
    assert row["exposed"] == pytest.approx(0.2)
    assert row["hidden"] == pytest.approx(0.75)
    text = report_text(ring)
    assert "20±2" in text
    assert "75" in text
    ring.exposure_us["transfer"]["fwd"][0] = [4e3] * 3  # less than the noise: unknown
    assert pd.isna(table_of(ring).iloc[0]["hidden"])


def test_uncontested() -> None:
    (ranking,) = rank_methods(
        table_of(record("a", 2.0), record("b", status="unsupported", reason="no"))
    )
    assert ranking.lead is None
    lines = section_lines(report_text(record("a", 2.0)), "Fastest method per problem")
    assert "uncontested" in lines[2]


def test_problems_and_world_sizes_are_ranked_separately() -> None:
    rankings = rank_methods(
        table_of(
            record("a", 1.0),
            record("b", 2.0, seq_len=2048),
            record("c", 3.0, world_size=2),
            record("d", 4.0, dtype="bfloat16"),
            record("e", 5.0, seed=1),
        )
    )
    assert [len(ranking.rows) for ranking in rankings] == [1] * 5


def test_time_is_that_of_the_slowest_rank() -> None:
    two_ranks = record("a", strategy="ring", world_size=2)
    two_ranks.times_us = {"fwd": [[1e3] * 7, [4e3] * 7], "bwd": [[2e3] * 7, [1e3] * 7]}
    (row,) = table_of(two_ranks).to_dict("records")
    assert (row["time_ms"], row["fwd_ms"], row["bwd_ms"]) == (6.0, 4.0, 2.0)


def test_table() -> None:
    text = report_text(
        record("quick", 2.0),
        record("slow", 3.0),
        record("alike", 3.01, seq_len=4096),
        record("same", 3.0, seq_len=4096),
    )
    assert "# night: 4 cases, 4 ok" in text
    assert "Common to all cases: world size 1, fwd_bwd, float32, batch 1, 4:4 heads" in text
    head, _, *rows = section_lines(text, "Fastest method per problem")
    assert head.split() == ["mask", "tokens", "fastest", "ms", "GFLOP/s", "lead", "runner-up"]
    assert [row.split() for row in rows if row.startswith("causal")] == [
        ["causal", "1k", "quick", "2.00", "500", "1.50x", "slow"],
        ["causal", "4k", "same", "3.00", "333", "tie", "alike"],
    ]
    assert "quick is fastest on 1 of 2 problems, by 1.50x; 1 is a tie." in text
    assert [line.split()[0] for line in section_lines(text, "All cases, fastest first") if line][
        :5
    ] == [
        "method",
        "------",
        "causal,",
        "quick",
        "slow",
    ]


def test_a_long_mask_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    mask = "global_sliding_window:num_global=64,window=1024"
    text = report_text(
        *(
            record(
                name, ms, mask=mask, strategy=strategy, world_size=4, layout="zigzag", dtype=dtype
            )
            for name, ms in (("bands", 2.0), ("sdpa.efficient", 3.0))
            for strategy in ("ring_allgather", "ulysses")
            for dtype in ("float32", "bfloat16")
        )
    )
    for title in ("Fastest method per problem", "All cases, fastest first"):
        assert max(map(len, section_lines(text, title))) <= 100
    assert mask in text


def test_caveats_are_listed_once() -> None:
    one = report_text(record("a", 2.0, flags=["contended"]), record("b", 3.0))
    assert one.count("contended") == 1
    assert "Caveat *: 1 of 2 timed cases is contended" in one
    rows = section_lines(one, "All cases, fastest first")
    assert ["*" in row for row in rows if row[:2] in ("a ", "b ")] == [True, False]
    both = report_text(record("a", 2.0, flags=["contended"]), record("b", 3.0, flags=["contended"]))
    assert "Caveat *: 2 of 2 timed cases are contended" in both
    fastest = section_lines(both, "Fastest method per problem")[2]
    assert "2.00  *" in fastest  # a winner carries its mark, also where all are marked
    noted = [record(name, 2.0, flags=["error-grows"]) for name in ("a", "b")]
    assert "*" not in report_text(*noted)


def test_few_and_all_queries_are_distinguished() -> None:
    records = [record("a", 2.0), record("a", 1.0, queries=16)]
    text = report_text(*records)
    assert [row.split()[:4] for row in section_lines(text, "Fastest method per problem")[:4:2]] == [
        ["mask", "tokens", "queries", "fastest"],
        ["causal", "1k", "all", "a"],
    ]
    assert "causal, 1k tokens, all queries\n" in text
    assert "causal, 1k tokens, last 16 queries\n" in text
    md = section_lines(report_text(*records, form="md"), "Fastest method per problem")[2:4]
    assert [[cell.strip() for cell in row.split("|")[2:4]] for row in md] == [
        ["1k", "all"],
        ["1k", "last 16"],
    ]
    seeded = [
        record("a", 1.0, mask=f"causal_document:corpus=pile,seed={seed}", queries=queries)
        for seed in (0, 1)
        for queries in (0, 16)
    ]
    assert "causal_document:corpus=pile, 1k tokens, all queries\n" in report_text(
        *seeded, record("a", 1.0)
    )


def test_common_queries_are_listed_once() -> None:
    text = report_text(record("a", 2.0, queries=16), record("b", 1.0, queries=16))
    assert "Common to all cases: last 16 queries, world size 1" in text
    assert text.count("queries") == 1
    assert "queries" not in report_text(record("a", 2.0), record("b", 1.0))


def test_failures_have_a_reason_and_a_log() -> None:
    crash = record("a", status="crash", reason="rank 1 was killed\nby SIGSEGV", log="jobs/x/r1.log")
    text = report_text(crash, record("b", 2.0), record("c", status="oom", reason="out of memory"))
    lines = section_lines(text, "Failed")
    assert lines[:4] == [
        "crash    a, causal, 1k tokens, world size 1, fwd_bwd, float32, batch 1, 4:4 heads, "
        "head_dim 64,",
        "         input seed 0",
        "         rank 1 was killed by SIGSEGV",
        "         log: results/night/jobs/x/r1.log",
    ]
    assert "- **crash** a, causal" in report_text(crash, form="md")


def test_unsupported_cases_are_counted_by_reason() -> None:
    text = report_text(
        record("a", status="unsupported", reason="other", seed=3),
        *(record("a", status="unsupported", reason="too long", seq_len=n) for n in (1024, 2048)),
    )
    assert [row.split() for row in section_lines(text, "Unsupported")[2:4]] == [
        ["a", "1", "other"],
        ["a", "2", "too", "long"],
    ]


@pytest.mark.parametrize("form", render.FORMATS)
def test_nothing_timed(form: str) -> None:
    text = report_text(record("a", status="unsupported", reason="no"), form=form)
    assert "unsupported" in text
    assert "nan" not in text.lower()
    not_timed = report_text(record("a"), form=form)
    assert (
        form not in ("table", "md")
        or "Nothing to compare: no case was exact, timed and checked." in not_timed
    )


def test_an_infinite_error_is_shown() -> None:
    wrong = record("a", status="wrong", reason="out is nan")
    wrong.errors = {
        "small": {
            "out": {"rel_l2": None, "max_rms": None},  # type: ignore[dict-item]
            "lse": {"rel_l2": 1e-7, "max_rms": 1e-7},
        }
    }
    assert table_of(wrong)["worst_error"].tolist() == [float("inf")]
    assert "wrong" in report_text(wrong)
    assert json.loads(report_text(wrong, form="json"))[0]["worst_error"] is None


ROWS = (
    record("a", 2.123456789012345, 0.0123456789),
    record("b", status="crash", reason='say "hi", | and\nbye', log="jobs/x.log"),
    record("c", status="unsupported", reason="no", mask="full_document:doc_lens=[24,1000]"),
    record("d", 1.0, mask="causal_document:corpus=pile,seed=9007199254740993"),
)


@pytest.mark.parametrize("form", ["short", "table", "md"])
def test_needles_are_listed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "haystack:depth=0.25,keys=4,length=16"
    records = [record(method, 2.0, inputs=Spec.parse(name)) for method in ("bands", "moba")]
    for item, found in zip(records, (0.25, 0.75), strict=True):
        item.quality = {"found": found, "solved": found / 2}
    text = report_text(*records, form=form)
    lines = text[text.index("Needles, most found first") :].splitlines()
    rows = [re.sub(r"[|`]", " ", line).split() for line in lines]
    found = [row[row.index(x) :][:3] for row in rows for x in ("moba", "bands") if x in row]
    assert found[:2] == [["moba", "75.0", "37.5"], ["bands", "25.0", "12.5"]]
    assert form == "md" or max(map(len, text.splitlines())) <= 80
    assert "Needles" not in report_text(record("bands", 2.0), form=form)


def test_common_words_leave_sizes_of_decoding_whole() -> None:
    labels = [
        Case(phase="decode", batch=600, seq_len=n, page_size=16, operator=Spec(name)).label
        for name in ("paged.sdpa", "paged.triton") for n in (1, 70)
    ]  # fmt: skip
    common, rest = split_common_words(labels)
    assert common == "causal H=4:4 D=64 float32 fwd_bwd"
    assert rest[0] == "paged.sdpa decode 600x1 pages of 16"


@pytest.mark.parametrize(("mb", "text"), [(0.00412, "0.00412"), (0.0, "0.00"), (12.3456, "12.35")])
def test_small_traffic_has_digits(mb: float, text: str) -> None:
    assert format_megabytes(mb) == text


def test_csv_round_trip() -> None:
    table = table_of(*ROWS)
    back = pd.read_csv(
        io.StringIO(report_text(*ROWS, form="csv")), dtype={"iterations": "Int64", "draw": "Int64"}
    )
    assert list(back.columns) == list(COLUMNS)
    for column in COLUMNS:
        written = table[column]
        if column in ("flags", "writer", "key_lens"):
            written = written.replace("", None)
        assert written.isna().tolist() == back[column].isna().tolist(), column
        expected, read = written.dropna().tolist(), back[column].dropna().tolist()
        if column.endswith("_ms"):
            expected = pytest.approx(expected, rel=1e-14)
        assert read == expected, column


def test_json_round_trip() -> None:
    table = table_of(*ROWS)
    back = pd.DataFrame(json.loads(report_text(*ROWS, form="json")), dtype=object)
    assert list(back.columns) == list(COLUMNS)
    for column in COLUMNS:
        assert table[column].isna().tolist() == back[column].isna().tolist(), column
        assert table[column].dropna().tolist() == back[column].dropna().tolist(), column


def test_markdown_escapes() -> None:
    text = report_text(record("./a|b.py:op", 2.0), form="md") + report_text(
        record("c", status="unsupported", reason="x | y * z `q` <b>"), form="md"
    )
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for rows in tables:
        assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "./a\\|b.py:op" in text
    assert "x \\| y \\* z \\`q\\` \\<b\\>" in text
    assert MARKUPS["md"].text("\\") == "\\\\"


def test_columns_are_explained() -> None:
    assert [line.split()[0] for line in render.explain_columns().splitlines()] == list(COLUMNS)


def test_load_rejects_other_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="records"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.96, "0.960"),
        (0.9784, "0.978"),
        (0.9996, "1.00"),
        (9.999, "10.0"),
        (99.96, "100"),
        (12345.6, "12,346"),
        (0.0000234, "0.0000234"),
        (float("nan"), ""),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_wrap_name() -> None:
    assert wrap_name("a:b=1,c=2", 20) == ["a:b=1,c=2"]
    assert wrap_name("sliding_window:window=512,sinks=4", 16) == [
        "sliding_window:",
        "window=512,",
        "sinks=4",
    ]
    assert wrap_name("one_word_that_is_long", 10) == ["one_word_", "that_is_", "long"]
    assert wrap_name("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert wrap_name("", 10) == [""]
