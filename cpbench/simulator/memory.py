"""Whether a case fits into the memory of a GPU.

A rank needs its inputs, the peak of its strategy (``cpbench.parallel.tracing``) and, at most
at the same time, the workspace that its operator declares; beside tensors, the CUDA context,
buffers that NCCL keeps for each peer, and what the allocator does not give back.  The last two are
upper bounds, so the need is a range.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from cpbench.core.problem import Problem
from cpbench.simulator.events import Kernel, Post, Program, SideWork

if TYPE_CHECKING:
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.tracing.traced_operator import Traceable
    from cpbench.parallel.world import World
    from cpbench.simulator.cluster import Cluster

FULL = 0.85  # of the memory of a GPU, below which a case fits
FITS, UNSURE, TOO_LARGE = "fits", "unsure", "does not fit"


@dataclass(frozen=True)
class Need:
    """Bytes that one rank needs.

    Attributes:
        rank: the rank.
        inputs: q, k, v, and dout if there is a backward pass; none if they are in host memory.
        buffers: peak of all that its strategy allocates beside them.
        workspace: of its largest kernel call.
        peers: distinct (peer in its node, communicator).
        host: in host memory, with ``offload=host``; the verdict is not of these.
    """

    rank: int
    inputs: int
    buffers: int
    workspace: int
    peers: int
    host: int = 0

    def total(self, cluster: Cluster) -> tuple[int, int]:
        """The least and the most memory that is in use at the peak."""
        memory = cluster.memory
        tensors = self.inputs + self.buffers + self.workspace
        low = tensors + memory.context_gb * 1e9
        return round(low), round(low + memory.slack * tensors + memory.peer_gb * 1e9 * self.peers)


def verdict(low: int, high: int, gpu: int) -> str:
    """``"fits"`` if the most that may be in use is below 85 % of the memory of a GPU, ``"does not
    fit"`` if the least is beyond it, else ``"unsure"``."""
    if high < FULL * gpu:
        return FITS
    return TOO_LARGE if low > gpu else UNSURE


def summary(needs: Mapping[int, Need], cluster: Cluster) -> dict[str, int | str]:
    """The need of the rank that needs most, and the verdict, as plain values."""
    need = max(needs.values(), key=lambda one: (one.total(cluster)[1], -one.rank))
    low, high = need.total(cluster)
    gpu = round(cluster.gpu.memory_gib * (1 << 30))
    return {
        **{f"{name}_bytes": value for name, value in asdict(need).items() if name not in _COUNTS},
        "rank": need.rank,
        "low_bytes": low,
        "high_bytes": high,
        "gpu_bytes": gpu,
        "verdict": verdict(low, high, gpu),
    }


_COUNTS = ("rank", "peers")


def likely_largest(programs: Mapping[int, Mapping[str, Program]], per_node: int) -> list[int]:
    """The ranks that may need most memory, without tracing it, which is slow: those that receive
    most bytes, receive and send most, compute most blocks of attention, have most side work, or
    have most peers in their node.

    Args:
        programs: recordings of ranks by phase.
        per_node: ranks per node.
    """
    figures = {rank: _figures(program, rank, per_node) for rank, program in programs.items()}
    count = len(next(iter(figures.values())))
    largest = {max(figures, key=lambda rank: (figures[rank][i], -rank)) for i in range(count)}
    return sorted(largest)


def _figures(programs: Mapping[str, Program], rank: int, per_node: int) -> list[int]:
    """What the memory of a rank grows with."""
    events = [event for program in programs.values() for event in program]
    posts = _posts(programs)
    return [
        sum(n for post in posts for _, n in post.receives),
        sum(n for post in posts for _, n in (*post.receives, *post.sends)),
        sum(x.tiles.blocks * x.heads_q for x in events if isinstance(x, Kernel)),
        sum(x.stream + x.gather + x.scatter for x in events if isinstance(x, SideWork)),
        _peers(programs, rank, per_node),
    ]


def _posts(programs: Mapping[str, Program]) -> list[Post]:
    return [event for program in programs.values() for event in program if isinstance(event, Post)]


def _peers(programs: Mapping[str, Program], rank: int, per_node: int) -> int:
    """Distinct (peer in its node, communicator) of a rank."""
    return len({
        (peer, post.members, post.lane)
        for post in _posts(programs)
        for peer, _ in (*post.sends, *post.receives)
        if peer // per_node == rank // per_node
    })  # fmt: skip


def need(
    strategy: Strategy, operator: Traceable, world: World, rank: int,
    programs: Mapping[str, Program], offloaded: bool = False,
) -> Need:  # fmt: skip
    """What one rank needs.

    Args:
        programs: its recordings by phase.
        offloaded: whether its inputs are in host memory.
    """
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.tracing.memory_trace import peak_bytes
    from cpbench.parallel.tracing.trace import empty_inputs

    problem = world.problem
    if problem.backward:  # what the forward pass saves is there, whether it is timed or not
        world = _with_both_phases(world)
    info = operator.info if isinstance(operator, BoundOperator) else operator
    tensors, dout = empty_inputs(world, info.kind)
    inputs = sum(x.nbytes for x in tensors if x is not None) + dout.nbytes * problem.backward
    peak = peak_bytes(strategy, operator, world, rank)
    events = [event for program in programs.values() for event in program]
    return Need(
        rank=rank,
        inputs=0 if offloaded else inputs,
        buffers=peak.device,
        workspace=max((_workspace(x, info, problem) for x in events if isinstance(x, Kernel)),
                      default=0),
        peers=_peers(programs, rank, world.ranks_per_node),
        host=inputs + peak.host if offloaded else 0,
    )  # fmt: skip


@functools.lru_cache(maxsize=8)  # shared by all ranks
def _with_both_phases(world: World) -> World:
    if world.problem.direction == "fwd_bwd":
        return world
    return world.changed(problem=replace(world.problem, direction="fwd_bwd"))


def _workspace(kernel: Kernel, operator: OperatorInfo, problem: Problem) -> int:
    """Bytes that one call needs, by declaration."""
    if operator.workspace is None:
        return 0
    call = replace(
        problem, batch=1, seq_q=kernel.seq_q, seq_k=kernel.seq_k, heads_q=kernel.heads_q,
        heads_kv=kernel.heads_kv, direction=kernel.phase,
    )  # fmt: skip
    return operator.workspace(call)
