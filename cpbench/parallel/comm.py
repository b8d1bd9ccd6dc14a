"""Communication between ranks: the operations that strategies use, and control messages.

Bytes are counted here, from the tensors passed to the transport, independently of any plan.
Attribution to (sender, receiver), one message each unless noted otherwise:

- exchange: every tensor to its receiver, unless that is the sender itself;
- all_to_all: each chunk to its rank;  all_gather: the local shard to every other rank;
- reduce_scatter: each chunk to its rank;
- all_reduce: a reduce-scatter and an all-gather, two messages of 1/P of the tensor to every other
  rank.

Copies between the host and the device of a rank are counted apart; they are no messages.

The algorithm of a transport (ring, tree) may send the same bytes over other routes, but not fewer,
neither per rank nor in total.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from cpbench.parallel.host_memory.link import HostLink
from cpbench.parallel.process_group import create_group, destroy_group

if TYPE_CHECKING:
    import torch

    Messages = Sequence[tuple[torch.Tensor, int]]  # tensors, each with its peer rank

Part = tuple[tuple[int, ...], str]  # of a communicator: root ranks, and the name of a lane or ""


class Handle(Protocol):
    """A pending operation; its buffers may be read and reused after ``wait``."""

    def wait(self) -> None: ...


class Traffic:
    """Counters of the bytes and messages that one rank has sent to other ranks.

    Attributes:
        bytes_to: bytes by receiver, ``[P]``.
        messages: number of messages.
        largest_message: bytes of the largest message.
        to_device, to_host: bytes copied from host memory to the device, and back.
    """

    def __init__(self, size: int) -> None:
        self.bytes_to = [0] * size
        self.messages = self.largest_message = 0
        self.to_device = self.to_host = 0

    def add(self, receiver: int, nbytes: int, messages: int = 1) -> None:
        """Count messages of ``nbytes`` each."""
        self.bytes_to[receiver] += nbytes * messages
        self.messages += messages
        self.largest_message = max(self.largest_message, nbytes)

    def clear(self) -> None:
        """Reset the counters."""
        self.clear_messages()
        self.to_device = self.to_host = 0

    def clear_messages(self) -> None:
        """Reset the counters of messages only."""
        self.bytes_to = [0] * len(self.bytes_to)
        self.messages = self.largest_message = 0

    def snapshot(self) -> Traffic:
        """A copy of the counters; later messages do not change it."""
        snapshot = copy.copy(self)
        snapshot.bytes_to = list(self.bytes_to)
        return snapshot

    @property
    def bytes_sent(self) -> int:
        return sum(self.bytes_to)

    def bytes_across_nodes(self, sender: int, ranks_per_node: int) -> int:
        """Bytes sent to ranks of other nodes."""
        first = sender // ranks_per_node * ranks_per_node
        return self.bytes_sent - sum(self.bytes_to[first : first + ranks_per_node])


class Comm(Protocol):
    """The operations that a strategy uses.  Tensors are contiguous; each returns a handle.

    Attributes:
        rank, size: of this communicator.
        traffic: counters of this rank, shared with its sub-communicators.
        pause_s: sleep after each wait; see cpbench.measure.timing.measure_memory.
        meet: queues an operation in which the devices of all ranks wait for each other, on the
            current stream; None where hosts compute, which meet in a barrier.
    """

    rank: int
    size: int
    traffic: Traffic
    pause_s: float
    meet: Callable[[], None] | None

    def sub(self, ranks: Sequence[int]) -> Comm:
        """The communicator of a subset of ranks, including this one, numbered in the order given.

        All members must create the same communicators in the same order; nothing is sent before
        the first collective.
        """
        ...

    def lane(self, name: str) -> Comm:
        """A communicator of the same ranks for exchanges that need not wait for those of this one.

        A GPU runs the operations of one communicator one after another; a lane is another one,
        where the transport needs it.  All members must create the same lanes in the same order.
        """
        ...

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        """Post a batch of P2P sends and receives.

        Messages between two ranks match in the order in which they are posted, whatever lanes they
        take.  ``what`` names the content (``"keys"``): ranks compare the names before anything is
        sent, which detects messages of equal size in the wrong order.
        """
        ...

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Send chunk ``r`` of x along its first axis (length P) to rank r."""
        ...

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Set ``out[r]`` to x of rank r."""
        ...

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Set out to the sum over ranks of their ``x[rank]``."""
        ...

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        """Replace x by its sum over ranks, or by its elementwise maximum."""
        ...

    def to_device(self, out: torch.Tensor, x: torch.Tensor, after: Sequence[Handle] = ()) -> Handle:
        """Copy x from host memory to ``out`` on the device.

        Args:
            after: copies that read what this one writes, or write what it reads, and that have not
                been waited for: on a GPU it starts after them.
        """
        ...

    def to_host(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Copy x from the device to ``out`` in host memory, which the CPU may read after
        :meth:`finish_copies`; x may be reused after ``wait``."""
        ...

    def finish_copies(self) -> None:
        """Block until all copies to host memory have ended."""
        ...


class Transport(Comm, Protocol):
    """The communicator of all ranks, which connects and disconnects its parts."""

    def connect(self, parts: Sequence[Part]) -> None:
        """Connect sub-communicators and lanes, so that their first use takes no longer than later
        ones; collective.

        Args:
            parts: as ``cpbench.parallel.tracing`` finds them; members connect theirs in one order.
        """
        ...

    def disconnect(self) -> None:
        """Disconnect all sub-communicators and lanes, which must not be in use; collective.  One
        that is used again is connected again."""
        ...


class CompletedHandle:
    """The handle of an operation that has already completed."""

    def wait(self) -> None:
        pass


class GroupedComm:
    """Base of communicators: a root communicator, its cached sub-communicators and their lanes.

    Args:
        rank, size: of the root communicator.
    """

    meet: Callable[[], None] | None = None

    def __init__(self: Self, rank: int, size: int) -> None:
        self._root: Self = self
        self._members = tuple(range(size))  # root ranks, in the order of this communicator
        self._lane = ""
        self._parts: dict[Part, Self] = {(self._members, ""): self}
        self.rank, self.size = rank, size
        self.traffic, self._pause_s = Traffic(size), 0.0
        self._link: HostLink | None = None

    @property
    def pause_s(self) -> float:
        return self._root._pause_s

    @pause_s.setter
    def pause_s(self, seconds: float) -> None:
        self._root._pause_s = seconds

    def sub(self, ranks: Sequence[int]) -> Self:
        """See :meth:`Comm.sub`."""
        return self._part(tuple(self._members[rank] for rank in ranks), "")

    def lane(self, name: str) -> Self:
        """See :meth:`Comm.lane`."""
        return self._part(self._members, name)

    def to_device(self, out: torch.Tensor, x: torch.Tensor, after: Sequence[Handle] = ()) -> Handle:
        """See :meth:`Comm.to_device`."""
        self.traffic.to_device += x.nbytes
        return self._copy(out, x, True, after)

    def to_host(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """See :meth:`Comm.to_host`."""
        self.traffic.to_host += x.nbytes
        return self._copy(out, x, False)

    def _copy(
        self, out: torch.Tensor, x: torch.Tensor, to_device: bool, after: Sequence[Any] = ()
    ) -> Handle:
        """Copy between host and device: at once, where both are main memory."""
        if not (out if to_device else x).is_cuda:
            out.copy_(x)
            return CompletedHandle()
        root = self._root
        if root._link is None:
            import torch

            root._link = HostLink(torch.cuda)
        return root._link.copy(out, x, to_device, after)

    def finish_copies(self) -> None:
        """See :meth:`Comm.finish_copies`."""
        if self._root._link is not None:
            self._root._link.finish()

    def _part(self, members: tuple[int, ...], lane: str) -> Self:
        root = self._root
        if (members, lane) not in root._parts:
            part = copy.copy(root)  # shares traffic and all else with the root
            part._members, part._lane, part.size = members, lane, len(members)
            part.rank = members.index(root.rank)
            part._init_part()
            root._parts[members, lane] = part
        return root._parts[members, lane]

    def connect(self, parts: Sequence[Part]) -> None:
        """See :meth:`Transport.connect`; for the root communicator."""
        for members, lane in parts:
            self._part(members, lane)._connect()

    def disconnect(self) -> None:
        """See :meth:`Transport.disconnect`; for the root communicator."""
        own = (self._members, "")
        for part in self._parts.values():
            if part is not self:
                part._disconnect()
        self._parts = {own: self._parts[own]}

    def _init_part(self) -> None:
        """Initialise the state that a sub-communicator or lane does not share with the root."""

    def _connect(self) -> None:
        """Make what the transport needs for this sub-communicator or lane."""

    def _disconnect(self) -> None:
        """Undo :meth:`_connect`, if that has happened."""

    def _copy_self_messages(self, sends: Messages, recvs: Messages) -> None:
        """Copy the messages of an exchange that this rank sends to itself."""
        sources = (tensor for tensor, peer in sends if peer == self.rank)
        targets = (tensor for tensor, peer in recvs if peer == self.rank)
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def _count_collective(self, nbytes: int, messages: int) -> None:
        """Count a collective that sends ``messages`` of ``nbytes`` to each other member."""
        for member in self._members:
            if member != self._root.rank:
                self.traffic.add(member, nbytes, messages)


class Control:
    """Control messages between ranks, apart from the measured ones: agreement, barriers, results.

    Uses a Gloo group of its own, so it neither disturbs nor waits for the transport under test.
    """

    def __init__(self, group: Any = None, timeout_s: float = 0.0) -> None:
        import torch.distributed as dist

        self._dist = dist
        members = range(dist.get_world_size(group))
        self._group = create_group(group, members, "control", "gloo", timeout_s)
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)

    def destroy(self) -> None:
        """Destroy the group."""
        destroy_group(self._group)

    def barrier(self) -> None:
        """Wait until every rank has reached this call."""
        self._dist.barrier(group=self._group)

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, checksum: int, ready: bool) -> bool:
        """Whether all ranks are ready and have the same checksum (one all-reduce of 24 bytes)."""
        import torch

        cells = torch.tensor([checksum, -checksum, not ready], dtype=torch.int64, device="cpu")
        self._dist.all_reduce(cells, op=self._dist.ReduceOp.MAX, group=self._group)
        largest, minus_smallest, unready = cells.tolist()
        return largest == -minus_smallest and not unready

    def max(self, value: float) -> float:
        """The maximum over ranks, on every rank (one small all-reduce)."""
        import torch

        cell = torch.tensor([value], dtype=torch.float64, device="cpu")
        self._dist.all_reduce(cell, op=self._dist.ReduceOp.MAX, group=self._group)
        return float(cell.item())

    def broadcast(self, flag: bool) -> bool:
        """The flag of rank 0, on every rank."""
        import torch

        cell = torch.tensor([int(flag)], device="cpu")
        self._dist.broadcast(cell, group=self._group, group_src=0)
        return bool(cell.item())

    def request_value(self, rank: int) -> float:
        """On rank 0: the value that ``rank`` computes in :meth:`reply_value`."""
        import torch

        cell = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._dist.send(cell, group=self._group, group_dst=rank)
        self._dist.recv(cell, group=self._group, group_src=rank)
        return float(cell.item())

    def reply_value(self, compute: Callable[[], float]) -> None:
        """Wait for a request of rank 0 and send it a value computed at that moment."""
        import torch

        cell = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._dist.recv(cell, group=self._group, group_src=0)
        cell[0] = compute()
        self._dist.send(cell, group=self._group, group_dst=0)

    def ranks_per_node(self) -> int:
        """Ranks per node where ranks are numbered node by node, equally many on each but the last,
        which may have fewer; else 1."""
        hosts = self.all_gather(socket.gethostname())
        per_node = hosts.count(hosts[0])
        nodes = [hosts[i : i + per_node] for i in range(0, len(hosts), per_node)]
        by_node = all(len(set(node)) == 1 for node in nodes)
        return per_node if by_node and len(set(hosts)) == len(nodes) else 1
