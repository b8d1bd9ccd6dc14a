"""Operator `flex`: compiled FlexAttention with a BlockMask built from exact tile areas.

torch's own ``create_block_mask`` evaluates the mask S x S; here the block lists are computed from
the slices, and ``mask_mod`` looks up the visible intervals of each row in a table.

Source: torch.nn.attention.flex_attention (arXiv 2412.05496).

Legend: B batch, S query length, T key length, H query heads, G key/value heads, D head dim
(values may have another).
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import nothing_visible, zero_gradients
from cpbench.core.problem import Problem
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.autograd_op import GraphStore
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.convert import row_intervals, to_block_mask_tables

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse

OPERATORS = (
    OperatorInfo(
        name="flex",
        summary="compiled FlexAttention with a BlockMask; on CPUs forward only and no lse",
        source="FlexAttention, arXiv 2412.05496",
        load="cpbench.kernels.flex:Flex",
        value_dims=True,
        backward_on=("cuda",),
        external_lse=False,
        lse_on=("cuda",),
        deterministic=False,
    ),
)

BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """The plan: the BlockMask (None for an empty mask) and the scale of the scores."""

    block_mask: BlockMask | None
    scale: float
    keep_graph: bool


class Flex:
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def __init__(self) -> None:
        self._graphs = GraphStore("flex")
        self.states = self._graphs.states

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        if device == "cpu" and shutil.which("g++") is None:
            return "flex compiles C++ on CPUs, and g++ was not found; install a C++ compiler"
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        empty = mask.kind == "empty"
        block_mask = None if empty else to_block_mask(mask, device)
        return Plan(block_mask, problem.softmax_scale, problem.backward)

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        if plan.block_mask is None:
            return nothing_visible(qkv.q, qkv.v.shape[3])
        attend = functools.partial(self.differentiable_forward, plan=plan)
        return self._graphs.forward(attend, qkv, plan.keep_graph)

    def differentiable_forward(self, qkv: QKV, plan: Plan) -> OutLse:
        """The forward pass, for autograd to record."""
        if plan.block_mask is None:
            return nothing_visible(qkv.q, qkv.v.shape[3])
        flex_attention, return_lse = _compiled()
        q, k, v = (x.transpose(1, 2) for x in qkv)
        gqa = q.shape[1] != k.shape[1]
        arguments = {"block_mask": plan.block_mask, "scale": plan.scale, "enable_gqa": gqa}
        if q.device.type == "cpu":  # compiled for CPUs it cannot return lse
            return flex_attention(q, k, v, **arguments).transpose(1, 2), None
        out, aux = flex_attention(q, k, v, **arguments, return_aux=return_lse)
        return out.transpose(1, 2), aux.lse

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        if plan.block_mask is None:
            return zero_gradients(x.qkv)
        return self._graphs.backward(x.dout, x.out)


def to_block_mask(mask: AttnMask, device: str) -> BlockMask:
    """Convert any ``AttnMask`` to an equal BlockMask of FlexAttention.

    The q lists are computed from the transposed mask: torch's own transposition of the kv lists
    takes longer than everything else by orders of magnitude.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    arrays = to_block_mask_tables(mask, BLOCK)
    tables: dict[str, Any] = {
        field.name: torch.as_tensor(getattr(arrays, field.name), device=device)
        for field in fields(arrays)
        if field.name != "block"
    }
    intervals = torch.as_tensor(row_intervals(mask), device=device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        inside = (key >= intervals[row, 0, 0]) & (key < intervals[row, 0, 1])
        for m in range(1, intervals.shape[1]):
            inside = inside | ((key >= intervals[row, m, 0]) & (key < intervals[row, m, 1]))
        return inside

    return BlockMask(
        seq_lengths=(mask.seq_q, mask.seq_k), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible, **tables
    )


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """The compiled ``flex_attention``, and the request for its lse."""
    import torch
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Every shape and mask is compiled, which is intended: lift the limits on recompilation.
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    return torch.compile(flex_attention, dynamic=False), AuxRequest(lse=True)
