"""DistFlashAttention: keys go straight to who needs them, and idle ranks help busy ones.

At step t, rank r gets something from rank r - t: its keys, to attend to them, or, where r has less
to do, its queries, to attend with them to its own keys and send back the result.  So contiguous
causal, where the last rank has P times the work of the first, is balanced in about half the
steps.  Masks that the layout balances need no help.

Source: DistFlashAttn / LightSeq (arXiv 2310.03294); whom to help is decided here by area.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import StrategyInfo
from cpbench.masks.attn_mask import BoolArray
from cpbench.parallel.bound_operator import row_delta
from cpbench.parallel.comm import Done
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.return_results import Returns

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="distflash",
    summary="keys sent straight to who needs them; idle ranks compute for busy ones",
    source="DistFlashAttn, arXiv 2310.03294",
    load="cpbench.strategies.distflash:DistFlash",
    merges=True,
    params=("grad_dtype",),
    variants=("grad_dtype=bfloat16",),
)


@dataclass(frozen=True)
class Step:
    """What one rank does at a step with ``source`` (before it) and ``target`` (after it).

    Attributes:
        attend: plan for our queries and the keys of ``source``; None if they do not come.
        help: plan for the queries of ``source`` and our keys; None if they do not come.
        keys_out: whether our keys go to ``target``.
        queries_out: whether our queries do, and a result comes back.
    """

    source: int
    target: int
    attend: Any
    help: Any
    keys_out: bool
    queries_out: bool


@dataclass(frozen=True)
class Plan:
    """The plan for the own keys (None where the mask is empty), and the steps."""

    own: Any
    steps: tuple[Step, ...]


class DistFlash:
    """The strategy.

    Args:
        grad_dtype: in which gradients of what was lent travel back.
    """

    def __init__(self, grad_dtype: str = "float32") -> None:
        self.grad_dtype = gradient_dtype.checked("distflash", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal("distflash", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        size, (by_owner, by_helper, last) = world.size, _shared(world)
        steps = []
        for t in range(1, last + 1):
            source, target = (rank - t) % size, (rank + t) % size
            attend, lend = by_owner[rank, source], by_helper[source, rank]
            steps.append(
                Step(
                    source=source,
                    target=target,
                    attend=op.prepare(world.part([rank], [source])) if attend else None,
                    help=op.prepare(world.part([source], [rank])) if lend else None,
                    keys_out=bool(by_owner[target, rank]),
                    queries_out=bool(by_helper[rank, target]),
                )
            )
        own = op.prepare(world.part([rank], [rank])) if world.areas[rank, rank] else None
        return Plan(own, tuple(steps))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        import torch

        parts = op.forward_parts(q)
        returns = Returns(comm)
        for step, kv, queries in _visits(plan, (q,), (k, v), comm):
            if step is None:
                if plan.own is not None:
                    parts.add(k, v, plan.own)
                continue
            if step.attend is not None:
                parts.add(kv[0], kv[1], step.attend)
            if step.help is not None:
                out, lse = op.forward(queries[0], k, v, step.help)
                returns.send([out, lse], step.source)
            if step.queries_out:
                shape = (q.shape[0], q.shape[2], q.shape[1])
                buffers = [q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)]
                returns.expect(buffers, step.target, parts.add_result)
            returns.post()
        returns.settle()
        out, lse = parts.finish()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q, k, v, out, lse = saved
        travels = gradient_dtype.dtype(self.grad_dtype)
        parts = op.backward_parts(dout, q, out, lse)
        own: torch.Tensor | None = None  # dK and dV of our keys, float32

        def add(found: Sequence[torch.Tensor] | torch.Tensor) -> None:
            nonlocal own
            own = op.add_up(own, tuple(found))

        returns = Returns(comm)
        lend = (q, dout, row_delta(dout, out), lse)
        for step, kv, queries in _visits(plan, lend, (k, v), comm):
            if step is None:
                if plan.own is not None:
                    add(parts.add(k, v, plan.own))
                continue
            if step.attend is not None:
                grads = op.add_up(None, parts.add(kv[0], kv[1], step.attend))
                returns.send([grads.to(travels)], step.source)
            if step.keys_out:
                returns.expect([k.new_empty((2, *k.shape), dtype=travels)], step.target, add)
            if step.help is not None:
                q_s, dout_s, delta_s, lse_s = queries
                theirs = op.lent_parts(dout_s, q_s, delta_s, lse_s)
                add(theirs.add(k, v, step.help))
                returns.send([theirs.finish(travels)], step.source)
            if step.queries_out:
                returns.expect([q.new_empty(q.shape, dtype=travels)], step.target, parts.add_result)
            returns.post()
        returns.settle()
        dk, dv = own.to(k.dtype) if own is not None else (torch.zeros_like(k), torch.zeros_like(v))
        return parts.finish(), dk, dv


def _visits(plan: Plan, queries: tuple[Any, ...], keys: tuple[Any, ...], comm: Comm) -> Any:
    """First Nones, for the own work; then each step, the keys and the queries that came for it.
    The next step's are on their way meanwhile; what is handed out serves for two steps."""
    buffers: list[dict[bool, tuple[Any, ...]]] = [{}, {}]

    def buffer(turn: int, like: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = buffers[turn % 2]
        if (like is keys) not in kept:
            kept[like is keys] = tuple(x.new_empty(x.shape) for x in like)
        return kept[like is keys]

    def post(turn: int) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        step = plan.steps[turn]
        kv = buffer(turn, keys) if step.attend is not None else ()
        lent = buffer(turn, queries) if step.help is not None else ()
        sends = [(x, step.target) for x in keys if step.keys_out]
        sends += [(x, step.target) for x in queries if step.queries_out]
        recvs = [(x, step.source) for x in (*kv, *lent)]
        return comm.exchange(sends, recvs, "keys and queries"), kv, lent

    coming = post(0) if plan.steps else (Done(), (), ())
    yield None, (), ()
    for turn, step in enumerate(plan.steps):
        handle, kv, lent = coming
        handle.wait()
        if turn + 1 < len(plan.steps):
            coming = post(turn + 1)
        yield step, kv, lent


@lru_cache(maxsize=4)
def _shared(world: World) -> tuple[BoolArray, BoolArray, int]:
    """Which pairs (queries of the row, keys of the column) of different ranks are computed where
    the queries are, which where the keys are, and the last step at which anything is sent.

    Pairs more than half way round go to the keys' rank as long as that evens out the areas.
    """
    areas, size = world.areas, world.size
    load = areas.sum(1)
    by_helper = np.zeros((size, size), dtype=np.bool_)
    queries = np.arange(size)
    for t in range(size - 1, (size - 1) // 2, -1):
        keys = (queries - t) % size
        area = areas[queries, keys]
        move = (area > 0) & (load[queries] - load[keys] > area)
        by_helper[queries[move], keys[move]] = True
        load -= np.where(move, area, 0)
        load[keys] += np.where(move, area, 0)
    by_owner = (areas > 0) & ~by_helper
    by_owner[queries, queries] = False
    step = (queries[:, None] - queries[None, :]) % size
    last = max(np.max(step, where=by_owner, initial=0), np.max(step.T, where=by_helper, initial=0))
    return by_owner, by_helper, int(last)
