"""A run as text: tables for a terminal or Markdown, or the data as CSV or JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.answer import QUESTION, answers, method
from cpbench.reports.frame import COLUMNS, frame
from cpbench.spec import format_size
from cpbench.store import Run

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("table", "md", "csv", "json")


def render(run: Run, out: Path, form: str) -> str:
    """The report of a run in one of ``FORMATS``.

    ``csv`` and ``json`` are the tidy table (see ``COLUMNS``); ``table`` and ``md`` are for people:
    winners, every case, what could not run and why, caveats, environments.
    """
    table = frame(run.records.values())
    if form == "csv":
        return str(table.to_csv(index=False))
    if form == "json":
        return str(table.to_json(orient="records", indent=1)) + "\n"
    sections = [
        ("Winners", winners(table)),
        ("All cases", every_case(table)),
        ("Not run", refusals(table)),
        ("Failed", failures(table)),
    ]
    lines = [f"# {out.name}: {_counts(table)}", ""]
    for title, rows in sections:
        if rows:
            lines += [f"## {title}", "", tabulated(rows, form), ""]
    lines += notes(table, run, out)
    return "\n".join(lines) + "\n"


def tabulated(rows: list[dict[str, Any]], form: str) -> str:
    """Rows of equal keys as a table for a terminal or as Markdown."""
    from tabulate import tabulate

    style = "simple" if form == "table" else "github"
    cells = [{k: _escaped(v, form) for k, v in row.items()} for row in rows]
    align = ["right" if _numeric(rows, key) else "left" for key in rows[0]]
    return str(tabulate(cells, headers="keys", tablefmt=style, colalign=align,
                        disable_numparse=True))


def winners(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The fastest method of each problem, how far ahead, and how sure."""
    found = answers(table)
    varying = [key for key in QUESTION if len({a.question[key] for a in found}) > 1
               or key in ("mask", "seq_len")]
    rows = []
    for answer in found:
        first = answer.ranking.iloc[0]
        many = answer.question["world_size"] > 1
        row = {_HEAD.get(key, key): _shown(key, answer.question[key]) for key in varying}
        names = [method(answer.ranking.iloc[i], many) for i in range(min(2, len(answer.ranking)))]
        row["fastest"] = " = ".join(names) if answer.tie else names[0]
        row["ms"] = _significant(first["time_ms"])
        row[_unit(table)] = _rate(first["tflops_per_rank"], table)
        lead = answer.lead
        row["lead"] = "only one" if lead is None else "tie" if answer.tie else f"{lead:.2f}x"
        rows.append(row)
    return rows


def every_case(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every timed case, slowest rank, with its noise, memory, traffic and error."""
    timed = table[table["status"] == "ok"]
    varying = [key for key in QUESTION if timed[key].nunique() > 1 or key in ("mask", "seq_len")]
    best = timed.groupby(list(QUESTION))["time_ms"].transform("min")
    rows = []
    for (_, row), fastest in zip(timed.iterrows(), best, strict=True):
        rows.append({
            **{_HEAD.get(key, key): _shown(key, row[key]) for key in varying},
            "method": method(row, row["world_size"] > 1),
            "ms": _significant(row["time_ms"]),
            "±%": _number(row["noise"] * 100 if row["noise"] is not None else None, ".1f"),
            "vs best": _number(row["time_ms"] / fastest, ".2f"),
            _unit(table): _rate(row["tflops_per_rank"], table),
            "peak MB": _number(row["peak_mb"], ".1f"),
            "sent MB": _number(row["sent_mb"], ".2f"),
            "error": _number(row["worst_error"], ".1e"),
            "flags": row["flags"],
        })
    return rows


def refusals(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What was refused, by who and why."""
    refused = table[table["status"] == "unsupported"]
    return [
        {"method": name, "cases": len(group), "reason": reason}
        for (name, reason), group in refused.groupby(
            [refused.apply(method, axis=1, many_ranks=False), "reason"]
        )
    ] if len(refused) else []


def failures(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Every case that is oom, wrong, crash or timeout, with its reason and log."""
    failed = table[~table["status"].isin(["ok", "unsupported"])]
    return [
        {
            "status": row["status"],
            "id": row["id"],
            "method": method(row, True),
            "mask": row["mask"],
            "tokens": format_size(row["seq_len"]),
            "ranks": row["world_size"],
            "reason": row["reason"],
            "log": row["log"] or "",
        }
        for _, row in failed.iterrows()
    ]


def notes(table: pd.DataFrame, run: Run, out: Path) -> list[str]:
    """Caveats, environments and where the files are."""
    lines = []
    timed = table[table["status"] == "ok"]
    flags = Counter(flag for flags in timed["flags"] for flag in str(flags).split())
    for flag, count in flags.most_common():
        lines.append(f"Caveat: {count} of {len(timed)} timed cases are {flag}"
                     f"{_MEANING.get(flag, '')}.")
    for warning in run.warnings:
        lines.append(f"Warning: {warning}")
    for environment in run.environments.values():
        device = environment.get("device", {})
        packages = environment.get("packages", {})
        lines.append(
            f"Environment {environment['id']}: {environment.get('host')}, "
            f"{device.get('name') or environment.get('processor')}, {environment.get('cores')} "
            f"cores, torch {packages.get('torch')}, cpbench {environment.get('commit') or ''}"
        )
    lines.append(f"Records: {out}/records, one JSON a line; columns: cpbench report --columns")
    return lines


def columns() -> str:
    """What the columns of the data mean."""
    width = max(map(len, COLUMNS))
    return "\n".join(f"{name:{width}}  {meaning}" for name, meaning in COLUMNS.items()) + "\n"


_HEAD = {"seq_len": "tokens", "world_size": "ranks", "direction": "dir", "num_heads_q": "Hq",
         "num_heads_kv": "Hkv", "head_dim": "D"}
_MEANING = {
    "contended": ": the processor was shared, times are too long",
    "oversubscribed": ": more threads than cores, ranks took turns",
    "throttled": ": the clock was held down",
}


def _counts(table: pd.DataFrame) -> str:
    counts = table["status"].value_counts()
    return f"{len(table)} cases, " + ", ".join(f"{n} {status}" for status, n in counts.items())


def _unit(table: pd.DataFrame) -> str:
    return "TFLOP/s" if table["tflops_per_rank"].max() >= 1 else "GFLOP/s"


def _rate(tflops: float | None, table: pd.DataFrame) -> str:
    scale = 1 if _unit(table) == "TFLOP/s" else 1e3
    return _significant(None if tflops is None else tflops * scale)


def _significant(value: Any) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None or value != value:
        return ""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.{digits}f}"


def _number(value: Any, form: str) -> str:
    return "" if value is None or value != value else format(value, form)


def _shown(key: str, value: Any) -> str:
    return format_size(int(value)) if key == "seq_len" else str(value)


def _numeric(rows: list[dict[str, Any]], key: str) -> bool:
    return key in ("tokens", "ranks", "ms", "±%", "vs best", "lead", "cases", "error", "peak MB",
                   "sent MB") or key.endswith("FLOP/s")


def _escaped(value: Any, form: str) -> str:
    text = " ".join(str(value).split())
    return text.replace("|", "\\|") if form == "md" else text
