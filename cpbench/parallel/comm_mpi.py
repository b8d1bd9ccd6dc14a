"""Communication between ranks through MPI (mpi4py), for tensors in main memory.

Tensors are passed as views of their own memory, as plain bytes, so that every dtype travels.  What
moves between a post and its ``wait`` is up to the library: without a progress thread of its own,
MPI moves large messages inside ``wait`` only, and transfer and compute do not overlap.

Bytes are counted as ``cpbench.parallel.comm`` attributes them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cpbench.parallel.comm import Done, Grouped, Handle

if TYPE_CHECKING:
    import torch

LARGEST = (1 << 31) - 1  # what a count holds before MPI-4; more bytes travel as one item of a type
SUMS = ("float32", "float64", "int32", "int64")  # of torch, that MPI adds up and compares


class _Requests:
    """MPI's requests, and what is left to do when they have ended."""

    def __init__(
        self, comm: MpiComm, requests: Sequence[Any], then: Callable[[], Any] | None = None
    ) -> None:
        self._comm, self._requests, self._then = comm, list(requests), then

    def wait(self) -> None:
        if self._requests:
            request = self._comm.mpi.Request
            while self._comm.nap_s and not request.Testall(self._requests):
                time.sleep(self._comm.nap_s)
            request.Waitall(self._requests)
            if self._comm.pause_s:
                time.sleep(self._comm.pause_s)
        if self._then is not None:
            self._then()
        self._requests, self._then = [], None


class MpiComm(Grouped):
    """:class:`~cpbench.parallel.comm.Comm` over an MPI communicator, for CPU tensors.

    Args:
        comm: an mpi4py communicator, all of whose ranks make this together; that of all unless
            given.  A copy is used, so that no other traffic meets the one of here.
        nap_s: between looks whether something has arrived, for more ranks than cores; 0 leaves
            waiting to MPI, which is faster and keeps a core busy.
    """

    def __init__(self, comm: Any = None, nap_s: float = 0.0) -> None:
        from mpi4py import MPI

        self._job = (MPI.COMM_WORLD if comm is None else comm).Dup()
        super().__init__(self._job.Get_rank(), self._job.Get_size())
        self.mpi, self.nap_s = MPI, nap_s
        self._comm: Any = self._job

    def _begin(self) -> None:
        self._comm = None

    def _collective(self, nbytes: int, messages: int = 1) -> Any:
        """The communicator, made by its members when first needed; notes what goes to each other
        rank."""
        if self._comm is None:
            self._comm = self._job.Create_group(self._job.Get_group().Incl(self._members))
        self._note(nbytes, messages)
        return self._comm

    def exchange(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        recvs: Sequence[tuple[torch.Tensor, int]],
        what: str = "",
    ) -> Handle:
        comm = self._job
        own = [tensor for tensor, peer in sends if peer == self.rank]
        into = [tensor for tensor, peer in recvs if peer == self.rank]
        for target, source in zip(into, own, strict=True):
            target.copy_(source)
        requests = [
            comm.Irecv(_message(tensor), self._members[peer], tag=0)
            for tensor, peer in recvs
            if peer != self.rank
        ]
        for tensor, peer in sends:
            if peer != self.rank:
                receiver = self._members[peer]
                self.traffic.add(receiver, tensor.numel() * tensor.element_size())
                requests.append(comm.Isend(_message(tensor), receiver, tag=0))
        return _Requests(self, requests)

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(x) == len(out) == self.size
        if self.size == 1:
            return _Requests(self, [], lambda: out.copy_(x))
        comm = self._collective(x[0].numel() * x.element_size())
        return _Requests(self, [comm.Ialltoall(_message(x, self.size), _message(out, self.size))])

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        assert len(out) == self.size
        if self.size == 1:
            return _Requests(self, [], lambda: out[0].copy_(x))
        comm = self._collective(x.numel() * x.element_size())
        return _Requests(self, [comm.Iallgather(_message(x), _message(out, self.size))])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        import torch

        assert len(x) == self.size
        if self.size == 1:
            return _Requests(self, [], lambda: out.copy_(x[0]))
        # Not MPI's own: that may gather all at one rank, and knows no 16-bit floats.
        comm, parts = self._collective(out.numel() * out.element_size()), torch.empty_like(x)
        request = comm.Ialltoall(_message(x, self.size), _message(parts, self.size))
        return _Requests(self, [request], lambda: torch.sum(parts, 0, out=out))

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> Handle:
        name = str(x.dtype).removeprefix("torch.")
        if name not in SUMS:
            raise ValueError(f"MPI adds up {', '.join(SUMS)}, not {name}: convert it first")
        if self.size == 1:
            return Done()
        comm = self._collective(-(-x.numel() * x.element_size() // self.size), 2)
        kind = self.mpi.MAX if largest else self.mpi.SUM
        pieces = [piece.detach().numpy() for piece in x.view(-1).split(LARGEST)]
        return _Requests(
            self, [comm.Iallreduce(self.mpi.IN_PLACE, piece, kind) for piece in pieces]
        )


def _message(tensor: torch.Tensor, blocks: int = 1) -> list[Any]:
    """A contiguous tensor as MPI takes it: its memory, and what is in it for each rank, how many
    items of what type.

    Args:
        blocks: of equal size, one a rank.
    """
    import torch
    from mpi4py import MPI

    view = tensor.detach().view(-1).view(torch.uint8).numpy()
    each = view.size // blocks
    if each <= LARGEST:
        return [view, each, MPI.BYTE]
    return [view, 1, _type_of(each)]


@functools.cache
def _type_of(nbytes: int) -> Any:
    """A type whose items are ``nbytes`` long."""
    from mpi4py import MPI

    runs, rest = divmod(nbytes, LARGEST)
    run = MPI.BYTE.Create_contiguous(LARGEST)
    made = MPI.Datatype.Create_struct([runs, rest], [0, runs * LARGEST], [run, MPI.BYTE])
    return made.Commit()
