"""The worked example of docs/method.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_records import launches, write_run
from paths import ROOT

from cpbench.reports.compare.gate import evaluate_gate
from cpbench.reports.compare.statistics import compare_medians, decide_verdicts
from cpbench.results.contest import launches_needed


def test_from_samples_to_a_verdict(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "method.md").read_text().partition("**A worked example.**")[2]
    base, new = (
        [float(number) for number in re.findall(r"\d+\.\d+", listed)]
        for listed in re.findall(r"(?:base|new) ([\d.,\s]+) ms", text)[:2]
    )
    assert (len(base), len(new)) == (6, 6)
    test = compare_medians(base, new, 0.02)
    assert f"have the median {test.ratio:.3f}" in text
    assert f"{test.low - 1:+.1%} to {test.high - 1:+.1%}".replace("%", " %") in text
    assert test.slower == pytest.approx(1 / 924)
    assert decide_verdicts([test], 0.02) == ["SLOWER"]
    others = [compare_medians(base, base[::-1], 0.02)] * 47
    assert decide_verdicts([test, *others], 0.02)[0] == "UNCLEAR"
    assert launches_needed(96) == 7
    runs = [
        write_run(tmp_path / name, launches("a", times))
        for name, times in (("base", base), ("new", new))
    ]
    outcomes = [evaluate_gate(*runs, limit, 0.02).outcome for limit in (0.05, 0.12, 0.15)]
    assert outcomes == ["fail", "undecided", "pass"]
