"""A prepared computation: an operator under a strategy, on one rank."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cpbench import __version__
from cpbench.core.operator import QKV, MixerInputs, Unsupported, declared_refusal
from cpbench.core.registry import operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import GroupedComm
from cpbench.parallel.host_memory.allocation import home_of
from cpbench.parallel.strategy import load_strategy, method_refusal
from cpbench.parallel.tracing.mismatch import describe_mismatch
from cpbench.parallel.tracing.trace import MODULUS, RankTrace, trace_rank
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.comm import Comm, Control, Transport
    from cpbench.parallel.strategy import Forward, Strategy


class Prepared(Protocol):
    """One rank's prepared computation, as ranks agree on it.

    Attributes:
        world: the global computation.
        fingerprint: what ranks compare before anything is sent: a text, the same on all ranks, and
            a checksum of their messages, whose sum over ranks is 0 (see
            ``cpbench.parallel.tracing``).
    """

    @property
    def world(self) -> World: ...

    @property
    def fingerprint(self) -> tuple[str, int]: ...

    def trace_messages(self, log: bool = False) -> RankTrace:
        """Trace this rank again, with a log of every message if requested."""
        ...

    def connect(self, comm: Transport) -> None:
        """Connect the sub-communicators and lanes that the strategy uses, once ranks have agreed;
        collective."""
        ...


class Attention:
    """One rank's prepared computation: an operator under a strategy in a world of ranks.

    Args:
        operator, strategy: specs, as objects or text.
        world: the global computation.
        rank: this rank.
        device: ``"cpu"``, ``"cuda"`` (the current one) or ``"cuda:1"``.
        operator_class: how the operator is bound.

    Attributes:
        operator: its spec.
        offloaded: whether inputs and results are in host memory, pinned beside a GPU.
        home: the device of inputs and results: ``device``, or that of host memory.

    Raises:
        Unsupported: with the reason, before anything is computed or sent.
        ValueError: for unknown names or parameters.
    """

    def __init__(
        self,
        operator: Spec | str,
        strategy: Spec | str,
        world: World,
        rank: int,
        device: str,
        operator_class: type[BoundOperator] = BoundOperator,
    ) -> None:
        strategy_spec, operator_spec = Spec.parse(strategy), Spec.parse(operator)
        self.info, op_info = strategy_info(strategy_spec.name), operator_info(operator_spec.name)
        device_type = device.partition(":")[0]
        self.offloaded = self.info.is_offloaded(strategy_spec.kwargs)
        reason = declared_refusal(op_info, world.problem, device_type)
        reason = reason or method_refusal(self.info, op_info, strategy_spec, world, device_type)
        if reason is not None:
            raise Unsupported(reason)
        self.op = operator_class.load(operator_spec, device)
        self.strategy: Strategy
        kwargs, kind = strategy_spec.kwargs, op_info.kind
        self.strategy, world = load_strategy(self.info, kwargs, kind, world)
        self.home = home_of(device) if self.offloaded else device
        world = world.with_inputs_of(op_info)
        self.world, self.rank = world, rank
        self.mask, self.layout, self.problem = world.mask, world.keys, world.problem
        reason = self.strategy.unsupported(world)
        if reason is not None:
            raise Unsupported(reason)
        self.operator = operator_spec
        self._specs = f"{operator_spec} {strategy_spec}"
        start = time.perf_counter()
        self.plan = self.strategy.prepare(self.op, world, rank)
        self.plan_us = (time.perf_counter() - start) * 1e6

    @functools.cached_property
    def fingerprint(self) -> tuple[str, int]:
        """See :class:`Prepared`."""
        world = self.world
        nodes = f"{world.ranks_per_node} {world.placement}"
        layout_names = f"{world.queries.name} {world.keys.name} x{world.size} {nodes}"
        text = f"{__version__} {self._specs} {layout_names} {world.mask.digest} {world.problem}"
        return text, self.trace.checksum if self.trace else 0

    @functools.cached_property
    def trace(self) -> RankTrace | None:
        """The communication and work of this rank; None for strategies of libraries."""
        return self.trace_messages() if self.info.traced else None

    def trace_messages(self, log: bool = False) -> RankTrace:
        """See :class:`Prepared`."""
        return trace_rank(self.strategy, self.op, self.world, self.rank, log)

    def connect(self, comm: Transport) -> None:
        """See :class:`Prepared`.  Libraries make their own groups when they are first called."""
        if self.trace is not None:
            comm.connect(self.trace.parts)

    @property
    def computes(self) -> str:
        """``"attention"``, or the recurrence of a sequence mixer."""
        return str(self.op.impl.recurrence) if self.op.info.mixer else "attention"  # type: ignore[attr-defined]

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs of the forward and the backward pass, all ranks together."""
        if self.op.info.mixer:
            flops: dict[str, int] = self.op.impl.flops(self.problem)  # type: ignore[attr-defined]
            return flops
        return self.problem.flops(self.mask.area)

    @property
    def result_names(self) -> tuple[str, ...]:
        """Names of the results: of the forward pass, then the gradients."""
        second = "state" if self.op.info.mixer else "lse"
        return ("out", second, *(f"d{name}" for name in self.problem.inputs))

    def inputs_of(self, tensors: Mapping[str, torch.Tensor]) -> QKV | MixerInputs:
        """The inputs of the operator, from tensors by name."""
        return MixerInputs.of(tensors) if self.op.info.mixer else QKV.of(tensors)

    def forward(self, qkv: QKV | MixerInputs, comm: Comm | None, need_lse: bool = True) -> Forward:
        """Return out, lse (None if the operator returns none; of mixers, the last state) and the
        values saved for backward."""
        return self.strategy.forward(qkv, self.plan, self.op, comm or self._alone, need_lse)

    def backward(self, dout: torch.Tensor, saved: Any, comm: Comm | None) -> Gradients:
        """Return the gradients of the local shards, in the order of the inputs."""
        return self.strategy.backward(dout, saved, self.plan, self.op, comm or self._alone)

    @functools.cached_property
    def _alone(self) -> Comm:
        """The communicator of a single rank, which sends nothing."""
        assert self.world.size == 1
        return GroupedComm(0, 1)  # type: ignore[return-value]


def find_disagreement(fingerprints: Sequence[tuple[str, int]]) -> str | None:
    """Compare the :attr:`Attention.fingerprint` of all ranks: what they disagree on, or None."""
    texts = [text for text, _ in fingerprints]
    if len(set(texts)) > 1:
        by_text = {text: [r for r, own in enumerate(texts) if own == text] for text in texts}
        described = (f"{text} (rank {', '.join(map(str, r))})" for text, r in by_text.items())
        return f"ranks disagree on the problem: {' vs. '.join(described)}"
    if sum(checksum for _, checksum in fingerprints) % MODULUS:
        return "ranks disagree on the communication schedule"
    return None


def require_agreement(
    control: Control, work: Prepared, fingerprints: Sequence[tuple[str, int]]
) -> None:
    """Raise a RuntimeError on every rank if their problems or communication schedules differ.

    Args:
        fingerprints: of all ranks.
    """
    message = find_disagreement(fingerprints)
    if message is None:
        return
    if len({text for text, _ in fingerprints}) == 1:
        logs = control.all_gather(work.trace_messages(log=True).log)
        message += f": {describe_mismatch(logs)}"
    raise RuntimeError(message)
