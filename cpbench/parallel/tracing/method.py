"""The strategy and the operator of a case, as they are traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.operator import declared_limits
from cpbench.core.registry import operator_info, strategy_info
from cpbench.parallel.bound_operator import BoundOperator, declared_kind
from cpbench.parallel.strategy import load_strategy, method_refusal, untraced_reason
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.problem import Case
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.traced_operator import Traceable


def load_method(case: Case, world: World) -> tuple[Strategy, Traceable, World]:
    """The strategy and the operator of a case, and its world with the inputs of that operator.

    An operator of attention is not loaded: what is sent does not depend on it.

    Raises:
        ValueError: in one line, if the strategy does not take the case, or is not traced.
    """
    info, operator = strategy_info(case.strategy.name), operator_info(case.operator.name)
    if not info.traced:
        raise ValueError(untraced_reason(info))
    reason = _operator_refusal(operator, world)
    reason = reason or method_refusal(info, operator, case.strategy, world, "meta")
    traceable: Traceable = operator
    if operator.mixer and reason is None:
        traceable = BoundOperator.load(case.operator, "meta")
        if declared_kind(operator, world.mask) not in operator.masks:
            takes, kind = ", ".join(operator.masks), world.mask.kind
            reason = f"{operator.name} takes {takes} masks; this one is {kind}"
    if reason is not None:
        raise ValueError(reason)
    strategy, world = load_strategy(info, case.strategy.kwargs, operator.kind, world)
    world = world.with_inputs_of(operator)
    if reason := strategy.unsupported(world):
        raise ValueError(reason)
    return strategy, traceable, world


def _operator_refusal(operator: OperatorInfo, world: World) -> str | None:
    """Why an operator takes a problem on no device, or None."""
    reasons = [declared_limits(operator, world.problem, device) for device in operator.devices]
    return reasons[0] if all(reasons) else None
