"""A gate for continuous integration: does a run pass or fail against a base, or is it undecided?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cpbench.reports.compare.statistics import ALPHA, SLOWER, launches_to_decide
from cpbench.reports.compare.verdicts import ADDED, FAILS, MISSING, NEITHER, WORKS, compare
from cpbench.reports.labels import pluralize, signed_percent
from cpbench.results.contest import MIN_LAUNCHES, launches_needed
from cpbench.results.record import FAILURES
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
EXIT_CODES = {PASS: 0, FAIL: 1, UNDECIDED: 3}  # 2 is for a command that cannot be carried out
MAX_LAUNCHES = 100  # per side, that are recommended
_OUTCOMES = {PASS: "passed", FAIL: "failed", UNDECIDED: "undecided"}


@dataclass(frozen=True)
class Decision:
    """The decision on one case.

    Attributes:
        outcome: ``PASS``, ``FAIL`` or ``UNDECIDED``.
        reasons: kind and text of each reason; none for a case that passes.
        launches: about how many launches per side would decide an undecided time; None where no
            reasonable number would.
    """

    outcome: str
    reasons: tuple[tuple[str, str], ...] = ()
    launches: int | None = None

    @property
    def kinds(self) -> str:
        return "+".join(kind for kind, _ in self.reasons)

    @property
    def text(self) -> str:
        return "; ".join(text for _, text in self.reasons)


@dataclass(frozen=True)
class GateResult:
    """Result of a gate.

    Attributes:
        table: of :func:`compare`, with the allowed slowdown as its floor.
        decisions: by case id.
        max_slowdown, max_memory: what is allowed.
    """

    table: pd.DataFrame
    decisions: Mapping[str, Decision]
    max_slowdown: float
    max_memory: float

    def resolved(self, outcome: str | None) -> GateResult:
        """The result with undecided cases as ``PASS`` or ``FAIL``; as it is for None."""
        if outcome is None:
            return self
        decisions = {
            key: replace(decision, outcome=outcome) if decision.outcome == UNDECIDED else decision
            for key, decision in self.decisions.items()
        }
        return replace(self, decisions=decisions)

    @property
    def outcome(self) -> str:
        """``FAIL`` if a case fails, else ``UNDECIDED`` if one is undecided, else ``PASS``."""
        counts = self.counts
        return next((outcome for outcome in (FAIL, UNDECIDED) if counts[outcome]), PASS)

    @property
    def counts(self) -> Counter[str]:
        """Number of cases by outcome."""
        return Counter(decision.outcome for decision in self.decisions.values())

    @property
    def launches(self) -> int | None:
        """About how many launches per side would decide every case that launches can decide; None
        where there is no such case."""
        return max((d.launches for d in self.decisions.values() if d.launches), default=None)


def evaluate_gate(
    base: Run, new: Run, max_slowdown: float, max_memory: float, alpha: float = ALPHA
) -> GateResult:
    """Check a new run against a base.

    A case **fails** when it is significantly slower by more than ``max_slowdown``, when its peak
    memory grew by more than ``max_memory``, when it was ok and is not, when it is missing, when it
    is new and failed, or when its result does not count (``unchecked``).  It **passes** when the
    interval of the ratio of times lies below that limit.  Otherwise it is **undecided**: launches
    are too few or too noisy, one run lacks what the other has measured, or times of the base do not
    count.

    Args:
        max_slowdown, max_memory: 0.05 for 5 %.
        alpha: false discovery rate of failures; half of it is the risk that a case passes which is
            slower than allowed.

    Raises:
        ValueError: when the runs have no case in common.
    """
    table = compare(base, new, max_slowdown, alpha)
    if not (table["base_status"].notna() & table["new_status"].notna()).any():
        raise ValueError("the runs have no case in common: nothing can be compared")
    timed = int((table["base_ms"].notna() & table["new_ms"].notna()).sum())
    decisions = {row["id"]: _decide(row, max_slowdown, max_memory, timed) for row in rows(table)}
    return GateResult(table, decisions, max_slowdown, max_memory)


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table of :func:`compare`."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _decide(row: dict[str, Any], max_slowdown: float, max_memory: float, timed: int) -> Decision:
    """The decision on a case, of so many that are timed on both sides."""
    if failures := tuple(_failures(row, max_slowdown, max_memory)):
        return Decision(FAIL, failures)
    if row["verdict"] in (WORKS, NEITHER) and not math.isnan(row["ratio"]):
        known = row["why"].startswith("not comparable")
        text = row["why"] + ("" if known else ": times of the base do not count")
        return Decision(UNDECIDED, (("base", text),))
    if row["base_status"] == row["new_status"] in ("crash", "wrong"):
        return Decision(UNDECIDED, (("status", f"{row['new_status']} in both runs"),))
    reasons, launches = [], None
    if text := _undecided_time(row, max_slowdown):
        launches = _launches_to_decide(row, max_slowdown, timed)
        reasons.append(("time", f"{text}; {_remedy(launches)}"))
    lacking = [
        f"{what} in {'the base' if base_has else 'the new run'} only"
        for what, column in (("time", "ms"), ("peak memory", "peak_mb"))
        if _both_ok(row)
        and (base_has := not math.isnan(row[f"base_{column}"]))
        != (not math.isnan(row[f"new_{column}"]))
    ]
    reasons += [("not-measured", text) for text in lacking]
    return Decision(UNDECIDED, tuple(reasons), launches) if reasons else Decision(PASS)


def _failures(
    row: dict[str, Any], max_slowdown: float, max_memory: float
) -> Iterator[tuple[str, str]]:
    """Kind and text of each reason for which a case fails."""
    if row["new_flaws"]:
        for flag in row["new_flaws"].split():
            yield flag, f"the result of the new run is {flag}"
    elif row["verdict"] in (FAILS, MISSING) or (
        row["verdict"] == ADDED and row["new_status"] in (*FAILURES, "oom")
    ):
        yield "status", str(row["why"])
    if row["verdict"] == SLOWER:
        yield "slowdown", f"{_times_text(row)}; at most {max_slowdown:.1%} is allowed"
    if row["memory_ratio"] > 1 + max_memory:
        yield (
            "memory",
            f"peak {row['base_peak_mb']:.1f} to {row['new_peak_mb']:.1f} MB, "
            f"{signed_percent(row['memory_ratio'] - 1)}; at most {max_memory:.1%} is allowed",
        )


def _both_ok(row: dict[str, Any]) -> bool:
    return (row["base_status"], row["new_status"]) == ("ok", "ok")


def _undecided_time(row: dict[str, Any], max_slowdown: float) -> str:
    """Why a time that both runs have is undecided; "" where it passes."""
    if math.isnan(row["ratio"]) or row["high"] <= 1 + max_slowdown or not _both_ok(row):
        return ""
    launches = f"{row['base_launches']} and {row['new_launches']} launches"
    if math.isnan(row["high"]):
        change = signed_percent(row["ratio"] - 1)
        return (
            f"{row['base_ms']:.3g} to {row['new_ms']:.3g} ms, {change}, over {launches}; the test "
            f"takes {MIN_LAUNCHES} per side"
        )
    if row["low"] <= 1 + max_slowdown:
        problem = f"the interval has the limit of {max_slowdown:.1%} in it"
    else:
        problem = f"above the limit of {max_slowdown:.1%}, but not yet significant among all cases"
    return f"{_times_text(row)}, over {launches}; {problem}"


def _launches_to_decide(row: dict[str, Any], max_slowdown: float, timed: int) -> int | None:
    """About how many launches per side would decide a case; more than it has."""
    least: int = min(row["base_launches"], row["new_launches"])
    if math.isnan(row["spread"]):  # one launch per side
        return launches_needed(2 * timed)
    launches = launches_to_decide(row["ratio"], row["spread"], max_slowdown, timed)
    if launches is None or launches > MAX_LAUNCHES:
        return None
    return max(launches, least + 1)


def _remedy(launches: int | None) -> str:
    if launches is None:
        return f"too near to the limit to be decided by {MAX_LAUNCHES} launches per side"
    return f"about {launches} launches per side would decide"


def result_lines(result: GateResult) -> list[str]:
    """Failures, undecided cases and the outcome, a line each."""
    labels = dict(zip(result.table["id"], result.table["case"], strict=True))
    lines = [
        f"FAIL {labels[key]}: {kind}: {text}"
        for key, decision in result.decisions.items()
        if decision.outcome == FAIL
        for kind, text in decision.reasons
    ]
    lines += [
        f"UNDECIDED {labels[key]}: {text}"
        for key, decision in result.decisions.items()
        if decision.outcome == UNDECIDED
        for _, text in decision.reasons
    ]
    counts = result.counts
    numbers = ", ".join(f"{counts[name]} {_OUTCOMES[name]}" for name in (FAIL, UNDECIDED, PASS))
    cases = pluralize(len(result.decisions), "case")
    limits = f"limits {result.max_slowdown:.1%} time, {result.max_memory:.1%} memory"
    return [*lines, f"gate {_OUTCOMES[result.outcome]}: {cases}: {numbers}; {limits}"]


def _times_text(row: dict[str, Any]) -> str:
    return (
        f"{row['base_ms']:.3g} to {row['new_ms']:.3g} ms, {signed_percent(row['ratio'] - 1)} "
        f"({signed_percent(row['low'] - 1)} to {signed_percent(row['high'] - 1)})"
    )
