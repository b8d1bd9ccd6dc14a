"""How reports say things: what a problem is, numbers with few digits, lists of draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

from cpbench.core.spec import format_size

_AS_LAUNCHED = "as launched"
_ALL = "all"
_UNSAID = (
    "",
    "none",
    "normal",
    "unknown",
    _AS_LAUNCHED,
)  # not worth a word where they hold throughout
_SHOWN = 5  # runs of seeds that are listed

# What a problem is: column by heading, from a row of the tidy table, and how a sentence says it.
FACTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "mask": (itemgetter("mask"), "{}"),
    "tokens": (lambda row: format_size(int(row["seq_len"])), "{} tokens"),
    "queries": (lambda row: f"last {row['queries']}" if row["queries"] else _ALL, "{} queries"),
    "ranks": (itemgetter("world_size"), "world size {}"),
    "a node": (lambda row: row["ranks_per_node"] or _AS_LAUNCHED, "{} ranks a node"),
    "direction": (itemgetter("direction"), "{}"),
    "dtype": (itemgetter("dtype"), "{}"),
    "batch": (itemgetter("batch"), "batch {}"),
    "heads": (lambda row: f"{row['num_heads_q']}:{row['num_heads_kv']}", "{} heads"),
    "head_dim": (itemgetter("head_dim"), "head_dim {}"),
    "input seed": (itemgetter("seed"), "input seed {}"),
    "inputs": (itemgetter("inputs"), "inputs {}"),
    "files": (itemgetter("content"), "files {}"),
    "machine": (itemgetter("machine"), "on {}"),
}
# The columns that a fact is read from, where they are not one of the fact's own name.
FACT_COLUMNS = {
    "tokens": ("seq_len",),
    "ranks": ("world_size",),
    "a node": ("ranks_per_node",),
    "heads": ("num_heads_q", "num_heads_kv"),
    "input seed": ("seed",),
    "files": ("content",),
}


def told(row: Any, facts: Iterable[str]) -> dict[str, str]:
    """Some facts of a row, by heading."""
    return {fact: str(FACTS[fact][0](row)) for fact in facts}


def sentence(row: Any, facts: Iterable[str]) -> str:
    """Some facts of a row, in words; that all queries attend goes without saying."""
    return phrase({fact: value for fact, value in told(row, facts).items() if value != _ALL})


def phrase(facts: dict[str, str]) -> str:
    """What :func:`told` gave, in words: a heading, told apart from others by what it says."""
    return ", ".join(
        FACTS[fact][1].format(value) for fact, value in facts.items() if value not in _UNSAID
    )


def apart(rows: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Neighbouring rows of one problem together: its facts in words, and the rows without them."""
    found = []
    for problem, group in itertools.groupby(
        rows, key=lambda row: phrase({key: row[key] for key in FACTS if key in row})
    ):
        cells = [{key: row[key] for key in row if key not in FACTS} for row in group]
        found.append((problem, cells))
    return found


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def seeds(draws: Sequence[Any]) -> str:
    """``seeds 0-3, 7``: what was drawn, neighbours together and the end left out when long."""
    runs: list[list[Any]] = []
    for draw in sorted(draw for draw in draws if isinstance(draw, int)):
        if runs and runs[-1][-1] == draw - 1:
            runs[-1].append(draw)
        else:
            runs.append([draw])
    runs += [[draw] for draw in draws if not isinstance(draw, int)]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:_SHOWN]]
    more = ", …" if len(runs) > _SHOWN else ""
    return f"seed{'' if len(draws) == 1 else 's'} {', '.join(parts)}{more}"


def significant(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    if math.isnan(value):
        return ""
    rounded = abs(float(f"{value:.2e}"))
    digits = 2 - math.floor(math.log10(rounded)) if 0 < rounded < math.inf else 0
    return f"{value:,.{max(digits, 0)}f}"


def number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else format(value, form) + unit


class Rate:
    """Rates in one unit, TFLOP/s or GFLOP/s, so that columns compare.

    Args:
        rates: all that there are, TFLOP/s.
    """

    def __init__(self, rates: Iterable[float]) -> None:
        self._tera = max((rate for rate in rates if not math.isnan(rate)), default=0.0) >= 1

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self._tera else "GFLOP/s"

    def __call__(self, tflops: float) -> str:
        return significant(tflops if self._tera else tflops * 1e3)
