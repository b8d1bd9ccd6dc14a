"""Ulysses: all-to-all from token shards to head shards, attention over all tokens, and back.

With ``chunks`` above 1 the heads of a rank are processed in chunks: one is computed while the next
is received and the previous one returned.  Masks that all heads share are always balanced.

Source: DeepSpeed-Ulysses (arXiv 2309.14509); chunks of heads as in FPDT (arXiv 2408.16978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.core.registry import StrategyInfo
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import head_exchange

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="ulysses",
    summary="all-to-all to head shards and back; chunks of heads overlap with compute",
    source="DeepSpeed-Ulysses, arXiv 2309.14509",
    load="cpbench.strategies.ulysses:Ulysses",
    value_dims=True,
    params=("chunks",),
    variants=("chunks=2",),
)


@dataclass(frozen=True)
class Plan:
    """The operator's plan for a chunk of heads, and the key/value heads of the problem."""

    op: Any
    heads_kv: int


class Ulysses:
    """The strategy.

    Args:
        chunks: number of chunks of the heads of a rank.
    """

    def __init__(self, chunks: int = 1) -> None:
        if chunks < 1:
            raise ValueError(f"ulysses: chunks = {chunks} must be 1 or more")
        self.chunks = chunks

    def unsupported(self, world: World) -> str | None:
        reason = head_exchange.refusal("ulysses", world.problem, world.size)
        if reason is None:
            local_q, local_kv = head_exchange.heads_per_rank(world.problem, world.size)
            kv_chunks = min(self.chunks, local_kv)
            if local_q % self.chunks or local_kv % kv_chunks or self.chunks % kv_chunks:
                reason = (
                    f"ulysses: chunks = {self.chunks} must divide the {local_q} query and "
                    f"{local_kv} key/value heads of a rank (or be a multiple of the latter)"
                )
        return reason

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        local_q, local_kv = head_exchange.heads_per_rank(world.problem, world.size)
        chunk = (local_q // self.chunks, max(local_kv // self.chunks, 1))
        merged = world.merged((tuple(range(world.size)),), *chunk)
        return Plan(op.prepare(merged.subproblem([0], [0])), world.problem.heads_kv)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        import torch

        inputs = self._chunk_inputs(qkv, comm.size)
        incoming = head_exchange.tokens_to_heads(inputs[0], comm)
        kv: list[torch.Tensor] = []
        chunks: list[Saved] = []
        outgoing = []
        for i in range(self.chunks):
            q_all, *kv_all = incoming.wait()
            k_all, v_all = kv = kv_all or kv  # a key/value head of several chunks is sent once
            if i + 1 < self.chunks:
                incoming = head_exchange.tokens_to_heads(inputs[i + 1], comm)
            out_all, lse_all = op.forward(QKV(q_all, k_all, v_all), plan.op)
            outgoing.append(head_exchange.heads_to_tokens([out_all], comm))
            chunks.append(Saved(q_all, k_all, v_all, out_all, lse_all))
        out = _join_heads([pending.wait()[0] for pending in outgoing], comm.size)
        lse, lses = None, [chunk.lse for chunk in chunks if chunk.lse is not None]
        if need_lse and lses:
            lse = head_exchange.lse_to_tokens(torch.cat(lses, dim=1), comm)
        return out, lse, chunks

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        douts = [[x] for x in _split_heads(dout, comm.size, self.chunks)]
        incoming = head_exchange.tokens_to_heads(douts[0], comm)
        outgoing = []
        dk_dv: tuple[torch.Tensor, torch.Tensor] | None = None  # of chunks that share a head
        for i, chunk in enumerate(saved):
            (dout_all,) = incoming.wait()
            if i + 1 < self.chunks:
                incoming = head_exchange.tokens_to_heads(douts[i + 1], comm)
            dq, dk, dv = op.backward(chunk.backward_inputs(dout_all), plan.op)
            if dk_dv is None:
                dk_dv = (dk, dv)
            else:
                dk_dv = (dk_dv[0].float().add_(dk), dk_dv[1].float().add_(dv))
            grads = [dq]
            if i + 1 == self.chunks or saved[i + 1].k is not chunk.k:
                grads += [grad.to(dq.dtype) for grad in dk_dv]
                dk_dv = None
            outgoing.append(head_exchange.heads_to_tokens(grads, comm))
        received = [pending.wait() for pending in outgoing]
        dq = _join_heads([grads[0] for grads in received], comm.size)
        dk_dvs = [grads[1:] for grads in received if len(grads) > 1]
        dk, dv = (_join_heads(list(x), comm.size) for x in zip(*dk_dvs, strict=True))
        return (
            dq,
            head_exchange.sum_replicas(dk, plan.heads_kv),
            head_exchange.sum_replicas(dv, plan.heads_kv),
        )

    def _chunk_inputs(self, qkv: QKV, size: int) -> list[list[torch.Tensor]]:
        """The tensors to exchange for each chunk: its query heads and, unless an earlier chunk has
        them, its key/value heads."""
        k, v = (head_exchange.replicate_kv_heads(x, size) for x in (qkv.k, qkv.v))
        kv_chunks = min(self.chunks, k.shape[2] // size)
        inputs: list[list[torch.Tensor]] = [[x] for x in _split_heads(qkv.q, size, self.chunks)]
        pairs = zip(_split_heads(k, size, kv_chunks), _split_heads(v, size, kv_chunks), strict=True)
        for i, kv in enumerate(pairs):
            inputs[i * (self.chunks // kv_chunks)] += kv
        return inputs


def _split_heads(x: torch.Tensor, size: int, chunks: int) -> list[torch.Tensor]:
    """Split the heads of every rank into ``chunks``: ``[B, L, size * h, D]`` each."""
    if chunks == 1:
        return [x]
    by_chunk = x.unflatten(2, (size, chunks, -1))
    return [by_chunk[:, :, :, i].flatten(2, 3) for i in range(chunks)]


def _join_heads(chunks: list[torch.Tensor], size: int) -> torch.Tensor:
    """The inverse of :func:`_split_heads`."""
    import torch

    if len(chunks) == 1:
        return chunks[0]
    return torch.stack([x.unflatten(2, (size, -1)) for x in chunks], dim=3).flatten(2, 4)
