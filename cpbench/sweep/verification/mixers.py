"""Cases of ``cpbench verify`` for sequence mixers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpbench.core import registry
from cpbench.core.spec import Spec

MIXERS = "mixers"  # in a list of operators: all of them
DOCUMENTS = "doc_lens=[1,60,100,7,125]"
MASKS = ("causal", f"causal_document:{DOCUMENTS}")
HEADS = {"num_heads_q": 4, "num_heads_kv": 4}
VALUE_DIMS = {"head_dim": 24, "head_dim_v": 16}
INITIAL_STATE = "gates:initial=true"
# Of which the first document, which alone starts from the initial state, is long enough for ranks
# to cut it.
INITIAL_MASKS = ("causal", "causal_document:doc_lens=[125,7,100,1,60]")
LONG_SEQ_LEN = 1111
FEW = ("gated_deltanet",)  # on several ranks, where no operator is named
FEW_SIZES = ("2", "3")

# Chunks that are part of a definition: short ones, and tokens and documents that are cut nowhere
# inside them on 1, 2, 3, 4 and 8 ranks.
CHUNKED = {"ttt": "ttt:chunk=16"}
CHUNKED_SEQ_LEN = 768
CHUNKED_MASKS = ("causal", "causal_document:doc_lens=[16,272,64,416]")


def split(operators: Iterable[str]) -> tuple[list[str], list[str]]:
    """Operators of attention, and sequence mixers, each with its parameters."""
    kinds: dict[str, list[str]] = {"attention": [], "mixer": []}
    for text in operators:
        if text == MIXERS:
            infos = registry.operators().items()
            kinds["mixer"] += sorted(name for name, info in infos if info.mixer == name)
        else:
            kinds[registry.operator_info(Spec.parse(text).name).kind].append(text)
    return kinds["attention"], kinds["mixer"]


def distributing() -> list[str]:
    """Names of the strategies of sequence mixers on several ranks."""
    return [name for name in registry.strategies_for("mixer") if name != "single"]


def tables_alone(
    mixers: list[str], shapes: Mapping[str, Any], given_masks: bool
) -> list[dict[str, Any]]:
    """Tables of mixers on one rank: small, longer than the small check, other head_dims of values
    (with an initial state), gates of 20 nats a token, and the full mask of those that take it."""
    masks = {} if given_masks else {"mask": list(MASKS)}
    base = {**shapes, **HEADS, **masks, "operator": mixers}
    if given_masks:
        return [{**base, "head_dim": 64, "direction": ["fwd", "fwd_bwd"]}]
    full = [
        text for text in mixers if "full" in registry.operator_info(Spec.parse(text).name).masks
    ]
    return [
        {**base, "head_dim": 64, "direction": ["fwd", "fwd_bwd"]},
        *_with_initial_states({**base, **VALUE_DIMS}, mixers),
        {**base, "head_dim": 16, "inputs": "gates:shortest=0.03"},
        {**base, "head_dim": 32, "seq_len": LONG_SEQ_LEN},
        *([{**base, "operator": full, "mask": "full"}] if full else []),
    ]


def tables_on_ranks(
    spec: Spec,
    mixers: Sequence[str],
    shapes: Mapping[str, Any],
    sizes: Sequence[str],
    given_masks: bool,
) -> list[dict[str, Any]]:
    """Tables of mixers under a strategy: on all its layouts, its variants on two of them; on all
    layouts also other head_dims of values, with an initial state; and longer than the small check.

    Args:
        mixers: none for :data:`FEW`, in a few cases.
        sizes: world sizes.
    """
    info = registry.strategy_info(spec.name)
    variants = [] if spec.params else [f"{spec.name}:{text}" for text in info.mixer_variants]
    ways, two_layouts = [str(spec), *variants], list(info.layouts[:2])
    base = {**shapes, **HEADS, "head_dim": 16, "world_size": list(sizes)}
    if not given_masks:
        base["mask"] = list(MASKS)
    last_mask = {"mask": base["mask"][-1]}
    if not mixers:
        return [
            {**base, **last_mask, "operator": list(FEW), "strategy": ways, "layout": two_layouts[1]}
        ]
    both = {"direction": ["fwd", "fwd_bwd"]}
    tables: list[dict[str, Any]] = []
    free = [text for text in mixers if text not in CHUNKED]
    if free:
        of_free = {**base, "operator": free}
        longer = {"seq_len": LONG_SEQ_LEN, "mask": "causal_document:corpus=prolong64k"}
        if given_masks:
            longer.pop("mask")
        of_ways = {**of_free, **last_mask, "strategy": ways}
        initial_masks = {} if given_masks else {"mask": list(INITIAL_MASKS)}
        unequal = {**of_ways, **VALUE_DIMS, **initial_masks}
        tables += [
            {**of_free, **both, "strategy": str(spec), "layout": list(info.layouts)},
            {**of_free, **both, "strategy": variants or str(spec), "layout": two_layouts},
            *_with_initial_states({**unequal, "layout": list(info.layouts)}, free),
            *_with_initial_states({**unequal, "layout": two_layouts[0], "direction": "fwd"}, free),
            {**of_ways, **longer, "layout": two_layouts[1]},
        ]
    if chunked := [CHUNKED[text] for text in mixers if text in CHUNKED]:
        shaped = {**base, **both, "seq_len": CHUNKED_SEQ_LEN}
        if not given_masks:
            shaped["mask"] = list(CHUNKED_MASKS)
        tables += _with_initial_states({**shaped, "strategy": ways, "layout": two_layouts}, chunked)
    return tables


def _with_initial_states(table: Mapping[str, Any], mixers: Sequence[str]) -> list[dict[str, Any]]:
    """A table of mixers, with an initial state for those that take one."""
    infos = {text: registry.operator_info(Spec.parse(text).name) for text in mixers}
    taking = [text for text, info in infos.items() if info.initial_states]
    others = [text for text in mixers if text not in taking]
    return [
        *([{**table, "operator": taking, "inputs": INITIAL_STATE}] if taking else []),
        *([{**table, "operator": others}] if others else []),
    ]
