"""All-gather the keys and attend once; in the backward pass, all-gather again and reduce-scatter dK
and dV.

Nothing is merged, so any operator and any mask is supported.  Memory is P times the local keys,
divided by ``stages``: each stage gathers a subset of the key/value heads while the previous one is
computed.  Gradients are summed in float32.

Source: Llama 3's context parallelism (arXiv 2407.21783); stages of heads as in ring-flash-attn's
llama3 variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, BackwardInputs, Unsupported
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common.collectives import (
    all_gather_tokens,
    reduce_scatter_tokens,
    to_token_major,
)

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ring_allgather",
    summary="all-gather of keys, one attention, reduce-scatter of gradients; stages bound memory",
    source="Llama 3, arXiv 2407.21783",
    load="cpbench.strategies.ring_allgather:RingAllGather",
    value_dims=True,
    params=("stages",),
    variants=("stages=2",),
)


class RingAllGather:
    """The strategy.

    Args:
        stages: number of stages in which key/value heads are gathered.
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
        if self.stages > 1 and problem.backward and not op.info.external_lse:
            raise Unsupported(
                f"ring_allgather: with stages = {self.stages} results are cut into heads, and "
                f"{op.info.name} needs them as it returned them: use stages = 1"
            )
        staged = world.with_heads(problem.heads_q // self.stages, problem.heads_kv // self.stages)
        return op.prepare(staged.subproblem([rank], range(world.size)))

    def forward(
        self, qkv: QKV, plan: Any, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        outs, lses = [], []
        stages = self._gather_stages(k, v, comm)
        for q_i, (k_all, v_all) in zip(self._head_chunks(q), stages, strict=True):
            out, lse = op.forward(QKV(q_i, k_all, v_all), plan)
            outs.append(out)
            lses.append(lse)
        out, lse = _concat(outs, 2), None if lses[0] is None else _concat(lses, 1)
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> Gradients:
        q, k, v, out, lse, _ = saved
        lses: list[Any] = self._head_chunks(lse, 1) if lse is not None else [None] * self.stages
        douts, qs, outs = (self._head_chunks(x) for x in (dout, q, out))
        stage_inputs = zip(douts, qs, self._gather_stages(k, v, comm), outs, lses, strict=True)
        dqs, pending = [], []
        for dout_i, q_i, (k_all, v_all), out_i, lse_i in stage_inputs:
            dq, *dkv = op.backward(BackwardInputs(dout_i, q_i, k_all, v_all, out_i, lse_i), plan)
            dqs.append(dq)
            pending.append(
                reduce_scatter_tokens([to_token_major(grad.float()) for grad in dkv], comm)
            )
        stages = [pending_grads.wait() for pending_grads in pending]
        dk, dv = (
            _concat([local.transpose(0, 1) for local in of_stages], 2)
            for of_stages in zip(*stages, strict=True)
        )
        return _concat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype)

    def _head_chunks(self, x: torch.Tensor, axis: int = 2) -> list[torch.Tensor]:
        """Equal shares of the heads; of one stage ``x`` itself, which an operator may know."""
        return [x] if self.stages == 1 else list(x.chunk(self.stages, dim=axis))

    def _gather_stages(self, k: torch.Tensor, v: torch.Tensor, comm: Comm) -> Any:
        """Iterate over stages with their keys and values, ``[B, P * L, G / stages, D]`` in
        rank-major order, while the next stage is in transfer."""
        chunks = list(zip(self._head_chunks(k), self._head_chunks(v), strict=True))
        pending = all_gather_tokens([to_token_major(x) for x in chunks[0]], comm)
        for i in range(self.stages):
            gathered = [x.transpose(0, 1) for x in pending.wait()]
            if i + 1 < self.stages:
                pending = all_gather_tokens([to_token_major(x) for x in chunks[i + 1]], comm)
            yield gathered


def _concat(chunks: list[Any], axis: int) -> Any:
    import torch

    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=axis)
