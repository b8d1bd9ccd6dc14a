"""The very code of a strategy, run on tensors without data: who would send what to whom.

:class:`TraceComm` moves nothing: it notes the bytes of every operation for one rank, from the
definition of the operation, and folds every message into a number that adds up to zero over all
ranks exactly when each message sent is expected, and each collective is entered, by all that it
concerns, in the same order and size.  So ranks can agree on a schedule before the first send.

:class:`TracedOperator` computes nothing: it counts the visible pairs that it would compute.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.parallel.bound_operator import BackwardParts, BoundOperator, ForwardParts
from cpbench.parallel.comm import Done, Grouped, Handle

if TYPE_CHECKING:
    import torch

    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.world import Part, Piece, World

MODULUS = 1 << 61
_DONE = Done()


@dataclass
class PhaseTrace:
    """What one rank would do in one phase.

    Attributes:
        bytes_to: sent, by receiver ``[P]``.
        messages, largest: how many, and bytes of the largest.
        pairs: visible pairs that it computes, each counted once a query head.
    """

    bytes_to: list[int]
    messages: int
    largest: int
    pairs: int


@dataclass
class RankTrace:
    """What one rank would do.

    Attributes:
        phases: by name, ``fwd`` and ``bwd``.
        balance: its share of a number that is 0 modulo ``MODULUS`` in the sum over all ranks.
        log: every message and collective, for people; empty unless asked for.
    """

    phases: dict[str, PhaseTrace]
    balance: int
    log: list[tuple[object, ...]]


class TraceComm(Grouped):
    """:class:`~cpbench.parallel.comm.Comm` for one rank on meta tensors."""

    def __init__(self, rank: int, size: int, log: bool = False) -> None:
        self.log: list[tuple[object, ...]] | None = [] if log else None
        super().__init__(rank, size)
        self.balance = 0
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._entered = 0

    def _begin(self) -> None:
        self._entered = 0

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        root, members, me = self._root, self._members, self.rank
        here, balance, traffic = root.rank, root.balance, root.traffic
        word = _number(what)
        for tensor, peer in sends:
            if peer != me:
                to, nbytes = members[peer], tensor.nbytes
                number = root._sent[to] = root._sent.get(to, 0) + 1
                balance += hash((here, to, number, nbytes, word))  # of integers: alike everywhere
                traffic.bytes_to[to] += nbytes
                traffic.messages += 1
                if nbytes > traffic.largest:
                    traffic.largest = nbytes
                if root.log is not None:
                    root.log.append(("message", here, to, number, nbytes, what, "sent"))
        for tensor, peer in recvs:
            if peer != me:
                sender, nbytes = members[peer], tensor.nbytes
                number = root._received[sender] = root._received.get(sender, 0) + 1
                balance -= hash((sender, here, number, nbytes, word))
                if root.log is not None:
                    root.log.append(("message", sender, here, number, nbytes, what, "expected"))
        root.balance = balance
        return _DONE

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert out.shape == x.shape
        return self._enter(1, x.nbytes // self.size)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert out.shape == (self.size, *x.shape)
        return self._enter(2, x.nbytes)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert x.shape == (self.size, *out.shape)
        return self._enter(3, out.nbytes)

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        nbytes = x.nbytes
        return self._enter(5 if largest else 4, (nbytes + self.size - 1) // self.size, 2)

    def _enter(self, kind: int, nbytes: int, messages: int = 1) -> Handle:
        """A collective in which ``nbytes`` go from each rank to each other, ``messages`` times."""
        self._entered += 1
        if self._root.log is not None:
            self._root.log.append(("collective", self._members, self._entered, kind, nbytes))
        mixed = hash((kind, self._members, self._entered, nbytes))
        self._root.balance += mixed * (self.size - 1 if self.rank == 0 else -1)
        for place, member in enumerate(self._members):
            if place != self.rank:
                self.traffic.add(member, nbytes, messages)
        return _DONE


class TracedOperator(BoundOperator):
    """An operator that only knows how many visible pairs each of its calls would compute."""

    def __init__(self, info: OperatorInfo, device: str = "meta") -> None:
        super().__init__(info, None, device)  # type: ignore[arg-type]

    def prepare(self, part: Part | Piece) -> Any:
        return part.area

    def add_up(self, total: torch.Tensor | None, found: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        if total is None:
            shape = (len(found), *found[0].shape)
            total = torch.empty(shape, dtype=torch.float32, device=self.device)
        return total

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.pairs += plan * q.shape[2]
        return q.new_empty(q.shape), _lse(q)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        plan: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.pairs += plan * q.shape[2]
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def forward_parts(self, q: torch.Tensor) -> ForwardParts:
        return _ForwardParts(self, q)

    def backward_parts(
        self, dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> BackwardParts:
        return _BackwardParts(self, dout, q, out, lse)

    def lent_parts(
        self, dout: torch.Tensor, q: torch.Tensor, delta: torch.Tensor, lse: torch.Tensor
    ) -> BackwardParts:
        return _BackwardParts(self, dout, q, dout, lse)


class _ForwardParts(ForwardParts):
    """As its base, but merging costs nothing."""

    def add(self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any) -> None:
        self._op.pairs += plan * self._q.shape[2]

    def add_result(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        pass

    def finish(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self._q.new_empty(self._q.shape), _lse(self._q)


class _BackwardParts(BackwardParts):
    """As its base, but merging costs nothing."""

    def add(
        self, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._op.pairs += plan * self._q.shape[2]
        return k_BTGD, v_BTGD

    def add_result(self, dq: torch.Tensor) -> None:
        pass

    def finish(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._q.new_empty(self._q.shape, dtype=dtype)


def _lse(q: torch.Tensor) -> torch.Tensor:
    import torch

    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def trace_rank(
    strategy: Strategy, operator: OperatorInfo, world: World, rank: int, log: bool = False
) -> RankTrace:
    """What one rank would send and compute in the phases of the problem's direction.

    The log-sum-exp is not asked for, as in timed runs.
    """
    op, comm = TracedOperator(operator), TraceComm(rank, world.size, log)
    plan = strategy.prepare(op, world, rank)
    q, k, v, dout = empty_inputs(world)
    _, _, saved = strategy.forward(q, k, v, plan, op, comm, need_lse=False)
    phases = {"fwd": _phase(op, comm)}
    if world.problem.backward:
        strategy.backward(dout, saved, plan, op, comm)
        phases["bwd"] = _phase(op, comm)
    return RankTrace(phases, comm.balance, comm.log or [])


def empty_inputs(world: World) -> list[torch.Tensor]:
    """q, k, v and dout of one rank, without data."""
    import torch

    problem = world.problem
    dtype = getattr(torch, problem.dtype)
    of_queries = (world.queries.local_len, problem.heads_q)
    of_keys = (world.keys.local_len, problem.heads_kv)
    return [
        torch.empty((problem.batch, *shape, problem.head_dim), dtype=dtype, device="meta")
        for shape in (of_queries, of_keys, of_keys, of_queries)
    ]


@functools.cache
def _number(word: str) -> int:
    """The same in every process, which ``hash`` of a text is not."""
    return zlib.crc32(word.encode())


def _phase(op: TracedOperator, comm: TraceComm) -> PhaseTrace:
    """What has been noted since the last time."""
    traffic = comm.traffic
    found = PhaseTrace(traffic.bytes_to, traffic.messages, traffic.largest, op.pairs)
    traffic.clear()
    op.pairs = 0
    return found


def mismatch(logs: Sequence[Sequence[tuple[object, ...]]]) -> str:
    """The first message that is sent and not expected (or the other way), or collective that not
    all its ranks enter alike, in words."""
    ways: dict[tuple[object, ...], set[object]] = {}
    for log in logs:
        for kind, sender, receiver, number, *rest in log:
            if kind == "message":
                *content, way = rest
                ways.setdefault((sender, receiver, number, *content), set()).add(way)
    for (sender, receiver, number, nbytes, what), found in ways.items():
        if len(found) == 1:
            other = "does not expect it so" if "sent" in found else "does not send it so"
            who = receiver if "sent" in found else sender
            return (
                f"message {number} from rank {sender} to rank {receiver}, {nbytes} bytes"
                f"{f' of {what}' if what else ''}: "
                f"rank {who} {other}"
            )
    return "a collective that not all of its ranks enter alike"
