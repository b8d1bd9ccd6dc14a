"""Operations on data that the receiver knows: what ``cpbench links`` times, and checks.

Values are small whole numbers in float32, so that sums are exact in any order and any flipped bit
shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.comm import Comm

WIDTH = 4  # bytes of an element
PERIOD = 4093  # values are 1 to this: sums over 4,000 ranks stay below 2**24


class LinkError(RuntimeError):
    """What keeps links from being measured, in words for the user."""


def elements(operation: str, nbytes: int, ranks: int) -> int:
    """Elements of a message (point-to-point) or of each rank's part, one at least."""
    return max(1, nbytes // WIDTH // (1 if operation == "p2p" else ranks))


def actual_bytes(operation: str, nbytes: int, ranks: int) -> int:
    """The size that a wanted one becomes, in whole elements for every rank."""
    each = elements(operation, nbytes, ranks) * WIDTH
    return each if operation == "p2p" else each * ranks


def pattern(seeds: Sequence[int], length: int, device: str) -> torch.Tensor:
    """The sum over seeds of values 1 to ``PERIOD`` in turn, the first of which depends on the
    seed."""
    import torch

    turn = torch.arange(PERIOD, device=device)
    one = torch.zeros(PERIOD, device=device)
    for seed in seeds:
        one += (turn + seed * 977) % PERIOD + 1
    return one.repeat(-(-length // PERIOD))[:length]


class Work:
    """One operation of one rank in a group.

    Attributes:
        share: of the time taken that counts: half for who starts a ping-pong, none for the other.
        x, out, want: what is sent, where something arrives, and what should.
    """

    share = 1.0
    x: torch.Tensor
    out: torch.Tensor
    want: torch.Tensor

    def __init__(self, comm: Comm, group: tuple[int, ...], length: int, device: str) -> None:
        self.comm, self.group, self.size = comm.sub(group), group, len(group)
        self.me, self.length, self.device = self.comm.rank, length, device
        self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    def reset(self, repeats: int) -> None:
        """Before a sample of so many repetitions."""
        self.out.zero_()

    def once(self, turn: int) -> None:
        """The repetition of a number."""
        raise NotImplementedError

    def of(self, *seeds: int) -> torch.Tensor:
        return pattern(seeds, self.length, self.device)

    def parts(self) -> torch.Tensor:
        """What this rank has for each member."""
        import torch

        return torch.stack([self.of(self.me * self.size + to) for to in range(self.size)])

    def senders(self) -> list[int]:
        """The seeds of what the members have for this rank."""
        return [sender * self.size + self.me for sender in range(self.size)]

    def check(self, what: str) -> None:
        """Raise where something else has arrived than was sent."""
        import torch

        if not torch.equal(self.out, self.want):
            where = int((self.out != self.want).flatten().nonzero()[0])
            found, want = (float(x.flatten()[where]) for x in (self.out, self.want))
            raise LinkError(
                f"{what}, ranks {named(self.group)}: rank {self.group[self.me]} received wrong "
                f"data: element {where} is {found:g}, not {want:g}"
            )


class _PingPong(Work):
    def prepare(self) -> None:
        self.share = 0.0 if self.me else 0.5
        self.x, self.want = self.of(self.me), self.of(1 - self.me)
        self.out = self.x.new_empty(self.x.shape)

    def once(self, turn: int) -> None:
        other = 1 - self.me
        ways: list[Any] = [([(self.x, other)], []), ([], [(self.out, other)])]
        for sends, recvs in ways[:: -1 if self.me else 1]:
            self.comm.exchange(sends, recvs).wait()


class _AllToAll(Work):
    def prepare(self) -> None:
        import torch

        self.x, self.want = self.parts(), torch.stack([self.of(seed) for seed in self.senders()])
        self.out = self.x.new_empty(self.x.shape)

    def once(self, turn: int) -> None:
        self.comm.all_to_all(self.out, self.x).wait()


class _AllGather(Work):
    def prepare(self) -> None:
        import torch

        self.x = self.of(self.me)
        self.want = torch.stack([self.of(sender) for sender in range(self.size)])
        self.out = self.x.new_empty(self.want.shape)

    def once(self, turn: int) -> None:
        self.comm.all_gather(self.out, self.x).wait()


class _ReduceScatter(Work):
    def prepare(self) -> None:
        self.x, self.want = self.parts(), self.of(*self.senders())
        self.out = self.x.new_empty(self.length)

    def once(self, turn: int) -> None:
        self.comm.reduce_scatter(self.out, self.x).wait()


class _AllReduce(Work):
    """In place: every repetition has a tensor of its own."""

    def prepare(self) -> None:
        self.length *= self.size
        self.x, self.want = self.of(self.me), self.of(*range(self.size))
        self.turns: list[torch.Tensor] = []

    def reset(self, repeats: int) -> None:
        while len(self.turns) < repeats:
            self.turns.append(self.x.new_empty(self.x.shape))
        for turn in self.turns[:repeats]:
            turn.copy_(self.x)
        self.out = self.turns[repeats - 1]

    def once(self, turn: int) -> None:
        self.comm.all_reduce(self.turns[turn]).wait()


WORKS: dict[str, type[Work]] = {
    "p2p": _PingPong,
    "all_to_all": _AllToAll,
    "all_gather": _AllGather,
    "reduce_scatter": _ReduceScatter,
    "all_reduce": _AllReduce,
}


def named(ranks: Sequence[int]) -> str:
    """``0-3`` for neighbours, ``0,4,8`` for others."""
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks[:4])) + (f",…,{ranks[-1]}" if len(ranks) > 4 else "")
