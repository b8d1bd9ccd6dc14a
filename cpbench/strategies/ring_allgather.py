"""Gather all keys, attend once; in the backward pass gather again and reduce-scatter dK and dV.

There is no merging, so any operator and any mask will do.  Memory is P times the local keys; with
``stages`` above 1 it is so many times less, as key/value heads are gathered in turns, each while
the one before is computed.  Gradients are summed in float32.

Source: Llama 3's context parallelism (arXiv 2407.21783); turns of heads as in ring-flash-attn's
llama3 variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.strategies.common.collectives import gather, reduce, tokens_first

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring_allgather",
    summary="all-gather the keys, attend once, reduce-scatter their gradients; stages bound memory",
    source="Llama 3, arXiv 2407.21783",
    load="cpbench.strategies.ring_allgather:RingAllGather",
    params=("stages",),
    variants=("stages=2",),
)


class RingAllGather:
    """The strategy.

    Args:
        stages: turns in which key/value heads are gathered.
    """

    def __init__(self, stages: int = 1) -> None:
        if stages < 1:
            raise ValueError(f"ring_allgather: stages = {stages} must be 1 or more")
        self.stages = stages

    def unsupported(self, world: World) -> str | None:
        if world.problem.heads_kv % self.stages:
            return (
                f"ring_allgather: stages = {self.stages} must divide num_heads_kv, "
                f"{world.problem.heads_kv}"
            )
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Any:
        problem = world.problem
        staged = world.with_heads(problem.heads_q // self.stages, problem.heads_kv // self.stages)
        return op.prepare(staged.part([rank], range(world.size)))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        outs, lses = [], []
        for q_i, (k_all, v_all) in zip(self._turns(q), self._gathered(k, v, comm), strict=True):
            out, lse = op.forward(q_i, k_all, v_all, plan)
            outs.append(out)
            lses.append(lse)
        out, lse = _joined(outs, 2), None if lses[0] is None else _joined(lses, 1)
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, lse = saved
        lses = self._turns(lse, 1) if lse is not None else [None] * self.stages
        turns = zip(
            self._turns(dout), self._turns(q), self._gathered(k, v, comm), self._turns(out), lses,
            strict=True,
        )  # fmt: skip
        dqs, scattered = [], []
        for dout_i, q_i, (k_all, v_all), out_i, lse_i in turns:
            dq, *dkv = op.backward(dout_i, q_i, k_all, v_all, out_i, lse_i, plan)
            dqs.append(dq)
            scattered.append(reduce([tokens_first(grad.float()) for grad in dkv], comm))
        stages = [pending.wait() for pending in scattered]
        dk, dv = (
            _joined([local.transpose(0, 1) for local in of_stages], 2)
            for of_stages in zip(*stages, strict=True)
        )
        return _joined(dqs, 2), dk.to(k.dtype), dv.to(v.dtype)

    def _turns(self, x: torch.Tensor, axis: int = 2) -> list[torch.Tensor]:
        return list(x.chunk(self.stages, dim=axis))

    def _gathered(self, k: torch.Tensor, v: torch.Tensor, comm: Comm) -> Any:
        """Keys and values of each stage, ``[B, P * L, G / stages, D]`` in rank-major order; the
        next stage is on its way meanwhile."""
        turns = list(zip(self._turns(k), self._turns(v), strict=True))
        coming = gather([tokens_first(x) for x in turns[0]], comm)
        for i in range(self.stages):
            here = [x.transpose(0, 1) for x in coming.wait()]
            if i + 1 < self.stages:
                coming = gather([tokens_first(x) for x in turns[i + 1]], comm)
            yield here


def _joined(parts: list[Any], axis: int) -> Any:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
