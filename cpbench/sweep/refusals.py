"""Combinations of a sweep that no machine can run, by the declarations of strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cpbench.core.problem import Case
from cpbench.core.registry import operator_info, strategy_info
from cpbench.parallel.strategy import kind_refusal


def leave_out_refused(cases: Iterable[Case]) -> tuple[list[Case], Counter[str]]:
    """The cases without those that are certain to be refused, and how many of these there are by
    reason.

    A strategy keeps its cases where all of them are certain to be refused, so that a report says
    why; but for ``single``, which is the default and not always meant.

    Raises:
        ValueError: if no strategy takes the kind of the operators beside it, in any case.
    """
    cases = list(cases)
    unlike = [_kind_refusal(case) for case in cases]
    if cases and None not in unlike:
        raise ValueError("; ".join(dict.fromkeys(text for text in unlike if text)))
    reasons = [(case, certain_refusal(case)) for case in cases]
    possible = {case.strategy for case, reason in reasons if reason is None}
    kept, left_out = list[Case](), Counter[str]()
    for case, reason in reasons:
        if reason is None or (case.strategy not in possible and case.strategy.name != "single"):
            kept.append(case)
        else:
            left_out[reason] += 1
    return kept, left_out


def certain_refusal(case: Case) -> str | None:
    """Why no machine can run a case, or None if one may."""
    name = case.strategy.name
    if name == "single" and case.world_size > 1:
        return "single runs on one rank"
    info = strategy_info(name)
    if reason := _kind_refusal(case):
        return reason
    layouts = info.layouts
    if case.layout.name not in layouts:
        return f"{name} takes layouts {', '.join(layouts)}"
    return None


def _kind_refusal(case: Case) -> str | None:
    """Why the strategy of a case does not take operators of this kind, or None."""
    info, operator = strategy_info(case.strategy.name), operator_info(case.operator.name)
    return kind_refusal(info, operator, case.strategy.kwargs)


def describe(left_out: Counter[str]) -> str:
    """``left out, since no machine can run them: 3 cases (single runs on one rank)``."""
    texts = [
        f"{count} case{'s' if count > 1 else ''} ({reason})"
        for reason, count in left_out.most_common()
    ]
    return f"left out, since no machine can run them: {'; '.join(texts)}"
