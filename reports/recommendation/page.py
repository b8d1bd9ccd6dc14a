"""A recommendation as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from cpbench.reports.page import assets
from cpbench.reports.page.write import render_template
from cpbench.reports.recommendation import text

NO_BREAK = "\N{NO-BREAK SPACE}"
PARTS = ("attention", "side", "exposed")


def render_page(result: dict[str, Any]) -> str:
    """The page: the answer, where the time goes, the order by number of ranks, all methods."""
    methods = text.of_ranks(result)
    source = assets.read_web("loader.js", "recommend.js")
    return render_template(
        "recommend.html.j2",
        title="Recommended strategies",
        answer=text.answer(result),
        problem=text.problem(result),
        warnings=result["warnings"],
        strategies=[_cells(row) for row in text.strategies(methods)],
        crossovers=text.crossovers(result) if len(result["by_ranks"]) > 1 else [],
        methods=[_cells(row) for row in methods],
        error=f"{result['error']:.0%}",
        css=assets.read_web("page.css"),
        tables_css="",
        script=source,
        policy=assets.security_policy(source, external_samples=False),
        blobs={"plotly": assets.packed_plotly(), "data": assets.pack_json(page_data(result))},
    )


def page_data(result: dict[str, Any]) -> dict[str, Any]:
    """What the charts show: parts of the time of predicted methods, and times by ranks."""
    timed = [row for row in text.of_ranks(result) if "breakdown" in row]
    return {
        "error": result["error"],
        "parts": [
            {"method": text.method(row), "best": row["status"] == "best",
             "seconds": row["seconds"], "low": row["low"], "high": row["high"],
             **{part: row["breakdown"][part] for part in PARTS}}
            for row in timed
        ],
        "lines": lines_by_ranks(result),
    }  # fmt: skip


def lines_by_ranks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For each strategy its least time by number of ranks, where one was predicted."""
    series: dict[str, dict[int, tuple[float, str]]] = {}
    for one in result["by_ranks"]:
        for row in one["methods"]:
            if row["status"] in ("best", "slower") and "breakdown" in row:
                of_strategy = series.setdefault(text.base(row), {})
                found = row["seconds"], text.method(row)
                of_strategy[one["ranks"]] = min(found, of_strategy.get(one["ranks"], found))
    return [
        {"strategy": name, "ranks": list(points), "seconds": [time for time, _ in points.values()],
         "methods": [method for _, method in points.values()]}
        for name, points in sorted(series.items())
    ]  # fmt: skip


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Cells of a table."""
    memory = row.get("memory")
    gib = f", {memory['high_bytes'] / (1 << 30):,.0f} GiB" if memory else ""
    return {
        "strategy": text.name(row),
        "layout": row["layout"],
        "ms": _number(text.times(row)),
        "draws": _number(text.spread(row)),
        "x best": _number(text.ratio(row)),
        "memory": f"{memory['verdict']}{gib}" if memory else "",
        "why it loses": row["why"] or "(one of the best)",
    }


def _number(cell: str) -> str:
    """A number that is not broken over lines."""
    return cell.replace(">=", "≥").replace(" ", NO_BREAK)
