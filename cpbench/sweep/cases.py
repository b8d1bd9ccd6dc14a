"""Cases of a sweep: the values of their keys, checked against each other."""

from __future__ import annotations

import functools
from typing import Any

from cpbench import inputs
from cpbench.core.problem import Case, different_or_zero
from cpbench.core.registry import (
    LoadError,
    StrategyInfo,
    implementation,
    operator_info,
    strategy_info,
)
from cpbench.core.spec import Spec
from cpbench.inputs import rope
from cpbench.sweep import decoding

GATES = Spec("gates")  # the inputs of sequence mixers unless given


def build_case(values: dict[str, Any]) -> Case:
    """A case from checked values by key, these checked against each other.

    Raises:
        ValueError: for what does not fit, in one line.
    """
    if "num_heads_q" in values:
        values.setdefault("num_heads_kv", values["num_heads_q"])
    if "head_dim_v" in values:
        head_dim = values.get("head_dim", Case.head_dim)
        values["head_dim_v"] = different_or_zero(values["head_dim_v"], head_dim)
    if "inputs" not in values and operator_info(values.get("operator", Case.operator).name).mixer:
        values["inputs"] = GATES
    decoding.complete(values)
    case = Case(**values)
    if case.num_heads_q % case.num_heads_kv:
        raise ValueError(
            f"num_heads_q ({case.num_heads_q}) must be a multiple of num_heads_kv "
            f"({case.num_heads_kv})"
        )
    if case.queries >= case.seq_len:
        raise ValueError(
            f"queries ({case.queries}) must be fewer than seq_len ({case.seq_len}), or 0 for all"
        )
    selects = operator_info(case.operator.name).selects
    if selects and (reason := _selector(case.operator).misfit(case.problem)):
        raise ValueError(reason)
    inputs.check_case(case)
    decoding.check(case)
    rope.rotation_of(case)
    axes = _checked_strategy(case.strategy).axes
    if case.placement and case.placement not in axes:
        takes = f"takes {', '.join(axes)}" if axes else "has no mesh"
        raise ValueError(f"placement = {case.placement!r}: {case.strategy.name} {takes}")
    return case


@functools.lru_cache(maxsize=256)
def _checked_strategy(spec: Spec) -> StrategyInfo:
    """The declaration of a strategy, after its implementation has checked the parameters."""
    info = strategy_info(spec.name)
    try:
        implementation(info, spec.kwargs, info.kinds[0])
    except LoadError as error:
        raise ValueError(f"strategy {spec.name!r}: {error}") from None
    return info


@functools.lru_cache(maxsize=256)
def _selector(spec: Spec) -> Any:
    """A selector, which has checked its parameters; it loads no torch."""
    if kernel := spec.kwargs.get("kernel"):
        operator_info(str(kernel))
    return implementation(operator_info(spec.name), spec.kwargs)
