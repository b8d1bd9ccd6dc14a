"""Tile: rank (u, w) computes the queries of its row against the keys of its column.

The ranks form a mesh, ``keys`` x ``queries``: a rank computes the queries of the ``rows`` ranks of
its queries group against the keys of the P / ``rows`` ranks of its keys group.  Received keys are
kept; queries are received from one rank after another, and their results returned immediately.
Traffic grows with the square root of the number of ranks.  One row is the all-to-all form of a
ring; P rows send queries only, as TokenRing does.

Source: Mesh-Attention (arXiv 2512.20968); TokenRing (arXiv 2412.20501).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.mesh import Mesh
from cpbench.parallel.partial_results.accumulators import row_delta, unpacked
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.return_results import ResultExchange

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.core.problem import Problem
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="tile",
    summary="a tile of query rows by key columns per rank: traffic grows with the root of P",
    source="Mesh-Attention, arXiv 2512.20968",
    load="cpbench.strategies.tile:Tile",
    value_dims=True,
    merges=True,
    params=("rows", "grad_dtype", "offload", "chunk"),
    axes=("keys", "queries"),
    variants=("rows=1", "offload=host,chunk=16", "rows=2"),
    offloaded="cpbench.strategies.offload.tile:OffloadedTile",
)


@dataclass(frozen=True)
class Peers:
    """A turn of an exchange: the local keys (or queries) are sent to ``target`` if ``sends``, those
    of ``source`` received if ``receives``."""

    source: int
    target: int
    sends: bool
    receives: bool


@dataclass(frozen=True)
class Row:
    """A row of the tile: the queries of one rank of the queries group.

    Attributes:
        source: owner of the queries of this row; target: receiver of the local ones.
        plans: of the operator, for the keys of every column; None where the mask is empty.
        sends: whether ``target`` needs the local queries.
    """

    source: int
    target: int
    plans: tuple[Any, ...]
    sends: bool

    @property
    def receives(self) -> bool:
        return any(plan is not None for plan in self.plans)


@dataclass(frozen=True)
class Plan:
    """Rows and columns of one rank: the first ones are its local queries and keys."""

    rows: tuple[Row, ...]
    columns: tuple[Peers, ...]


class Tile:
    """The strategy.

    Args:
        rows: ranks whose queries a rank computes; 0 for the least traffic.
        grad_dtype: in which dQ, dK and dV are sent.
    """

    def __init__(self, rows: int = 0, grad_dtype: str = "float32") -> None:
        if rows < 0:
            raise ValueError(f"tile: rows = {rows} must be a number of ranks, or 0 to choose")
        self.rows, self.grad_dtype = rows, gradient_dtype.validate("tile", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        if self.rows and world.size % self.rows:
            return f"tile: rows = {self.rows} must divide the {world.size} ranks"
        return gradient_dtype.refusal("tile", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        rows = self.rows or rows_with_least_traffic(world.problem, world.keys.local_len, world.size)
        mesh = world.mesh(keys=world.size // rows, queries=rows)
        row_peers = ring_peers(mesh, rank, "queries")
        column_peers = ring_peers(mesh, rank, "keys")
        column_ranks = [source for source, _ in column_peers]

        def needed(queries: list[int], keys: list[int]) -> bool:
            return bool(world.subproblem(queries, keys).area)

        def plan(queries: int, keys: int) -> Any:
            subproblem = world.subproblem([queries], [keys])
            return op.prepare(subproblem) if subproblem.area else None

        return Plan(
            rows=tuple(
                Row(
                    source=source,
                    target=target,
                    plans=tuple(plan(source, keys) for keys in column_ranks),
                    sends=needed([rank], list(mesh.group(target, "keys"))),
                )
                for source, target in row_peers
            ),
            columns=tuple(
                Peers(
                    source=source,
                    target=target,
                    sends=needed(list(mesh.group(target, "queries")), [rank]),
                    receives=needed([queries for queries, _ in row_peers], [source]),
                )
                for source, target in column_peers
            ),
        )

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        columns = _ColumnKeys(k, v, plan, comm)
        results = ResultExchange(comm)
        own = op.forward_accumulator(q, v.shape[3])
        for row, (q_s,) in _overlapped_rows(plan, (q,), comm):
            accumulator = own
            if row is not plan.rows[0]:
                accumulator = op.forward_accumulator(q_s, v.shape[3])
            for i, tile in enumerate(row.plans):
                if tile is not None:
                    k_s, v_s = columns[i]
                    accumulator.add(k_s, v_s, tile)
            if row is plan.rows[0]:
                continue
            if row.receives:
                results.send(list(accumulator.finish()), row.source)
            if row.sends:
                results.receive_partial(row.target, own)
            results.post()
        columns.finish()
        results.wait()
        out, lse = own.finish()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        send_dtype = gradient_dtype.torch_dtype(self.grad_dtype)
        columns = _ColumnKeys(k, v, plan, comm)
        column_grads: dict[int, torch.Tensor] = {}  # dK and dV of each column, float32
        results = ResultExchange(comm)
        own = op.backward_accumulator(dout, q, out, lse)
        for row, (q_s, dout_s, delta_s, lse_s) in _overlapped_rows(
            plan, (q, dout, row_delta(dout, out), lse), comm
        ):
            accumulator = own
            if row is not plan.rows[0]:
                accumulator = op.backward_accumulator_from_delta(dout_s, q_s, delta_s, lse_s)
            for i, tile in enumerate(row.plans):
                if tile is not None:
                    k_s, v_s = columns[i]
                    dk_dv = accumulator.add(k_s, v_s, tile)
                    column_grads[i] = op.sum_float32(column_grads.get(i), dk_dv)
            if row is plan.rows[0]:
                continue
            if row.receives:
                results.send([accumulator.finish(send_dtype)], row.source)
            if row.sends:
                results.receive([op.empty(q.shape, send_dtype)], row.target, own.add_partial)
            results.post()
        columns.finish()

        def add(packed: torch.Tensor) -> None:
            column_grads[0] = op.sum_float32(column_grads.get(0), [packed])

        for i, column in list(enumerate(plan.columns))[1:]:
            if column.receives:
                results.send([column_grads[i].to(send_dtype)], column.source)
            if column.sends:
                buffer = op.empty((k.numel() + v.numel(),), send_dtype)
                results.receive([buffer], column.target, add)
            results.post()
        results.wait()
        dq = own.finish()
        if 0 not in column_grads:
            return dq, torch.zeros_like(k), torch.zeros_like(v)
        dk, dv = unpacked(column_grads[0].to(k.dtype), [k.shape, v.shape])
        return dq, dk, dv


class _ColumnKeys:
    """The keys of all columns: received concurrently, each waited for at its first use.

    Where queries are received too, from other ranks and perhaps over faster links, keys take a lane
    of their own.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm) -> None:
        lane = comm.lane("keys") if min(len(plan.rows), len(plan.columns)) > 1 else comm
        self._kv: list[Any] = [(k, v)]
        self._handles: list[Any] = [CompletedHandle()]
        for column in plan.columns[1:]:
            kv = (k.new_empty(k.shape), v.new_empty(v.shape)) if column.receives else ()
            sends = [(x, column.target) for x in (k, v) if column.sends]
            self._handles.append(lane.exchange(sends, [(x, column.source) for x in kv], "keys"))
            self._kv.append(kv)

    def __getitem__(self, i: int) -> Any:
        self._handles[i].wait()
        self._handles[i] = CompletedHandle()
        return self._kv[i]

    def finish(self) -> None:
        """Wait for the remaining transfers: local keys may still be in transfer."""
        for handle in self._handles:
            handle.wait()


def _overlapped_rows(plan: Plan, queries: tuple[Any, ...], comm: Comm) -> Iterator[tuple[Row, Any]]:
    """Iterate over rows with their queries, while those of the next row are in transfer; uses two
    buffers."""
    buffers: list[tuple[Any, ...]] = []
    current, next_queries, handle = queries, queries, CompletedHandle()
    for turn, row in enumerate(plan.rows):
        handle.wait()
        current = next_queries
        if turn + 1 < len(plan.rows):
            next_row = plan.rows[turn + 1]
            if len(buffers) < 2:
                buffers.append(tuple(x.new_empty(x.shape) for x in queries))
            next_queries = buffers[turn % 2]
            sends = [(x, next_row.target) for x in queries if next_row.sends]
            recvs = [(x, next_row.source) for x in next_queries if next_row.receives]
            handle = comm.exchange(sends, recvs, "queries")  # type: ignore[assignment]
        yield row, current


def rows_with_least_traffic(problem: Problem, tokens: int, size: int) -> int:
    """The number of rows with the least traffic in the forward pass."""
    lse = 4 * problem.batch * tokens * problem.heads_q
    q = problem.q_bytes(tokens) + problem.out_bytes(tokens) + lse
    kv = problem.kv_bytes(tokens)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda rows: (rows - 1) * q + (size // rows - 1) * kv)


def ring_peers(mesh: Mesh, rank: int, axis: str) -> list[tuple[int, int]]:
    """The (source, target) ranks of every turn along ``axis``; at turn 0 the rank itself."""
    group = mesh.group(rank, axis)
    position, size = group.index(rank), len(group)
    return [(group[(position - t) % size], group[(position + t) % size]) for t in range(size)]
