"""Stacks of attention and mixer layers, from the times of one layer of each.

A hybrid model has ``a`` attention layers for every ``n`` mixer layers (Jamba 1:7, Falcon-H1 1:1).
One such period takes a times the time of attention and n times that of the mixer, both of one
problem on as many ranks.  Where the two have different layouts, hidden states change between them
before the attention layers and after, in the forward and in the backward pass.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import DTYPE_BYTES
from cpbench.reports.collection import Collection
from cpbench.reports.labels import fact_values, format_number, group_by_problem, three_digits
from cpbench.reports.mixers.beside import KEYS
from cpbench.reports.tables.markup import MARKUPS, data_text
from cpbench.reports.tables.summary import method_name
from cpbench.results.record import ATTENTION

if TYPE_CHECKING:
    from cpbench.masks.attn_mask import AttnMask

CHANGES = {"fwd": 2, "bwd": 2, "fwd_bwd": 4}  # of layouts, in a period
LARGEST_RATIO = 1000


@dataclass(frozen=True)
class Ratio:
    """How many layers of a period are attention, and how many mixers."""

    attention: int
    mixers: int

    @classmethod
    def parse(cls, text: str) -> Ratio:
        """``"1:7"``.

        Raises:
            ValueError: for anything but two whole numbers from 1 to 1000.
        """
        match = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text)
        ratio = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not all(1 <= layers <= LARGEST_RATIO for layers in (ratio.attention, ratio.mixers)):
            raise ValueError(
                f"--hybrid {text!r}: give attention layers and mixer layers, e.g. 1:7, each from 1 "
                f"to {LARGEST_RATIO}"
            )
        return ratio

    def __str__(self) -> str:
        return f"{self.attention}:{self.mixers}"


@dataclass(frozen=True)
class Stack:
    """A period of a hybrid stack.

    Attributes:
        attention, mixer: rows of the tidy table, a layer of each.
        attention_ms, mixer_ms: of all layers of a kind in the period.
        exchange_mb: 10^6 bytes of hidden states that the rank with the most sends; 0 in one layout.
        exchange_ms: the time of that, at the rate at which either method sends alone; nan where
            neither was measured.
        alone_ms: of as many attention layers of the fastest method.
    """

    attention: Any
    mixer: Any
    attention_ms: float
    mixer_ms: float
    exchange_mb: float
    exchange_ms: float
    alone_ms: float

    @property
    def ms(self) -> float:
        """Of the period; nan where the time of the exchange is unknown."""
        return self.attention_ms + self.mixer_ms + self.exchange_ms


def hybrid_stacks(collection: Collection, ratio: Ratio) -> list[Stack]:
    """For every mixer method that competes, the stack with the attention method that makes it the
    fastest; by problem, fastest first.  One whose exchange has no known time is taken only where
    there is no other.

    Raises:
        ValueError: where no problem has both.
    """
    ranked = collection.table[collection.table["competes"]]
    stacks = []
    for _, group in ranked.groupby(list(KEYS), sort=True):
        rows = group.to_dict("records")
        attention = [row for row in rows if row["computes"] == ATTENTION]
        if not attention:
            continue
        alone_ms = min(row["time_ms"] for row in attention)
        found = [
            min((_stack(one, row, ratio, alone_ms) for one in attention), key=_order)
            for row in rows
            if row["computes"] != ATTENTION
        ]
        stacks += sorted(found, key=_order)
    if not stacks:
        raise ValueError(
            "--hybrid needs times of exact attention and of a sequence mixer for as many tokens, "
            "heads and ranks; no problem has both"
        )
    return stacks


def render(collection: Collection, ratio: Ratio, varying_facts: Sequence[str], form: str) -> str:
    """The stacks as ``short``, ``table``, ``md``, ``latex``, ``csv`` or ``json``."""
    stacks = hybrid_stacks(collection, ratio)
    if form in ("csv", "json"):
        return data_text([_data(stack, ratio) for stack in stacks], form)
    markup = MARKUPS[form]
    layers = f"{ratio.attention} attention, {ratio.mixers} mixer layers"
    lines = markup.title(f"{collection.title}: hybrid stacks, {layers}")
    facts = [fact for fact in varying_facts if fact not in ("computes", "inputs", "files")]
    rows = [{**fact_values(stack.mixer, facts), **_texts(stack)} for stack in stacks]
    blocks = group_by_problem(rows)
    if form in ("short", "table"):
        for problem, cells in blocks:
            lines += markup.section(problem) if problem else []
            lines += markup.table(cells)
    else:
        lines += markup.table(rows)
    return markup.document([*lines, *markup.notes(_notes(stacks, ratio))])


def _stack(attention: Any, mixer: Any, ratio: Ratio, alone_ms: float) -> Stack:
    megabytes = _exchange_mb(attention, mixer) if mixer["world_size"] > 1 else 0.0
    rate = max(map(_mb_per_ms, (attention, mixer)))
    exchange_ms = megabytes / rate if rate else math.nan
    return Stack(
        attention=attention,
        mixer=mixer,
        attention_ms=ratio.attention * attention["time_ms"],
        mixer_ms=ratio.mixers * mixer["time_ms"],
        exchange_mb=megabytes,
        exchange_ms=exchange_ms if megabytes else 0.0,
        alone_ms=(ratio.attention + ratio.mixers) * alone_ms,
    )


def _order(stack: Stack) -> tuple[bool, float]:
    known = not math.isnan(stack.exchange_ms)
    return not known, stack.ms if known else stack.attention_ms + stack.mixer_ms


def _mb_per_ms(row: Any) -> float:
    """At which a method sends alone; 0 where that was not measured."""
    measured = row["transfer_ms"] > 0 and row["sent_mb"] > 0
    return float(row["sent_mb"] / row["transfer_ms"]) if measured else 0.0


def _exchange_mb(attention: Any, mixer: Any) -> float:
    """The 10^6 bytes that the rank with the most sends in a period: hidden states as wide as the
    outputs of all heads, in the dtype of the inputs."""
    names = str(attention["layout"]), str(mixer["layout"])
    if names[0] == names[1]:
        return 0.0
    problem = int(mixer["seq_len"]), int(mixer["world_size"]), str(mixer["mask"])
    tokens = max(_moved_tokens(*pair, *problem) for pair in (names, names[::-1]))
    width = int(mixer["num_heads_q"]) * int(mixer["head_dim_v"] or mixer["head_dim"])
    nbytes = tokens * int(mixer["batch"]) * width * DTYPE_BYTES[mixer["dtype"]]
    return CHANGES[mixer["direction"]] * nbytes / 1e6


@functools.lru_cache(maxsize=256)
def _moved_tokens(before: str, after: str, seq_len: int, world_size: int, mask: str) -> int:
    """The most tokens of a rank that are of another one in another layout."""
    import numpy as np

    from cpbench.parallel import layout as layouts

    built = _mask(mask, seq_len)
    first, second = (layouts.build(name, seq_len, world_size, built) for name in (before, after))
    most = 0
    for rank in range(world_size):
        own, later = (layout.positions(rank) for layout in (first, second))
        most = max(most, int((~np.isin(own[own < seq_len], later)).sum()))
    return most


def _mask(mask: str, seq_len: int) -> AttnMask:
    from cpbench import masks

    return masks.build(mask, seq_len)


def _texts(stack: Stack) -> dict[str, str]:
    unknown, alone = math.isnan(stack.exchange_ms), stack.mixer["world_size"] == 1
    ms = stack.attention_ms + stack.mixer_ms if unknown else stack.ms
    return {
        "mixer": method_name(stack.mixer),
        "attention": method_name(stack.attention),
        "ms": ("over " if unknown else "") + three_digits(ms),
        "vs attention": "" if unknown else format_number(stack.alone_ms / ms, ".2f", "x"),
        "attention %": format_number(100 * stack.attention_ms / ms, ".1f"),
        "exchange MB": "" if alone else three_digits(stack.exchange_mb),
        "exchange ms": "?" if unknown else "" if alone else three_digits(stack.exchange_ms),
    }


def _data(stack: Stack, ratio: Ratio) -> dict[str, Any]:
    """A stack for programs: its problem, both methods, and unrounded figures, None for unknown."""
    parts = ("operator", "strategy", "layout", "id")
    methods = {
        f"{kind}_{part}": row[part]
        for kind, row in (("mixer", stack.mixer), ("attention", stack.attention))
        for part in parts
    }
    unknown = math.isnan(stack.exchange_ms)
    return {
        "hybrid": str(ratio),
        **{key: stack.mixer[key] for key in KEYS},
        **methods,
        "attention_ms": stack.attention_ms,
        "mixer_ms": stack.mixer_ms,
        "exchange_mb": stack.exchange_mb,
        "exchange_ms": None if unknown else stack.exchange_ms,
        "time_ms": None if unknown else stack.ms,
        "attention_alone_ms": stack.alone_ms,
    }


def _notes(stacks: Sequence[Stack], ratio: Ratio) -> list[str]:
    layers = ratio.attention + ratio.mixers
    notes = [
        f"ms: of {layers} layers, without what is between them (projections, MLPs, norms); vs "
        f"attention: {layers} layers of the fastest attention over that."
    ]
    if any(stack.exchange_mb for stack in stacks):
        notes.append(
            "exchange: hidden states, as wide as all heads, that change their layout between "
            "attention and mixers: MB of the rank that sends most; ms at the rate at which the "
            "methods send."
        )
    if any(math.isnan(stack.exchange_ms) for stack in stacks):
        notes.append("?: not known, for no communication was measured (exposure in [measure]).")
    return notes
