"""Pass or fail for the continuous integration of those who write kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from cpbench.reports.compare.statistics import FEWEST, SLOWER, UNCLEAR
from cpbench.reports.compare.verdicts import FAILS, MISSING, compare
from cpbench.reports.labels import counted
from cpbench.results.store import Run

if TYPE_CHECKING:
    import pandas as pd

_FORBIDDEN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML 1.0


@dataclass(frozen=True)
class Judgement:
    """What a gate says.

    Attributes:
        table: of :func:`compare`, with the slowdown that is allowed as its floor.
        failures: case id to what is wrong with it, a kind and a sentence each.
        unclear: case id to why nothing can be said of its time.
    """

    table: pd.DataFrame
    failures: dict[str, list[tuple[str, str]]]
    unclear: dict[str, str]

    @property
    def passed(self) -> bool:
        return not self.failures


def judge(
    base: Run, new: Run, max_slowdown: float, max_memory: float, strict: bool = False
) -> Judgement:
    """Whether a new run is as good as the base.

    A case fails when it is slower by more than ``max_slowdown`` beyond what chance explains, when
    its peak memory has grown by more than ``max_memory``, when it was ok and is not, or is missing.

    Args:
        max_slowdown, max_memory: 0.05 for 5 %.
        strict: fail as well where the interval of the ratio reaches beyond ``max_slowdown``, or
            launches are too few.

    Raises:
        ValueError: when the runs cannot be compared at all: no common case, too few launches of
            every one.
    """
    table = compare(base, new, max_slowdown)
    both = table[table["base_ms"].notna() & table["new_ms"].notna()]
    if not (table["base_status"].notna() & table["new_status"].notna()).any():
        raise ValueError("the runs have no case in common: nothing can be compared")
    least = both[["base_launches", "new_launches"]].min(axis=1)
    if len(both) and least.max() < FEWEST and not strict:
        raise ValueError(
            f"no case has {FEWEST} launches on both sides (the most are {least.max()}), so nothing "
            f"can be told; cpbench run SWEEP --launches {FEWEST}"
        )
    failures: dict[str, list[tuple[str, str]]] = {}
    unclear: dict[str, str] = {}
    for row in _rows(table):
        wrong = []
        if row["verdict"] in (FAILS, MISSING):
            wrong.append(("status", str(row["why"])))
        if row["verdict"] == SLOWER:
            wrong.append(("slowdown", f"{_times(row)}; at most {max_slowdown:.1%} is allowed"))
        if row["verdict"] == UNCLEAR and (row["why"] or row["high"] > 1 + max_slowdown):
            unclear[row["id"]] = str(row["why"] or _times(row))
            if strict:
                wrong.append(("unclear", f"{unclear[row['id']]}; --strict wants certainty"))
        if row["memory_ratio"] > 1 + max_memory:
            wrong.append(
                ("memory", f"peak {row['base_peak_mb']:.1f} to {row['new_peak_mb']:.1f} MB, "
                 f"{row['memory_ratio'] - 1:+.1%}; at most {max_memory:.1%} is allowed")
            )  # fmt: skip
        if wrong:
            failures[row["id"]] = wrong
    return Judgement(table, failures, unclear)


def words(found: Judgement) -> list[str]:
    """What a gate found, a line each."""
    labels = dict(zip(found.table["id"], found.table["case"], strict=True))
    lines = [
        f"FAIL {labels[key]}: {kind}: {text}"
        for key, wrong in found.failures.items()
        for kind, text in wrong
    ]
    for why in dict.fromkeys(found.unclear.values()):
        alike = [key for key, other in found.unclear.items() if other == why]
        one = labels[alike[0]] if len(alike) == 1 else counted(len(alike), "case")
        lines.append(f"unclear: {one}: {why}")
    verdict = "passed" if found.passed else "failed"
    lines.append(
        f"gate {verdict}: {counted(len(found.table), 'case')}, {len(found.failures)} failed, "
        f"{len(found.unclear)} unclear"
    )
    return lines


def junit(found: Judgement, cautions: list[str]) -> str:
    """JUnit XML: a test case for each case, a failure for what is wrong, skipped for unclear."""
    suite = ElementTree.Element(
        "testsuite", name="cpbench gate", tests=str(len(found.table)),
        failures=str(len(found.failures)), errors="0",
        skipped=str(len(set(found.unclear) - set(found.failures))),
    )  # fmt: skip
    for row in _rows(found.table):
        seconds = row["new_ms"] / 1e3 if row["new_ms"] == row["new_ms"] else 0.0
        operator, _, rest = str(row["case"]).partition(" ")
        case = ElementTree.SubElement(
            suite, "testcase", classname=_legal(f"cpbench.{operator.replace('.', '_')}"),
            name=_legal(f"{rest} [{row['id']}]"), time=f"{seconds:.6f}",
        )  # fmt: skip
        wrong = found.failures.get(row["id"], [])
        if wrong:  # readers take one failure a case
            kinds, text = "+".join(kind for kind, _ in wrong), "; ".join(t for _, t in wrong)
            ElementTree.SubElement(case, "failure", type=kinds, message=_legal(text))
        elif row["id"] in found.unclear:
            ElementTree.SubElement(case, "skipped", message=_legal(found.unclear[row["id"]]))
    if cautions:
        ElementTree.SubElement(suite, "system-out").text = _legal("\n".join(cautions))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _times(row: dict[str, Any]) -> str:
    return (
        f"{row['base_ms']:.3g} to {row['new_ms']:.3g} ms, {row['ratio'] - 1:+.1%} "
        f"({row['low'] - 1:+.1%} to {row['high'] - 1:+.1%})"
    )


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
