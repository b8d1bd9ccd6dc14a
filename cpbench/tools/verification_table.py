"""The summary of ``cpbench verify`` for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from cpbench.reports.tables.terminal import fit_table, wrap
from cpbench.sweep.verification.summary import TENSORS


def summary_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of ``summary.summary_rows``: a block for each operator and strategy, with the
    largest error of any tensor, and the first reason of what is not ok.  What was refused entirely
    is named at the end, by reason."""
    tried = [row for row in rows if row["ok"] or row["failed"]]
    lines = _blocks(tried) if tried else []
    refused: dict[str, list[str]] = {}
    for row in rows:
        if not (row["ok"] or row["failed"]):
            reason = row["why"].replace(f"{row['operator'].partition(':')[0]} ", "", 1)
            refused.setdefault(reason, []).append(_name(row))
    lines += [""] if refused else []
    for reason, names in refused.items():
        lines += wrap(f"refused ({reason}): {', '.join(dict.fromkeys(names))}", "  ")
    return lines


def _blocks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        errors = [(float(row[name]), name) for name in TENSORS if row.get(name)]
        error, name = max(errors, default=(0.0, ""))
        cells.append(
            {
                **{key: row[key] for key in ("dtype", "ranks", "ok", "refused", "failed")},
                "largest error": f"{error:.1e} ({name})" if errors else "",
                "of limit": row["of limit"],
            }
        )
    table = fit_table(cells)
    lines, bodies = list(table.head), iter(table.bodies)
    for name, group in itertools.groupby(rows, key=_name):
        lines += ["", *wrap(name, "  ")]
        for row in group:
            lines += next(bodies)
            lines += wrap(f"    {row['why']}", "    ") if row["why"] else []
    return lines


def _name(row: Mapping[str, Any]) -> str:
    strategy = row["strategy/layout"]
    return f"{row['operator']} under {strategy}" if strategy else str(row["operator"])
