"""The summary of ``cpbench verify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cpbench.core import registry, tolerance
from cpbench.core.problem import INITIAL_STATE
from cpbench.core.spec import Spec
from cpbench.results.record import FAILURES, Record
from cpbench.results.store import Run
from cpbench.sweep.request import Request

TENSORS = ("out", "lse", "state", "dq", "dk", "dv", "dg", "dbeta", f"d{INITIAL_STATE}")


def summary_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per method and dtype: counts of statuses, the largest error of each tensor, and the
    largest error of all in percent of its limit."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        case = record.case
        alone = case.strategy == Spec("single")
        strategy = "" if alone else f"{case.strategy}/{case.layout}"
        strategy += f" {case.placement} inside" if case.placement else ""
        groups.setdefault((str(case.operator), strategy, case.dtype), []).append(record)
    rows = []
    for (operator, strategy, dtype), group in sorted(groups.items()):
        counts = Counter(record.status for record in group)
        max_errors = {name: _max_error(group, name) for name in TENSORS}
        failed = sum(counts[status] for status in (*FAILURES, "oom"))
        world_sizes = sorted({record.case.world_size for record in group})
        rows.append(
            {
                "operator": operator,
                "strategy/layout": strategy,
                "ranks": " ".join(map(str, world_sizes)),
                "dtype": dtype,
                "ok": counts["ok"],
                "refused": counts["unsupported"],
                "failed": failed,
                **{
                    name: "" if error is None else f"{error:.1e}"
                    for name, error in max_errors.items()
                },
                "of limit": _limit_used(group),
                "why": _first_reason(group),
            }
        )
    return rows


def _first_reason(records: Sequence[Record]) -> str:
    """The first reason of a failure; without one, and if no record is ok, of a refusal."""
    for record in records:
        if record.status not in ("ok", "unsupported"):
            return f"{record.status}: {record.reason}"
    refused = [record.reason or "" for record in records if record.status == "unsupported"]
    return refused[0] if refused and len(refused) == len(records) else ""


def summary_footer(run: Run, request: Request) -> str:
    """Counts and environment below the summary, to paste into an issue."""
    counts = Counter(record.status for record in run.records.values())
    lines = [
        f"\n{len(run.records)} of {len(request.cases)} cases: "
        + ", ".join(f"{count} {status}" for status, count in counts.most_common())
    ]
    for environment in run.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        name = device.get("name") or environment.get("processor")
        lines.append(f"{name}: {versions}; cpbench {environment.get('commit') or ''}".rstrip())
        break
    lines.append(f"records: {request.out}")
    return "\n".join(lines)


def _limit_used(records: Iterable[Record]) -> str:
    """The largest error of any check, in percent of its limit."""
    shares = []
    for record in records:
        info = registry.operator_info(record.case.operator.name)
        for errors in record.errors.values():
            case = record.case
            shares.append(tolerance.largest_share(errors, case.dtype, info, case.seq_len))
    return f"{max(shares):.0%}" if shares else ""


def _max_error(records: Iterable[Record], tensor: str) -> float | None:
    """Largest relative L2 error of a tensor; None where it was not checked."""
    errors = [
        errors[tensor]["rel_l2"]
        for record in records
        for errors in record.errors.values()
        if tensor in errors
    ]
    return max((float("inf") if error is None else error for error in errors), default=None)
