"""A recommendation for a terminal: the answer, a row for each strategy, and the numbers of ranks at
which the order changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpbench.core.problem import format_head_dims
from cpbench.core.spec import format_size, three_digits
from cpbench.reports.tables.terminal import table_lines, wrap

Row = dict[str, Any]
Result = dict[str, Any]


def lines(result: Result) -> list[str]:
    """All lines, no wider than the terminal."""
    methods = of_ranks(result)
    text = [line for warning in result["warnings"] for line in wrap(warning)]
    text += [*wrap(answer(result)), *wrap(problem(result)), ""]
    text += table_lines([_cells(row) for row in strategies(methods)])
    if len(result["by_ranks"]) > 1:
        text += ["", *table_lines(crossovers(result))]
    return text


def of_ranks(result: Result) -> list[Row]:
    """The methods on the number of ranks that was asked for."""
    rows: list[Row] = result["by_ranks"][-1]["methods"]
    return rows


def strategies(methods: Sequence[Row]) -> list[Row]:
    """Of each strategy the row that comes first."""
    rows: dict[str, Row] = {}
    for row in methods:
        rows.setdefault(base(row), row)
    return list(rows.values())


def base(row: Row) -> str:
    """The name of its strategy without parameters."""
    return str(row["strategy"]).partition(":")[0]


def name(row: Row) -> str:
    """Strategy, parameters and placement."""
    return f"{row['strategy']}" + f" {row['placement']} inside" * bool(row["placement"])


def method(row: Row) -> str:
    """Strategy and layout."""
    return f"{name(row)}/{row['layout']}"


def answer(result: Result) -> str:
    """The best in a sentence, one variant of each strategy."""
    methods = of_ranks(result)
    if methods[0]["status"] != "best":
        return f"Nothing fits into {result['gpu_gib']:g} GiB on {result['ranks']} ranks."
    first, *others = (row for row in strategies(methods) if row["status"] == "best")
    sentence = f"Fastest: {method(first)}, {milliseconds(first['seconds'])} ms"
    if others:
        names = ", ".join(method(row) for row in others)
        return f"{sentence}; within its interval of {result['error']:.0%}: {names}."
    return f"{sentence}; no other strategy is within its interval of {result['error']:.0%}."


def problem(result: Result) -> str:
    """What was asked for, and what it was predicted with."""
    dims = format_head_dims(result["head_dim"], result["head_dim_v"])
    facts = [
        f"{format_size(result['seq_len'])} tokens", result["mask"],
        f"{result['draws']} draws" * (result["draws"] > 1),
        f"{result['num_heads_q']}:{result['num_heads_kv']} heads of {dims}",
        f"batch {result['batch']}" * (result["batch"] > 1), result["dtype"], result["direction"],
        f"{result['ranks']} ranks of {result['gpu_gib']:g} GiB, {result['ranks_per_node']} a node",
        f"{result['operator']} on {result['cluster']} ({result['cluster_hash']})",
    ]  # fmt: skip
    return ", ".join(fact for fact in facts if fact)


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits."""
    return three_digits(seconds * 1e3)


def times(row: Row) -> str:
    """``12.3``, or ``>= 12.3`` of a lower bound; "" of a method that is refused."""
    if "seconds" not in row:
        return ""
    return _at_least(row) + milliseconds(row["seconds"])


def spread(row: Row) -> str:
    """The times of its fastest and slowest draw; "" of one draw."""
    draws = row.get("draw_seconds", ())
    return f"{milliseconds(min(draws))} to {milliseconds(max(draws))}" if len(draws) > 1 else ""


def ratio(row: Row) -> str:
    """Its time over that of the best, on the same draws."""
    value = row.get("ratio")
    return "" if value is None else f"{_at_least(row)}{value:.2f}"


def _at_least(row: Row) -> str:
    return ">= " if row["at_least"] else ""


def _cells(row: Row) -> dict[str, str]:
    memory = row.get("memory")
    return {
        "strategy": name(row),
        "layout": row["layout"],
        "ms": times(row),
        "draws": spread(row),
        "x best": ratio(row),
        "memory": memory["verdict"] if memory else "",
        "why it loses": row["why"] or "(one of the best)",
    }


def crossovers(result: Result) -> list[dict[str, str]]:
    """A row for each number of ranks: the fastest, its time, and others within its interval."""
    table = []
    for one in result["by_ranks"]:
        best = [row for row in one["methods"] if row["status"] == "best"]
        table.append({
            "ranks": str(one["ranks"]) + " (extrapolated)" * bool(one["warnings"]),
            "fastest": method(best[0]) if best else "none fits",
            "ms": milliseconds(best[0]["seconds"]) if best else "",
            "within its interval": ", ".join(base(row) for row in strategies(best)[1:]),
        })  # fmt: skip
    return table
