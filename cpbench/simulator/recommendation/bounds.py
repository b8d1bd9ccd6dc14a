"""A lower bound of the time of a case, from a trace of one rank: no rank is faster than the peak
rate of its kernel on the pairs that it computes, nor than its links on the bytes that they carry.

A trace takes a fraction of the time of a recording, so cases whose bound is beyond the best time
need not be recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.simulator.events import Copy, Event, Post
from cpbench.simulator.network import collective_rate

if TYPE_CHECKING:
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.traced_operator import Traceable
    from cpbench.parallel.world import World
    from cpbench.simulator.cluster import Cluster, Costs


@dataclass(frozen=True)
class Bound:
    """Seconds that one rank takes at least, over all phases of a problem.

    Attributes:
        attention: in kernels, at their peak rate.
        links: in messages, at the full rate of its busiest link or communicator.
        total: the larger of the two in each phase, summed.
        across: bytes that it sends to other nodes; inside: to its own.
        pairs: visible pairs of its heads, in one pass.
    """

    attention: float
    links: float
    total: float
    across: int
    inside: int
    pairs: int


def bound(
    strategy: Strategy, operator: Traceable, world: World, rank: int, cluster: Cluster,
    kernel: Costs,
) -> Bound:  # fmt: skip
    """The bound of one rank.

    Raises:
        ValueError: if its strategy does not take the case.
    """
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.tracing.meta_ops import MetaOps
    from cpbench.parallel.tracing.trace import of_shapes
    from cpbench.simulator.events import Recorder
    from cpbench.simulator.recording import RecordingComm

    recorder = Recorder()
    op, (qkv, dout) = of_shapes(operator, world, rank)
    comm = RecordingComm(rank, world.size, recorder)
    plan = strategy.prepare(op, world, rank)
    problem, phases = world.problem, world.problem.direction.split("_")
    with MetaOps():
        *_, saved = strategy.forward(qkv, plan, op, comm, need_lse=False)
        pairs, events = {"fwd": op.pairs}, {"fwd": recorder.take()}
        if problem.backward:
            op.pairs = 0
            strategy.backward(dout, saved, plan, op, comm)
            pairs["bwd"], events["bwd"] = op.pairs, recorder.take()
    attention, links = {}, {}
    for phase in phases:
        costs = kernel.fwd if phase == "fwd" else kernel.bwd
        if costs is None:
            raise ValueError(f"{', '.join(kernel.operators)}: no backward pass was calibrated")
        rate = costs.tflops * 1e12 * getattr(costs, "full_rate", 1.0)
        if isinstance(operator, BoundOperator):  # a mixer, whose tokens are the same on all ranks
            flops = operator.impl.flops(problem)[phase] / world.size  # type: ignore[attr-defined]
            pairs[phase] = round(world.mask.area * problem.heads_q / world.size)
        else:
            flops = problem.flops(1)[phase] / problem.heads_q * pairs[phase]
        attention[phase] = flops / max(rate, costs.tflops * 1e12)
        links[phase] = link_seconds(events[phase], rank, world.ranks_per_node, cluster)
    inside, across = sent_bytes((x for p in phases for x in events[p]), rank, world.ranks_per_node)
    return Bound(
        attention=sum(attention.values()),
        links=sum(links.values()),
        total=sum(max(attention[phase], links[phase]) for phase in phases),
        across=across,
        inside=inside,
        pairs=pairs[phases[0]],
    )


def link_seconds(events: Iterable[Event], rank: int, nodes: int, cluster: Cluster) -> float:
    """Seconds of the busiest link, or of the busiest communicator whose collectives run at a rate
    of their own."""
    busy: dict[tuple[object, ...], float] = {}
    for post in events:
        if isinstance(post, Copy):
            host = "host", post.to_device
            seconds = post.nbytes / (cluster.links["host"].gb_per_s * 1e9)
            busy[host] = busy.get(host, 0.0) + seconds
        if not isinstance(post, Post):
            continue
        if post.operation in ("exchange", "all_to_all"):
            for way, rows in (("out", post.sends), ("in", post.receives)):
                for peer, nbytes in rows:
                    name = "node" if peer // nodes == rank // nodes else "across"
                    rate = cluster.links[name].gb_per_s * 1e9
                    busy[name, way] = busy.get((name, way), 0.0) + nbytes / rate
            continue
        rate = collective_rate(cluster, rank, post, nodes)
        key = post.members, post.lane
        busy[key] = busy.get(key, 0.0) + sum(nbytes for _, nbytes in post.receives) / rate
    return max(busy.values(), default=0.0)


def sent_bytes(events: Iterable[Event], rank: int, nodes: int) -> tuple[int, int]:
    """Bytes that a rank sends inside its node and across nodes."""
    totals = [0, 0]
    for post in events:
        if isinstance(post, Post):
            for peer, nbytes in post.sends:
                totals[peer // nodes != rank // nodes] += nbytes
    return totals[0], totals[1]
