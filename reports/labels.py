"""Labels and number formats of reports: problem facts, three digits, rates, lists of seeds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any

from cpbench.core.problem import format_head_dims
from cpbench.core.spec import format_size
from cpbench.core.spec import three_digits as three_digits
from cpbench.results.record import ATTENTION

_AS_LAUNCHED = "as launched"
_ALL_QUERIES = "all"
_DEFAULTS = (
    "",
    "none",
    ATTENTION,
    "normal",
    "unknown",
    _AS_LAUNCHED,
)  # left out where all cases have them
_MAX_SEED_RANGES = 5  # that are listed
_PIECE = re.compile(r"[^\s,:/]*(?:[,:/]+\s?|\s|$)")
# Words of the label of a case that say something together only.
_PHRASE = re.compile(
    r"decode \S+ pages of \S+|S=\S+ of \S+|\S+ inside/\S+|\(\d+ per node\)|(?:on|rope) \S+|\S+"
)
_BREAKS = "_="  # where a piece that is too long is broken

# Facts of a problem by heading: their value, from a row of the tidy table, and form in a sentence.
FACTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "computes": (itemgetter("computes"), "{}"),
    "mask": (itemgetter("mask"), "{}"),
    "tokens": (lambda row: format_size(int(row["seq_len"])), "{} tokens"),
    "queries": (
        lambda row: (
            f"last {row['queries']}" if row["queries"] and not row["page_size"] else _ALL_QUERIES
        ),
        "{} queries",
    ),
    "decoding": (
        lambda row: (
            f"{row['key_lens']} in pages of {row['page_size']}".strip() if row["page_size"] else ""
        ),
        "decoding {}",
    ),
    "ranks": (itemgetter("world_size"), "world size {}"),
    "ranks/node": (lambda row: row["ranks_per_node"] or _AS_LAUNCHED, "{} ranks per node"),
    "direction": (itemgetter("direction"), "{}"),
    "dtype": (itemgetter("dtype"), "{}"),
    "batch": (itemgetter("batch"), "batch {}"),
    "heads": (lambda row: f"{row['num_heads_q']}:{row['num_heads_kv']}", "{} heads"),
    "head_dim": (
        lambda row: format_head_dims(int(row["head_dim"]), int(row["head_dim_v"])),
        "head_dim {}",
    ),
    "input seed": (itemgetter("seed"), "input seed {}"),
    "inputs": (itemgetter("inputs"), "inputs {}"),
    "rope": (itemgetter("rope"), "rope {}"),
    "files": (itemgetter("content"), "files {}"),
    "machine": (itemgetter("machine"), "on {}"),
}
# The columns that a fact is read from, where the name of the column differs.
FACT_COLUMNS = {
    "tokens": ("seq_len",),
    "decoding": ("key_lens", "page_size"),
    "ranks": ("world_size",),
    "ranks/node": ("ranks_per_node",),
    "heads": ("num_heads_q", "num_heads_kv"),
    "head_dim": ("head_dim", "head_dim_v"),
    "input seed": ("seed",),
    "files": ("content",),
}


def fact_values(row: Any, facts: Iterable[str]) -> dict[str, str]:
    """Values of the given facts of a row, by heading."""
    return {fact: str(FACTS[fact][0](row)) for fact in facts}


def describe(row: Any, facts: Iterable[str]) -> str:
    """The given facts of a row in words; "all queries" is left out."""
    values = fact_values(row, facts)
    return describe_values({fact: text for fact, text in values.items() if text != _ALL_QUERIES})


def describe_values(values: dict[str, str]) -> str:
    """Values from :func:`fact_values` in words, defaults left out."""
    return ", ".join(
        FACTS[fact][1].format(text) for fact, text in values.items() if text not in _DEFAULTS
    )


def group_by_problem(rows: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Neighbouring rows of one problem: its facts in words, and the rows without these facts."""
    groups = []
    for problem, rows_of_problem in itertools.groupby(
        rows, key=lambda row: describe_values({key: row[key] for key in FACTS if key in row})
    ):
        cells = [{key: row[key] for key in row if key not in FACTS} for row in rows_of_problem]
        groups.append((problem, cells))
    return groups


def split_common_words(labels: Sequence[str]) -> tuple[str, list[str]]:
    """The words that all labels of cases have in common, and the labels without them; with a single
    label, nothing is common."""
    words = [_PHRASE.findall(label) for label in labels]
    if len(set(labels)) < 2:
        return "", list(labels)
    common = set.intersection(*map(set, words))
    shared = " ".join(word for word in words[0] if word in common)
    return shared, [" ".join(word for word in of if word not in common) or of[0] for of in words]


def pluralize(count: int, noun: str) -> str:
    """``1 case``, ``2 cases``, ``2 launches``."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{'' if count == 1 else ending}"


def format_seeds(seeds: Sequence[Any]) -> str:
    """``0-3, 7``: seeds in order, consecutive ones as a range, cut when there are many ranges."""
    ranges: list[list[Any]] = []
    for seed in sorted(seed for seed in seeds if isinstance(seed, int)):
        if ranges and ranges[-1][-1] == seed - 1:
            ranges[-1].append(seed)
        else:
            ranges.append([seed])
    ranges += [[seed] for seed in seeds if not isinstance(seed, int)]
    texts = [
        f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0])
        for members in ranges[:_MAX_SEED_RANGES]
    ]
    more = ", …" if len(ranges) > _MAX_SEED_RANGES else ""
    return f"{', '.join(texts)}{more}"


def format_number(value: float, form: str, unit: str = "") -> str:
    """A number in a given format, with its unit; "" for nan, and no minus before zeros."""
    return "" if math.isnan(value) else without_minus_zero(format(value, form)) + unit


def format_megabytes(value: float) -> str:
    """Two decimals, or three digits of what has none in these; "" for nan."""
    return three_digits(value) if 0 < value < 0.1 else format_number(value, ".2f")


def signed_percent(change: float) -> str:
    """``+1.2%``, ``-3.0%`` or ``0.0%`` for a relative change."""
    text = f"{change:+.1%}"
    return text[1:] if not text.strip("+-0.%") else text


def without_minus_zero(text: str) -> str:
    """``0.0`` for ``-0.0``."""
    return text[1:] if text.startswith("-") and not text.strip("-0.%") else text


class RateFormat:
    """Formats rates in one unit, TFLOP/s or GFLOP/s, so that columns compare.

    Args:
        rates: all rates of a report, TFLOP/s.
    """

    def __init__(self, rates: Iterable[float]) -> None:
        self._tera = max((rate for rate in rates if not math.isnan(rate)), default=0.0) >= 1

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self._tera else "GFLOP/s"

    def __call__(self, tflops: float) -> str:
        return three_digits(tflops if self._tera else tflops * 1e3)


def wrap_name(text: str, width: int) -> list[str]:
    """Lines of a label in a figure, of at most ``width``, broken after spaces and punctuation where
    possible."""
    lines = [""]
    for piece in _PIECE.findall(text):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        while len(piece.rstrip()) > width:
            cut = max(piece.rfind(letter, 0, width) for letter in _BREAKS) + 1 or width
            lines[-1:] = [piece[:cut], ""]
            piece = piece[cut:]
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def if_multi_rank(row: Any, column: str) -> float:
    """A value that is meaningful on several ranks only; nan on one."""
    return float(row[column]) if row["world_size"] > 1 else math.nan
