"""Communication between ranks over torch.distributed: Gloo for CPU tensors, NCCL for CUDA ones.

Bytes are attributed as in ``cpbench.parallel.comm``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.parallel.comm import CompletedHandle, GroupedComm, Handle
from cpbench.parallel.process_group import create_group, destroy_group

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Messages

COLLECTIVE_TAG = 1  # of messages that make up a collective; those of exchanges have 0


class TorchHandle:
    """A handle on works of torch.distributed, with an optional callback after the last one."""

    def __init__(
        self, comm: TorchComm, works: Sequence[Any], on_complete: Callable[[], Any] | None = None
    ) -> None:
        self._works, self._on_complete, self._pause_s = works, on_complete, comm.pause_s

    def wait_transfers(self) -> None:
        """Wait for the transfers only; ``wait`` must still be called."""
        for work in self._works:
            work.wait()

    def wait(self) -> None:
        self.wait_transfers()
        if self._pause_s and self._works:
            time.sleep(self._pause_s)
        if self._on_complete is not None:
            self._on_complete()
        self._works, self._on_complete = (), None


class TorchComm(GroupedComm):
    """:class:`~cpbench.parallel.comm.Comm` over a torch.distributed group.

    Exchanges go through the group of all ranks.  Only a lane on NCCL has them in a group of its
    own: NCCL runs the operations of a group one after another, on one stream.

    Args:
        group: a process group; the default group unless given.

    Attributes:
        group: the process group of the members; None for the default group, or for a
            sub-communicator or lane before it is connected.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._dist, self._root_group, self.group = dist, group, group
        self._serial = "nccl" in dist.get_backend(group)
        self._start_group()
        if self._serial and self.size > 1:
            self.meet = self._start_group

    @property
    def on_gpus(self) -> bool:
        """Whether it is between GPUs, over NCCL."""
        return self._serial

    def _init_part(self) -> None:
        self.group = None

    def _connect(self) -> None:
        if self._serial or not self._lane:
            self._own_group()

    def _disconnect(self) -> None:
        if self.group is not None:
            destroy_group(self.group)
            self.group = None

    def destroy(self) -> None:
        """Destroy the groups of all sub-communicators and lanes, and let go of the own one."""
        self.disconnect()
        self._root_group = self.group = None

    def _own_group(self) -> Any:
        """The process group of the members; the first call creates it, and is collective."""
        if self.group is None and self is not self._root:
            purpose = f"lane {self._lane}" if self._lane else "part"
            self.group = create_group(self._root_group, sorted(self._members), purpose)
            self._start_group()
        return self.group

    def _start_group(self) -> None:
        """Send something in a new group of NCCL: its first operation requires every rank, and a
        ring that skips steps does not provide that; nor is it started in a timed window.  The
        current stream waits for it."""
        if self._serial:
            import torch

            self._dist.all_reduce(torch.zeros(1, device="cuda"), group=self.group)

    def _collective(self, nbytes: int, messages: int = 1) -> Any:
        """Return the process group, and count the bytes sent."""
        assert list(self._members) == sorted(self._members), "process groups sort their ranks"
        self._count_collective(nbytes, messages)
        return self._own_group()

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        group, members = self._root_group, self._members
        if self._serial and self._lane:
            order = sorted(members)
            group, members = self._own_group(), tuple(order.index(member) for member in members)
        self._copy_self_messages(sends, recvs)  # Gloo cannot send to itself
        for tensor, peer in sends:
            if peer != self.rank:
                self.traffic.add(self._members[peer], _nbytes(tensor))
        to, from_ = (
            [(tensor, members[peer]) for tensor, peer in messages if peer != self.rank]
            for messages in (sends, recvs)
        )
        return TorchHandle(self, self._post(to, from_, group))

    def _post(self, sends: Messages, recvs: Messages, group: Any, tag: int = 0) -> list[Any]:
        """Post messages to and from ranks of a group.

        Receives first: over Gloo, the notice of a posted receive queues behind data being sent, and
        the peer sends nothing before it.
        """
        dist = self._dist
        ops = [
            dist.P2POp(operation, tensor, group=group, tag=tag, group_peer=peer)
            for operation, messages in ((dist.irecv, recvs), (dist.isend, sends))
            for tensor, peer in messages
        ]
        return dist.batch_isend_irecv(ops) if ops else []

    def _swap_chunks(self, out: torch.Tensor, x: torch.Tensor, group: Any) -> list[Any]:
        """Start to send ``x[i]`` to member i, and to receive ``out[i]`` from it.

        Gloo's all-to-all posts its sends first, so that a pair of ranks often sends one after the
        other: half the rate of a link.
        """
        if self._serial:
            return [self._dist.all_to_all_single(out, x, group=group, async_op=True)]
        out[self.rank].copy_(x[self.rank])
        ahead = [(self.rank + i) % self.size for i in range(1, self.size)]
        sends = [(x[peer], peer) for peer in ahead]
        recvs = [(out[peer], peer) for peer in reversed(ahead)]
        return self._post(sends, recvs, group, COLLECTIVE_TAG)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == len(out) == self.size
        if self.size == 1:
            return TorchHandle(self, [], lambda: out.copy_(x))
        return TorchHandle(self, self._swap_chunks(out, x, self._collective(_nbytes(x[0]))))

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(out) == self.size
        if self.size == 1:
            return TorchHandle(self, [], lambda: out[0].copy_(x))
        group = self._collective(_nbytes(x))
        if self.size == 2 and not self._serial:
            return TorchHandle(self, self._swap_chunks(out, x.expand(2, *x.shape), group))
        gather = getattr(self._dist, "all_gather_single", self._dist.all_gather_into_tensor)
        return TorchHandle(self, [gather(out.flatten(0, 1), x, group=group, async_op=True)])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        import torch

        assert len(x) == self.size
        if self.size == 1:
            return TorchHandle(self, [], lambda: out.copy_(x[0]))
        group = self._collective(_nbytes(out))
        if x.device.type == "cpu":
            # Gloo's reduce-scatter is an all-reduce: twice the bytes, another order of summation.
            received = torch.empty_like(x)
            works = self._swap_chunks(received, x, group)
            return TorchHandle(self, works, lambda: torch.sum(received, 0, out=out))
        scatter = getattr(self._dist, "reduce_scatter_single", self._dist.reduce_scatter_tensor)
        return TorchHandle(self, [scatter(out, x.flatten(0, 1), group=group, async_op=True)])

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        if self.size == 1:
            return CompletedHandle()
        group = self._collective(-(-_nbytes(x) // self.size), 2)
        op = self._dist.ReduceOp.MAX if largest else self._dist.ReduceOp.SUM
        return TorchHandle(self, [self._dist.all_reduce(x, op, group=group, async_op=True)])


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
