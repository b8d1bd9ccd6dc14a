"""DistFlashAttention: P2P sends of keys to the ranks that need them; idle ranks help busy ones.

At step t, rank r receives from rank r - t its keys, to attend to them, or, if r has less work, its
queries, to compute their attention to the keys of r and return the result.  This balances a causal
mask with contiguous layout, where the last rank has P times the work of the first, in about half
the steps.  Masks that the layout balances need no helpers.

Source: DistFlashAttn / LightSeq (arXiv 2310.03294); helpers are chosen here by area.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.masks.slices import BoolArray
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.partial_results.accumulators import row_delta, unpacked
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.return_results import ResultExchange

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="distflash",
    summary="P2P sends of keys to the ranks that need them; idle ranks help busy ones",
    source="DistFlashAttn, arXiv 2310.03294",
    load="cpbench.strategies.distflash:DistFlash",
    value_dims=True,
    merges=True,
    params=("grad_dtype",),
    variants=("grad_dtype=bfloat16",),
)


@dataclass(frozen=True)
class Step:
    """One step of a rank, receiving from ``source`` and sending to ``target``.

    Attributes:
        attend_plan: for local queries and the keys of ``source``; None if these are not sent.
        help_plan: for the queries of ``source`` and local keys; None if those are not sent.
        sends_keys: whether local keys are sent to ``target``.
        sends_queries: whether local queries are sent to ``target``, which returns a result.
    """

    source: int
    target: int
    attend_plan: Any
    help_plan: Any
    sends_keys: bool
    sends_queries: bool


@dataclass(frozen=True)
class Plan:
    """The plan for the local keys (None if the mask is empty there), and the steps."""

    local: Any
    steps: tuple[Step, ...]


class DistFlash:
    """The strategy.

    Args:
        grad_dtype: in which gradients are returned to their owners.
    """

    def __init__(self, grad_dtype: str = "float32") -> None:
        self.grad_dtype = gradient_dtype.validate("distflash", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal("distflash", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        size, (by_owner, by_helper, last) = world.size, _schedule(world)
        steps = []
        for t in range(1, last + 1):
            source, target = (rank - t) % size, (rank + t) % size
            attends, helps = by_owner[rank, source], by_helper[source, rank]
            steps.append(
                Step(
                    source=source,
                    target=target,
                    attend_plan=op.prepare(world.subproblem([rank], [source])) if attends else None,
                    help_plan=op.prepare(world.subproblem([source], [rank])) if helps else None,
                    sends_keys=bool(by_owner[target, rank]),
                    sends_queries=bool(by_helper[rank, target]),
                )
            )
        local = op.prepare(world.subproblem([rank], [rank])) if world.areas[rank, rank] else None
        return Plan(local, tuple(steps))

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:

        q, k, v = qkv
        accumulator = op.forward_accumulator(q, v.shape[3])
        results = ResultExchange(comm)
        for step, kv, queries in _overlapped_steps(plan, (q,), (k, v), comm):
            if step is None:
                if plan.local is not None:
                    accumulator.add(k, v, plan.local)
                continue
            if step.attend_plan is not None:
                accumulator.add(kv[0], kv[1], step.attend_plan)
            if step.help_plan is not None:
                out, lse = op.forward(QKV(queries[0], k, v), step.help_plan)
                results.send([out, lse], step.source)
            if step.sends_queries:
                results.receive_partial(step.target, accumulator)
            results.post()
        results.wait()
        out, lse = accumulator.finish()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        send_dtype = gradient_dtype.torch_dtype(self.grad_dtype)
        accumulator = op.backward_accumulator(dout, q, out, lse)
        dk_dv: torch.Tensor | None = None  # of the local keys, float32

        def add(*gradients: torch.Tensor) -> None:
            nonlocal dk_dv
            dk_dv = op.sum_float32(dk_dv, gradients)

        results = ResultExchange(comm)
        local_queries = (q, dout, row_delta(dout, out), lse)
        for step, kv, queries in _overlapped_steps(plan, local_queries, (k, v), comm):
            if step is None:
                if plan.local is not None:
                    add(*accumulator.add(k, v, plan.local))
                continue
            if step.attend_plan is not None:
                grads = op.sum_float32(None, accumulator.add(kv[0], kv[1], step.attend_plan))
                results.send([grads.to(send_dtype)], step.source)
            if step.sends_keys:
                buffer = op.empty((k.numel() + v.numel(),), send_dtype)
                results.receive([buffer], step.target, add)
            if step.help_plan is not None:
                q_s, dout_s, delta_s, lse_s = queries
                helper = op.backward_accumulator_from_delta(dout_s, q_s, delta_s, lse_s)
                add(*helper.add(k, v, step.help_plan))
                results.send([helper.finish(send_dtype)], step.source)
            if step.sends_queries:
                results.receive(
                    [op.empty(q.shape, send_dtype)], step.target, accumulator.add_partial
                )
            results.post()
        results.wait()
        dq = accumulator.finish()
        if dk_dv is None:
            return dq, torch.zeros_like(k), torch.zeros_like(v)
        dk, dv = unpacked(dk_dv.to(k.dtype), [k.shape, v.shape])
        return dq, dk, dv


def _overlapped_steps(
    plan: Plan, queries: tuple[Any, ...], keys: tuple[Any, ...], comm: Comm
) -> Any:
    """Iterate over the steps with their received keys and queries, first a None for local work,
    while those of the next step are in transfer; buffers are reused after two steps."""
    buffers: list[dict[bool, tuple[Any, ...]]] = [{}, {}]

    def buffer(turn: int, like: tuple[Any, ...]) -> tuple[Any, ...]:
        turn_buffers = buffers[turn % 2]
        if (like is keys) not in turn_buffers:
            turn_buffers[like is keys] = tuple(x.new_empty(x.shape) for x in like)
        return turn_buffers[like is keys]

    def post(turn: int) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        step = plan.steps[turn]
        kv = buffer(turn, keys) if step.attend_plan is not None else ()
        peer_queries = buffer(turn, queries) if step.help_plan is not None else ()
        sends = [(x, step.target) for x in keys if step.sends_keys]
        sends += [(x, step.target) for x in queries if step.sends_queries]
        recvs = [(x, step.source) for x in (*kv, *peer_queries)]
        return comm.exchange(sends, recvs, "keys and queries"), kv, peer_queries

    pending = post(0) if plan.steps else (CompletedHandle(), (), ())
    yield None, (), ()
    for turn, step in enumerate(plan.steps):
        handle, kv, peer_queries = pending
        handle.wait()
        if turn + 1 < len(plan.steps):
            pending = post(turn + 1)
        yield step, kv, peer_queries


@lru_cache(maxsize=4)
def _schedule(world: World) -> tuple[BoolArray, BoolArray, int]:
    """The pairs of ranks (queries of the row, keys of the column) that the owner of the queries
    computes, those that the owner of the keys computes, and the last step that sends anything.

    Pairs more than half the ring apart are moved to the owner of the keys while that reduces the
    load imbalance.
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
