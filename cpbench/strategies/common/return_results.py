"""Results that go back to those who lent something.  Not a strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm


class Returns:
    """What goes back to those that lent us something, and comes back from those we lent to;
    settled one step later."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self._handle = comm, comm.exchange([], [])
        self._sends: list[tuple[torch.Tensor, int]] = []
        self._recvs: list[tuple[torch.Tensor, int]] = []
        self._next: list[tuple[list[torch.Tensor], Any]] = []
        self._posted: list[tuple[list[torch.Tensor], Any]] = []

    def send(self, tensors: list[Any], rank: int) -> None:
        self._sends += [(x, rank) for x in tensors]

    def expect(self, buffers: list[torch.Tensor], rank: int, take: Any) -> None:
        """``take`` is called with the buffers when they are filled."""
        self._recvs += [(x, rank) for x in buffers]
        self._next.append((buffers, take))

    def post(self) -> None:
        """Wait for what was posted before, and send and expect what has been said since."""
        self.settle()
        self._handle = self._comm.exchange(self._sends, self._recvs, "results")
        self._posted, self._sends, self._recvs, self._next = self._next, [], [], []

    def settle(self) -> None:
        self._handle.wait()
        for buffers, take in self._posted:
            take(*buffers)
        self._posted = []
