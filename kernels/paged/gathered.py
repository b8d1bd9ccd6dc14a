"""Operators `paged.gathered` and `paged.sdpa`: decoding over pages in plain torch, on any device.

Both copy the keys and values of a sequence out of its pages.  ``paged.gathered`` copies a few pages
at a time, which stay in the cache until they are used: first keys, for all scores of the sequence,
then values, for their weighted sum.  ``paged.sdpa`` copies a whole sequence and calls torch's
scaled_dot_product_attention on it, the baseline.

Legend: B sequences, one query each; T slots of the cache; H query heads, G key/value heads, R query
heads of each; D head dim of queries and keys, Dv of values; L slots that a query sees.
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
        summary="decoding: a few pages are copied at a time, first of keys and then of values",
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
CHUNK_BYTES = 1 << 20  # of keys, or of values, that are copied at a time


@dataclass(frozen=True, eq=False)
class Chunk:
    """What is copied at a time: whole pages, or single slots.

    Attributes:
        index: int64 numbers of pages, or of slots.
        size: slots of each: those of a page, or 1.
    """

    index: torch.Tensor
    size: int

    @property
    def slots(self) -> int:
        """How many slots they are."""
        return len(self.index) * self.size


@dataclass(frozen=True, eq=False)
class Plan:
    """What each query sees.

    Attributes:
        scale: factor of the scores.
        chunks: by query.
    """

    scale: float
    chunks: tuple[tuple[Chunk, ...], ...]

    @property
    def largest(self) -> int:
        """Slots of the largest chunk."""
        return max((chunk.slots for own in self.chunks for chunk in own), default=0)


class Rows:
    """Copies of rows of a cache ``[T, G, D]``, chunk by chunk, each in the memory of the last.

    Args:
        most: slots of the largest chunk.
        dtype: of the copies.
    """

    def __init__(self, cache: torch.Tensor, most: int, dtype: torch.dtype) -> None:
        self._cache = cache if cache.is_contiguous() else cache.contiguous()
        self._copies = cache.new_empty((most, *cache.shape[1:]))
        same = cache.dtype == dtype
        self._converted = self._copies if same else cache.new_empty(self._copies.shape, dtype=dtype)

    def of(self, chunk: Chunk) -> torch.Tensor:
        """``[slots, G, D]``, valid until the next call."""
        import torch

        rows, copies = self._cache, self._copies[: chunk.slots]
        if chunk.size > 1:
            rows = rows.view(-1, chunk.size * rows[0].numel())
        torch.index_select(rows, 0, chunk.index, out=copies.view(-1, *rows.shape[1:]))
        converted = self._converted[: chunk.slots]
        return copies if self._converted is self._copies else converted.copy_(copies)


class _Paged:
    """What both operators share; see ``cpbench.core.operator.Operator``."""

    def unsupported(self, problem: Problem, mask: AttnMask, device: str) -> str | None:
        return None

    def backward(self, x: BackwardInputs, plan: Plan) -> Gradients:
        raise NotImplementedError("decoding has no backward pass")


class PagedGathered(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes.

    Args:
        chunk: slots that are copied at a time, in whole pages where they are seen whole; 0: a MiB
            of keys or values.
    """

    def __init__(self, chunk: int = 0) -> None:
        if type(chunk) is not int or chunk < 0:
            raise ValueError(f"paged.gathered: chunk = {chunk!r} must be a number of slots, or 0")
        self._chunk = chunk

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        import torch

        table, size = PageTable.of(mask, problem.page_size), problem.page_size
        most = self._chunk or max(size, 2 * CHUNK_BYTES // problem.kv_bytes(1))
        by_query = []
        for b in range(mask.seq_q):
            slots = torch.as_tensor(table.slots(b), device=device)
            whole = size * table.whole(b) if mask.seq_k % size == 0 and most >= size else 0
            pages = (slots[:whole:size] // size).split(most // size) if whole else ()
            rest = slots[whole:].split(most) if whole < len(slots) else ()
            chunks = *(Chunk(x, size) for x in pages), *(Chunk(x, 1) for x in rest)
            by_query.append(chunks)
        return Plan(problem.softmax_scale, tuple(by_query))

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = (x[0] for x in qkv)  # [B or T, heads, D]
        exact = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((1, *q.shape[:2], v.shape[2]))
        lse = torch.full(
            (1, q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32, device=q.device
        )
        keys, values = (Rows(x, plan.largest, exact) for x in (k, v))
        for b, chunks in enumerate(plan.chunks):
            if not chunks:
                continue
            scaled = (q[b].to(exact) * plan.scale).unflatten(0, (k.shape[1], -1))  # [G, R, D]
            sizes = [chunk.slots for chunk in chunks]
            weights = scaled.new_empty((*scaled.shape[:2], sum(sizes)))  # [G, R, L]
            parts = weights.split(sizes, dim=2)
            for chunk, scores in zip(chunks, parts, strict=True):
                torch.bmm(scaled, keys.of(chunk).permute(1, 2, 0), out=scores)
            total = weights.logsumexp(-1, keepdim=True)
            weights.sub_(total).exp_()
            acc = scaled.new_zeros((*scaled.shape[:2], v.shape[2]))
            for chunk, shares in zip(chunks, parts, strict=True):
                acc.baddbmm_(shares, values.of(chunk).transpose(0, 1))
            out[0, b], lse[0, :, b] = acc.flatten(0, 1), total.flatten()
        return out, lse


class PagedSdpa(_Paged):
    """The operator; see ``cpbench.core.operator.Operator`` for shapes."""

    def prepare(self, mask: AttnMask, problem: Problem, device: str) -> Plan:
        import torch

        table = PageTable.of(mask, problem.page_size)
        slots = (torch.as_tensor(table.slots(b), device=device) for b in range(mask.seq_q))
        return Plan(problem.softmax_scale, tuple((Chunk(own, 1),) for own in slots))

    def forward(self, qkv: QKV, plan: Plan) -> OutLse:
        import torch

        q, k, v = (x[0] for x in qkv)
        out = q.new_zeros((1, *q.shape[:2], v.shape[2]))
        for b, (sequence,) in enumerate(plan.chunks):
            if sequence.slots:
                keys, values = (
                    x.index_select(0, sequence.index).transpose(0, 1)[None] for x in (k, v)
                )
                out[0, b] = torch.nn.functional.scaled_dot_product_attention(
                    q[b, :, None][None], keys, values, scale=plan.scale, enable_gqa=True
                )[0, :, 0]
        return out, None
