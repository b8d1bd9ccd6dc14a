"""Reports across mask seeds: methods compared on common seeds, medians, tails and ties."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_records import OUT, record, report_text, section_lines, table_of

from cpbench.core.problem import Case
from cpbench.reports.collection import collect
from cpbench.reports.columns import COLUMNS
from cpbench.reports.frame import load
from cpbench.reports.labels import format_seeds
from cpbench.reports.tables import render
from cpbench.reports.tables.mask_seeds import (
    SeedGroup,
    percentile_95,
    sign_test,
    split_seed_groups,
)
from cpbench.reports.tables.summary import PROBLEM_KEYS, method_name, rank_methods
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter

PILE = "causal_document:corpus=pile"
FASTEST = "Fastest method per problem"


def seeded(operator: str, medians_ms: Sequence[float | None], **case: Any) -> list[Record]:
    """One record per mask seed; a median of None is out of memory."""
    return [
        record(operator, ms, mask=f"{PILE},seed={seed}", area=1000 * (seed + 1), **case)
        if ms
        else record(operator, mask=f"{PILE},seed={seed}", status="oom", reason="no room", **case)
        for seed, ms in enumerate(medians_ms)
    ]


def seed_group(*records: Record) -> SeedGroup:
    ungrouped, (group,) = split_seed_groups(table_of(*records))
    assert ungrouped.empty
    return group


def words_of_rows(lines: Sequence[str], first: str) -> list[list[str]]:
    """Words of the lines that begin with a word."""
    return [line.split() for line in lines if line.split()[:1] == [first]]


def test_percentile_and_sign_test() -> None:
    assert pd.isna(percentile_95([1.0] * 19))
    values = [float(x) for x in range(100, 0, -1)]
    assert [percentile_95(values[-n:]) for n in (20, 21, 30, 100)] == [19, 20, 29, 95]
    least = {n: min(k for k in range(n // 2, n + 1) if sign_test(k, n - k) <= 0.05)
             for n in (6, 10, 20, 30)}  # fmt: skip
    assert least == {6: 6, 10: 9, 20: 15, 30: 21}
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(0, 0) == 1


def test_problem_keys() -> None:
    """A new field of a case must define the problem, or be part of the method."""
    method_keys = {"operator", "strategy", "layout", "placement"}
    found = {"machine", "computes"}  # not of the case
    assert {field.name for field in fields(Case)} == {*PROBLEM_KEYS, *method_keys} - found
    assert {*PROBLEM_KEYS, *method_keys} <= {*COLUMNS}


@pytest.mark.parametrize(
    "difference",
    [{"seq_len": 2048}, {"dtype": "bfloat16"}, {"direction": "fwd"}, {"world_size": 2},
     {"ranks_per_node": 1}, {"batch": 2}, {"num_heads_q": 8}, {"num_heads_kv": 2},
     {"head_dim": 128}, {"seed": 1}, {"rope": "pi:factor=2"},
     {"phase": "decode", "page_size": 16}, {"phase": "decode", "page_size": 32, "key_lens": (8, 9)},
     {"environment": "e"}, {"content": (("lengths.json", "abc"),)}],
)  # fmt: skip
def test_cases_of_a_group_differ_in_the_mask_seed_only(difference: dict[str, Any]) -> None:
    records = [*seeded("a", [1.0, 1.0]), *seeded("a", [1.0, 1.0], **difference)]
    ungrouped, groups = split_seed_groups(
        table_of(*records, environments={"e": {"host": "elsewhere", "processor": "x"}})
    )
    assert ungrouped.empty
    assert [len(group.mask_seeds) for group in groups] == [2, 2]


def test_other_masks_and_single_seeds_are_not_grouped() -> None:
    others = [record("a", 1.0, mask=mask) for mask in
              (PILE, "causal", "causal_document:corpus=prolong64k,seed=1", f"full{PILE[6:]},seed=1",
               "prefix_lm_document:corpus=pile,prefix_len=1,seed=1",
               "prefix_lm_document:corpus=pile,prefix_len=2,seed=2")]  # fmt: skip
    ungrouped, (group,) = split_seed_groups(table_of(*others, *seeded("a", [1.0, 2.0])))
    assert len(ungrouped) == len(others) == len(rank_methods(ungrouped))
    assert group.problem["mask"] == PILE
    text = report_text(*others, *seeded("a", [1.0, 2.0]))
    rows = words_of_rows(section_lines(text, "Remaining cases, fastest first"), "a")
    assert len(rows) == len(others)


def test_median_and_tail_may_have_different_fastest_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """b is a little slower on most mask seeds and much faster on the heavy ones."""
    monkeypatch.setenv("COLUMNS", "140")  # no cell wraps
    records = [*seeded("a", [1.0] * 26 + [9.0] * 4), *seeded("b", [1.1] * 26 + [5.0] * 4)]
    group = seed_group(*records)
    a, b = group.compared
    assert (a.method, a.median("time_ms"), a.p95("time_ms"), a.max("time_ms")) == ("a", 1, 9, 9)
    assert group.fastest_in_tail == "b"
    assert (group.count_fastest(a), group.count_fastest(b)) == (26, 4)
    assert b.time_ratio(a) == pytest.approx((1.1**26 * (5 / 9) ** 4) ** (1 / 30))
    assert group.verdict == "won"
    (row,) = words_of_rows(section_lines(report_text(*records), FASTEST), PILE)
    assert (row[2:6], row[-2:]) == (["30", "of", "30", "a"], ["b", "b"])  # runner-up, at p95
    light = [*records[:10], *records[30:40]]
    assert words_of_rows(section_lines(report_text(*light), FASTEST), PILE)[0][-1] == "same"


@pytest.mark.parametrize(
    ("times_a", "times_b", "verdict"),
    [
        ([1.0] * 5, [2.0] * 5, "inconclusive"),
        ([1.0] * 6, [2.0] * 6, "won"),
        ([1.0] * 6, [2.0] * 5 + [0.9], "tie"),  # 5 of 6 may be chance
        ([1.0] * 21 + [2.0] * 9, [1.5] * 30, "won"),
        ([1.0] * 20 + [2.0] * 10, [1.5] * 30, "tie"),  # 20 of 30 may be chance
        ([1.0] * 26 + [9.0] * 4, [1.1] * 26 + [1.0] * 4, "tie"),  # the mean contradicts the median
        ([1.0] * 30, [1.0] * 30, "tie"),
        ([float(n) for n in range(1, 31)], [1.01 * n for n in range(1, 31)], "won"),  # paired
    ],
)
def test_verdict(times_a: list[float], times_b: list[float], verdict: str) -> None:
    group = seed_group(*seeded("a", times_a), *seeded("b", times_b))
    assert group.compared[0].method == "a"
    assert group.verdict == verdict
    c = seeded("c", [x * 1.0001 if i % 2 else x * 0.9999 for i, x in enumerate(times_a)])
    if verdict == "won":  # all other methods must be significantly slower
        assert seed_group(*seeded("a", times_a), *seeded("b", times_b), *c).verdict == "tie"


def test_the_tail_is_a_tie_within_the_noise() -> None:
    def fastest_in_tail(ms: float, noise: float = 0.01, n: int = 6) -> str | None:
        return seed_group(
            *seeded("a", [2.0] * n), *seeded("b", [ms] * n, noise=noise)
        ).fastest_in_tail

    assert fastest_in_tail(2.03) is None
    assert fastest_in_tail(2.05) == "a"
    assert fastest_in_tail(1.9) == "b"
    assert fastest_in_tail(2.05, 0.05) is None
    unknown_noise = seeded("b", [9.0] * 3)
    unknown_noise[1].times_us = {"fwd": [[9e3, 9e3]]}
    assert seed_group(*seeded("a", [2.0] * 3), *unknown_noise).fastest_in_tail is None


def test_only_common_seeds_are_compared() -> None:
    """b is out of memory on the two heavy mask seeds, which would spoil the times of a."""
    group = seed_group(
        *seeded("a", [2.0] * 8 + [50.0] * 2), *seeded("b", [3.0] * 8 + [None] * 2),
        *seeded("c", [1.0] * 4 + [None] * 6),
    )  # fmt: skip
    assert [(s.method, len(s.rows), s.max("time_ms")) for s in group.compared] == [
        ("a", 8, 2.0),
        ("b", 8, 3.0),
    ]
    assert [(s.method, len(s.rows), s.max("time_ms")) for s in group.not_compared] == [
        ("a", 10, 50.0),
        ("c", 4, 1.0),
    ]
    assert group.missing == {"b": {"oom": 2}, "c": {"oom": 6}}
    assert group.density_range == pytest.approx((1e3 / 2**20, 1e4 / 2**20))
    assert group.common_density_range == pytest.approx((1e3 / 2**20, 8e3 / 2**20))


def test_missing_seeds_have_a_reason() -> None:
    a, b = seeded("a", [2.0] * 6), seeded("b", [3.0] * 5)  # one was not run
    b[0].flags, b[1].times_us, b[2].status = ["unchecked"], {}, "wrong"
    group = seed_group(*a, *b)
    assert group.missing == {"b": {"unchecked": 1, "untimed": 1, "wrong": 1, "not run": 1}}
    text = " ".join(report_text(*a, *b).split())
    assert "Missing: b completed 2 of 6 mask seeds (" in text
    assert "too few to be compared." in text
    disjoint = report_text(
        *seeded("a", [1.0, 1.0, None, None]), *seeded("b", [None, None, 1.0, 1.0])
    )
    words = " ".join(disjoint.split())
    assert "not compared: no mask seed was completed by all methods" in words
    assert "Nothing to compare" in disjoint


def thirty_seeds() -> list[Record]:
    ring: dict[str, Any] = {"strategy": "ring", "world_size": 2}
    balances = [[100 + n, 100 - n] for n in range(30)]
    a, b = seeded("a", [1.0 + n for n in range(30)], **ring), seeded("b", [3.0] * 30, **ring)
    for records in (a, b):
        for seed_record, balance in zip(records, balances, strict=True):
            seed_record.balance = balance
            seed_record.bytes_sent = {"fwd": [balance[0] * 10**6, 0]}
    c = seeded("c", [2.0 + n for n in range(28)] + [None] * 2, **ring)
    unsupported = [
        record("d", mask=r.case.mask, status="unsupported", reason="no", **ring) for r in a
    ]
    return [*a, *b, *c, *unsupported, record("a", 4.0, **ring)]


@pytest.mark.parametrize("form", ["table", "md"])
def test_each_method_is_one_row_over_thirty_seeds(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = report_text(*thirty_seeds(), form=form).replace("|", " ")
    assert len(text.splitlines()) < 75
    assert text.count("seed=") == 0
    times = section_lines(text, "Across mask seeds, lowest median first")
    assert "30 mask seeds (0-29)" in "".join(times)
    assert "compared on 28, density 0.000954 to 0.0267" in "".join(times)
    rows = words_of_rows(times, "ring/contiguous")
    assert [row[1] for row in rows][:5] == ["b", "a", "c", "b", "a"]
    a = "a 28 of 30 14.5 27.0 28.0 3.77x 3 34.5 / 17.9"
    assert " ".join(rows[1][1:]) == a
    assert " ".join(rows[4][1:]).startswith("a 30 of 30 15.5 29.0 30.0")
    assert any("c completed 28 of 30 mask seeds (2 oom)." in line for line in times)
    title = "Across mask seeds: memory, load imbalance and traffic per rank"
    costs_of_a = words_of_rows(section_lines(text, title), "ring/contiguous")[1][1:]
    assert " ".join(costs_of_a) == "a 28 of 30 1.13 / 1.27 113.50 / 127.00"
    (fastest,) = [line for line in section_lines(text, FASTEST) if "28 of 30" in line]
    assert "3.77x" in fastest
    assert text.split("## Failed")[1].count("no room") == 1
    assert "2 mask seeds (28-29)" in text.split("## Failed")[1]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_every_seed_is_in_the_data(form: str, tmp_path: Path) -> None:
    records = thirty_seeds()
    with RecordWriter(tmp_path / "records" / "one.jsonl") as writer:
        for case_record in records:
            writer.append(case_record.to_json())
    text = render.render(collect([tmp_path]), form)
    path = tmp_path / "data"
    path.write_text(text)
    data = pd.read_csv(path) if form == "csv" else pd.DataFrame(json.loads(text))
    ids = {case_record.case.id for case_record in records}
    assert set(data["id"]) == set(load(tmp_path)["id"]) == ids
    seeds = data[data["mask_family"] == PILE]["draw"]
    assert sorted(seeds) == sorted([*range(30)] * 4)
    assert data[data["mask"] == "causal"]["draw"].isna().all()
    assert set(data["mask_family"]) == {PILE, "causal"}


def test_seeds_that_failed_alike_are_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    records = seeded("a", [1.0] + [None] * 3 + [1.0] + [None] * 3)
    records[2].reason, records[3].status = "other", "timeout"
    for seed_record in records:
        is_oom = seed_record.status == "oom"
        seed_record.log = f"jobs/{seed_record.case.id}.log" if is_oom else None
    lines = section_lines(report_text(*records), "Failed")
    assert [line.split(",")[0] for line in lines if line[8:11] == " a,"] == [
        "oom      a",
        "oom      a",
        "timeout  a",
    ]
    assert lines[0].endswith("input seed 0: 4 mask seeds (1, 5-7)")
    assert lines[2].endswith(f"{OUT}/jobs/{records[1].case.id}.log and 3 more")
    assert f"{PILE},seed=2," in lines[3]
    assert lines[4].strip() == "other"
    assert f"{PILE},seed=3," in lines[6]


def test_a_crash_on_an_unknown_machine_is_a_missing_seed() -> None:
    records = seeded("a", [1.0] * 3, environment="e")
    records.append(record("a", mask=f"{PILE},seed=3", status="crash", reason="no start"))
    table = table_of(*records, environments={"e": {"host": "h", "processor": "p"}})
    ungrouped, (group,) = split_seed_groups(table)
    assert ungrouped.empty
    assert (group.problem["machine"], group.missing) == ("h, p", {"a": {"crash": 1}})


def test_checked_only() -> None:
    records = seeded("a", [1.0] * 3)
    for seed_record in records:
        seed_record.times_us = {}
    text = report_text(*records)
    assert "Nothing to compare: no case was exact, timed and checked." in text
    assert "Missing: a completed 0 of 3 mask seeds (3 untimed)." in text
    assert "nan" not in text


def test_a_single_method_is_uncontested() -> None:
    text = report_text(*seeded("a", [1.0, 2.0, 4.0, None]))
    (row,) = [line for line in section_lines(text, FASTEST) if line.startswith(PILE[:15])]
    assert "uncontested" in row
    assert "Nothing to compare: 1 problem, one method each." in text
    assert "compared" not in text


def test_format_seeds() -> None:
    assert format_seeds([3]) == "3"
    assert format_seeds([2, 0, 1, 7]) == "0-2, 7"
    assert format_seeds(range(0, 20, 2)) == "0, 2, 4, 6, 8, …"
    assert format_seeds(["a", 1]) == "1, a"


def test_placements_are_different_methods() -> None:
    placements = ("", "head")
    rows = table_of(
        *(record("a", 1.0, strategy="ring", world_size=4, placement=axis) for axis in placements)
    )
    assert [method_name(row) for _, row in rows.iterrows()] == [
        "ring/contiguous a",
        "ring head inside/contiguous a",
    ]
