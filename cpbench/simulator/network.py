"""Links of a cluster, and messages that share them.

Each rank has a link in each direction for every class (inside the node, across nodes, to the
host); links across nodes, and to the host, may be fewer than ranks.  A message gets, on every link
that it uses, an equal share with the others on it, and runs at the smallest of its shares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from cpbench.simulator.cluster import Cluster
from cpbench.simulator.events import Copy, Post

At = Callable[[float, Callable[[float], None]], None]
Done = Callable[[float], None]


def collective_rate(cluster: Cluster, rank: int, post: Post, nodes: int) -> float:
    """The received bytes per second of a rank in an all-gather, reduce-scatter or all-reduce.

    Rates across nodes are those of all ranks of a node: of fewer, which have as many of its
    links, they are that share.

    Args:
        nodes: ranks per node.
    """
    inside, across = getattr(cluster.collectives, post.operation)
    beside = sum(member // nodes == rank // nodes for member in post.members)
    if beside == len(post.members):
        return float(inside) * 1e9
    return float(across) * 1e9 * beside / nodes


class _Flow:
    """A message in transfer: bytes that remain, its rate, and when both were set."""

    def __init__(self, nbytes: int, links: tuple[Any, ...], done: Done) -> None:
        self.remaining, self.links, self.done = float(nbytes), links, done
        self.rate, self.since, self.version = 0.0, 0.0, 0


class Network:
    """The links of all ranks.

    Args:
        nodes: ranks per node.
        at: schedules an action at a time.
    """

    def __init__(self, cluster: Cluster, nodes: int, at: At) -> None:
        self._cluster, self._nodes, self._at = cluster, nodes, at
        self._on: dict[Any, dict[_Flow, None]] = {}  # flows on a link, in the order of their start
        self._changed: dict[Any, None] = {}  # links on which flows began or ended at this time

    def link_class(self, rank: int, peer: int) -> str:
        """The class of the link between two ranks.

        Raises:
            ValueError: if it is not in the cluster.
        """
        name = "node" if rank // self._nodes == peer // self._nodes else "across"
        if name not in self._cluster.links:
            raise ValueError(f"cluster {self._cluster.name} has no [links.{name}]")
        return name

    def send(
        self, name: str, sender: int | None, receiver: int | None, nbytes: int, now: float,
        done: Done,
    ) -> None:  # fmt: skip
        """Start a message over links of a class; an end that is None uses none."""
        ends = (("out", sender), ("in", receiver))
        links = tuple(self._link(name, way, rank) for way, rank in ends if rank is not None)
        self._start(name, nbytes, links, now, done)

    def _link(self, name: str, direction: str, rank: int) -> tuple[Any, ...]:
        """A link by its name: of one rank, or of the share of a node's links that it uses."""
        per_node = self._cluster.links[name].per_node
        if per_node:
            node, place = divmod(rank, self._nodes)
            return name, direction, node, place * per_node // self._nodes
        return name, direction, rank

    def copy(self, rank: int, copy: Copy, now: float, done: Done) -> None:
        """Start a copy between a device and its host."""
        way = "to device" if copy.to_device else "to host"
        link = self._link("host", way, rank)
        self._start("host", copy.nbytes, (link,), now, done, copy.pieces)

    def collective_flows(self, rank: int, post: Post) -> int:
        """How many messages :meth:`collective` starts on a rank."""
        if post.operation != "all_to_all":
            return 1
        return 2 * len(self._by_class(rank, post))

    def collective(self, rank: int, post: Post, now: float, done: Done) -> None:
        """Start the part of one rank: of an all-to-all its bytes in each class of links; others run
        at a rate of their own, in received bytes."""
        by_class = self._by_class(rank, post)
        if post.operation == "all_to_all":
            for name, nbytes in by_class.items():
                for direction in ("out", "in"):
                    self._start(name, nbytes, (self._link(name, direction, rank),), now, done)
            return
        assert self._cluster.collectives is not None  # a cluster with links has them
        rate = collective_rate(self._cluster, rank, post, self._nodes)
        latency = self._cluster.collectives.alpha_us * 1e-6
        self._at(now + latency + sum(by_class.values()) / rate, done)

    def _by_class(self, rank: int, post: Post) -> dict[str, int]:
        """Bytes that a collective receives on a rank, by the class of link."""
        totals: dict[str, int] = {}
        for peer, nbytes in post.receives:
            name = self.link_class(rank, peer)
            totals[name] = totals.get(name, 0) + nbytes
        return totals

    def _start(
        self, name: str, nbytes: int, links: tuple[Any, ...], now: float, done: Done,
        messages: int = 1,
    ) -> None:  # fmt: skip
        flow = _Flow(nbytes, links, done)
        latency = messages * self._cluster.links[name].alpha_us * 1e-6
        self._at(now + latency, functools.partial(self._begin, flow))

    def _begin(self, flow: _Flow, now: float) -> None:
        flow.since = now
        for link in flow.links:
            self._on.setdefault(link, {})[flow] = None
        self._change(flow.links, now)

    def _change(self, links: tuple[Any, ...], now: float) -> None:
        """Note that flows on these links began or ended; once all have that do so at this time,
        the rates of the others are set anew."""
        if not self._changed:
            self._at(now, self._share)
        self._changed.update(dict.fromkeys(links))

    def _share(self, now: float) -> None:
        """Set the rates of all flows on changed links."""
        changed, self._changed = self._changed, {}
        for flow in dict.fromkeys(flow for link in changed for flow in self._on[link]):
            rate = min(
                self._cluster.links[link[0]].gb_per_s * 1e9 / len(self._on[link])
                for link in flow.links
            )
            if rate == flow.rate:
                continue
            flow.remaining -= flow.rate * (now - flow.since)
            flow.since, flow.rate = now, rate
            flow.version += 1
            end = now + max(flow.remaining, 0.0) / rate
            self._at(end, functools.partial(self._end, flow, flow.version))

    def _end(self, flow: _Flow, version: int, now: float) -> None:
        if version != flow.version:
            return
        flow.version += 1
        for link in flow.links:
            del self._on[link][flow]
        if used := tuple(link for link in flow.links if self._on[link]):
            self._change(used, now)
        flow.done(now)
