"""Reports of sequence mixers: beside attention, never ranked with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_records import record, report_text, run_of, section_lines, table_of, write_run

from cpbench.cli.main import invoke
from cpbench.reports.collection import Collection, merge_runs
from cpbench.reports.frame import load
from cpbench.reports.mixers import beside, hybrid
from cpbench.reports.tables.summary import method_name, rank_methods
from cpbench.results.record import Record
from cpbench.results.validation import check_shapes

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
    ours, triton = beside.length_table(table, ["tokens", "computes"])
    assert ours == {
        "method": "ssd",
        "faster from": "4k",
        "speedup over attention": "1k: 0.50x, 4k: 2.00x, 16k: 9.00x",
        "state MB": "0.0655",  # 4 heads of 64 x 64 elements of 4 bytes
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


# --- several ranks ------------------------------------------------------------------------------

TOKENS = 4096


def on_ranks(operator: str, ms: float, **fields: Any) -> Record:
    """A record of a case on two ranks with exposure: 2 ms of communication, of which half is
    exposed, for 4 MB that the busier rank sends."""
    made = record(operator, ms, world_size=2, seq_len=TOKENS, direction="fwd", **fields)
    made.exposure_us = {
        name: {"fwd": [[us] * 7] * 2}
        for name, us in (("whole", 1e3 * ms), ("compute", 1e3 * ms - 1e3), ("transfer", 2e3))
    }
    made.bytes_sent = {"fwd": [4_000_000, 1_000_000]}
    return made


def pair() -> list[Record]:
    """A mixer and attention on two ranks, in other layouts, and the mixer in that of attention."""
    mixed = on_ranks("ssd", 5.0, strategy="scan", layout="contiguous", computes="ssd")
    mixed.parts_us = {"summarise": [[900.0, 1100.0], [1000.0, 1000.0]]}
    return [
        mixed,
        on_ranks("ssd", 8.0, strategy="scan", layout="zigzag", computes="ssd"),
        on_ranks("bands", 20.0, strategy="ring", layout="zigzag"),
        record("ssd", 4.0, seq_len=TOKENS // 2, direction="fwd", computes="ssd"),
        record("bands", 8.0, seq_len=TOKENS // 2, direction="fwd"),
    ]


def test_mixers_on_several_ranks() -> None:
    first, second = beside.rank_rows(table_of(*pair()), [])
    assert first == {
        "method": "scan/contiguous ssd", "ms": "5.00", "vs attention": "4.00x",
        "summarise %": "21.0",  # of the slowest rank: 1.0 and 1.1 ms
        "exposed %": "20.0", "hidden %": "50.0", "sent MB": "4.00",
        "attention": "ring/zigzag bands",
    }  # fmt: skip
    assert (second["method"], second["summarise %"]) == ("scan/zigzag ssd", "")
    text = report_text(*pair())
    assert any("21.0" in line for line in section_lines(text, "Sequence mixers: several ranks"))


def test_weak_scaling_at_fixed_tokens_a_rank() -> None:
    """As fast with twice the tokens on two ranks is 100 %, whatever the FLOPs are."""
    made = pair()
    for one in made:
        one.flops = {"fwd": 10**9 * one.case.world_size}
    rows = {row["method"]: row for row in beside.weak_scaling_rows(table_of(*made), [])}
    assert set(rows) == {"scan/contiguous ssd", "scan/zigzag ssd", "ring/zigzag bands"}
    assert rows["scan/contiguous ssd"] == {
        "tokens a rank": "2k", "method": "scan/contiguous ssd", "ms by ranks": "1: 4.00, 2: 5.00",
        "rate per rank": "2: 80%",
    }  # fmt: skip
    assert rows["ring/zigzag bands"]["rate per rank"] == "2: 40%"
    assert beside.weak_scaling_rows(table_of(*(r for r in made if r.computes != "ssd")), []) == []


def test_columns_of_bytes_and_parts() -> None:
    mixed, _, attention, *_ = table_of(*pair()).to_dict("records")
    assert mixed["state_mb"] == 4 * 64 * 64 * 4 / 1e6
    assert mixed["kv_mb"] == attention["kv_mb"] == TOKENS * 2 * 4 * 64 * 4 / 1e6
    assert attention["state_mb"] != attention["state_mb"]
    assert mixed["summarise_ms"] == pytest.approx(1.05)  # the median of 1.0 and 1.1
    with pytest.raises(ValueError, match="has kernel, summarise, not kernel, plan, select"):
        check_shapes({"parts_us": {"summarise": [[1.0]], "kernel": [[1.0]]}}, 1)


# --- hybrid stacks ------------------------------------------------------------------------------


def collected(*made: Record) -> Collection:
    return merge_runs({"x": run_of(*made)})


def test_a_stack_in_two_layouts_pays_for_changing_them() -> None:
    """Half of a rank's 2,048 tokens change ranks between contiguous and zigzag, twice a period, as
    4 heads of 64 elements of 4 bytes, at the 2 MB/ms at which both send."""
    both, same = hybrid.hybrid_stacks(collected(*pair()), hybrid.Ratio(1, 7))[1:]
    assert (both.mixer["layout"], same.mixer["layout"]) == ("contiguous", "zigzag")
    assert both.exchange_mb == 2 * 1024 * 4 * 64 * 4 / 1e6
    assert both.exchange_ms == pytest.approx(both.exchange_mb / 2)
    assert both.ms == pytest.approx(20 + 7 * 5 + both.exchange_ms)
    assert (same.exchange_mb, same.exchange_ms, same.ms) == (0.0, 0.0, 20 + 7 * 8)
    assert both.alone_ms == same.alone_ms == 8 * 20


def test_an_exchange_that_was_not_measured_is_not_free() -> None:
    made = [one for one in pair() if one.case.world_size == 2]
    for one in made:
        one.exposure_us = {}
    known, unknown = hybrid.hybrid_stacks(collected(*made), hybrid.Ratio(2, 1))
    assert known.mixer["layout"] == "zigzag"
    assert known.attention_ms == 40
    text = hybrid.render(collected(*made), hybrid.Ratio(2, 1), [], "table")
    (line,) = (one for one in text.splitlines() if "scan/contiguous ssd" in one)
    assert "over 45.0" in line
    assert line.split()[-1] == "?"
    assert "no communication was measured" in text
    (row,) = (
        row
        for row in json.loads(hybrid.render(collected(*made), hybrid.Ratio(2, 1), [], "json"))
        if row["mixer_layout"] == "contiguous"
    )
    assert (row["time_ms"], row["exchange_ms"]) == (None, None)
    assert row["exchange_mb"] == unknown.exchange_mb > 0


def test_on_one_rank_attention_is_the_fastest() -> None:
    stacks = hybrid.hybrid_stacks(collected(*records()), hybrid.Ratio(1, 1))
    assert {stack.attention["operator"] for stack in stacks} == {"bands"}
    assert {stack.exchange_mb for stack in stacks} == {0.0}
    assert [stack.ms for stack in stacks[:2]] == [1.5, 2.5]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = invoke(["report", str(tmp_path), *arguments])
        return (code, *capsys.readouterr())

    write_run(tmp_path, records())
    code, text, _ = run("--hybrid", "1:7")
    assert code == 0
    assert "hybrid stacks, 1 attention, 7 mixer layers" in text
    assert "exchange" not in text
    _, table, _ = run("--hybrid", "1:7", "--format", "csv")
    assert len(table.splitlines()) == 1 + 6
    assert "exchange_mb" in table.splitlines()[0]
    for arguments, words in (
        (("0:7",), "each from 1 to 1000"),
        (("7",), "e.g. 1:7"),
        (("1:1001",), "to 1000"),
        (("1:7", "--pivot", "mask,operator"), "--hybrid and --pivot are two tables"),
        (("1:7", "--format", "github"), "--hybrid is not written as github"),
        (("1:7", "--where", "operator=bands"), "no problem has both"),
    ):
        code, _, stderr = run("--hybrid", *arguments)
        assert code == 2
        assert words in stderr
        assert len(stderr.splitlines()) == 1


SWEEP = """
[sweep]
operator = ["ssd"]
strategy = ["scan", "ulysses"]
inputs = "gates"
direction = "fwd"
seq_len = 256
num_heads_q = 2
head_dim = 16
world_size = 2
[[include]]
operator = "bands"
strategy = "ring"
layout = "zigzag"
[measure]
min_iterations = 2
max_iterations = 2
warmup = 1
memory = false
interleave = 1
"""


def test_a_run_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scan is measured with its summaries, and hybrid stacks with the rate of its messages."""
    (tmp_path / "sweep.toml").write_text(SWEEP)
    run = tmp_path / "run"
    assert invoke(["run", str(tmp_path / "sweep.toml"), "--out", str(run), "--device", "cpu"]) == 0
    capsys.readouterr()
    rows = {row["strategy"]: row for row in load(run).to_dict("records")}
    assert set(rows) == {"scan", "ulysses", "ring"}
    assert rows["scan"]["summarise_ms"] > 0
    assert all(math.isnan(rows[name]["summarise_ms"]) for name in ("ulysses", "ring"))
    assert invoke(["report", str(run), "--hybrid", "1:3", "--format", "json"]) == 0
    stacks = {row["mixer_strategy"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(stacks) == {"scan", "ulysses"}
    for stack in stacks.values():
        assert stack["attention_strategy"] == "ring"
        assert stack["exchange_mb"] == 2 * 64 * 2 * 16 * 4 / 1e6
        total = stack["attention_ms"] + stack["mixer_ms"] + stack["exchange_ms"]
        assert stack["time_ms"] == pytest.approx(total)
        assert stack["exchange_ms"] > 0
