"""Ranks as threads of one process: dozens of them, where processes would be too many."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cpbench.parallel.comm import Traffic

LIMIT_S = 400.0


class ThreadComm:
    """``cpbench.parallel.comm.Comm`` among threads: every message is a copy in a queue."""

    def __init__(self, mail: Any, rank: int, size: int, members: Sequence[int] = ()) -> None:
        self._mail, self._members = mail, tuple(members) or tuple(range(size))
        self.rank, self.size = self._members.index(rank), len(self._members)
        self.traffic, self.pause_s = Traffic(size), 0.0

    def sub(self, ranks: Sequence[int]) -> ThreadComm:
        me = self._members[self.rank]
        members = [self._members[rank] for rank in ranks]
        return ThreadComm(self._mail, me, len(self.traffic.bytes_to), members)

    def exchange(self, sends: Any, recvs: Any, what: str = "") -> _Arrivals:
        me = self._members[self.rank]
        for tensor, peer in sends:
            self._mail[me, self._members[peer]].put(tensor.clone())
        return _Arrivals([(x, self._mail[self._members[peer], me]) for x, peer in recvs])

    def all_to_all(self, out: torch.Tensor, x: torch.Tensor) -> _Arrivals:
        ranks = range(self.size)
        return self.exchange([(x[r], r) for r in ranks], [(out[r], r) for r in ranks])

    def all_gather(self, out: torch.Tensor, x: torch.Tensor) -> _Arrivals:
        ranks = range(self.size)
        return self.exchange([(x, r) for r in ranks], [(out[r], r) for r in ranks])

    def reduce_scatter(self, out: torch.Tensor, x: torch.Tensor) -> _Arrivals:
        parts = torch.empty_like(x)
        self.all_to_all(parts, x).wait()
        torch.sum(parts, 0, out=out)
        return _Arrivals([])

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> _Arrivals:
        parts = x.new_empty((self.size, *x.shape))
        self.all_gather(parts, x).wait()
        x.copy_(parts.amax(0) if largest else parts.sum(0))
        return _Arrivals([])


class _Arrivals:
    def __init__(self, expected: list[tuple[torch.Tensor, queue.Queue[torch.Tensor]]]) -> None:
        self._expected = expected

    def wait(self) -> None:
        for into, box in self._expected:
            into.copy_(box.get(timeout=LIMIT_S))
        self._expected = []


def run_threads(size: int, function: Callable[[ThreadComm], Any]) -> list[Any]:
    """What ``function`` returned on each of ``size`` ranks."""
    # All made beforehand: two threads that ask a defaultdict at once may get two queues.
    mail: Any = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    results: dict[int, Any] = {}

    def rank(number: int) -> None:
        try:
            results[number] = function(ThreadComm(mail, number, size))
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
