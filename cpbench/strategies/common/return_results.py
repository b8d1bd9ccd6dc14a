"""Return of partial results to the rank that owns the queries or keys.  Not a strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.parallel.comm import CompletedHandle

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.partial_results.accumulators import ForwardAccumulator


class ResultExchange:
    """Sends partial results to their owners and receives those of this rank, overlapped with the
    next step.

    They go the opposite way to keys and queries, when a rank has computed them: in a lane of their
    own, so that what comes next does not wait for the results of slower ranks.
    """

    def __init__(self, comm: Comm, lane: str = "results") -> None:
        self._comm = comm.lane(lane)
        self._handle: Handle = CompletedHandle()
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._recvs: list[tuple[torch.Tensor, int]] = []
        self._callbacks: list[tuple[list[torch.Tensor], Any]] = []
        self._posted: list[tuple[list[torch.Tensor], Any]] = []

    def send(self, tensors: list[Any], rank: int) -> None:
        """Send these tensors at the next :meth:`post`."""
        self._sends += [(x.contiguous(), rank) for x in tensors]

    def receive(self, buffers: list[torch.Tensor], rank: int, consume: Any) -> None:
        """Receive into buffers at the next :meth:`post`, then call ``consume`` with them."""
        self._recvs += [(x, rank) for x in buffers]
        self._callbacks.append((buffers, consume))

    def receive_partial(self, rank: int, accumulator: ForwardAccumulator) -> None:
        """Receive a partial out and lse of the local queries, and merge them when they arrive."""
        self.receive(list(accumulator.empty_result()), rank, accumulator.add_partial)

    def post(self) -> None:
        """Wait for the previous exchange, then start the one prepared since."""
        self.wait()
        self._handle = self._comm.exchange(self._sends, self._recvs, "results")
        self._posted, self._sends, self._recvs, self._callbacks = self._callbacks, [], [], []

    def wait(self) -> None:
        """Wait for the posted exchange and consume what was received."""
        self._handle.wait()
        for buffers, consume in self._posted:
            consume(*buffers)
        self._posted = []
