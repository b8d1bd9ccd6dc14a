"""Operators `paged.gathered` and `paged.sdpa`: decoding over pages in plain torch, on any device.

Both copy the keys and values of a sequence out of its pages.  ``paged.gathered`` copies a few pages
at a time, which stay in the cache until they are used, and updates an online softmax;
``paged.sdpa`` copies a whole sequence and calls torch's scaled_dot_product_attention on it, the
baseline.

Legend: B sequences, one query each; T slots of the cache; H query heads, G key/value heads, R query
heads of each; D head dim of queries and keys, Dv of values; n slots of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.core.registry import OperatorInfo
from cpbench.masks.paged.table import PageTable

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

OPERATORS = (
    OperatorInfo(
        name="paged.gathered",
        summary="decoding: a few pages are copied at a time, under an online softmax",
        source="PagedAttention, arXiv 2309.06180, in plain torch",
        load="cpbench.kernels.paged.gathered:PagedGathered",
        dtypes=("float64", "float32", "bfloat16", "float16"),
        value_dims=True,
        backward_on=(),
        paged=True,
        params=("chunk",),
        variants=("chunk=16",),
    ),
    OperatorInfo(
        name="paged.sdpa",
        summary="decoding: each sequence is copied out of its pages for torch's attention",
        source="torch.nn.functional.scaled_dot_product_attention",
        load="cpbench.kernels.paged.gathered:PagedSdpa",
        value_dims=True,
        backward_on=(),
        mergeable=False,
        lse_on=(),
        paged=True,
    ),
)
CHUNK_BYTES = 1 << 19  # of keys and values that are copied at a time


@dataclass(frozen=True, eq=False)
class Plan:
    """The slots that each query sees.

    Attributes:
        scale: factor of the scores.
        slots: by query, ``[n]`` int64.
        chunk: slots of a chunk.
    """

    scale: float
    slots: tuple[torch.Tensor, ...]
    chunk: int


class _Paged:
    """What both operators share; see ``cpbench.core.operator.Operator``."""

    def __init__(self, chunk: int = 0) -> None:
        if type(chunk) is not int or chunk < 0:
            raise ValueError(f"paged.gathered: chunk = {chunk!r} must be a number of slots, or 0")
        self._chunk = chunk

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        return None

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        import torch

        table = PageTable.of(mask, problem.page_size)
        slots = [torch.as_tensor(table.slots(b), device=device) for b in range(mask.seq_q)]
        chunk = self._chunk or max(problem.page_size, CHUNK_BYTES // problem.kv_bytes(1))
        return Plan(problem.softmax_scale, tuple(slots), chunk)

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        raise NotImplementedError("decoding has no backward pass")


class PagedGathered(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        chunk: slots that are copied at a time; 0: half a MiB of keys and values.
    """

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = (x[0] for x in qkv)  # [B or T, heads, D]
        exact = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((1, *q.shape[:2], v.shape[2]))
        lse = q.new_empty((1, q.shape[1], q.shape[0]), dtype=torch.float32)
        for b, slots in enumerate(plan.slots):
            scaled = (q[b].to(exact) * plan.scale).unflatten(0, (k.shape[1], -1))  # [G, R, D]
            acc = torch.zeros((*scaled.shape[:2], v.shape[2]), dtype=exact, device=q.device)
            largest = torch.full((*scaled.shape[:2], 1), -torch.inf, dtype=exact, device=q.device)
            total = torch.zeros_like(largest)
            for own in slots.split(plan.chunk) if len(slots) else ():
                keys, values = k.index_select(0, own), v.index_select(0, own)
                scores = scaled @ keys.to(exact).permute(1, 2, 0)  # [G, R, n]
                new = torch.maximum(largest, scores.amax(-1, keepdim=True))
                weights = (scores - new).exp_()
                shrink = (largest - new).exp_()
                acc = acc * shrink + weights @ values.to(exact).transpose(0, 1)
                total, largest = total * shrink + weights.sum(-1, keepdim=True), new
            # A query that sees nothing has a total of 0.
            out[0, b] = (acc / total).masked_fill_(total == 0, 0.0).flatten(0, 1)
            lse[0, :, b] = (largest + total.log()).flatten()
        return out, lse


class PagedSdpa(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = (x[0] for x in qkv)
        out = q.new_zeros((1, *q.shape[:2], v.shape[2]))
        for b, slots in enumerate(plan.slots):
            if len(slots):
                keys, values = (x.index_select(0, slots).transpose(0, 1)[None] for x in (k, v))
                out[0, b] = torch.nn.functional.scaled_dot_product_attention(
                    q[b, :, None][None], keys, values, scale=plan.scale, enable_gqa=True
                )[0, :, 0]
        return out, None
