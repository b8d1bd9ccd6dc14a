"""Communication between ranks: what strategies may ask for, and torch.distributed doing it.

Bytes are counted here, from the tensors that cross the transport boundary, independently of any
plan.  Attribution to (sender, receiver), one message each unless said otherwise:

- exchange: every tensor to its receiver, unless that is the sender itself;
- all_to_all: each chunk to its rank;  all_gather: the own shard to every other rank;
- reduce_scatter: each chunk to its rank;
- all_reduce: as reduce-scatter and all-gather, two messages of 1/P of the tensor to every other.

What a transport does underneath (rings, trees) may move the same bytes by other routes; per rank
and in sum it cannot do with fewer.
"""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import torch


class Handle(Protocol):
    """Something under way; buffers may be read and reused after ``wait``."""

    def wait(self) -> None: ...


class Traffic:
    """What one rank has sent to other ranks.

    Attributes:
        bytes_to: by receiver, ``[P]``.
        messages: how many.
        largest: bytes of the largest.
    """

    def __init__(self, size: int) -> None:
        self.bytes_to = [0] * size
        self.messages = self.largest = 0

    def add(self, receiver: int, nbytes: int, messages: int = 1) -> None:
        """Note messages of ``nbytes`` each."""
        self.bytes_to[receiver] += nbytes * messages
        self.messages += messages
        self.largest = max(self.largest, nbytes)

    def clear(self) -> None:
        """Begin anew."""
        self.bytes_to = [0] * len(self.bytes_to)
        self.messages = self.largest = 0

    def snapshot(self) -> Traffic:
        """What has been noted so far; later messages do not change it."""
        found = copy.copy(self)
        found.bytes_to = list(self.bytes_to)
        return found

    @property
    def bytes_sent(self) -> int:
        return sum(self.bytes_to)

    def across(self, sender: int, ranks_per_node: int) -> int:
        """Bytes to ranks of other nodes."""
        node = sender // ranks_per_node * ranks_per_node
        return self.bytes_sent - sum(self.bytes_to[node : node + ranks_per_node])


class Comm(Protocol):
    """The operations of a strategy.  Tensors are contiguous; each returns a handle to wait on.

    Attributes:
        rank, size: in this communicator.
        traffic: of the whole job's rank, shared by its sub-communicators.
        pause_s: slept after each wait; see cpbench.measure.timing.measure_memory.
    """

    rank: int
    size: int
    traffic: Traffic
    pause_s: float

    def sub(self, ranks: Sequence[int]) -> Comm:
        """The communicator of some ranks, of which this must be one, numbered in this order.

        Its members ask for the same communicators in the same order; nothing is sent before the
        first collective.
        """
        ...

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        """Send tensors to ranks and receive into tensors from ranks, all at once.

        Between two ranks, messages match in the order in which they are given.  ``what`` says in
        a word what is sent (``"keys"``): ranks agree on the words before anything is sent, so that
        messages of one size that would swap places are found.
        """
        ...

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Chunk ``r`` of x along its first axis (length P) goes to rank r."""
        ...

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """``out[r]`` becomes x of rank r."""
        ...

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """out becomes the sum over ranks of their ``x[rank]``."""
        ...

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        """x becomes the sum over ranks of x, or the elementwise largest."""
        ...


class Done:
    """A handle on nothing left to do."""

    def wait(self) -> None:
        pass


class Works:
    """torch.distributed's works, and what is left to do when they have ended."""

    def __init__(
        self, comm: TorchComm, works: Sequence[Any], then: Callable[[], Any] | None = None
    ) -> None:
        self._works, self._then, self._pause_s = works, then, comm.pause_s

    def arrive(self) -> None:
        """Wait for the transfers alone; ``wait`` is still to come."""
        for work in self._works:
            work.wait()

    def wait(self) -> None:
        self.arrive()
        if self._pause_s and self._works:
            time.sleep(self._pause_s)
        if self._then is not None:
            self._then()
        self._works, self._then = (), None


class Grouped:
    """What communicators share: members of a root one, and sub-communicators made once.

    Args:
        rank, size: of the root.
    """

    def __init__(self: Self, rank: int, size: int) -> None:
        self._root: Self = self
        self._members = tuple(range(size))  # ranks of the root, in the order of this one
        self._subs: dict[tuple[int, ...], Self] = {self._members: self}
        self.rank, self.size = rank, size
        self.traffic, self._pause_s = Traffic(size), 0.0

    @property
    def pause_s(self) -> float:
        return self._root._pause_s

    @pause_s.setter
    def pause_s(self, seconds: float) -> None:
        self._root._pause_s = seconds

    def sub(self, ranks: Sequence[int]) -> Self:
        """See :meth:`Comm.sub`."""
        members = tuple(self._members[rank] for rank in ranks)
        if members not in self._root._subs:
            made = copy.copy(self._root)  # traffic and all else is the root's
            made._members, made.size = members, len(members)
            made.rank = members.index(self._root.rank)
            made._begin()
            self._root._subs[members] = made
        return self._root._subs[members]

    def _begin(self) -> None:
        """What a sub-communicator has of its own."""

    def _note(self, nbytes: int, messages: int) -> None:
        """A collective in which so much goes to each other member."""
        for member in self._members:
            if member != self._root.rank:
                self.traffic.add(member, nbytes, messages)


class TorchComm(Grouped):
    """:class:`Comm` over a torch.distributed group (Gloo for CPU tensors, NCCL for CUDA ones).

    Args:
        group: a process group; the default one unless given.

    Attributes:
        group: that of the members, None for the default one or one that nothing has needed yet.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._dist, self._world, self.group = dist, group, group
        if "nccl" in dist.get_backend(group):
            # NCCL wants every rank in a group's first operation, which a ring's first exchange,
            # with its skipped steps, is not; and no communicator is made in a timed window.
            import torch

            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def _begin(self) -> None:
        self.group = None

    def _collective(self, nbytes: int, messages: int = 1) -> Any:
        """The process group, made when first needed; notes what goes to each other rank."""
        if self.group is None and self is not self._root:
            assert list(self._members) == sorted(self._members), "process groups sort their ranks"
            world = self._dist.get_process_group_ranks(self._world)
            ranks = [world[member] for member in self._members]
            self.group = self._dist.new_group(ranks, use_local_synchronization=True)
        self._note(nbytes, messages)
        return self.group

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        dist, group = self._dist, self._world
        own = [tensor for tensor, peer in sends if peer == self.rank]
        into = [tensor for tensor, peer in recvs if peer == self.rank]
        for target, source in zip(into, own, strict=True):  # Gloo cannot send to itself
            target.copy_(source)
        # Receives first: over Gloo, being ready to receive would queue behind one's own data.
        ops = []
        for tensor, peer in recvs:
            if peer != self.rank:
                sender = self._members[peer]
                ops.append(dist.P2POp(dist.irecv, tensor, group=group, group_peer=sender))
        for tensor, peer in sends:
            if peer != self.rank:
                receiver = self._members[peer]
                self.traffic.add(receiver, _nbytes(tensor))
                ops.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=receiver))
        return Works(self, dist.batch_isend_irecv(ops) if ops else [])

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == len(out) == self.size
        if self.size == 1:
            return Works(self, [], lambda: out.copy_(x))
        group = self._collective(_nbytes(x[0]))
        return Works(self, [self._dist.all_to_all_single(out, x, group=group, async_op=True)])

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(out) == self.size
        if self.size == 1:
            return Works(self, [], lambda: out[0].copy_(x))
        group = self._collective(_nbytes(x))
        gather = getattr(self._dist, "all_gather_single", self._dist.all_gather_into_tensor)
        return Works(self, [gather(out.flatten(0, 1), x, group=group, async_op=True)])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        import torch

        assert len(x) == self.size
        if self.size == 1:
            return Works(self, [], lambda: out.copy_(x[0]))
        group = self._collective(_nbytes(out))
        if x.device.type == "cpu":
            # Gloo's own is an all-reduce: twice the bytes, and sums in an order of its own.
            parts = torch.empty_like(x)
            work = self._dist.all_to_all_single(parts, x, group=group, async_op=True)
            return Works(self, [work], lambda: torch.sum(parts, 0, out=out))
        scatter = getattr(self._dist, "reduce_scatter_single", self._dist.reduce_scatter_tensor)
        return Works(self, [scatter(out, x.flatten(0, 1), group=group, async_op=True)])

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        if self.size == 1:
            return Done()
        group = self._collective(-(-_nbytes(x) // self.size), 2)
        kind = self._dist.ReduceOp.MAX if largest else self._dist.ReduceOp.SUM
        return Works(self, [self._dist.all_reduce(x, kind, group=group, async_op=True)])


class Control:
    """Small messages between ranks beside the measured ones: agreement, barriers, results.

    Runs on its own Gloo group, so it never disturbs (or waits for) the transport under test.
    """

    def __init__(self, group: Any = None, timeout_s: float = 1800.0) -> None:
        import torch.distributed as dist

        self._dist = dist
        self._group = dist.new_group(
            None if group is None else dist.get_process_group_ranks(group),
            backend="gloo",
            timeout=timedelta(seconds=timeout_s),
            use_local_synchronization=group is not None,
        )
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._dist.barrier(group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def slowest(self, seconds: float) -> float:
        """The largest of the ranks' figures, on every rank (one small all-reduce)."""
        import torch

        cell = torch.tensor([seconds], dtype=torch.float64)
        self._dist.all_reduce(cell, op=self._dist.ReduceOp.MAX, group=self._group)
        return float(cell.item())

    def decide(self, choice: bool) -> bool:
        """Rank 0's choice, on every rank."""
        import torch

        cell = torch.tensor([int(choice)])
        self._dist.broadcast(cell, group=self._group, group_src=0)
        return bool(cell.item())

    def ask(self, rank: int) -> float:
        """The number that another rank gives in :meth:`answer`, asked for by rank 0."""
        import torch

        cell = torch.zeros(1, dtype=torch.float64)
        self._dist.send(cell, group=self._group, group_dst=rank)
        self._dist.recv(cell, group=self._group, group_src=rank)
        return float(cell.item())

    def answer(self, number: Callable[[], float]) -> None:
        """Give rank 0 a number when it asks."""
        import torch

        cell = torch.zeros(1, dtype=torch.float64)
        self._dist.recv(cell, group=self._group, group_src=0)
        cell[0] = number()
        self._dist.send(cell, group=self._group, group_dst=0)

    def ranks_per_node(self) -> int:
        """Ranks that share a machine, where they are numbered machine by machine and as many on
        each; else 1."""
        hosts = self.gather(socket.gethostname())
        each = hosts.count(hosts[0])
        runs = [hosts[i : i + each] for i in range(0, len(hosts), each)]
        even = all(len(run) == each and len(set(run)) == 1 for run in runs)
        return each if even and len(set(hosts)) == len(runs) else 1


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
