"""The cases of ``cpbench verify`` with selectors on several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cpbench.core import registry
from cpbench.core.spec import Spec

SEQ_LEN = 256  # whole blocks of 16 tokens on every rank of 2 and 4, in two runs each
WORLD_SIZES = ("2", "4")


def required_by(strategy: str) -> bool:
    """Whether a strategy takes nothing but selectors."""
    return registry.strategy_info(strategy).selectors == "pooled"


def taking_others(strategies: Iterable[str]) -> list[str]:
    """The strategies of several ranks that take other operators, too."""
    return sorted(name for name in strategies if name != "single" and not required_by(name))


def with_others(strategies: list[Spec], operators: Sequence[str]) -> list[Spec]:
    """Those of the strategies that take other operators, too; none where there are none."""
    return [spec for spec in strategies if operators and not required_by(spec.name)]


def named(operators: Iterable[str]) -> list[str]:
    """The selectors among operators, each with its parameters."""
    return [text for text in operators if registry.operator_info(Spec.parse(text).name).selects]


def on_ranks(
    strategies: Iterable[str],
    sizes: Sequence[str] | None = None,
    selectors: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Tables of selectors under each strategy that takes them, or all where selectors are named.

    Args:
        strategies: with parameters.
        sizes: numbers of ranks; ``WORLD_SIZES`` unless given.
        selectors: with parameters; the variants of all that are registered unless given.
    """
    tables = []
    for strategy in strategies:
        name = Spec.parse(strategy).name
        takes_none = registry.strategy_info(name).selectors == "none"
        if name == "single" or (takes_none and selectors is None):
            continue
        for operator in _taken(name) if selectors is None else selectors:
            tables.append(_table(operator, strategy, sizes or WORLD_SIZES))
    return tables


def quick(size: str) -> list[dict[str, Any]]:
    """Tables of one selector under each strategy that takes any."""
    names = sorted(registry.strategies())
    tables = [table for name in names for table in on_ranks([name], [size])[:1]]
    return [{**table, "layout": "contiguous", "dtype": "bfloat16"} for table in tables]


def _taken(strategy: str) -> list[str]:
    """The variants of the selectors that a strategy takes."""
    any_kind = registry.strategy_info(strategy).selectors == "any"
    return [
        f"{name}:{text}"
        for name, info in sorted(registry.operators().items())
        if info.selects and (any_kind or info.selects_from == "pooled_keys")
        for text in info.variants
    ]


def _table(operator: str, strategy: str, sizes: Sequence[str]) -> dict[str, Any]:
    masks = registry.operator_info(Spec.parse(operator).name).masks
    return {
        "operator": operator,
        "strategy": strategy,
        "layout": "zigzag",
        "world_size": list(sizes),
        "mask": "causal" if "causal" in masks else masks[0],
        "seq_len": SEQ_LEN,
        "num_heads_q": 8,
        "num_heads_kv": 4,
        "head_dim": 16,
        "dtype": ["float32", "bfloat16"],
        "direction": "fwd_bwd",
    }
