"""Communication between ranks: what strategies may ask for, and torch.distributed doing it.

Bytes are counted here, from the tensors that cross the transport boundary, independently of any
plan.  Attribution, per rank: a send counts its bytes unless it is to the rank itself; all_to_all
counts the chunks for the other ranks; all_gather counts the own shard once per other rank;
reduce_scatter counts the chunks of the other ranks.  What a transport does underneath (rings,
trees) may move the same bytes by other routes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Handle(Protocol):
    """Something under way; buffers may be read and reused after ``wait``."""

    def wait(self) -> None: ...


@dataclass
class Traffic:
    """What this rank has sent to other ranks."""

    bytes_sent: int = 0
    messages: int = 0

    def add(self, nbytes: int, messages: int) -> None:
        self.bytes_sent += nbytes
        self.messages += messages


class Comm(Protocol):
    """The operations of a strategy.  Tensors are contiguous; each returns a handle to wait on."""

    rank: int
    size: int
    traffic: Traffic
    pause_s: float  # after each wait; see cpbench.measure.measure_memory

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
    ) -> Handle:
        """Send tensors to ranks and receive into tensors from ranks, all at once.

        Between two ranks, messages match in the order in which they are given.
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


class _Works:
    def __init__(self, works: Sequence[Any], pause_s: float) -> None:
        self._works, self._pause_s = works, pause_s

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        if self._pause_s and self._works:
            time.sleep(self._pause_s)


class TorchComm:
    """:class:`Comm` over a torch.distributed group (Gloo for CPU tensors, NCCL for CUDA ones)."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()
        self.pause_s = 0.0
        if "nccl" in dist.get_backend(group):
            # NCCL wants every rank in a group's first operation, which a ring's first exchange,
            # with its skipped steps, is not; and no communicator is made in a timed window.
            import torch

            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
    ) -> Handle:
        dist = self._dist
        own = [tensor for tensor, peer in sends if peer == self.rank]
        into = [tensor for tensor, peer in recvs if peer == self.rank]
        for target, source in zip(into, own, strict=True):  # Gloo cannot send to itself
            target.copy_(source)
        ops = []
        for tensor, peer in sends:
            if peer != self.rank:
                self.traffic.add(_nbytes(tensor), 1)
                ops.append(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer))
        for tensor, peer in recvs:
            if peer != self.rank:
                ops.append(dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer))
        return _Works(dist.batch_isend_irecv(ops) if ops else [], self.pause_s)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == len(out) == self.size
        self.traffic.add(_nbytes(x) // self.size * (self.size - 1), self.size - 1)
        work = self._dist.all_to_all_single(out, x, group=self._group, async_op=True)
        return _Works([work], self.pause_s)

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(out) == self.size
        self.traffic.add(_nbytes(x) * (self.size - 1), self.size - 1)
        gather = getattr(self._dist, "all_gather_single", self._dist.all_gather_into_tensor)
        work = gather(out.flatten(0, 1), x, group=self._group, async_op=True)
        return _Works([work], self.pause_s)

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == self.size
        self.traffic.add(_nbytes(out) * (self.size - 1), self.size - 1)
        scatter = getattr(self._dist, "reduce_scatter_single", self._dist.reduce_scatter_tensor)
        work = scatter(out, x.flatten(0, 1), group=self._group, async_op=True)
        return _Works([work], self.pause_s)


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

    def agree(self, what: str, value: str) -> None:
        """Raise on every rank when the ranks do not all hold the same value."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise RuntimeError(f"ranks disagree on the {what}: {values}")


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
