"""Tables of a whole collection: support, errors, noise, environments, ends of failure logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.columns import ERROR_TENSORS
from cpbench.reports.labels import format_number
from cpbench.reports.tables.summary import is_checked

if TYPE_CHECKING:
    import pandas as pd

    from cpbench.reports.collection import Collection

_BY_SEVERITY = ("wrong", "crash", "timeout", "oom", "unsupported", "ok")
LOG_LINES, LOG_BYTES, MAX_LOGS = 40, 64 << 10, 60


@dataclass(frozen=True)
class SupportCell:
    """Cases of one method on one mask.

    Attributes:
        status: the most severe one, see ``_BY_SEVERITY``.
        text: status, or cases by status.
        reasons: why cases are not ok.
    """

    status: str
    text: str
    reasons: tuple[str, ...]


def support_table(table: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, SupportCell]]:
    """Which masks each method ran, by method and mask.

    Args:
        names: method of each row.
    """
    cells: dict[str, dict[str, SupportCell]] = {}
    keyed = table.assign(method=names)
    for (name, mask), group in keyed.groupby(["method", "mask_family"], sort=True):
        counts = Counter(group["status"])
        worst = next(status for status in _BY_SEVERITY if counts[status])
        if len(counts) == 1:
            text = worst
        else:
            text = ", ".join(f"{counts[s]} {s}" for s in reversed(_BY_SEVERITY) if counts[s])
        reasons = group.loc[group["status"] != "ok", "reason"].dropna().unique()
        cell = SupportCell(worst, text, tuple(map(str, reasons)))
        cells.setdefault(str(name), {})[str(mask)] = cell
    return cells


def correctness_rows(table: pd.DataFrame, names: Sequence[str]) -> list[dict[str, str]]:
    """Largest error of each tensor by method and dtype, over all cases with errors; those of a
    single check, the other being off, are not counted as checked."""
    columns = [f"error_{tensor}" for tensor in ERROR_TENSORS]
    keyed = table.assign(method=names)[table["worst_error"].notna().to_numpy()]
    rows = []
    for (name, dtype), group in keyed.groupby(["method", "dtype"], sort=True):
        wrong = int((group["status"] == "wrong").sum())
        rows.append(
            {
                "method": str(name), "dtype": str(dtype),
                "checked": str(int(is_checked(group).sum())),
                "wrong": str(wrong) if wrong else "",
                **{
                    tensor: format_number(float(group[column].max()), ".1e")
                    for tensor, column in zip(ERROR_TENSORS, columns, strict=True)
                },
            }
        )  # fmt: skip
    return rows


def noise_rows(ok_rows: pd.DataFrame) -> list[dict[str, str]]:
    """Noise of the medians and caveats, by machine and number of ranks."""
    rows = []
    for (machine, ranks), group in ok_rows[ok_rows["time_ms"].notna()].groupby(
        ["machine", "world_size"], sort=True
    ):
        flags = Counter(flag for flags in group["flags"] for flag in flags.split())
        noise = group["noise"].dropna() * 100
        rows.append(
            {
                "machine": str(machine), "ranks": str(ranks), "cases": str(len(group)),
                "median noise": format_number(float(noise.median()), ".1f", " %"),
                "90th percentile": format_number(float(noise.quantile(0.9)), ".1f", " %"),
                "max": format_number(float(noise.max()), ".1f", " %"),
                "launches": _range_text(group["launches"]),
                "iterations": _range_text(group["iterations"]),
                "caveats": ", ".join(f"{n} {flag}" for flag, n in flags.most_common()),
            }
        )  # fmt: skip
    return rows


def distinct_environments(collection: Collection) -> list[dict[str, str]]:
    """Facts of every distinct machine and software, transient facts left out; environments that
    differ in their ranks only are one."""
    ranks_by_facts: dict[tuple[tuple[str, str], ...], Counter[str]] = {}
    num_cases = Counter(collection.table["environment"].dropna())
    for key, environment in collection.environments.items():
        if num_cases[key]:
            facts = environment_facts(environment)
            ranks = facts.pop("ranks")
            ranks_by_facts.setdefault(tuple(facts.items()), Counter())[ranks] += num_cases[key]
    return [
        {
            "ranks": "; ".join(f"{ranks} ({n} cases)" for ranks, n in sorted(counts.items())),
            **dict(facts),
        }
        for facts, counts in ranks_by_facts.items()
    ]


def environment_facts(environment: dict[str, Any]) -> dict[str, str]:
    """Facts of an environment record, by heading."""
    device = environment.get("device", {})
    hosts = Counter(str(rank.get("host")) for rank in environment.get("ranks", []))
    packages, variables = environment.get("packages", {}), environment.get("variables", {})
    facts = {
        "ranks": ", ".join(f"{n} on {host}" for host, n in sorted(hosts.items()))
        or str(environment.get("host", "")),
        "device": device.get("name") or environment.get("processor"),
        "cores": environment.get("cores"),
        "memory": f"{environment['memory_bytes'] / 2**30:.0f} GiB"
        if "memory_bytes" in environment else "",
        "device memory": f"{device['memory_bytes'] / 2**30:.0f} GiB"
        if "memory_bytes" in device else "",
        "driver": device.get("driver"),
        "CUDA": device.get("cuda"),
        "cuDNN": device.get("cudnn"),
        "NCCL": device.get("nccl"),
        "system": environment.get("system"),
        "python": environment.get("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
        "cpbench": environment.get("commit") or environment.get("cpbench"),
        "variables": ", ".join(f"{name}={value}" for name, value in sorted(variables.items())),
    }  # fmt: skip
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


@dataclass(frozen=True)
class Failure:
    """A failed case, or mask seeds that failed alike, with the end of the first log."""

    status: str
    case: str
    reason: str
    log: str
    more: str
    tail: str


def add_log_tails(
    failed_cases: Sequence[tuple[str, str, str, list[str]]], limit: int
) -> list[Failure]:
    """Failures with the ends of their first logs.

    Args:
        failed_cases: of ``rows.failed_cases``.
        limit: how many are returned.
    """
    failures = []
    for i, (status, case, reason, logs) in enumerate(failed_cases[:limit]):
        log = logs[0] if logs else ""
        more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
        tail = _log_tail(Path(log)) if log and i < MAX_LOGS else ""
        failures.append(Failure(status, case, reason, log, more, tail))
    return failures


def _log_tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    return "\n".join(text.splitlines()[-LOG_LINES:])


def _range_text(values: pd.Series[int]) -> str:
    known = values.dropna()
    if known.empty:
        return ""
    low, high = int(known.min()), int(known.max())
    return str(low) if low == high else f"{low} to {high}"
