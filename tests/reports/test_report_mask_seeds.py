"""Reports over draws of one mask: methods compared on common draws, medians, tails and ties."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_records import OUT, record, section, shown, table_of

from cpbench.core.problem import Case
from cpbench.reports.collection import collect
from cpbench.reports.columns import COLUMNS
from cpbench.reports.frame import load
from cpbench.reports.labels import seeds
from cpbench.reports.tables import render
from cpbench.reports.tables.mask_seeds import Family, percentile95, sign_test, split
from cpbench.reports.tables.summary import QUESTION, answers, method
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter

PILE = "causal_document:corpus=pile"


def draws(operator: str, times: Sequence[float | None], **given: Any) -> list[Record]:
    """A record a draw, with a median of so many ms; None is out of memory."""
    return [
        record(operator, ms, mask=f"{PILE},seed={seed}", area=1000 * (seed + 1), **given)
        if ms
        else record(operator, mask=f"{PILE},seed={seed}", status="oom", reason="no room", **given)
        for seed, ms in enumerate(times)
    ]


def family(*records: Record) -> Family:
    singles, (found,) = split(table_of(*records))
    assert singles.empty
    return found


def words(lines: Sequence[str], first: str) -> list[list[str]]:
    return [line.split() for line in lines if line.split()[:1] == [first]]


def test_percentile_and_sign_test() -> None:
    assert pd.isna(percentile95([1.0] * 19))
    values = [float(x) for x in range(100, 0, -1)]
    assert [percentile95(values[-n:]) for n in (20, 21, 30, 100)] == [19, 20, 29, 95]
    least = {n: min(k for k in range(n // 2, n + 1) if sign_test(k, n - k) <= 0.05)
             for n in (6, 10, 20, 30)}  # fmt: skip
    assert least == {6: 6, 10: 9, 20: 15, 30: 21}
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(0, 0) == 1


def test_what_a_question_is_made_of() -> None:
    """A field that a case gets must tell problems apart, or be part of a method."""
    of_method = {"operator", "strategy", "layout", "placement"}
    assert {item.name for item in fields(Case)} == {*QUESTION, *of_method} - {"machine"}
    assert {*QUESTION, *of_method} <= {*COLUMNS}


@pytest.mark.parametrize(
    "other",
    [{"seq_len": 2048}, {"dtype": "bfloat16"}, {"direction": "fwd"}, {"world_size": 2},
     {"ranks_per_node": 1}, {"batch": 2}, {"num_heads_q": 8}, {"num_heads_kv": 2},
     {"head_dim": 128}, {"seed": 1},
     {"environment": "e"}, {"content": (("lengths.json", "abc"),)}],
)  # fmt: skip
def test_draws_of_a_family_differ_in_nothing_else(other: dict[str, Any]) -> None:
    records = [*draws("a", [1.0, 1.0]), *draws("a", [1.0, 1.0], **other)]
    singles, found = split(
        table_of(*records, environments={"e": {"host": "elsewhere", "processor": "x"}})
    )
    assert singles.empty
    assert [len(one.draws) for one in found] == [2, 2]


def test_other_masks_and_single_draws_stay_as_they_are() -> None:
    others = [record("a", 1.0, mask=mask) for mask in
              (PILE, "causal", "causal_document:corpus=prolong64k,seed=1", f"full{PILE[6:]},seed=1",
               "prefix_lm_document:corpus=pile,prefix_len=1,seed=1",
               "prefix_lm_document:corpus=pile,prefix_len=2,seed=2")]  # fmt: skip
    singles, (found,) = split(table_of(*others, *draws("a", [1.0, 2.0])))
    assert len(singles) == len(others) == len(answers(singles))
    assert found.question["mask"] == PILE
    text = shown(*others, *draws("a", [1.0, 2.0]))
    assert len(words(section(text, "All other cases, fastest first"), "a")) == len(others)


def test_median_and_tail_have_winners_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """b is a little slower on most draws and much faster on the heavy ones."""
    monkeypatch.setenv("COLUMNS", "140")  # no cell wraps
    found = family(*draws("a", [1.0] * 26 + [9.0] * 4), *draws("b", [1.1] * 26 + [5.0] * 4))
    a, b = found.compared
    assert (a.method, a.median("time_ms"), a.p95("time_ms"), a.most("time_ms")) == ("a", 1, 9, 9)
    assert found.tail_winner == "b"
    assert (found.fastest_on(a), found.fastest_on(b)) == (26, 4)
    assert b.ratio(a) == pytest.approx((1.1**26 * (5 / 9) ** 4) ** (1 / 30))
    assert found.verdict == "won"
    records = [*draws("a", [1.0] * 26 + [9.0] * 4), *draws("b", [1.1] * 26 + [5.0] * 4)]
    (won,) = words(section(shown(*records), "Winners"), PILE)
    assert (won[2:6], won[-2:]) == (["30", "of", "30", "a"], ["b", "b"])  # over b; at p95: b
    assert words(section(shown(*records[:10], *records[30:40]), "Winners"), PILE)[0][-1] == "same"


@pytest.mark.parametrize(
    ("mine", "others", "verdict"),
    [
        ([1.0] * 5, [2.0] * 5, "open"),
        ([1.0] * 6, [2.0] * 6, "won"),
        ([1.0] * 6, [2.0] * 5 + [0.9], "tie"),  # 5 of 6 may be chance
        ([1.0] * 21 + [2.0] * 9, [1.5] * 30, "won"),
        ([1.0] * 20 + [2.0] * 10, [1.5] * 30, "tie"),  # 20 of 30 may be chance
        ([1.0] * 26 + [9.0] * 4, [1.1] * 26 + [1.0] * 4, "tie"),  # the mean contradicts the median
        ([1.0] * 30, [1.0] * 30, "tie"),
        ([float(n) for n in range(1, 31)], [1.01 * n for n in range(1, 31)], "won"),  # paired
    ],
)
def test_verdict(mine: list[float], others: list[float], verdict: str) -> None:
    found = family(*draws("a", mine), *draws("b", others))
    assert found.compared[0].method == "a"
    assert found.verdict == verdict
    third = draws("c", [x * 1.0001 if i % 2 else x * 0.9999 for i, x in enumerate(mine)])
    if verdict == "won":  # all rivals must be told apart
        assert family(*draws("a", mine), *draws("b", others), *third).verdict == "tie"


def test_the_tail_is_a_tie_within_the_noise() -> None:
    def winner(rival: float, noise: float = 0.01, n: int = 6) -> str | None:
        return family(*draws("a", [2.0] * n), *draws("b", [rival] * n, noise=noise)).tail_winner

    assert (winner(2.03), winner(2.05), winner(1.9), winner(2.05, 0.05)) == (None, "a", "b", None)
    few = draws("b", [9.0] * 3)
    few[1].times_us = {"fwd": [[9e3, 9e3]]}
    assert family(*draws("a", [2.0] * 3), *few).tail_winner is None


def test_only_common_draws_are_compared() -> None:
    """b is out of memory on the two heavy draws, which would spoil a's figures."""
    found = family(
        *draws("a", [2.0] * 8 + [50.0] * 2), *draws("b", [3.0] * 8 + [None] * 2),
        *draws("c", [1.0] * 4 + [None] * 6),
    )  # fmt: skip
    assert [(s.method, len(s.rows), s.most("time_ms")) for s in found.compared] == [
        ("a", 8, 2.0),
        ("b", 8, 3.0),
    ]
    assert [(s.method, len(s.rows), s.most("time_ms")) for s in found.apart] == [
        ("a", 10, 50.0),
        ("c", 4, 1.0),
    ]
    assert found.lacking == {"b": {"oom": 2}, "c": {"oom": 6}}
    assert found.density == pytest.approx((1e3 / 2**20, 1e4 / 2**20))
    assert found.common_density == pytest.approx((1e3 / 2**20, 8e3 / 2**20))


def test_missing_draws_have_a_reason() -> None:
    a, b = draws("a", [2.0] * 6), draws("b", [3.0] * 5)  # one was not run
    b[0].flags, b[1].times_us, b[2].status = ["unchecked"], {}, "wrong"
    found = family(*a, *b[:-1], b[-1])
    assert found.lacking == {"b": {"not checked": 1, "not timed": 1, "wrong": 1, "not run": 1}}
    text = " ".join(shown(*a, *b).split())
    assert "Missing: b completed 2 of 6 draws (" in text
    assert "too few to compete." in text
    nothing = shown(*draws("a", [1.0, 1.0, None, None]), *draws("b", [None, None, 1.0, 1.0]))
    assert "nothing is compared, for no draw was completed by all" in " ".join(nothing.split())
    assert "No case competes" in nothing


def thirty() -> list[Record]:
    spread: dict[str, Any] = {"strategy": "ring", "world_size": 2}
    balances = [[100 + n, 100 - n] for n in range(30)]
    a, b = draws("a", [1.0 + n for n in range(30)], **spread), draws("b", [3.0] * 30, **spread)
    for records in (a, b):
        for made, balance in zip(records, balances, strict=True):
            made.balance, made.bytes_sent = balance, {"fwd": [balance[0] * 10**6, 0]}
    c = draws("c", [2.0 + n for n in range(28)] + [None] * 2, **spread)
    refused = [
        record("d", mask=r.case.mask, status="unsupported", reason="no", **spread) for r in a
    ]
    return [*a, *b, *c, *refused, record("a", 4.0, **spread)]


@pytest.mark.parametrize("form", ["table", "md"])
def test_thirty_draws_are_a_row_a_method(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(*thirty(), form=form).replace("|", " ")
    assert len(text.splitlines()) < 75
    assert text.count("seed=") == 0
    drawn = section(text, "Over draws, fastest in the median first")
    assert "30 draws (seeds 0-29)" in "".join(drawn)
    assert "compared on 28, density 0.000954 to 0.0267" in "".join(drawn)
    rows = words(drawn, "ring/contiguous")
    assert [row[1] for row in rows][:5] == ["b", "a", "c", "b", "a"]
    a = "a 28 of 30 14.5 27.0 28.0 3.77x 3 34.5 / 17.9"
    assert " ".join(rows[1][1:]) == a
    assert " ".join(rows[4][1:]).startswith("a 30 of 30 15.5 29.0 30.0")
    assert any("c completed 28 of 30 draws (2 oom)." in line for line in drawn)
    costs = section(text, "Over draws: what ranks hold, compute and send")
    costs_of_a = " ".join(words(costs, "ring/contiguous")[1][1:])
    assert costs_of_a == "a 28 of 30 1.13 / 1.27 113.50 / 127.00"
    (won,) = [line for line in section(text, "Winners") if "28 of 30" in line]
    assert "3.77x" in won
    assert text.split("## Failed")[1].count("no room") == 1
    assert "2 draws (seeds 28-29)" in text.split("## Failed")[1]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_every_draw_is_in_the_data(form: str, tmp_path: Path) -> None:
    records = thirty()
    with RecordWriter(tmp_path / "records" / "one.jsonl") as writer:
        for made in records:
            writer.append(made.to_json())
    text = render.render(collect([tmp_path]), form)
    path = tmp_path / "data"
    path.write_text(text)
    data = pd.read_csv(path) if form == "csv" else pd.DataFrame(json.loads(text))
    assert set(data["id"]) == set(load(tmp_path)["id"]) == {made.case.id for made in records}
    drawn = data[data["mask_family"] == PILE]
    assert sorted(drawn["draw"]) == sorted([*range(30)] * 4)
    assert data[data["mask"] == "causal"]["draw"].isna().all()
    assert set(data["mask_family"]) == {PILE, "causal"}


def test_draws_that_failed_alike_are_told_together() -> None:
    records = draws("a", [1.0] + [None] * 3 + [1.0] + [None] * 3)
    records[2].reason, records[3].status = "other", "timeout"
    for made in records:
        made.log = f"jobs/{made.case.id}.log" if made.status == "oom" else None
    lines = section(shown(*records), "Failed")
    assert [line.split(",")[0] for line in lines if line[8:11] == " a,"] == [
        "oom      a",
        "oom      a",
        "timeout  a",
    ]
    assert lines[0].endswith("input seed 0: 4 draws (seeds 1, 5-7)")
    assert lines[2].endswith(f"{OUT}/jobs/{records[1].case.id}.log and 3 more")
    assert f"{PILE},seed=2," in lines[3]
    assert lines[4].strip() == "other"
    assert f"{PILE},seed=3," in lines[6]


def test_a_crash_before_the_machine_was_known_is_a_missing_draw() -> None:
    records = draws("a", [1.0] * 3, environment="e")
    records.append(record("a", mask=f"{PILE},seed=3", status="crash", reason="no start"))
    table = table_of(*records, environments={"e": {"host": "h", "processor": "p"}})
    singles, (found,) = split(table)
    assert singles.empty
    assert (found.question["machine"], found.lacking) == ("h, p", {"a": {"crash": 1}})


def test_checked_only() -> None:
    checked = draws("a", [1.0] * 3)
    for made in checked:
        made.times_us = {}
    text = shown(*checked)
    assert "No case competes: none was exact, timed and checked." in text
    assert "Missing: a completed 0 of 3 draws (3 not timed)." in text
    assert "nan" not in text


def test_one_method_has_no_rival() -> None:
    text = shown(*draws("a", [1.0, 2.0, 4.0, None]))
    (won,) = [line for line in section(text, "Winners") if line.startswith(PILE[:15])]
    assert (
        won.split()[-7:] == ["3", "of", "4", "a", "2.00", "500", "other"][:0] or "no other" in won
    )
    assert "Of 1 problem: without a rival 1." in text
    assert "compared" not in text


def test_seeds() -> None:
    assert seeds([3]) == "seed 3"
    assert seeds([2, 0, 1, 7]) == "seeds 0-2, 7"
    assert seeds(range(0, 20, 2)) == "seeds 0, 2, 4, 6, 8, …"
    assert seeds(["a", 1]) == "seeds 1, a"


def test_a_placement_is_a_method() -> None:
    rows = table_of(
        *(record("a", 1.0, strategy="ring", world_size=4, placement=at) for at in ("", "head"))
    )
    assert [method(row) for _, row in rows.iterrows()] == [
        "ring/contiguous a",
        "ring head inside/contiguous a",
    ]
