"""Attention over tensors in host memory, chunk by chunk.

A chunk of queries stays on the device with its accumulator while the chunks of keys that it sees
pass through two buffers; in the backward pass their gradients do too.  So what is read and written
again for every chunk of queries is of the size of keys, not of queries: with the usual GQA that is
less than reading chunks of queries again for every chunk of keys, whose dq would have to be kept.

Source: FPDT (arXiv 2408.16978); distributed attention beyond device memory (arXiv 2302.06218).

Legend: B batch, S query length, H query heads, D head dim, Dv that of values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.operator import QKV
from cpbench.parallel.host_memory import allocation
from cpbench.strategies.offload.stream import GradientSums, Reader, Writer

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.partial_results.accumulators import BackwardAccumulator
    from cpbench.parallel.strategy import Saved
    from cpbench.strategies.offload.grid import Grid


def forward(
    qkv: QKV, grid: Grid, op: BoundOperator, comm: Comm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The out ``[B, S, H, Dv]`` and lse ``[B, H, S]`` of the grid, in host memory."""
    import torch

    q, k, v = qkv
    b, s, h, _ = q.shape
    out = allocation.empty((b, s, h, v.shape[3]), q.dtype, op.device)
    lse = allocation.empty((b, s, h), torch.float32, op.device)
    queries = Reader((q,), [(row.span,) for row in grid.rows if row.tiles], op, comm, buffers=1)
    keys = _VisitedKeys((k, v), grid, op, comm)
    writer = Writer(comm)
    for row in grid.rows:
        start, end = row.span
        if not row.tiles:
            out[:, start:end].zero_()
            lse[:, start:end].fill_(-torch.inf)
            continue
        (q_i,) = queries.next()
        accumulator = op.forward_accumulator(q_i, v.shape[3])
        for tile in row.tiles:
            k_j, v_j = keys.at(tile.column)
            accumulator.add(k_j, v_j, tile.plan)
            writer.release()
        row_out, row_lse = accumulator.finish()
        del accumulator
        assert row_lse is not None, "merging operators return it"
        writer.write(out[:, start:end], row_out)
        writer.write(lse[:, start:end], row_lse.transpose(1, 2).contiguous())
        del row_out, row_lse
    writer.finish()
    return out, lse.transpose(1, 2)


def backward(
    dout: torch.Tensor,
    saved: Saved,
    grid: Grid,
    op: BoundOperator,
    comm: Comm,
    *,
    delta: torch.Tensor | None = None,
    dq_dtype: torch.dtype | None = None,
    dkv_dtype: torch.dtype | None = None,
) -> Gradients:
    """dq, dk and dv of the grid, in host memory.

    Args:
        saved: q, k, v, and the global out and lse.
        delta: ``[B, S, H]`` float32, see ``row_delta``, instead of out, which is not read then.
        dq_dtype: of dq; that of q unless given.  dkv_dtype: of dk and dv.
    """
    q, k, v, out, lse, _ = saved
    assert lse is not None
    dq = allocation.empty(q.shape, dq_dtype or q.dtype, op.device)
    dk, dv = (allocation.empty(x.shape, dkv_dtype or x.dtype, op.device) for x in (k, v))
    of_queries = (dout, q, out if delta is None else delta, lse.transpose(1, 2))
    rows = [row for row in grid.rows if row.tiles]
    queries = Reader(of_queries, [(row.span,) for row in rows], op, comm, buffers=1)
    keys, writer = _VisitedKeys((k, v), grid, op, comm), Writer(comm)
    sums = GradientSums(grid.visits, grid.columns, dk, dv, op, writer, comm)
    total = None
    for row in grid.rows:
        start, end = row.span
        if not row.tiles:
            dq[:, start:end].zero_()
            continue
        accumulator = _accumulator(queries.next(), delta is not None, op)
        for tile in row.tiles:
            new = keys.column != tile.column
            k_j, v_j = keys.at(tile.column)
            total = sums.next() if new or total is None else total
            op.sum_float32(total, accumulator.add(k_j, v_j, tile.plan))
            writer.release()
        writer.write(dq[:, start:end], accumulator.finish(dq.dtype))
        del accumulator
    sums.finish()
    for start, end in grid.unseen:
        dk[:, start:end].zero_()
        dv[:, start:end].zero_()
    writer.finish()
    return dq, dk, dv


class _VisitedKeys:
    """The keys and values of the grid's visits.

    Attributes:
        column: of the chunk on the device; None before the first.
    """

    def __init__(
        self, kv: tuple[torch.Tensor, torch.Tensor], grid: Grid, op: BoundOperator, comm: Comm
    ) -> None:
        order = [(grid.columns[visit.column],) for visit in grid.visits]
        self._reader = Reader(kv, order, op, comm)
        self._chunk: list[torch.Tensor] = []
        self.column: int | None = None

    def at(self, column: int) -> list[torch.Tensor]:
        """k and v of this chunk, which is the present one or the next."""
        if column != self.column:
            self._chunk, self.column = self._reader.next(), column
        return self._chunk


def _accumulator(
    chunk: list[torch.Tensor], has_delta: bool, op: BoundOperator
) -> BackwardAccumulator:
    """The accumulator of dq of a chunk of queries."""
    dout, q, out_or_delta, lse_BSH = chunk
    lse = lse_BSH.transpose(1, 2).contiguous()
    if has_delta:
        return op.backward_accumulator_from_delta(dout, q, out_or_delta, lse)
    return op.backward_accumulator(dout, q, out_or_delta, lse)
