"""Operations that ``cpbench links`` times, on data that the receiver can check.

Values are small integers in float32, so that sums are exact in any order and any flipped bit is
detected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm

ITEMSIZE = 4  # bytes of an element
MESSAGES = ("p2p", "ring", "cross")  # operations whose size is that of a message
PERIOD = 4093  # values are 1 to PERIOD: sums over 4,000 ranks stay below 2**24


class LinkError(RuntimeError):
    """Links cannot be measured, or wrong data was received; the message is for the user."""


def element_count(operation: str, nbytes: int, ranks: int) -> int:
    """Elements of a message, or of each rank's chunk (collectives), at least 1."""
    return max(1, nbytes // ITEMSIZE // (1 if operation in MESSAGES else ranks))


def actual_bytes(operation: str, nbytes: int, ranks: int) -> int:
    """``nbytes`` rounded down to whole elements for every rank, at least one each."""
    chunk_bytes = element_count(operation, nbytes, ranks) * ITEMSIZE
    return chunk_bytes if operation in MESSAGES else chunk_bytes * ranks


def seeded_values(seeds: Sequence[int], length: int, device: str) -> torch.Tensor:
    """``[length]`` float32, the sum over seeds of the cycle 1 to ``PERIOD``.

    The seed determines where a cycle starts.
    """
    import torch

    index = torch.arange(PERIOD, device=device)
    cycle = torch.zeros(PERIOD, device=device)
    for seed in seeds:
        cycle += (index + seed * 977) % PERIOD + 1
    return cycle.repeat(-(-length // PERIOD))[:length]


class LinkOperation(ABC):
    """One rank's part of an operation in a group of ranks.

    Attributes:
        time_share: share of the elapsed time that counts: a half for the rank that starts a
            ping-pong, none for the other.
        x, out, expected: the data to send, the receive buffer, and what it should hold afterwards.
    """

    time_share = 1.0
    x: torch.Tensor
    out: torch.Tensor
    expected: torch.Tensor

    def __init__(self, comm: Comm, group: tuple[int, ...], length: int, device: str) -> None:
        self.comm, self.group, self.size = comm.sub(group), group, len(group)
        self.rank, self.length, self.device = self.comm.rank, length, device
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Create the tensors."""

    def reset(self, repeats: int) -> None:
        """Reset the tensors before a sample of ``repeats`` repetitions."""
        self.out.zero_()

    @abstractmethod
    def run(self, repeat: int) -> None:
        """Run repetition number ``repeat`` of a sample."""

    def values(self, *seeds: int) -> torch.Tensor:
        """See :func:`seeded_values`."""
        return seeded_values(seeds, self.length, self.device)

    def send_chunks(self) -> torch.Tensor:
        """``[size, length]``: the chunk that this rank has for each member of the group."""
        import torch

        return torch.stack([self.values(self.rank * self.size + to) for to in range(self.size)])

    def received_seeds(self) -> list[int]:
        """The seeds of the chunks that the members have for this rank."""
        return [sender * self.size + self.rank for sender in range(self.size)]

    def check(self, label: str) -> None:
        """Raise :class:`LinkError` if the received data is wrong; ``label`` names the operation."""
        import torch

        if not torch.equal(self.out, self.expected):
            index = int((self.out != self.expected).flatten().nonzero()[0])
            actual, expected = (float(x.flatten()[index]) for x in (self.out, self.expected))
            raise LinkError(
                f"{label}, ranks {format_ranks(self.group)}: rank {self.group[self.rank]} received "
                f"wrong data: element {index} is {actual:g}, not {expected:g}"
            )


class _PingPong(LinkOperation):
    def prepare(self) -> None:
        self.time_share = 0.0 if self.rank else 0.5
        self.x, self.expected = self.values(self.rank), self.values(1 - self.rank)
        self.out = self.x.new_empty(self.x.shape)

    def run(self, repeat: int) -> None:
        peer = 1 - self.rank
        steps: list[Any] = [([(self.x, peer)], []), ([], [(self.out, peer)])]
        for sends, recvs in steps[:: -1 if self.rank else 1]:
            self.comm.exchange(sends, recvs).wait()


class _Ring(LinkOperation):
    """Every rank sends to the next one and receives from the one before, at once."""

    def prepare(self) -> None:
        before = (self.rank - 1) % self.size
        self.x, self.expected = self.values(self.rank), self.values(before)
        self.out = self.x.new_empty(self.x.shape)

    def run(self, repeat: int) -> None:
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self.comm.exchange([(self.x, after)], [(self.out, before)]).wait()


class _AllToAll(LinkOperation):
    def prepare(self) -> None:
        import torch

        self.x = self.send_chunks()
        self.expected = torch.stack([self.values(seed) for seed in self.received_seeds()])
        self.out = self.x.new_empty(self.x.shape)

    def run(self, repeat: int) -> None:
        self.comm.all_to_all(self.out, self.x).wait()


class _AllGather(LinkOperation):
    def prepare(self) -> None:
        import torch

        self.x = self.values(self.rank)
        self.expected = torch.stack([self.values(sender) for sender in range(self.size)])
        self.out = self.x.new_empty(self.expected.shape)

    def run(self, repeat: int) -> None:
        self.comm.all_gather(self.out, self.x).wait()


class _ReduceScatter(LinkOperation):
    def prepare(self) -> None:
        self.x, self.expected = self.send_chunks(), self.values(*self.received_seeds())
        self.out = self.x.new_empty(self.length)

    def run(self, repeat: int) -> None:
        self.comm.reduce_scatter(self.out, self.x).wait()


class _AllReduce(LinkOperation):
    """In place, so every repetition has its own tensor."""

    def prepare(self) -> None:
        self.length *= self.size
        self.x, self.expected = self.values(self.rank), self.values(*range(self.size))
        self.buffers: list[torch.Tensor] = []

    def reset(self, repeats: int) -> None:
        while len(self.buffers) < repeats:
            self.buffers.append(self.x.new_empty(self.x.shape))
        for buffer in self.buffers[:repeats]:
            buffer.copy_(self.x)
        self.out = self.buffers[repeats - 1]

    def run(self, repeat: int) -> None:
        self.comm.all_reduce(self.buffers[repeat]).wait()


OPERATIONS: dict[str, type[LinkOperation]] = {
    "p2p": _PingPong,
    "ring": _Ring,
    "cross": _Ring,
    "all_to_all": _AllToAll,
    "all_gather": _AllGather,
    "reduce_scatter": _ReduceScatter,
    "all_reduce": _AllReduce,
}


def format_ranks(ranks: Sequence[int]) -> str:
    """``0-3`` for consecutive ranks, ``0,4,8`` for others."""
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks[:4])) + (f",…,{ranks[-1]}" if len(ranks) > 4 else "")
