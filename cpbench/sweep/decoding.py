"""Cases of phase ``decode``: sequences with one new token each, whose keys lie in pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cpbench import masks
from cpbench.core.problem import DECODE, Case
from cpbench.core.registry import operator_info
from cpbench.core.spec import Spec, parse_size
from cpbench.inputs import KINDS, input_kind
from cpbench.masks.head_masks import per_head

PAGE_SIZE = 64  # unless given
PAGE_SIZES = (16, 256)
VERIFIED_LENS = [293, 1, 512, 65, 1111]


def parse_key_lens(value: Any) -> list[tuple[int, ...]]:
    """A list of the keys of each sequence, or several such lists; also as texts ``"[8k,70]"``.

    Raises:
        ValueError: for anything else.
    """
    items = value if isinstance(value, list) else [value]
    is_list = [isinstance(x, list) or (isinstance(x, str) and x[:1] == "[") for x in items]
    several = all(is_list) and bool(items)
    return [_lengths(item) for item in (items if several else [value])]


def _lengths(item: Any) -> tuple[int, ...]:
    if isinstance(item, str) and item.startswith("[") and item.endswith("]"):
        item = [x.strip() for x in item[1:-1].split(",") if x.strip()]
    if not isinstance(item, list) or any(isinstance(x, bool) for x in item):
        raise ValueError(f"key_lens = {item!r} is not a list of lengths, such as [8192, 70]")
    try:
        lengths = tuple(parse_size(x) if isinstance(x, str) else int(x) for x in item)
    except (TypeError, ValueError):
        raise ValueError(
            f"key_lens = {item!r} is not a list of lengths, such as [8192, 70]"
        ) from None
    if not lengths:
        raise ValueError("key_lens = [] is an empty list; give at least one length")
    if any(tokens < 1 for tokens in lengths):
        raise ValueError(f"key_lens = {item!r}: each length must be at least 1")
    return lengths


def split_paged(operators: Iterable[str]) -> tuple[list[str], list[str]]:
    """Operators of sequences, and those that decode over pages, each with its parameters."""
    by_kind: dict[bool, list[str]] = {False: [], True: []}
    for text in operators:
        by_kind[operator_info(Spec.parse(text).name).paged].append(text)
    return by_kind[False], by_kind[True]


def verified_tables(operators: list[str], shapes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables by which operators that decode are verified: unequal lengths, the last page of each
    full, partial or a single token, and windows that cut pages.

    Args:
        shapes: values that all share, of which lengths and directions are left out.
    """
    base = {key: x for key, x in shapes.items() if key not in ("seq_len", "direction")}
    base |= {"phase": DECODE, "operator": operators, "key_lens": VERIFIED_LENS}
    base |= {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}
    window = "sliding_window_causal:window=37"
    return [
        {**base, "page_size": [16, 64]},
        {**base, "page_size": 256, "head_dim": 128, "mask": ["causal", window]},
    ]


def complete(values: dict[str, Any]) -> None:
    """Fill in what follows from the phase of a case.

    Args:
        values: checked values of its keys.

    Raises:
        ValueError: for values that do not go with the phase.
    """
    if values.get("phase", Case.phase) != DECODE:
        for key in ("page_size", "key_lens"):
            if values.get(key):
                raise ValueError(f"{key} is of the phase decode; give phase = 'decode'")
        return
    lengths = values.get("key_lens", ())
    if lengths:
        for key, value in (("batch", len(lengths)), ("seq_len", max(lengths))):
            if values.setdefault(key, value) != value:
                raise ValueError(f"{key} = {values[key]}: key_lens say {value}; leave {key} out")
        if len(set(lengths)) == 1:
            values["key_lens"] = ()  # so that one batch is one value
    values["page_size"] = values.get("page_size") or PAGE_SIZE
    least, most = PAGE_SIZES
    if not least <= values["page_size"] <= most:
        raise ValueError(f"page_size = {values['page_size']} must be from {least} to {most}")
    if values.setdefault("direction", "fwd") != "fwd":
        raise ValueError(f"direction = {values['direction']!r}: decoding has fwd alone")
    values["queries"] = values.get("queries") or 1
    if values["queries"] != 1:
        raise ValueError(f"queries = {values['queries']}: decoding has 1 for each sequence")


def check(case: Case) -> None:
    """Raise ``ValueError`` for a method or inputs that do not go with the phase of a case."""
    info = operator_info(case.operator.name)
    if case.phase != DECODE:
        return
    if info.mixer or info.selects:
        kind = "sequence mixer" if info.mixer else "selector"
        raise ValueError(f"phase = 'decode': {info.name} is a {kind}; give an operator")
    if per_head(masks.build_heads(case.mask, min(case.lengths), 1)):
        raise ValueError(f"phase = 'decode': mask {case.mask} differs from head to head")
    if not input_kind(case.inputs).decodes:
        kinds = ", ".join(name for name, kind in KINDS.items() if kind.decodes)
        raise ValueError(f"phase = 'decode': inputs are one of {kinds}, not {case.inputs}")
    if case.layout != Spec("contiguous"):
        raise ValueError(f"phase = 'decode': pages lie contiguous on ranks, not {case.layout}")
