"""Ranks as threads of one process, for dozens of ranks, where processes would be too many."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from limits import LIMIT_S

from cpbench.parallel.comm import Traffic


class ThreadComm:
    """A ``cpbench.parallel.comm.Comm`` between threads; every message is a copy in a queue."""

    def __init__(self, queues: Any, rank: int, size: int, members: Sequence[int] = ()) -> None:
        self._queues, self._members = queues, tuple(members) or tuple(range(size))
        self.rank, self.size = self._members.index(rank), len(self._members)
        self.traffic, self.pause_s = Traffic(size), 0.0

    def sub(self, ranks: Sequence[int]) -> ThreadComm:
        own = self._members[self.rank]
        members = [self._members[rank] for rank in ranks]
        return ThreadComm(self._queues, own, len(self.traffic.bytes_to), members)

    def lane(self, name: str) -> ThreadComm:
        return self

    def exchange(self, sends: Any, recvs: Any, what: str = "") -> _Receives:
        own = self._members[self.rank]
        for tensor, peer in sends:
            self._queues[own, self._members[peer]].put(tensor.clone())
        return _Receives([(x, self._queues[self._members[peer], own]) for x, peer in recvs])

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> _Receives:
        ranks = range(self.size)
        return self.exchange([(x[r], r) for r in ranks], [(out[r], r) for r in ranks])

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> _Receives:
        ranks = range(self.size)
        return self.exchange([(x, r) for r in ranks], [(out[r], r) for r in ranks])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> _Receives:
        chunks = torch.empty_like(x)
        self.all_to_all(chunks, x).wait()
        torch.sum(chunks, 0, out=out)
        return _Receives([])

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> _Receives:
        gathered = x.new_empty((self.size, *x.shape))
        self.all_gather(gathered, x).wait()
        x.copy_(gathered.amax(0) if largest else gathered.sum(0))
        return _Receives([])


class _Receives:
    """The handle of an exchange: buffers to receive into, each with its queue."""

    def __init__(self, pending: list[tuple[torch.Tensor, queue.Queue[torch.Tensor]]]) -> None:
        self._pending = pending

    def wait(self) -> None:
        for buffer, messages in self._pending:
            buffer.copy_(messages.get(timeout=LIMIT_S))
        self._pending = []


def run_threads(size: int, function: Callable[[ThreadComm], Any]) -> list[Any]:
    """Run ``function`` on ``size`` ranks; returns the result of each."""
    # Made beforehand: two threads that access a defaultdict at once may get two queues.
    queues: Any = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    results: dict[int, Any] = {}

    def rank(number: int) -> None:
        try:
            results[number] = function(ThreadComm(queues, number, size))
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(size):
        if isinstance(results[number], BaseException):
            raise results[number]
    return [results[number] for number in range(size)]
