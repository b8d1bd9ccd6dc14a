"""A calibration for people: tables of constants and errors, and sentences."""

from __future__ import annotations

import statistics

from cpbench.reports.labels import pluralize
from cpbench.tools.calibration.calibrate import ERRORS, Calibration, Judged, percentile


def constant_rows(calibration: Calibration) -> list[dict[str, str]]:
    """The constants, for a table."""
    return [
        {"of": one.of, "constant": one.name, "value": f"{one.value:.3g}", "95 % interval": one.note}
        for one in calibration.constants
    ]


def method_rows(calibration: Calibration) -> list[dict[str, str]]:
    """The errors of cases of several ranks by method, for a table."""
    by_method: dict[tuple[str, str], list[Judged]] = {}
    for one in calibration.judged:
        by_method.setdefault((one.method, one.phase), []).append(one)
    return [
        {
            "method": method, "phase": phase, "times": str(len(rows)),
            "median error": f"{statistics.median(one.error for one in rows):+.1%}",
            "largest": f"{max((one.error for one in rows), key=abs):+.1%}",
        }
        for (method, phase), rows in by_method.items()
    ]  # fmt: skip


def error_lines(calibration: Calibration) -> list[str]:
    """Errors of what was not fitted to, and what is not identified, in sentences."""
    lines = [
        f"{pluralize(len(values), 'time')} of {ERRORS[name]}: median error "
        f"{statistics.median(values):.1%}, 90th percentile {percentile(values):.1%}"
        for name, values in calibration.errors().items()
    ]
    by_table: dict[str, list[str]] = {}
    for one in calibration.unidentified:
        of, _, name = one.rpartition(" ")
        by_table.setdefault(of, []).append(name)
    if by_table:
        tables = "; ".join(f"{of}: {', '.join(names)}" for of, names in by_table.items())
        lines.append(f"not identified by these data: {tables}")
    return [*lines, *calibration.notes]
