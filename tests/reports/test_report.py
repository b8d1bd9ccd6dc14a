"""Reports from records made here: who wins, what is a tie, and that nothing is lost or misread."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
from made_records import record, section, shown, table_of

from cpbench.reports.columns import COLUMNS
from cpbench.reports.frame import load
from cpbench.reports.labels import significant
from cpbench.reports.tables import render
from cpbench.reports.tables.markup import MARKUPS
from cpbench.reports.tables.summary import answers
from cpbench.reports.tables.terminal import row_lines, wrapped


def test_winner_and_lead() -> None:
    (answer,) = answers(table_of(record("slow", 3.0), record("quick", 2.0), record("slower", 5.0)))
    assert list(answer.ranking["operator"]) == ["quick", "slow", "slower"]
    assert answer.lead == pytest.approx(1.5)
    assert not answer.tie


@pytest.mark.parametrize(
    ("ms", "noise", "tie"),
    [(2.0, 0.01, True), (2.03, 0.01, True), (2.05, 0.01, False), (2.05, 0.05, True)],
)
def test_tie_within_noise(ms: float, noise: float, tie: bool) -> None:
    (answer,) = answers(table_of(record("a", 2.0, noise), record("b", ms, noise)))
    assert answer.tie is tie


def test_unknown_noise_is_a_tie() -> None:
    few = record("b", 9.0)
    few.times_us = {"fwd": [[9e3, 9e3]]}
    (answer,) = answers(table_of(record("a", 2.0), few))
    assert answer.tie


def test_code_in_a_file_competes_and_data_in_a_file_makes_the_problem() -> None:
    mine = record("./mine.py:OP", 2.0, content=(("./mine.py:OP", "abc"),))
    table = table_of(mine, record("bands", 3.0))
    (answer,) = answers(table)
    assert list(answer.ranking["operator"]) == ["./mine.py:OP", "bands"]
    assert list(answer.ranking["code"]) == ["abc", None]
    lengths = [record("bands", 1.0, content=(("lengths.json", digest),)) for digest in "xy"]
    assert len(answers(table_of(*lengths))) == 2


def test_exposed_communication_is_told_with_its_spread() -> None:
    """100 ms, of which communication adds 20; alone it takes 80."""
    ways = {"whole": [98e3, 100e3, 102e3], "compute": [80e3] * 3, "transfer": [80e3] * 3}
    exposure = {way: {"fwd": [times, [1.0] * 3]} for way, times in ways.items()}
    seen = record("bands", 100.0, strategy="ring", layout="zigzag", world_size=2)
    seen.exposure_us = exposure
    row = table_of(seen).iloc[0]
    assert (row["compute_ms"], row["transfer_ms"], row["exposed_ms"]) == (80.0, 80.0, 20.0)
    assert row["exposed"] == pytest.approx(0.2)
    assert row["hidden"] == pytest.approx(0.75)
    told = shown(seen)
    assert "20±2" in told
    assert "75" in told
    seen.exposure_us["transfer"]["fwd"][0] = [4e3] * 3  # less than the noise: nobody can tell
    assert pd.isna(table_of(seen).iloc[0]["hidden"])


def test_no_rival() -> None:
    (answer,) = answers(table_of(record("a", 2.0), record("b", status="unsupported", reason="no")))
    assert answer.lead is None
    assert "no other" in section(shown(record("a", 2.0)), "Winners")[2]


def test_each_problem_and_world_size_is_a_contest_of_its_own() -> None:
    found = answers(
        table_of(
            record("a", 1.0),
            record("b", 2.0, seq_len=2048),
            record("c", 3.0, world_size=2),
            record("d", 4.0, dtype="bfloat16"),
            record("e", 5.0, seed=1),
        )
    )
    assert [len(answer.ranking) for answer in found] == [1] * 5


def test_the_slowest_rank_counts() -> None:
    two = record("a", strategy="ring", world_size=2)
    two.times_us = {"fwd": [[1e3] * 7, [4e3] * 7], "bwd": [[2e3] * 7, [1e3] * 7]}
    (row,) = table_of(two).to_dict("records")
    assert (row["time_ms"], row["fwd_ms"], row["bwd_ms"]) == (6.0, 4.0, 2.0)


def test_table() -> None:
    text = shown(
        record("quick", 2.0),
        record("slow", 3.0),
        record("alike", 3.01, seq_len=4096),
        record("same", 3.0, seq_len=4096),
    )
    assert "# night: 4 cases, 4 ok" in text
    assert "Throughout: world size 1, fwd_bwd, float32, batch 1, 4:4 heads" in text
    head, _, *rows = section(text, "Winners")
    assert head.split() == ["mask", "tokens", "fastest", "ms", "GFLOP/s", "lead", "over"]
    assert [row.split() for row in rows if row.startswith("causal")] == [
        ["causal", "1k", "quick", "2.00", "500", "1.50x", "slow"],
        ["causal", "4k", "same", "3.00", "333", "tie", "alike"],
    ]
    assert "Of 2 problems: quick 1, ties 1." in text
    assert [line.split()[0] for line in section(text, "All cases, fastest first") if line][:5] == [
        "method",
        "------",
        "causal,",
        "quick",
        "slow",
    ]


def test_a_long_mask_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    mask = "global_sliding_window:num_global=64,window=1024"
    text = shown(
        *(
            record(
                name, ms, mask=mask, strategy=strategy, world_size=4, layout="zigzag", dtype=dtype
            )
            for name, ms in (("bands", 2.0), ("sdpa.efficient", 3.0))
            for strategy in ("ring_allgather", "ulysses")
            for dtype in ("float32", "bfloat16")
        )
    )
    for title in ("Winners", "All cases, fastest first"):
        assert max(map(len, section(text, title))) <= 100
    assert mask in text


def test_caveats_are_told_once() -> None:
    some = shown(record("a", 2.0, flags=["contended"]), record("b", 3.0))
    assert some.count("contended") == 1
    assert "Caveat *: 1 of 2 timed cases is contended" in some
    rows = section(some, "All cases, fastest first")
    assert ["*" in row for row in rows if row[:2] in ("a ", "b ")] == [True, False]
    both = shown(record("a", 2.0, flags=["contended"]), record("b", 3.0, flags=["contended"]))
    assert "Caveat: 2 of 2 timed cases are contended" in both
    assert "*" not in both


def test_few_queries_beside_all_are_told_apart() -> None:
    some = [record("a", 2.0), record("a", 1.0, queries=16)]
    text = shown(*some)
    assert [row.split()[:4] for row in section(text, "Winners")[:4:2]] == [
        ["mask", "tokens", "queries", "fastest"],
        ["causal", "1k", "all", "a"],
    ]
    assert "causal, 1k tokens, all queries\n" in text
    assert "causal, 1k tokens, last 16 queries\n" in text
    md = section(shown(*some, form="md"), "Winners")[2:4]
    assert [[cell.strip() for cell in row.split("|")[2:4]] for row in md] == [
        ["1k", "all"],
        ["1k", "last 16"],
    ]
    drawn = [
        record("a", 1.0, mask=f"causal_document:corpus=pile,seed={seed}", queries=queries)
        for seed in (0, 1)
        for queries in (0, 16)
    ]
    assert "causal_document:corpus=pile, 1k tokens, all queries\n" in shown(
        *drawn, record("a", 1.0)
    )


def test_few_queries_throughout_are_told_once() -> None:
    text = shown(record("a", 2.0, queries=16), record("b", 1.0, queries=16))
    assert "Throughout: last 16 queries, world size 1" in text
    assert text.count("queries") == 1
    assert "queries" not in shown(record("a", 2.0), record("b", 1.0))


def test_failures_say_why_and_where() -> None:
    crash = record("a", status="crash", reason="rank 1 was killed\nby SIGSEGV", log="jobs/x/r1.log")
    text = shown(crash, record("b", 2.0), record("c", status="oom", reason="out of memory"))
    lines = section(text, "Failed")
    assert lines[:3] == [
        "crash    a, causal, 1k tokens, world size 1, fwd_bwd, float32, batch 1, 4:4 heads, "
        "head_dim 64, input seed 0",
        "         rank 1 was killed by SIGSEGV",
        "         log: results/night/jobs/x/r1.log",
    ]
    assert "- **crash** a, causal" in shown(crash, form="md")


def test_refusals_are_counted_by_reason() -> None:
    text = shown(
        record("a", status="unsupported", reason="other", seed=3),
        *(record("a", status="unsupported", reason="too long", seq_len=n) for n in (1024, 2048)),
    )
    assert [row.split() for row in section(text, "Refused")[2:4]] == [
        ["a", "1", "other"],
        ["a", "2", "too", "long"],
    ]


@pytest.mark.parametrize("form", render.FORMATS)
def test_nothing_timed(form: str) -> None:
    text = shown(record("a", status="unsupported", reason="no"), form=form)
    assert "unsupported" in text
    assert "nan" not in text.lower()
    checked = shown(record("a"), form=form)
    assert (
        form not in ("table", "md")
        or "No case competes: none was exact, timed and checked." in checked
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
    assert "wrong" in shown(wrong)
    assert json.loads(shown(wrong, form="json"))[0]["worst_error"] is None


ROWS = (
    record("a", 2.123456789012345, 0.0123456789),
    record("b", status="crash", reason='say "hi", | and\nbye', log="jobs/x.log"),
    record("c", status="unsupported", reason="no", mask="full_document:doc_lens=[24,1000]"),
    record("d", 1.0, mask="causal_document:corpus=pile,seed=9007199254740993"),
)


def test_csv_round_trip() -> None:
    table = table_of(*ROWS)
    back = pd.read_csv(
        io.StringIO(shown(*ROWS, form="csv")), dtype={"iterations": "Int64", "draw": "Int64"}
    )
    assert list(back.columns) == list(COLUMNS)
    for column in COLUMNS:
        mine = table[column].replace("", None) if column in ("flags", "writer") else table[column]
        assert mine.isna().tolist() == back[column].isna().tolist(), column
        told, read = mine.dropna().tolist(), back[column].dropna().tolist()
        assert read == (pytest.approx(told, rel=1e-14) if column.endswith("_ms") else told), column


def test_json_round_trip() -> None:
    table = table_of(*ROWS)
    back = pd.DataFrame(json.loads(shown(*ROWS, form="json")), dtype=object)
    assert list(back.columns) == list(COLUMNS)
    for column in COLUMNS:
        assert table[column].isna().tolist() == back[column].isna().tolist(), column
        assert table[column].dropna().tolist() == back[column].dropna().tolist(), column


def test_markdown_escapes() -> None:
    text = shown(record("./a|b.py:op", 2.0), form="md") + shown(
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
    assert [line.split()[0] for line in render.columns().splitlines()] == list(COLUMNS)


def test_load_refuses_what_is_no_run(tmp_path: Path) -> None:
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
    assert significant(value) == text


def test_wrapped() -> None:
    assert wrapped("a:b=1,c=2", 20) == ["a:b=1,c=2"]
    assert wrapped("sliding_window:window=512,sinks=4", 16) == [
        "sliding_window:",
        "window=512,",
        "sinks=4",
    ]
    assert wrapped("one_word_that_is_long", 10) == ["one_word_", "that_is_", "long"]
    assert wrapped("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert wrapped("", 10) == [""]


def test_row_lines() -> None:
    rows = [{"name": "a", "n": "1.5", "empty": ""}, {"name": "bb", "n": "10", "empty": ""}]
    assert row_lines(rows, 80) == [["name    n", "----  ---"], ["a     1.5"], ["bb     10"]]
    assert MARKUPS["table"].table([{"x": ["a", "b"]}]) == ["x", "---", "a b", ""]
