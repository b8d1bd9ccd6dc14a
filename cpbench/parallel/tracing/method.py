"""The strategy and the operator of a case, as they are traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.operator import declared_limits
from cpbench.core.registry import operator_info, strategy_info
from cpbench.parallel.bound_operator import BoundOperator, declared_kind
from cpbench.parallel.strategy import (
    declared_refusal,
    kind_refusal,
    load_strategy,
    untraced_reason,
)
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.problem import Case
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.trace import Traceable


def load_method(case: Case, world: World) -> tuple[Strategy, Traceable, World]:
    """The strategy and the operator of a case, and its world with the inputs of that operator.

    An operator of attention is not loaded: what is sent does not depend on it.

    Raises:
        ValueError: in one line, if the strategy does not take the case, or is not traced.
    """
    info, operator = strategy_info(case.strategy.name), operator_info(case.operator.name)
    params = case.strategy.kwargs
    if not info.traced:
        raise ValueError(untraced_reason(info))
    reason = kind_refusal(info, operator, params) or declared_refusal(info, world)
    traceable: Traceable = operator
    if operator.mixer and reason is None:
        reason = _mixer_refusal(operator, world)
        traceable = BoundOperator.load(case.operator, "meta")
    if reason is not None:
        raise ValueError(reason)
    strategy, world = load_strategy(info, params, operator.kind, world)
    if reason := strategy.unsupported(world):
        raise ValueError(reason)
    return strategy, traceable, world.with_inputs_of(operator)


def _mixer_refusal(operator: OperatorInfo, world: World) -> str | None:
    """Why a mixer does not take a computation, or None."""
    if reason := declared_limits(operator, world.problem, operator.devices[0]):
        return reason
    if declared_kind(operator, world.mask) in operator.masks:
        return None
    return f"{operator.name} takes {', '.join(operator.masks)} masks; this one is {world.mask.kind}"
