"""The contract of a context-parallel strategy.

A strategy is plain code against :class:`~cpbench.parallel.comm.Comm`.  It receives an operator and
never imports one, and never branches on tensor values: every decision (which messages are sent,
which steps are skipped) is made in ``prepare`` from data that all ranks share.

Legend: B batch, L local tokens, H query heads, G key/value heads, D head dim of queries and keys,
Dv head dim of values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cpbench.core.operator import (
    BackwardInputs,
    MixerBackwardInputs,
    MixerInputs,
    value_dims_refusal,
)
from cpbench.core.problem import DECODE
from cpbench.core.registry import implementation, missing_package, operators, strategies
from cpbench.masks.head_masks import per_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from cpbench.core.operator import Gradients
    from cpbench.core.problem import Problem
    from cpbench.core.registry import OperatorInfo, StrategyInfo
    from cpbench.core.spec import Spec
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

    Forward = tuple[torch.Tensor, torch.Tensor | None, Any]  # out, lse, saved for backward


class Saved(NamedTuple):
    """What the backward pass of a strategy needs of the forward pass.

    Attributes:
        q, k, v, out, lse: of this rank, or of the tokens and heads that it has received.
        last: other keys and values to keep, in turn.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    last: tuple[torch.Tensor, ...] | None = None

    def backward_inputs(self, dout: torch.Tensor) -> BackwardInputs:
        """The inputs of an operator's backward pass."""
        return BackwardInputs(dout, *self[:5])  # type: ignore[arg-type]


class SavedMixer(NamedTuple):
    """What the backward pass of a mixer over whole sequences needs of the forward pass.

    Attributes:
        inputs, out, state: of the operator.
        kept: what it keeps for its backward pass.
    """

    inputs: MixerInputs
    out: torch.Tensor
    state: torch.Tensor | None
    kept: Any

    @classmethod
    def mix(cls, x: MixerInputs, plan: Any, op: BoundOperator) -> SavedMixer:
        """Compute out and the last state."""
        out, state = op.forward(x, plan)
        return cls(x, out, state, op.take_state(out))

    def differentiate(
        self, dout: torch.Tensor, plan: Any, op: BoundOperator, dstate: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of the given inputs."""
        if self.kept is not None:
            op.restore_state(self.out, self.kept)
        x = MixerBackwardInputs(dout, self.inputs, self.out, self.state, dstate)
        gradients = op.backward(x, plan)
        op.take_state(self.out)
        return gradients


class Strategy(Protocol):
    """The methods of a strategy."""

    def unsupported(self, world: World) -> str | None:
        """The reason why this world is not supported, in words a user can act on; else None."""
        ...

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        """Make the immutable plan of one rank, without communication.

        Called again with a :class:`~cpbench.parallel.tracing.traced_operator.TracedOperator`, so
        that ranks can compare their communication schedules before anything is sent.
        """
        ...

    def forward(
        self, qkv: Any, plan: Any, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        """Compute attention on local shards, or mix their tokens.

        Args:
            qkv: a ``QKV``: q ``[B, L, H, D]``; k ``[B, L, G, D]``; v ``[B, L, G, Dv]``; contiguous.
                Of a mixer, a ``MixerInputs``, whose initial state is the same on all ranks; then
                lse is the state after the last token, ``[B, H, K, V]``, on every rank.
            need_lse: whether to return the local lse even if that costs communication.

        Returns:
            out ``[B, L, H, Dv]``, lse ``[B, H, L]`` or None, and the values saved for ``backward``:
            a :class:`Saved` or a list of them (anything, if the strategy is not traced).
        """
        ...

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> Gradients:
        """Compute the gradients of the local shards, in their shapes and dtypes.

        Strategies of mixers return one for each input that is given; that of the initial state is
        what the local tokens contribute, whose sum over ranks is the gradient.  They also take
        ``dstate``, the gradient of the last state as this rank has it, whose sum over ranks is the
        gradient; None on all ranks if nothing depends on it.
        """
        ...


def load_strategy(
    info: StrategyInfo, params: Mapping[str, Any], kind: str, world: World
) -> tuple[Any, World]:
    """The implementation of a strategy for operators of a kind, and the world as it holds keys.

    Raises:
        ValueError, LoadError: see :func:`cpbench.core.registry.implementation`.
    """
    by_heads = world.problem.page_size and info.decodes and not info.is_offloaded(params)
    strategy = implementation(info, dict(params), DECODE if by_heads else kind)
    return strategy, replace(world, held_heads=strategy.held_heads(world)) if by_heads else world


def declared_refusal(info: StrategyInfo, world: World) -> str | None:
    """The reason why the declaration of a strategy rules out a world, or None."""
    missing = missing_package(info)
    if missing is not None:
        return f"{info.name} needs the Python package {missing}, which is not installed"
    if world.keys.name not in info.layouts:
        return f"{info.name} takes layouts {', '.join(info.layouts)}, not {world.keys.name}"
    if per_head(world.mask) and world.size > 1:
        return f"{info.name} takes no mask per head: use 1 rank and the strategy single"
    if reason := value_dims_refusal(info, world.problem):
        return reason
    if world.placement and world.placement not in info.axes:
        takes = f"placements {', '.join(info.axes)}" if info.axes else "no placement"
        return f"{info.name} takes {takes}, not {world.placement!r}"
    return None


def kind_refusal(
    strategy: StrategyInfo, operator: OperatorInfo, params: Mapping[str, Any]
) -> str | None:
    """The reason why a strategy, with these parameters, does not take operators of this kind, or
    None."""
    if operator.kind in strategy.kinds:
        if not operator.mixer:
            return None
        if strategy.is_offloaded(params):
            return f"{operator.name} is a sequence mixer, which takes no offload"
        try:
            implementation(strategy, dict(params), operator.kind)
        except ValueError as refusal:
            return str(refusal)
        return None
    if operator.mixer:
        return f"{strategy.name} distributes attention; {operator.name} is a sequence mixer"
    return f"{strategy.name} distributes sequence mixers; {operator.name} computes attention"


def selector_refusal(strategy: StrategyInfo, operator: OperatorInfo) -> str | None:
    """The reason why a strategy does not take an operator because of what that selects, or None."""
    if strategy.selectors == "pooled" and operator.selects_from != "pooled_keys":
        takes = (name for name, info in sorted(operators().items()) if _selects_by_pooled(info))
        return (
            f"{strategy.name} sends the keys that are selected by pooled keys: it takes "
            f"{', '.join(takes)}, not {operator.name}"
        )
    if operator.selects and strategy.selectors == "none":
        takes = (name for name, info in sorted(strategies().items()) if info.selectors != "none")
        return (
            f"{operator.name} selects from all keys of a sequence, which {strategy.name} does not "
            f"give it at once; use {', '.join(takes)}"
        )
    return None


def _selects_by_pooled(info: OperatorInfo) -> bool:
    return info.selects and info.selects_from == "pooled_keys"


def method_refusal(
    strategy: StrategyInfo,
    operator: OperatorInfo,
    spec: Spec,
    world: World,
    device: str,
) -> str | None:
    """The reason why a strategy and an operator do not go together in a world, by declaration, or
    None.

    Args:
        spec: of the strategy.
        device: type of device, or ``"meta"`` in a trace.
    """
    offloaded = strategy.is_offloaded(spec.kwargs)
    reason = kind_refusal(strategy, operator, spec.kwargs) or declared_refusal(strategy, world)
    reason = reason or selector_refusal(strategy, operator)
    if reason is None and operator.selects and offloaded:
        reason = f"{operator.name} is a selector, which takes no offload"
    if reason is None and (offloaded or (strategy.merges and world.size > 1)):
        name = str(spec) if offloaded else strategy.name
        reason = merge_refusal(operator, name, world.problem, device)
    return reason


def untraced_reason(info: StrategyInfo) -> str:
    """Why the communication of a strategy that is not traced cannot be predicted."""
    if info.selectors == "pooled":
        return (
            f"{info.name} sends what is selected by the data: its bytes are only counted in a run "
            "(at most about those of ring_allgather)"
        )
    return f"{info.name} sends through a library: its bytes are only counted in a run"


def merge_refusal(
    operator: OperatorInfo, strategy: str, problem: Problem, device: str
) -> str | None:
    """The reason why a strategy cannot merge partial results of an operator, or None.

    Args:
        device: type of device, or ``"meta"`` in a trace.
    """
    if not operator.mergeable or device not in (*operator.lse_on, "meta"):
        return f"{strategy} merges partial results and {operator.name} returns no log-sum-exp"
    if problem.backward and not operator.external_lse:
        return (
            f"{strategy} needs a backward that takes the global lse, which {operator.name} "
            "does not have; use direction fwd or a strategy that does not merge"
        )
    return None
