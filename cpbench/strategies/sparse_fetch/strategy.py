"""Fetch what was selected: ranks gather the pooled keys of all, select, and are sent only the
blocks of keys and values that their queries attend to.

In the backward pass the gradients of these blocks return to their owners, which sum them in
float32; the keys fetched are kept for it.  Bytes depend on the data: a block crosses once to every
rank of which some query has selected it, for each key/value head.  At most all keys are sent, as by
``ring_allgather:keep=true``, and besides the pooled keys and a byte for each block.

Source: MoBA (arXiv 2502.13189) and Quest (arXiv 2406.10774), whose selections need pooled keys
only; the exchange is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, Unsupported
from cpbench.core.registry import StrategyInfo
from cpbench.masks.slices import IntArray
from cpbench.parallel.bound_selector import BoundPooledSelector, cut_refusal, in_order, token_index
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.sparse_fetch.exchange import BlockExchange, gather_pooled, request_blocks

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="sparse_fetch",
    summary="pooled keys to all ranks, then only selected blocks of keys, and their gradients back",
    source="MoBA, arXiv 2502.13189; Quest, arXiv 2406.10774",
    load="cpbench.strategies.sparse_fetch.strategy:SparseFetch",
    selectors="pooled",
    value_dims=True,
    params=("grad_dtype",),
    variants=("grad_dtype=bfloat16",),
    traced=False,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one rank.

    Attributes:
        op: the operator's, for the queries of this rank and all keys.
        block: keys of a block.
        owned: the blocks of the sequence that each rank holds, ascending.
        keys: number of keys of this rank, without padding.
        index: their index among the local tokens, in the order of the sequence; None for all.
        local_len: tokens of a rank, with padding.
        seq_k: keys of the sequence.
    """

    op: Any
    block: int
    owned: tuple[IntArray, ...]
    keys: int
    index: torch.Tensor | None
    local_len: int
    seq_k: int


class SparseFetch:
    """The strategy.

    Args:
        grad_dtype: dtype in which gradients are sent; sums are always float32.
    """

    name = "sparse_fetch"

    def __init__(self, grad_dtype: str = "float32") -> None:
        self.grad_dtype = gradient_dtype.validate(self.name, grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal(self.name, self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        planned = op.prepare(world.subproblem([rank], range(world.size)))
        selector = BoundPooledSelector(op, planned)
        block, reason = selector.key_block, selector.refusal
        owned = []
        for owner in range(world.size):
            positions, index = in_order(world.keys, [owner])
            reason = reason or cut_refusal(op.info.name, "keys", block, world.keys, positions)
            owned.append(positions[::block] // block)
            if owner == rank:
                keys, own_index = len(positions), token_index(index, world.keys.local_len, op)
        lengths = world.keys.local_len, world.keys.seq_len
        if reason is not None:
            raise Unsupported(f"{self.name}: {reason}")
        return Plan(planned, block, tuple(owned), keys, own_index, *lengths)

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        import torch

        q, k, v = qkv
        selector = BoundPooledSelector(op, plan.op)
        own = [x if plan.index is None else x.index_select(1, plan.index) for x in (k, v)]
        pooled = gather_pooled(selector.pool(own[0]), plan.owned, comm)
        branches = selector.select(q, pooled)
        wanted = selector.wanted(branches, pooled)
        asked = request_blocks(wanted, plan.owned, comm)
        exchange = BlockExchange(wanted, asked, plan, comm)
        fetched = exchange.fetch(torch.cat(own, 3))
        k_all, v_all = fetched.split([k.shape[3], v.shape[3]], 3)
        out, lse = selector.attend(QKV(q, k_all, v_all), branches, exchange.columns)
        return out, lse, Saved(q, k_all, v_all, out, lse, (wanted, asked))

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        k, v = saved.k, saved.v
        wanted, asked = saved.last
        selector = BoundPooledSelector(op, plan.op)
        exchange = BlockExchange(wanted, asked, plan, comm)
        dq, *dk_dv = selector.backward(saved.backward_inputs(dout))
        dtype = gradient_dtype.torch_dtype(self.grad_dtype)
        sums = exchange.return_gradients(torch.cat([x.float() for x in dk_dv], 3), dtype)
        shards = []
        for own, like in zip(sums.split([k.shape[3], v.shape[3]], 3), (k, v), strict=True):
            local = like.new_zeros((len(own), plan.local_len, *own.shape[2:]))
            index = slice(None) if plan.index is None else plan.index
            local[:, index] = own.to(like.dtype)
            shards.append(local)
        return dq, shards[0], shards[1]
