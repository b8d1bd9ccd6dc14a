"""Communication between ranks over MPI (mpi4py), for tensors in host memory.

Tensors are passed as byte views of their memory, so every dtype can be sent.  Whether data moves
between a post and its ``wait`` depends on the library: without a progress thread, MPI transfers
large messages inside ``wait`` only, and transfer and compute do not overlap.

Bytes are attributed as in ``cpbench.parallel.comm``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.parallel.comm import CompletedHandle, GroupedComm, Handle

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Messages

MAX_COUNT = (
    1 << 31
) - 1  # limit before MPI-4; more bytes are sent as one item of a derived datatype
REDUCIBLE_DTYPES = ("float32", "float64", "int32", "int64")  # torch dtypes that MPI reduces


class _MpiHandle:
    """A handle on MPI requests, with an optional callback after the last one."""

    def __init__(
        self, comm: MpiComm, requests: Sequence[Any], on_complete: Callable[[], Any] | None = None
    ) -> None:
        self._comm, self._requests, self._on_complete = comm, list(requests), on_complete

    def wait(self) -> None:
        if self._requests:
            request = self._comm.mpi.Request
            while self._comm.poll_interval_s and not request.Testall(self._requests):
                time.sleep(self._comm.poll_interval_s)
            request.Waitall(self._requests)
            if self._comm.pause_s:
                time.sleep(self._comm.pause_s)
        if self._on_complete is not None:
            self._on_complete()
        self._requests, self._on_complete = [], None


class MpiComm(GroupedComm):
    """:class:`~cpbench.parallel.comm.Comm` over an MPI communicator, for CPU tensors.

    Args:
        comm: an mpi4py communicator, COMM_WORLD unless given; construction is collective.  A
            duplicate is used, so that messages do not match those of other code.
        poll_interval_s: sleep between polls of a wait, for more ranks than cores; 0 waits inside
            MPI, which is faster and keeps a core busy.
    """

    def __init__(self, comm: Any = None, poll_interval_s: float = 0.0) -> None:
        from mpi4py import MPI

        self._job = (MPI.COMM_WORLD if comm is None else comm).Dup()
        super().__init__(self._job.Get_rank(), self._job.Get_size())
        self.mpi, self.poll_interval_s = MPI, poll_interval_s
        self._comm: Any = self._job

    def _init_part(self) -> None:
        self._comm = None

    def _connect(self) -> None:
        if self._comm is None and not self._lane:  # exchanges need none, in a lane or not
            self._comm = self._job.Create_group(self._job.Get_group().Incl(self._members))

    def _disconnect(self) -> None:
        if self._comm is not None:
            self._comm.Free()
            self._comm = None

    def _collective(self, nbytes: int, messages: int = 1) -> Any:
        """Return the communicator of the members, and count the bytes sent."""
        self._connect()
        self._count_collective(nbytes, messages)
        return self._comm

    def exchange(self, sends: Messages, recvs: Messages, what: str = "") -> Handle:
        comm = self._job
        self._copy_self_messages(sends, recvs)
        requests = [
            comm.Irecv(_buffer(tensor), self._members[peer], tag=0)
            for tensor, peer in recvs
            if peer != self.rank
        ]
        for tensor, peer in sends:
            if peer != self.rank:
                receiver = self._members[peer]
                self.traffic.add(receiver, tensor.numel() * tensor.element_size())
                requests.append(comm.Isend(_buffer(tensor), receiver, tag=0))
        return _MpiHandle(self, requests)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == len(out) == self.size
        if self.size == 1:
            return _MpiHandle(self, [], lambda: out.copy_(x))
        comm = self._collective(x[0].numel() * x.element_size())
        return _MpiHandle(self, [comm.Ialltoall(_buffer(x, self.size), _buffer(out, self.size))])

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(out) == self.size
        if self.size == 1:
            return _MpiHandle(self, [], lambda: out[0].copy_(x))
        comm = self._collective(x.numel() * x.element_size())
        return _MpiHandle(self, [comm.Iallgather(_buffer(x), _buffer(out, self.size))])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        import torch

        assert len(x) == self.size
        if self.size == 1:
            return _MpiHandle(self, [], lambda: out.copy_(x[0]))
        # MPI's reduce-scatter may gather everything on one rank, and has no 16-bit floats.
        comm, received = self._collective(out.numel() * out.element_size()), torch.empty_like(x)
        request = comm.Ialltoall(_buffer(x, self.size), _buffer(received, self.size))
        return _MpiHandle(self, [request], lambda: torch.sum(received, 0, out=out))

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        name = str(x.dtype).removeprefix("torch.")
        if name not in REDUCIBLE_DTYPES:
            raise ValueError(
                f"MPI reduces {', '.join(REDUCIBLE_DTYPES)}, not {name}: convert the tensor first"
            )
        if self.size == 1:
            return CompletedHandle()
        comm = self._collective(-(-x.numel() * x.element_size() // self.size), 2)
        op = self.mpi.MAX if largest else self.mpi.SUM
        chunks = [chunk.detach().numpy() for chunk in x.view(-1).split(MAX_COUNT)]
        return _MpiHandle(self, [comm.Iallreduce(self.mpi.IN_PLACE, chunk, op) for chunk in chunks])


def _buffer(tensor: torch.Tensor, blocks: int = 1) -> list[Any]:
    """The MPI buffer of a contiguous tensor: memory, items per rank and datatype.

    Args:
        blocks: number of equal blocks, one per rank.
    """
    import torch
    from mpi4py import MPI

    view = tensor.detach().view(-1).view(torch.uint8).numpy()
    block_bytes = view.size // blocks
    if block_bytes <= MAX_COUNT:
        return [view, block_bytes, MPI.BYTE]
    return [view, 1, _datatype(block_bytes)]


@functools.cache
def _datatype(nbytes: int) -> Any:
    """A derived datatype whose items are ``nbytes`` long."""
    from mpi4py import MPI

    chunks, rest = divmod(nbytes, MAX_COUNT)
    chunk = MPI.BYTE.Create_contiguous(MAX_COUNT)
    struct = MPI.Datatype.Create_struct([chunks, rest], [0, chunks * MAX_COUNT], [chunk, MPI.BYTE])
    return struct.Commit()
