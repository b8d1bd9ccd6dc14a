"""Traces of a strategy: its own code, run on tensors without data, records what it would send.

:class:`CountingComm` transfers nothing.  It counts the bytes of every operation of one rank, from
the definition of the operation.  :class:`TraceComm` also folds every message into a checksum.  The
checksums of all ranks sum to zero exactly when every message sent is expected by its receiver, and
every collective is entered by all its members, in the same order and with the same size.  So ranks
can compare their communication schedules before the first send.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from cpbench.core.operator import QKV, MixerInputs, state_dtype
from cpbench.core.problem import INITIAL_STATE
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import CompletedHandle, GroupedComm, Handle, Part
from cpbench.parallel.tracing.meta_ops import MetaOps
from cpbench.parallel.tracing.shape_tensor import without_data
from cpbench.parallel.tracing.traced_operator import ShapeOperator, Traceable, TracedOperator

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Messages
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.world import World

MODULUS = 1 << 61
# Names of the kinds of collectives; the last is the creation of a lane, which sends nothing.
COLLECTIVES = {
    1: "all_to_all", 2: "all_gather", 3: "reduce_scatter", 4: "all_reduce", 5: "all_reduce",
    6: "lane",
}  # fmt: skip
_DONE = CompletedHandle()


@dataclass
class PhaseTrace:
    """The communication and work of one rank in one phase.

    Attributes:
        bytes_to: bytes sent, by receiver ``[P]``.
        messages: number of messages; largest_message: bytes of the largest.
        pairs: computed visible pairs, counted once per query head.
        to_device, to_host: bytes copied from host memory to the device, and back.
    """

    bytes_to: list[int]
    messages: int
    largest_message: int
    pairs: int
    to_device: int = 0
    to_host: int = 0


@dataclass
class RankTrace:
    """The communication and work of one rank.

    Attributes:
        phases: by name, ``fwd`` and ``bwd``.
        checksum: of its messages; the sum over all ranks is 0 modulo ``MODULUS`` if they match.
        parts: the sub-communicators and lanes that it uses, in the order of their first use.
        log: every message and collective, for diagnosis; empty unless requested.
    """

    phases: dict[str, PhaseTrace]
    checksum: int
    parts: list[Part]
    log: list[tuple[object, ...]]


class CountingComm(GroupedComm):
    """:class:`~cpbench.parallel.comm.Comm` for one rank without data: counts what it sends."""

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        members, own, traffic = self._members, self.rank, self.traffic
        bytes_to = traffic.bytes_to
        for tensor, peer in sends:
            if peer != own:
                nbytes = tensor.nbytes
                bytes_to[members[peer]] += nbytes
                traffic.messages += 1
                if nbytes > traffic.largest_message:
                    traffic.largest_message = nbytes
        return _DONE

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert out.shape == x.shape
        return self._collective(1, x.nbytes // self.size)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert out.shape == (self.size, *x.shape)
        return self._collective(2, x.nbytes)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert x.shape == (self.size, *out.shape)
        return self._collective(3, out.nbytes)

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        shard_bytes = (x.nbytes + self.size - 1) // self.size
        return self._collective(5 if largest else 4, shard_bytes, 2)

    def _collective(self, kind: int, nbytes: int, messages: int = 1) -> Handle:
        """A collective that sends ``messages`` of ``nbytes`` between each pair of ranks."""
        self._count_collective(nbytes, messages)
        return _DONE

    def _copy(
        self, out: torch.Tensor, x: torch.Tensor, to_device: bool, after: Sequence[Any] = ()
    ) -> Handle:
        assert out.shape == x.shape
        return _DONE


class TraceComm(CountingComm):
    """A communicator that also keeps a checksum of what it sends and expects.

    Attributes:
        parts: as in :class:`RankTrace`.
    """

    def __init__(self, rank: int, size: int, log: bool = False) -> None:
        self.log: list[tuple[object, ...]] | None = [] if log else None
        super().__init__(rank, size)
        self.checksum, self.parts = 0, list[Part]()
        self._sent_count: dict[int, int] = {}
        self._recv_count: dict[int, int] = {}
        self._collectives = 0

    def _init_part(self) -> None:
        self._collectives = 0
        if self._lane:
            self._collective(6, 0, 0)  # all members create it

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        super().exchange(sends, recvs, what)
        root, members, member_rank = self._root, self._members, self.rank
        own_rank, checksum = root.rank, root.checksum
        what = f"{what} in lane {self._lane}" if self._lane else what
        content = _content_hash(what)
        for tensor, peer in sends:
            if peer != member_rank:
                receiver, nbytes = members[peer], tensor.nbytes
                number = root._sent_count[receiver] = root._sent_count.get(receiver, 0) + 1
                # Hashes of integers are the same in every process.
                checksum += hash((own_rank, receiver, number, nbytes, content))
                if root.log is not None:
                    root.log.append(("message", own_rank, receiver, number, nbytes, what, "sent"))
        for tensor, peer in recvs:
            if peer != member_rank:
                sender, nbytes = members[peer], tensor.nbytes
                number = root._recv_count[sender] = root._recv_count.get(sender, 0) + 1
                checksum -= hash((sender, own_rank, number, nbytes, content))
                if root.log is not None:
                    entry = ("message", sender, own_rank, number, nbytes, what, "expected")
                    root.log.append(entry)
        root.checksum = checksum
        return _DONE

    def _collective(self, kind: int, nbytes: int, messages: int = 1) -> Handle:
        self._collectives += 1
        if self._collectives == 1 and self is not self._root and self.size > 1:
            self.parts.append((self._members, self._lane))
        lane = _content_hash(self._lane)
        if self._root.log is not None:
            entry = ("collective", self._members, lane, self._collectives, kind, nbytes)
            self._root.log.append(entry)
        value = hash((kind, self._members, lane, self._collectives, nbytes))
        self._root.checksum += value * (self.size - 1 if self.rank == 0 else -1)
        return super()._collective(kind, nbytes, messages)


def trace_rank(
    strategy: Strategy,
    operator: Traceable,
    world: World,
    rank: int,
    log: bool = False,
    inputs: tuple[Any, torch.Tensor] | None = None,
    need_lse: bool = False,
) -> RankTrace:
    """Trace one rank in the phases of the problem's direction.

    Args:
        log: whether to log every message.
        inputs: as for :func:`trace_phases`, where they are not those of the problem.
        need_lse: whether the log-sum-exp, or the last state of a mixer, is requested.
    """
    comm = TraceComm(rank, world.size, log)
    given = inputs and (TracedOperator(operator), inputs)
    op, inputs = given or of_shapes(operator, world, rank)
    phases = trace_phases(strategy, op, world, comm, inputs, need_lse)
    return RankTrace(phases, comm.checksum, comm.parts, comm.log or [])


def count_rank(
    strategy: Strategy, operator: Traceable, world: World, rank: int
) -> dict[str, PhaseTrace]:
    """The phases of :func:`trace_rank`, without the checksum."""
    op, inputs = of_shapes(operator, world, rank)
    return trace_phases(strategy, op, world, CountingComm(rank, world.size), inputs)


def of_shapes(
    operator: Traceable, world: World, rank: int
) -> tuple[TracedOperator, tuple[Any, torch.Tensor]]:
    """An operator whose results are shapes and dtypes, with such inputs for :func:`trace_phases`;
    those of a mixer are tensors without data."""
    info = operator.info if isinstance(operator, BoundOperator) else operator
    inputs, dout = empty_inputs(world, info.kind, rank)
    if not isinstance(inputs, QKV):
        return TracedOperator(operator), (inputs, dout)
    q, k, v, dout = (cast("torch.Tensor", without_data(x)) for x in (*inputs, dout))
    return ShapeOperator(operator), (QKV(q, k, v), dout)


def trace_phases(
    strategy: Strategy,
    op: TracedOperator,
    world: World,
    comm: CountingComm,
    inputs: tuple[Any, torch.Tensor],
    need_lse: bool = False,
) -> dict[str, PhaseTrace]:
    """Run the strategy's code for the rank of a communicator, on inputs of its operator and dout
    without data; what it counts by phase."""
    qkv, dout = inputs
    plan = strategy.prepare(op, world, comm.rank)
    with MetaOps():
        _, _, saved = strategy.forward(qkv, plan, op, comm, need_lse)
        phases = {"fwd": take_phase(op, comm)}
        if world.problem.backward:
            strategy.backward(dout, saved, plan, op, comm)
            phases["bwd"] = take_phase(op, comm)
    return phases


def empty_inputs(world: World, kind: str = "attention", rank: int = 0) -> tuple[Any, torch.Tensor]:
    """The inputs of an operator of this kind on one rank, and dout, without data."""
    import torch

    problem, dtype = world.problem, getattr(torch, world.problem.dtype)
    of_queries = (world.queries.local_len, problem.heads_q)
    of_keys = world.held_shape(rank)
    q, k, v, dout = (
        torch.empty((problem.batch, *shape, dim), dtype=dtype, device="meta")
        for shape, dim in (
            (of_queries, problem.head_dim), (of_keys, problem.head_dim),
            (of_keys, problem.value_dim), (of_queries, problem.value_dim),
        )
    )  # fmt: skip
    if kind == "attention":
        return QKV(q, k, v), dout
    gates = {
        name: q.new_empty((*q.shape[:3], *([lanes] if lanes else [])), dtype=state_dtype(q))
        for name, lanes in problem.gates
    }
    if problem.initial_state:
        shape = (problem.batch, problem.heads_q, problem.head_dim, problem.value_dim)
        gates[INITIAL_STATE] = q.new_empty(shape, dtype=state_dtype(q))
    return MixerInputs.of({"q": q, "k": k, "v": v, **gates}), dout


@functools.cache
def _content_hash(what: str) -> int:
    """A hash that is the same in every process, unlike ``hash`` of a string."""
    return zlib.crc32(what.encode())


def take_phase(op: BoundOperator, comm: CountingComm) -> PhaseTrace:
    """The counts since the last call; resets the counters."""
    traffic = comm.traffic
    phase = PhaseTrace(
        traffic.bytes_to, traffic.messages, traffic.largest_message, op.pairs,
        traffic.to_device, traffic.to_host,
    )  # fmt: skip
    traffic.clear()
    op.pairs = 0
    return phase
