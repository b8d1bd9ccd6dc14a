"""Tables of a whole collection: what is supported, how right, how noisy, where it ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.columns import ERRORS
from cpbench.reports.labels import number

if TYPE_CHECKING:
    import pandas as pd

    from cpbench.reports.collection import Collection

_WORST = ("wrong", "crash", "timeout", "oom", "unsupported", "ok")  # first told of a cell
LOG_LINES, LOG_BYTES, LOGS = 40, 64 << 10, 60


@dataclass(frozen=True)
class Cell:
    """A method on a mask.

    Attributes:
        status: the worst there is, see ``_WORST``; "" where nothing was run.
        text: counts.
        reasons: why cases are not ok.
    """

    status: str
    text: str
    reasons: tuple[str, ...]


def support(table: pd.DataFrame, methods: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """By method and mask: what ran and what was refused.

    Args:
        methods: of each row.
    """
    found: dict[str, dict[str, Cell]] = {}
    keyed = table.assign(method=methods)
    for (name, mask), group in keyed.groupby(["method", "mask_family"], sort=True):
        counts = Counter(group["status"])
        worst = next(status for status in _WORST if counts[status])
        if len(counts) == 1:
            text = {"ok": "ok", "unsupported": "refused"}.get(worst, worst)
        else:
            text = ", ".join(f"{counts[s]} {s}" for s in reversed(_WORST) if counts[s])
        reasons = group.loc[group["status"] != "ok", "reason"].dropna().unique()
        found.setdefault(str(name), {})[str(mask)] = Cell(worst, text, tuple(map(str, reasons)))
    return found


def correctness(table: pd.DataFrame, methods: Sequence[str]) -> list[dict[str, str]]:
    """Largest error of each tensor by method and dtype, over all cases that were checked."""
    columns = [f"error_{tensor}" for tensor in ERRORS]
    keyed = table.assign(method=methods)[table["worst_error"].notna().to_numpy()]
    rows = []
    for (name, dtype), group in keyed.groupby(["method", "dtype"], sort=True):
        wrong = int((group["status"] == "wrong").sum())
        rows.append(
            {
                "method": str(name), "dtype": str(dtype), "checked": str(len(group)),
                "wrong": str(wrong) if wrong else "",
                **{
                    tensor: number(float(group[column].max()), ".1e")
                    for tensor, column in zip(ERRORS, columns, strict=True)
                },
            }
        )  # fmt: skip
    return rows


def noise(timed: pd.DataFrame) -> list[dict[str, str]]:
    """By machine and ranks: how well medians are known, and what disturbed them."""
    rows = []
    for (machine, ranks), group in timed[timed["time_ms"].notna()].groupby(
        ["machine", "world_size"], sort=True
    ):
        flags = Counter(flag for flags in group["flags"] for flag in flags.split())
        known = group["noise"].dropna() * 100
        rows.append(
            {
                "machine": str(machine), "ranks": str(ranks), "cases": str(len(group)),
                "noise, median": number(float(known.median()), ".1f", " %"),
                "90th percentile": number(float(known.quantile(0.9)), ".1f", " %"),
                "largest": number(float(known.max()), ".1f", " %"),
                "launches": _range(group["launches"]), "iterations": _range(group["iterations"]),
                "caveats": ", ".join(f"{n} {flag}" for flag, n in flags.most_common()),
            }
        )  # fmt: skip
    return rows


def environments(collection: Collection) -> list[dict[str, str]]:
    """Every kind of machine and software, once: what differs by the minute left out."""
    alike: dict[tuple[tuple[str, str], ...], Counter[str]] = {}
    used = Counter(collection.table["environment"].dropna())
    for key, told in collection.environments.items():
        if used[key]:
            facts = facts_of(told)
            ranks = facts.pop("ranks")
            alike.setdefault(tuple(facts.items()), Counter())[ranks] += used[key]
    return [
        {
            "ranks": "; ".join(f"{ranks} ({n} cases)" for ranks, n in sorted(counts.items())),
            **dict(facts),
        }
        for facts, counts in alike.items()
    ]


def facts_of(told: dict[str, Any]) -> dict[str, str]:
    """An environment in words, by heading."""
    device = told.get("device", {})
    hosts = Counter(str(rank.get("host")) for rank in told.get("ranks", []))
    facts = {
        "ranks": ", ".join(f"{n} on {host}" for host, n in sorted(hosts.items()))
        or str(told.get("host", "")),
        "device": device.get("name") or told.get("processor"),
        "cores": told.get("cores"),
        "memory": f"{told['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in told else "",
        "device memory": f"{device['memory_bytes'] / 2**30:.0f} GiB"
        if "memory_bytes" in device else "",
        "driver": device.get("driver"),
        "CUDA": device.get("cuda"),
        "system": told.get("system"),
        "python": told.get("python"),
        "packages": ", ".join(f"{k} {v}" for k, v in sorted(told.get("packages", {}).items())),
        "cpbench": told.get("commit") or told.get("cpbench"),
        "variables": ", ".join(f"{k}={v}" for k, v in sorted(told.get("variables", {}).items())),
    }  # fmt: skip
    return {key: str(value) for key, value in facts.items() if value not in (None, "")}


@dataclass(frozen=True)
class Failure:
    """A case, or draws of one, that failed: what was kept of its log's end."""

    status: str
    case: str
    reason: str
    log: str
    more: str
    tail: str


def failures(told: Sequence[tuple[str, str, str, list[str]]], limit: int) -> list[Failure]:
    """With the ends of the first logs.

    Args:
        told: of ``tables.failures``.
        limit: how many are listed.
    """
    found = []
    for number_, (status, case, reason, logs) in enumerate(told[:limit]):
        log = logs[0] if logs else ""
        more = f" and {len(logs) - 1} more" if len(logs) > 1 else ""
        tail = _tail(Path(log)) if log and number_ < LOGS else ""
        found.append(Failure(status, case, reason, log, more, tail))
    return found


def _tail(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"(cannot be read: {error.strerror})"
    return "\n".join(text.splitlines()[-LOG_LINES:])


def _range(values: pd.Series[int]) -> str:
    known = values.dropna()
    if known.empty:
        return ""
    low, high = int(known.min()), int(known.max())
    return str(low) if low == high else f"{low} to {high}"
