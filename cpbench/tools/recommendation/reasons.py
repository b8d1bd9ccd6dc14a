"""Why a method is not among the best, in a few words."""

from __future__ import annotations

from typing import Any

UNEVEN = 1.05  # load imbalance that is worth a word
PARTS = ("attention", "side", "exposed")


def reason(row: dict[str, Any], outcome: dict[str, Any], best: dict[str, Any] | None) -> str:
    """Why a method that is not refused loses; "" for one of the best.

    Args:
        row: of the method, see :func:`cpbench.tools.recommendation.recommend.ranked`.
        outcome, best: of the method and of the best one, on the same draw.
    """
    if row["status"] == "best":
        return ""
    parts = parts_of(outcome)
    if not parts:
        bound = outcome["bound"]
        return _work(bound) if bound["attention"] >= bound["links"] else _traffic(bound)
    if row["status"] == "does not fit":
        need = row["memory"]
        return (
            f"memory: needs {need['low_bytes'] / (1 << 30):,.0f} of "
            f"{need['gpu_bytes'] / (1 << 30):,.0f} GiB"
        )
    if best is None:
        return ""
    of_best = parts_of(best)
    largest = max(parts, key=lambda part: parts[part] - of_best[part])
    milliseconds = f"{parts[largest] * 1e3:,.3g} ms"
    if largest == "exposed":
        return f"waits {milliseconds} for communication, {_traffic(outcome['bound'])}"
    if largest == "side":
        return f"merges and copies take {milliseconds}"
    if row["strategy"].partition(":")[0] == "scan":
        return "summarises runs of tokens, and computes what their states change"
    return _work(outcome["bound"])


def parts_of(outcome: dict[str, Any]) -> dict[str, float]:
    """Seconds of attention, of side work and of waiting, over all phases; empty if only its bound
    is known."""
    if "phases" not in outcome:
        return dict(outcome.get("busiest_rank", {}))
    phases = outcome["phases"].values()
    return {part: sum(phase["breakdown"][part] for phase in phases) for part in PARTS}


def _work(bound: dict[str, Any]) -> str:
    if bound["balance"] > UNEVEN:
        return f"load imbalance {bound['balance']:.2f}"
    return "slower kernel calls: smaller or partial tiles"


def _traffic(bound: dict[str, Any]) -> str:
    where, name = ("across nodes", "across") if bound["across"] else ("inside the node", "inside")
    return f"sends {format_bytes(bound[name])} {where}"


def format_bytes(nbytes: float) -> str:
    """``4.2 GB``, or ``120 MB`` below a gigabyte."""
    if nbytes < 1e9:
        return f"{nbytes / 1e6:,.0f} MB"
    return f"{nbytes / 1e9:,.1f} GB" if nbytes < 1e10 else f"{nbytes / 1e9:,.0f} GB"
