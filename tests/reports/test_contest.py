"""The fastest method: decided by launches, or by turns of one gang, or open."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from made_records import record, report_text, section_lines, table_of

from cpbench.reports.frame import tidy_table
from cpbench.reports.tables.contest import hold_contest
from cpbench.reports.tables.fastest_grids import fastest_methods, verdict_text
from cpbench.reports.tables.summary import rank_methods
from cpbench.results.contest import launches_needed, signed_rank, turns_needed
from cpbench.results.record import Record
from cpbench.results.store import Run

FASTEST = "Fastest method per problem"


def one_launch(operator: str, ms: float, **fields: Any) -> Record:
    """Measured in one go: all of its iterations are one piece of evidence."""
    made = record(operator, ms, **fields)
    made.turns = []
    return made


def in_turns(operator: str, turns_ms: Sequence[float], **fields: Any) -> Record:
    """Two iterations a turn."""
    made = record(operator, 1.0, **fields)
    made.times_us = {"fwd": [[1e3 * ms for ms in turns_ms for _ in range(2)]]}
    made.turns = [2] * len(turns_ms)
    return made


def verdict(*records: Record) -> str:
    (ranking,) = rank_methods(table_of(*records))
    return ranking.verdict


def verdict_of_launches(**medians_ms: Sequence[float]) -> str:
    """The verdict on methods with several launches each."""
    run = Run()
    for name, medians in medians_ms.items():
        launches = [one_launch(name, ms, writer=f"w{i}") for i, ms in enumerate(medians)]
        run.records[launches[0].case.id] = launches[-1]
        run.launches[launches[0].case.id] = launches
    (ranking,) = rank_methods(tidy_table(run, "run"))
    return ranking.verdict


def test_one_launch_decides_nothing() -> None:
    records = [one_launch("a", 2.0), one_launch("b", 6.0)]
    assert verdict(*records) == "inconclusive"
    text = report_text(*records)
    assert "1 of 1 problem is inconclusive: too few launches." in text
    assert "inconclusive: 1 problem with 1 launch, 5 needed." in text
    assert "--launches 5, which adds launches; or measured again" in text
    assert "--interleave 6 --remeasure" in text
    assert "inconclusive" in section_lines(text, FASTEST)[2]
    (cell,) = fastest_methods(rank_methods(table_of(*records)), [])
    assert verdict_text(cell) == "inconclusive against b: 1 launch, 5 needed"
    assert verdict(one_launch("a", 2.0)) == "uncontested"


def test_five_launches_decide() -> None:
    a = [1.0, 1.01, 1.02, 0.99, 0.98]
    assert verdict_of_launches(a=a, b=[1.1 * ms for ms in a]) == "won"
    assert verdict_of_launches(a=a, b=[ms + 0.001 for ms in a]) == "tie"
    assert verdict_of_launches(a=a, b=[1.1 * ms for ms in a][:4]) == "inconclusive"


def test_turns_of_one_gang_decide() -> None:
    a = [1.0, 1.3, 0.9, 1.1, 1.0, 1.2]  # what disturbs one disturbs the other
    b = [1.05 * ms for ms in a]
    assert verdict(in_turns("a", a), in_turns("b", b)) == "won"
    assert verdict(in_turns("a", a), in_turns("b", [*b[:5], 1.1])) == "tie"
    assert verdict(in_turns("a", a[:5]), in_turns("b", b[:5])) == "inconclusive"
    apart = [in_turns("a", a, writer="w0"), in_turns("b", b, writer="w1")]
    assert verdict(*apart) == "inconclusive"  # not measured in turn
    (cell,) = fastest_methods(rank_methods(table_of(*apart)), [])
    assert cell.shortage == "1 launch, 5 needed"
    (cell,) = fastest_methods(
        rank_methods(table_of(in_turns("a", a[:3]), in_turns("b", b[:3]))), []
    )
    assert verdict_text(cell) == "inconclusive against b: 3 turns, 6 needed"


def test_the_fastest_must_beat_every_other_method() -> None:
    a, tied = [1.0] * 8, [0.9, 1.1] * 3 + [1.05, 1.06]
    assert verdict(in_turns("a", a), in_turns("b", [2.0] * 8), in_turns("c", [3.0] * 8)) == "won"
    assert verdict(in_turns("a", a), in_turns("b", tied), in_turns("c", [3.0] * 8)) == "tie"
    # One that was measured elsewhere leaves the problem open.
    late = in_turns("late", [3.0] * 8, writer="w1")
    assert verdict(in_turns("a", a), in_turns("b", [2.0] * 8), late) == "inconclusive"


def test_more_contenders_take_more_turns() -> None:
    assert [turns_needed(k) for k in (2, 3, 4, 6, 7, 12, 13)] == [6, 6, 7, 7, 8, 8, 9]
    assert [launches_needed(k) for k in (2, 12, 13)] == [5, 5, 6]
    for k in (3, 4):
        methods = [in_turns(name, [1.0 + i] * 6) for i, name in enumerate("abcd"[:k])]
        assert verdict(*methods) == ("won" if k == 3 else "inconclusive")


def test_the_signed_rank_test_matches_scipy() -> None:
    from scipy.stats import wilcoxon  # takes a second, which collecting tests need not

    generator = random.Random(0)
    for n in (6, 9, 20, 80):
        differences = [generator.gauss(0.3, 1) for _ in range(n)]
        method = "exact" if n <= 50 else "approx"
        expected = wilcoxon(differences, alternative="greater", method=method, correction=True)
        assert signed_rank(differences) == pytest.approx(expected.pvalue, rel=1e-6)
    assert signed_rank([0.0] * 6) == 1.0
    assert signed_rank([1.0, 1.0, 1.0, 1.0, 1.0, -1.0]) > signed_rank([1.0] * 6) == 1 / 64


@pytest.mark.parametrize("methods", [2, 3, 6])
@pytest.mark.parametrize("drift", [0.0, 0.02])
def test_identical_methods_are_rarely_called_fastest(methods: int, drift: float) -> None:
    """In a machine that gets slower, with disturbances that last longer than a method's turn."""
    won = 0
    for problem in range(300):
        generator, disturbance, slot = random.Random(problem), 0.0, 0
        names = [f"m{i}" for i in range(methods)]
        evidence: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(turns_needed(methods)):
            for name in generator.sample(names, methods):
                disturbance = 0.8 * disturbance + generator.gauss(0, 0.1)
                evidence[name].append(math.exp(drift * slot + disturbance))
                slot += 1
        ranked = sorted(names, key=lambda name: statistics.median(evidence[name]))
        won += hold_contest([json.dumps({"w": evidence[name]}) for name in ranked]).verdict == "won"
    assert won <= 24  # 5 % of 300 are 15; more than 24 have a chance of 1 %
