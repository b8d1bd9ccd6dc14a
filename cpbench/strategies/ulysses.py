"""Ulysses: all-to-all from token shards to head shards, attention over all tokens, and back.

With ``chunks`` above 1 the heads of a rank are processed in chunks: one is computed while the next
is received and the previous one returned.  Masks that all heads share are always balanced, if all
ranks get equally many heads; with ``pad`` they need not.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); chunks of heads as in FPDT (arXiv 2408.16978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, nothing_visible, zero_gradients
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import head_exchange, head_shares
from cpbench.strategies.common.head_shares import ChunkOfHeads, HeadShares

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World
    from cpbench.strategies.common.collectives import PendingTensors

STRATEGY = StrategyInfo(
    name="ulysses",
    summary="all-to-all to head shards and back; chunks of heads overlap with compute",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.ulysses:Ulysses",
    selectors="any",
    mixers="cpbench.strategies.ulysses_mixers:UlyssesMixers",
    decodes="cpbench.strategies.decoding.ulysses:UlyssesDecoding",
    kinds=("attention", "mixer"),
    value_dims=True,
    params=("chunks", "pad", "offload", "chunk"),
    variants=(
        "chunks=2",
        "pad=true",
        "offload=host,chunk=16",
        "chunks=3,pad=true",
        "offload=host,chunk=16,pad=true",
    ),
    mixer_variants=("pad=true",),
    offloaded="cpbench.strategies.offload.ulysses:OffloadedUlysses",
)


@dataclass(frozen=True)
class Plan:
    """The heads of all ranks, whole and in chunks, and the operator's plan for each chunk of this
    rank; None for a chunk without heads."""

    shares: HeadShares
    chunks: tuple[ChunkOfHeads, ...]
    ops: list[Any]


class Ulysses:
    """The strategy.

    Args:
        chunks: number of chunks of the heads of a rank.
        pad: whether the number of heads need not divide, as if heads were added up to the next
            multiple; these are neither sent nor computed.
    """

    def __init__(self, chunks: int = 1, pad: bool = False) -> None:
        if chunks < 1:
            raise ValueError(f"ulysses: chunks = {chunks} must be 1 or more")
        self.chunks, self.pad = chunks, pad

    def unsupported(self, world: World) -> str | None:
        reason = head_shares.refusal("ulysses", world.problem, world.size, self.pad)
        if reason is None and not self.pad:
            local_q = world.problem.heads_q // world.size
            local_kv = max(world.problem.heads_kv // world.size, 1)
            kv_chunks = min(self.chunks, local_kv)
            if local_q % self.chunks or local_kv % kv_chunks or self.chunks % kv_chunks:
                reason = (
                    f"ulysses: chunks = {self.chunks} must divide the {local_q} query and "
                    f"{local_kv} key/value heads of a rank (or be a multiple of the latter) "
                    "unless pad = true"
                )
        return reason

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        problem, size, chunks = world.problem, world.size, self.chunks
        merged = world.merged((tuple(range(size)),), problem.heads_q, problem.heads_kv)
        by_chunk = HeadShares.of(problem, size * chunks)
        plans: dict[Any, Any] = {(0, ()): None}  # by the heads of a chunk
        ops = []
        for i in range(rank * chunks, (rank + 1) * chunks):
            attention = by_chunk.attention(merged, i)
            heads = attention.problem.heads_q, attention.kv_heads
            if heads not in plans:
                plans[heads] = op.prepare(attention.subproblem([0], [0]))
            ops.append(plans[heads])
        shares = HeadShares.of(problem, size)
        return Plan(shares, head_shares.chunks_of_heads(problem, size, chunks), ops)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        import torch

        value_dim = qkv.v.shape[3]
        incoming = _receive_chunk(qkv, plan.chunks[0], comm)
        kv: list[torch.Tensor] = []
        chunks: list[Saved] = []
        outgoing = []
        for i, (chunk, op_plan) in enumerate(zip(plan.chunks, plan.ops, strict=True)):
            q_all, *received = incoming.wait()
            if i + 1 < self.chunks:
                incoming = _receive_chunk(qkv, plan.chunks[i + 1], comm)
            first, last = chunk.kv[comm.rank]
            kept = chunk.received[comm.rank][0] - first  # heads of the previous chunk
            kv = _append_heads(kv, received, kept) if last > first else kv or received
            k_all, v_all = kv
            if op_plan is None:
                result: OutLse = nothing_visible(q_all, value_dim)
            else:
                result = op.forward(QKV(q_all, k_all, v_all), op_plan)
            outgoing.append(head_exchange.heads_to_tokens(result[:1], (chunk.q,), comm))
            chunks.append(Saved(q_all, k_all, v_all, *result))
        returned = [pending.wait()[0] for pending in outgoing]
        out, lse = head_exchange.join_heads(returned, plan.shares.heads_q), None
        if need_lse and op.returns_lse:
            lse = torch.cat([chunk.lse for chunk in chunks if chunk.lse is not None], dim=1)
            lse = head_exchange.lse_to_tokens(lse, plan.shares, comm)
        return out, lse, chunks

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        def receive(i: int) -> PendingTensors[torch.Tensor]:
            return head_exchange.tokens_to_heads([dout], (plan.chunks[i].q,), comm)

        incoming = receive(0)
        outgoing = []
        carried: list[torch.Tensor | None] = [None, None]  # dk, dv of a head of several chunks
        for i, (chunk, inputs) in enumerate(zip(plan.chunks, saved, strict=True)):
            (dout_all,) = incoming.wait()
            if i + 1 < self.chunks:
                incoming = receive(i + 1)
            if plan.ops[i] is None:
                grads = [x[:, :, :0] for x in zero_gradients(QKV(*inputs[:3]))]
            else:
                dq, *dk_dv = op.backward(inputs.backward_inputs(dout_all), plan.ops[i])
                first, last = chunk.returned[comm.rank]
                complete = [
                    _complete_heads(grad, rest, last - first)
                    for grad, rest in zip(dk_dv, carried, strict=True)
                ]
                carried = [rest for _, rest in complete]
                grads = [dq, *(grad for grad, _ in complete)]
            shares = (chunk.q, chunk.returned, chunk.returned)
            outgoing.append(head_exchange.heads_to_tokens(grads, shares, comm))
        chunks = zip(*(pending.wait() for pending in outgoing), strict=True)
        heads = plan.shares.heads_q, plan.shares.heads_kv, plan.shares.heads_kv
        dq, dk, dv = (head_exchange.join_heads(x, n) for x, n in zip(chunks, heads, strict=True))
        return dq, dk, dv


def _receive_chunk(qkv: QKV, chunk: ChunkOfHeads, comm: Comm) -> PendingTensors[torch.Tensor]:
    shares = (chunk.q, chunk.received, chunk.received)
    return head_exchange.tokens_to_heads(qkv, shares, comm)


def _append_heads(
    held: list[torch.Tensor], received: list[torch.Tensor], kept: int
) -> list[torch.Tensor]:
    """Append the key/value heads received to the last ``kept`` ones held, ``[B, S, g, D]`` each."""
    import torch

    if not kept:
        return received
    held = [x if x.shape[2] == kept else x[:, :, -kept:] for x in held]
    if not received[0].shape[2]:
        return held
    return [torch.cat(pair, dim=2) for pair in zip(held, received, strict=True)]


def _complete_heads(
    grad: torch.Tensor, carried: torch.Tensor | None, complete: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add a gradient carried from earlier chunks to that of the first head.

    Returns:
        The gradients of the first ``complete`` heads, and that of the rest (one head or none),
        which is to be carried on.
    """
    import torch

    first = grad[:, :, :1]
    if carried is not None:
        first = carried.float().add_(first)
    if complete == 0:
        return grad[:, :, :0], first
    rest = grad[:, :, complete:] if complete < grad.shape[2] else None
    if carried is None:
        return grad[:, :, :complete], rest
    return torch.cat([first.to(grad.dtype), grad[:, :, 1:complete]], dim=2), rest
