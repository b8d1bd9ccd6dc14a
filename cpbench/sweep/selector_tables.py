"""The cases of ``cpbench verify`` with selectors on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpbench.core import registry

SEQ_LEN = 256  # whole blocks of 16 tokens on every rank of 2 and 4, in two runs each
WORLD_SIZES = ("2", "4")


def on_ranks(
    strategies: Sequence[str], sizes: Sequence[str] = WORLD_SIZES, quick: bool = False
) -> list[dict[str, Any]]:
    """Tables of every selector that the strategies take.

    Args:
        strategies: names, with parameters; those that take no selectors are left out.
        sizes: numbers of ranks.
        quick: one selector for each strategy.
    """
    tables = []
    for strategy in strategies:
        name = strategy.partition(":")[0]
        takes = registry.strategy_info(name).selectors
        if name == "single" or takes == "none":
            continue
        selectors = [
            info
            for _, info in sorted(registry.operators().items())
            if info.selects and (takes == "any" or info.selects_from == "pooled_keys")
        ]
        for info in selectors[:1] if quick else selectors:
            tables.append(
                {
                    "operator": [f"{info.name}:{text}" for text in info.variants],
                    "strategy": strategy,
                    "layout": ["contiguous"] if quick else ["contiguous", "zigzag"],
                    "world_size": list(sizes),
                    "mask": "causal" if "causal" in info.masks else info.masks[0],
                    "seq_len": SEQ_LEN,
                    "num_heads_q": 8,
                    "num_heads_kv": 4,
                    "head_dim": 16,
                    "dtype": ["bfloat16"] if quick else ["float32", "bfloat16"],
                    "direction": "fwd_bwd",
                }
            )
    return tables


def needing_selectors(strategies: Sequence[str]) -> list[str]:
    """Those of the strategies, each with its parameters, that take nothing but selectors."""
    return [
        text
        for text in strategies
        if registry.strategy_info(text.partition(":")[0]).selectors == "pooled"
    ]
