"""All-gather the keys and attend once; in the backward pass, all-gather again and reduce-scatter dK
and dV.

Nothing is merged, so any operator and any mask is supported.  Memory is P times the local keys,
divided by ``stages``: each stage gathers some of the key/value heads while the previous one is
computed.  Where heads do not divide into so many stages, a stage also gathers only some of the
tokens of every rank, and partial results are merged.  With ``keep`` the gathered keys are kept for
the backward pass.  Gradients are summed in float32.

Source: Llama 3's context parallelism (arXiv 2407.21783); stages of heads as in ring-flash-attn's
llama3 variant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cpbench.core.operator import QKV, Unsupported
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved, merge_refusal
from cpbench.strategies.common.collectives import (
    PendingTensors,
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
    selectors="any",
    value_dims=True,
    params=("stages", "keep", "offload", "chunk"),
    variants=("stages=2", "keep=true", "offload=host,chunk=16", "stages=8"),
    offloaded="cpbench.strategies.offload.ring_allgather:OffloadedRingAllGather",
)


class TokenStage(NamedTuple):
    """Local tokens of every rank that are gathered together, and the operator's plan for them; None
    if no local query sees any."""

    first: int
    last: int
    plan: Any


@dataclass(frozen=True)
class Plan:
    """Stages: each chunk of the heads gathers its keys in the same stages of tokens."""

    head_chunks: int
    token_stages: tuple[TokenStage, ...]


class RingAllGather:
    """The strategy.

    Args:
        stages: number of stages in which keys are gathered.
        keep: whether to keep the gathered keys for the backward pass, which gathers them again
            otherwise.
    """

    name = "ring_allgather"

    def __init__(self, stages: int = 1, keep: bool = False) -> None:
        if stages < 1:
            raise ValueError(f"{self.name}: stages = {stages} must be 1 or more")
        self.stages, self.keep = stages, keep

    def unsupported(self, world: World) -> str | None:
        if self._head_chunks(world) < self.stages and world.size > 1 and world.keys.step > 1:
            return (
                f"{self.name}: stages = {self.stages} must divide num_heads_kv, "
                f"{world.problem.heads_kv} on a rank, with the layout {world.keys.name}; others "
                "also divide the tokens"
            )
        return None

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        problem, chunks = world.problem, self._head_chunks(world)
        if chunks > 1 and problem.backward and not op.info.external_lse:
            raise Unsupported(
                f"{self.name}: with stages = {self.stages} results are cut into heads, and "
                f"{op.info.name} needs them as it returned them: use stages = 1"
            )
        if chunks > 1:
            world = world.with_heads(problem.heads_q // chunks, problem.heads_kv // chunks)
        tokens, count = world.keys.local_len, self.stages // chunks
        bounds = sorted({i * tokens // count for i in range(count + 1)})
        if world.size == 1 or len(bounds) == 2:
            every = world.subproblem([rank], range(world.size))
            return Plan(chunks, (TokenStage(0, tokens, op.prepare(every)),))
        reason = merge_refusal(op.info, self.name, problem, op.device.partition(":")[0])
        if reason is not None:
            raise Unsupported(f"{reason}; or use stages = {chunks}, which merges nothing")
        windows = [world.keys.windows(first, last) for first, last in itertools.pairwise(bounds)]
        stages = [
            TokenStage(first, last, op.prepare(part) if part.area else None)
            for (first, last), part in zip(
                itertools.pairwise(bounds), world.key_subsets(rank, windows), strict=True
            )
        ]
        return Plan(chunks, tuple(stages))

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        outs, lses, kept = [], list[Any](), list[Any]()
        gathered = _gather(k, v, plan, comm)
        for q_i in _split(q, plan.head_chunks):
            accumulator = op.forward_accumulator(q_i, v.shape[3])
            for stage in plan.token_stages:
                k_all, v_all = next(gathered)
                if stage.plan is not None:
                    accumulator.add(k_all, v_all, stage.plan)
                if self.keep:
                    kept += k_all, v_all
            out, lse = accumulator.finish()
            outs.append(out)
            lses.append(lse)
        out, lse = _join(outs, 2), None if lses[0] is None else _join(lses, 1)
        return out, lse, Saved(q, k, v, out, lse, tuple(kept) or None)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, kept = saved
        chunks = plan.head_chunks
        lses: list[Any] = _split(lse, chunks, 1) if lse is not None else [None] * chunks
        gathered = _gather(k, v, plan, comm)
        if kept:
            gathered = zip(kept[::2], kept[1::2], strict=True)
        dqs, pending = [], list[list[PendingTensors[torch.Tensor]]]()
        for dout_i, q_i, out_i, lse_i in zip(
            *(_split(x, chunks) for x in (dout, q, out)), lses, strict=True
        ):
            accumulator = op.backward_accumulator(dout_i, q_i, out_i, lse_i)
            pending.append([])
            for stage in plan.token_stages:
                k_all, v_all = next(gathered)
                if stage.plan is not None:
                    dk_dv = accumulator.add(k_all, v_all, stage.plan)
                else:
                    dk_dv = torch.zeros_like(k_all), torch.zeros_like(v_all)
                sums = [to_token_major(x.float()) for x in dk_dv]
                pending[-1].append(reduce_scatter_tokens(sums, comm))
            dqs.append(accumulator.finish())
        local = [[stage.wait() for stage in of_heads] for of_heads in pending]
        dk, dv = (
            _join([_join([stage[i] for stage in of_heads], 0) for of_heads in local], 2)
            for i in (0, 1)
        )
        dk, dv = (x.transpose(0, 1).to(k.dtype) for x in (dk, dv))
        return _join(dqs, 2), dk, dv

    def _head_chunks(self, world: World) -> int:
        """The chunks of heads into which stages divide: as many as possible."""
        return 1 if world.kv_heads else math.gcd(self.stages, world.problem.heads_kv)


def _gather(
    k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Iterate over stages with their keys and values, ``[B, tokens, heads, D]`` rank by rank, while
    the next stage is in transfer."""
    heads = list(zip(_split(k, plan.head_chunks), _split(v, plan.head_chunks), strict=True))
    parts = [(kv, stage) for kv in heads for stage in plan.token_stages]

    def post(i: int) -> PendingTensors[torch.Tensor]:
        kv, stage = parts[i]
        return all_gather_tokens([to_token_major(x[:, stage.first : stage.last]) for x in kv], comm)

    pending = post(0)
    for i in range(len(parts)):
        k_all, v_all = (x.transpose(0, 1) for x in pending.wait())
        if i + 1 < len(parts):
            pending = post(i + 1)
        yield k_all, v_all


def _split(x: torch.Tensor, chunks: int, axis: int = 2) -> list[torch.Tensor]:
    """Equal shares of the heads; of one chunk ``x`` itself, which an operator may know."""
    return [x] if chunks == 1 else list(x.chunk(chunks, dim=axis))


def _join(chunks: list[torch.Tensor], axis: int) -> torch.Tensor:
    import torch

    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=axis)
