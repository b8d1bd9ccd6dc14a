"""The result of a gate as JUnit XML, which services for continuous integration show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from cpbench.reports.compare.gate import FAIL, UNDECIDED, GateResult, rows

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0


def junit_xml(result: GateResult, caveats: Sequence[str]) -> str:
    """A test per case: with a failure, or skipped, with the reason, where undecided."""
    counts = result.counts
    suite = ElementTree.Element(
        "testsuite", name="cpbench gate", tests=str(len(result.decisions)),
        failures=str(counts[FAIL]), errors="0", skipped=str(counts[UNDECIDED]),
    )  # fmt: skip
    for row in rows(result.table):
        seconds = row["new_ms"] / 1e3 if row["new_ms"] == row["new_ms"] else 0.0
        operator, _, rest = str(row["case"]).partition(" ")
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml_text(f"cpbench.{operator.replace('.', '_')}"),
            name=_xml_text(f"{rest} [{row['id']}]"), time=f"{seconds:.6f}",
        )  # fmt: skip
        decision = result.decisions[row["id"]]
        message = _xml_text(decision.text)
        if decision.outcome == FAIL:  # readers of JUnit XML take one failure per case
            ElementTree.SubElement(case, "failure", type=decision.kinds, message=message)
        elif decision.outcome == UNDECIDED:
            ElementTree.SubElement(case, "skipped", message=f"undecided: {message}")
    if caveats:
        ElementTree.SubElement(suite, "system-out").text = _xml_text("\n".join(caveats))
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _xml_text(text: str) -> str:
    return _NOT_XML.sub("?", text)
