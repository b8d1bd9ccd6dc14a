"""Discrete-event replay of what ranks do: compute, side work, post, wait.

A rank computes in order and posts communication in the background, and copies between device and
host, unless these are one memory.  The operations of one communicator or lane, and the copies of
one direction, run one after another on every rank.  A message starts when both its ranks have
reached it, takes the latency of its link, and then shares the bandwidth of the links that it uses
with the other messages on them; a collective starts when all its members have reached it.

A few ranks may stand for many: those of a group are replayed together, and their peers outside of
it are taken to be where they are.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cpbench.simulator.cluster import Cluster
from cpbench.simulator.events import Copy, Kernel, Mix, Post, Program, SideWork, Wait
from cpbench.simulator.network import Network

Seconds = Callable[[Kernel | Mix | SideWork], float]


class Span(NamedTuple):
    """What a rank does for some time: a ``"kernel"``, a ``"wait"`` or a ``"transfer"``."""

    kind: str
    event: Kernel | Mix | Post | Copy
    start: float
    end: float

    @property
    def name(self) -> str:
        event = self.event
        if isinstance(event, Kernel | Mix):
            return event.phase if isinstance(event, Kernel) else event.step
        if isinstance(event, Copy):
            name = f"to {'device' if event.to_device else 'host'} {event.number}"
        else:
            lane = f", {event.lane}" if event.lane else ""
            name = f"{event.operation} {event.number}{lane}"
        return f"wait {name}" if self.kind == "wait" else name

    @property
    def details(self) -> dict[str, Any]:
        """Blocks of a kernel, tokens of a step of a mixer, else bytes, of messages by peer, as in
        measured timelines."""
        event = self.event
        if isinstance(event, Kernel):
            return {"blocks": event.tiles.blocks * event.heads_q}
        if isinstance(event, Mix):
            return {"tokens": event.tokens}
        if isinstance(event, Copy):
            return {"bytes": event.nbytes}
        sends, receives = (
            {str(peer): nbytes for peer, nbytes in rows} for rows in (event.sends, event.receives)
        )
        return {"sends": sends, "receives": receives}


@dataclass
class RankTimes:
    """The seconds of one rank in one phase.

    Attributes:
        attention: in kernels, or steps of a mixer; side: in other work; exposed: waiting for
            communication.
        end: when it has finished.
        spans: its kernels, waits and transfers, by the time of their end.
    """

    attention: float = 0.0
    side: float = 0.0
    exposed: float = 0.0
    end: float = 0.0
    spans: list[Span] = field(default_factory=list)


def replay(
    programs: Mapping[int, Program], cluster: Cluster, nodes: int, seconds: Seconds,
    groups: Collection[Collection[int]] = (),
) -> dict[int, RankTimes]:  # fmt: skip
    """Replay the programs of ranks.

    Args:
        programs: by rank.
        nodes: ranks per node.
        seconds: the time of a kernel, of a step of a mixer, or of side work.
        groups: of ranks that are replayed together; () for one group of all.  A peer outside of
            its group is taken to be where a rank is.

    Raises:
        ValueError: if ranks wait for each other for ever, or the cluster lacks a class of links.
    """
    times: dict[int, RankTimes] = {}
    for group in groups or [programs]:
        of_group = {rank: programs[rank] for rank in group}
        times |= _Replay(of_group, cluster, nodes, seconds).run()
    return times


@dataclass(eq=False)
class _Operation:
    """One operation on one rank: what it waits for, and how many of its messages are pending."""

    rank: int
    post: Post | Copy
    queue: tuple[Any, ...]
    pending: int = 0
    opened: float = 0.0
    done: bool = False


class _Replay:
    def __init__(
        self, programs: Mapping[int, Program], cluster: Cluster, nodes: int, seconds: Seconds
    ) -> None:
        self._programs, self._seconds = programs, seconds
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._network = Network(cluster, nodes, self._at)
        self._times = {rank: RankTimes() for rank in programs}
        self._next = dict.fromkeys(programs, 0)
        self._operations: dict[tuple[int, int], _Operation] = {}
        self._waiting: dict[tuple[int, int], float] = {}  # operation of a rank: since when
        self._queues: dict[tuple[Any, ...], deque[_Operation]] = {}
        self._channels: dict[tuple[int, int], tuple[deque[Any], deque[Any]]] = {}
        self._gathering: dict[tuple[Any, ...], list[_Operation]] = {}
        self._entered: dict[tuple[Any, ...], int] = {}
        self._held: dict[tuple[int, int], list[_Operation]] = {}  # copies after an operation
        self._overlaps = cluster.host is None or cluster.host.overlaps

    def run(self) -> dict[int, RankTimes]:
        for rank in self._programs:
            self._at(0.0, functools.partial(self._advance, rank))
        while self._heap:
            now, _, action = heapq.heappop(self._heap)
            action(now)
        if self._waiting:
            rank, number = min(self._waiting)
            raise ValueError(
                f"rank {rank} waits for ever for its operation {number}: "
                "its peers never reach the same one"
            )
        return self._times

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._order), action))

    def _advance(self, rank: int, now: float, is_last: bool = True) -> None:
        """Run a rank until it waits, ends, or computes while something else happens.

        Args:
            is_last: whether nothing else is still to happen now that is not in the heap.
        """
        times, program = self._times[rank], self._programs[rank]
        while self._next[rank] < len(program):
            event = program[self._next[rank]]
            self._next[rank] += 1
            if isinstance(event, Post | Copy):
                self._post(rank, event, now)
                if isinstance(event, Copy) and not self._overlaps:
                    self._waiting[rank, event.number] = now
                    return
            elif isinstance(event, Wait):
                if not self._operations[rank, event.number].done:
                    self._waiting[rank, event.number] = now
                    return
            elif length := self._seconds(event):
                end = now + length
                if isinstance(event, SideWork):
                    times.side += length
                else:
                    times.attention += length
                    times.spans.append(Span("kernel", event, now, end))
                if not is_last or (self._heap and self._heap[0][0] <= end):
                    self._at(end, functools.partial(self._advance, rank))
                    return
                now = end
        times.end = now

    def _post(self, rank: int, post: Post | Copy, now: float) -> None:
        queue_of = ("host", post.to_device) if isinstance(post, Copy) else (post.members, post.lane)
        operation = _Operation(rank, post, (rank, *queue_of))
        self._operations[rank, post.number] = operation
        queue = self._queues.setdefault(operation.queue, deque())
        queue.append(operation)
        if len(queue) == 1:
            self._open(operation, now)

    def _open(self, operation: _Operation, now: float) -> None:
        """The operation is the next one of its communicator, or of its direction of copies."""
        post, rank = operation.post, operation.rank
        operation.opened = now
        if isinstance(post, Copy):
            self._open_copy(operation, post, now)
            return
        if post.operation != "exchange":
            self._enter_collective(operation, now)
            return
        operation.pending = len(post.sends) + len(post.receives)
        for side, rows in enumerate((post.sends, post.receives)):
            for peer, nbytes in rows:
                name = self._network.link_class(rank, peer)
                if peer not in self._programs:
                    sender, receiver = (rank, None) if side == 0 else (None, rank)
                    finish = self._finisher(operation)
                    self._network.send(name, sender, receiver, nbytes, now, finish)
                    continue
                pair = (rank, peer) if side == 0 else (peer, rank)
                channel = self._channels.setdefault(pair, (deque(), deque()))
                if not channel[1 - side]:
                    channel[side].append(operation)
                    continue
                other = channel[1 - side].popleft()
                both = [self._finisher(operation), self._finisher(other)]
                finish = functools.partial(_call, both)
                self._network.send(name, pair[0], pair[1], nbytes, now, finish)
        if not operation.pending:
            self._complete(operation, now)

    def _open_copy(self, operation: _Operation, copy: Copy, now: float) -> None:
        rank = operation.rank
        for number in copy.after:
            if not self._operations[rank, number].done:
                self._held.setdefault((rank, number), []).append(operation)
                return
        operation.pending = 1
        self._network.copy(rank, copy, now, self._finisher(operation))

    def _enter_collective(self, operation: _Operation, now: float) -> None:
        post = operation.post
        assert isinstance(post, Post)
        key = (operation.rank, post.members, post.lane)
        turn = self._entered[key] = self._entered.get(key, 0) + 1
        group = self._gathering.setdefault((post.members, post.lane, turn), [])
        group.append(operation)
        if len(group) < sum(member in self._programs for member in post.members):
            return
        del self._gathering[post.members, post.lane, turn]
        finishers = [self._finisher(one) for one in group]
        for one in group:
            assert isinstance(one.post, Post)
            one.pending = self._network.collective_flows(one.rank, one.post)
        for one, finish in zip(group, finishers, strict=True):
            assert isinstance(one.post, Post)
            self._network.collective(one.rank, one.post, now, finish)

    def _finisher(self, operation: _Operation) -> Callable[[float], None]:
        def finish(now: float) -> None:
            operation.pending -= 1
            if not operation.pending:
                self._complete(operation, now)

        return finish

    def _complete(self, operation: _Operation, now: float) -> None:
        operation.done = True
        times = self._times[operation.rank]
        times.spans.append(Span("transfer", operation.post, operation.opened, now))
        queue = self._queues[operation.queue]
        queue.popleft()
        if queue:
            self._open(queue[0], now)
        key = operation.rank, operation.post.number
        for copy in self._held.pop(key, ()):
            self._open(copy, now)
        since = self._waiting.pop(key, None)
        if since is not None:
            times.exposed += now - since
            if now > since:
                times.spans.append(Span("wait", operation.post, since, now))
            self._advance(operation.rank, now, is_last=False)


def _call(actions: list[Callable[[float], None]], now: float) -> None:
    for action in actions:
        action(now)
