"""A gate for continuous integration: pass or fail a run against a base."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from cpbench.reports.compare.statistics import SLOWER, UNCLEAR
from cpbench.reports.compare.verdicts import FAILS, MISSING, compare
from cpbench.reports.labels import pluralize
from cpbench.results.contest import MIN_LAUNCHES
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0


@dataclass(frozen=True)
class GateResult:
    """Result of a gate.

    Attributes:
        table: of :func:`compare`, with the allowed slowdown as its floor.
        failures: by case id, kind and text of each failure.
        unclear: by case id, why its time is unclear.
    """

    table: pd.DataFrame
    failures: dict[str, list[tuple[str, str]]]
    unclear: dict[str, str]

    @property
    def passed(self) -> bool:
        return not self.failures


def evaluate_gate(
    base: Run, new: Run, max_slowdown: float, max_memory: float, strict: bool = False
) -> GateResult:
    """Check a new run against a base.

    A case fails when it is significantly slower by more than ``max_slowdown``, when its peak memory
    grew by more than ``max_memory``, when it was ok and is not, when it is missing, or when its
    result does not count (``unchecked``).

    Args:
        max_slowdown, max_memory: 0.05 for 5 %.
        strict: also fail where the interval of the ratio reaches beyond ``max_slowdown``, or
            launches are too few.

    Raises:
        ValueError: when the runs cannot be compared at all: no common case, or too few launches in
            every case.
    """
    table = compare(base, new, max_slowdown)
    both = table[table["base_ms"].notna() & table["new_ms"].notna()]
    if not (table["base_status"].notna() & table["new_status"].notna()).any():
        raise ValueError("the runs have no case in common: nothing can be compared")
    least = both[["base_launches", "new_launches"]].min(axis=1)
    if len(both) and least.max() < MIN_LAUNCHES and not strict:
        raise ValueError(
            f"no case has {MIN_LAUNCHES} launches on both sides (at most {least.max()}): nothing "
            f"can be compared; cpbench run SWEEP --launches {MIN_LAUNCHES}"
        )
    failures: dict[str, list[tuple[str, str]]] = {}
    unclear: dict[str, str] = {}
    for row in _rows(table):
        case_failures = []
        if row["new_flaws"]:
            case_failures += [
                (flag, f"the result of the new run is {flag}") for flag in row["new_flaws"].split()
            ]
        elif row["verdict"] in (FAILS, MISSING):
            case_failures.append(("status", str(row["why"])))
        if row["verdict"] == SLOWER:
            text = f"{_times_text(row)}; at most {max_slowdown:.1%} is allowed"
            case_failures.append(("slowdown", text))
        if row["verdict"] == UNCLEAR and not row["high"] <= 1 + max_slowdown:
            times = "" if math.isnan(row["high"]) else f"{_times_text(row)}; "
            unclear[row["id"]] = f"{times}{row['why']}"
            if strict:
                text = f"{unclear[row['id']]}; --strict fails unclear cases"
                case_failures.append(("unclear", text))
        if row["memory_ratio"] > 1 + max_memory:
            case_failures.append(
                ("memory", f"peak {row['base_peak_mb']:.1f} to {row['new_peak_mb']:.1f} MB, "
                 f"{row['memory_ratio'] - 1:+.1%}; at most {max_memory:.1%} is allowed")
            )  # fmt: skip
        if case_failures:
            failures[row["id"]] = case_failures
    return GateResult(table, failures, unclear)


def result_lines(result: GateResult) -> list[str]:
    """Failures, unclear cases and the verdict, a line each."""
    labels = dict(zip(result.table["id"], result.table["case"], strict=True))
    lines = [
        f"FAIL {labels[key]}: {kind}: {text}"
        for key, case_failures in result.failures.items()
        for kind, text in case_failures
    ]
    ids_by_reason: dict[str, list[str]] = {}
    for key, reason in result.unclear.items():
        ids_by_reason.setdefault(reason, []).append(key)
    for reason, ids in ids_by_reason.items():
        cases = labels[ids[0]] if len(ids) == 1 else pluralize(len(ids), "case")
        lines.append(f"unclear: {cases}: {reason}")
    verdict = "passed" if result.passed else "failed"
    lines.append(
        f"gate {verdict}: {pluralize(len(result.table), 'case')}, {len(result.failures)} failed, "
        f"{len(result.unclear)} unclear"
    )
    return lines


def junit_xml(result: GateResult, caveats: list[str]) -> str:
    """JUnit XML: a test case per case, with a failure, or skipped where unclear."""
    suite = ElementTree.Element(
        "testsuite", name="cpbench gate", tests=str(len(result.table)),
        failures=str(len(result.failures)), errors="0",
        skipped=str(len(set(result.unclear) - set(result.failures))),
    )  # fmt: skip
    for row in _rows(result.table):
        seconds = row["new_ms"] / 1e3 if row["new_ms"] == row["new_ms"] else 0.0
        operator, _, rest = str(row["case"]).partition(" ")
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml_text(f"cpbench.{operator.replace('.', '_')}"),
            name=_xml_text(f"{rest} [{row['id']}]"), time=f"{seconds:.6f}",
        )  # fmt: skip
        failures = result.failures.get(row["id"], [])
        if failures:  # readers of JUnit XML take one failure per case
            kinds = "+".join(kind for kind, _ in failures)
            message = _xml_text("; ".join(text for _, text in failures))
            ElementTree.SubElement(case, "failure", type=kinds, message=message)
        elif row["id"] in result.unclear:
            ElementTree.SubElement(case, "skipped", message=_xml_text(result.unclear[row["id"]]))
    if caveats:
        ElementTree.SubElement(suite, "system-out").text = _xml_text("\n".join(caveats))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _times_text(row: dict[str, Any]) -> str:
    return (
        f"{row['base_ms']:.3g} to {row['new_ms']:.3g} ms, {row['ratio'] - 1:+.1%} "
        f"({row['low'] - 1:+.1%} to {row['high'] - 1:+.1%})"
    )


def _xml_text(text: str) -> str:
    return _NOT_XML.sub("?", text)
