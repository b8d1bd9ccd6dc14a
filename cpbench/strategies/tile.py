"""Tile: rank (u, w) computes the queries of its row against the keys of its column.

The ranks form a mesh, ``keys`` x ``queries``: a rank works on the queries of the ``rows`` ranks of
its queries group and the keys of the P / ``rows`` ranks of its keys group.  The keys stay once
they have come; queries come one rank after another and their results go back at once.  What moves
grows with the square root of the ranks.  One row is the all-to-all form of a ring; P rows send
queries alone, as TokenRing does.

Source: Mesh-Attention (arXiv 2512.20968); TokenRing (arXiv 2412.20501).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.bound_operator import row_delta
from cpbench.parallel.comm import Done
from cpbench.parallel.mesh import Mesh
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.return_results import Returns

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="tile",
    summary="a tile of query rows by key columns for each rank: volume grows with the root of P",
    source="Mesh-Attention, arXiv 2512.20968",
    load="cpbench.strategies.tile:Tile",
    merges=True,
    params=("rows", "grad_dtype"),
    axes=("keys", "queries"),
    variants=("rows=1", "rows=2"),
)


@dataclass(frozen=True)
class Column:
    """The keys of one rank of the keys group: whether ours go to ``target``, and whether those of
    ``source`` come."""

    source: int
    target: int
    sends: bool
    receives: bool


@dataclass(frozen=True)
class Row:
    """The queries of one rank of the queries group.

    Attributes:
        source, target: whose queries come, and to whom ours go, at this turn.
        plans: of the operator, for the keys of every column; None where the mask is empty.
        sends: whether our queries are needed by ``target``.
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
    """Own queries are the first row, own keys the first column."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]


class Tile:
    """The strategy.

    Args:
        rows: ranks whose queries a rank works on; 0 for what sends the least.
        grad_dtype: in which dQ, dK and dV travel back.
    """

    def __init__(self, rows: int = 0, grad_dtype: str = "float32") -> None:
        if rows < 0:
            raise ValueError(f"tile: rows = {rows} must be a number of ranks, or 0 to choose")
        self.rows, self.grad_dtype = rows, gradient_dtype.checked("tile", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        if self.rows and world.size % self.rows:
            return f"tile: rows = {self.rows} must divide the {world.size} ranks"
        return gradient_dtype.refusal("tile", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        rows = self.rows or least_traffic(world.problem, world.keys.local_len, world.size)
        mesh = world.mesh(keys=world.size // rows, queries=rows)
        in_row, in_column = _others(mesh, rank, "queries"), _others(mesh, rank, "keys")
        mine = [source for source, _ in in_column]

        def needed(queries: list[int], keys: list[int]) -> bool:
            return bool(world.part(queries, keys).area)

        def plan(queries: int, keys: int) -> Any:
            part = world.part([queries], [keys])
            return op.prepare(part) if part.area else None

        return Plan(
            rows=tuple(
                Row(
                    source=source,
                    target=target,
                    plans=tuple(plan(source, keys) for keys in mine),
                    sends=needed([rank], list(mesh.group(target, "keys"))),
                )
                for source, target in in_row
            ),
            columns=tuple(
                Column(
                    source=source,
                    target=target,
                    sends=needed(list(mesh.group(target, "queries")), [rank]),
                    receives=needed([queries for queries, _ in in_row], [source]),
                )
                for source, target in in_column
            ),
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Plan,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        import torch

        columns = _Columns(k, v, plan, comm)
        returns = Returns(comm)
        own = op.forward_parts(q)
        for row, (q_s,) in _visits(plan, (q,), comm):
            parts = own if row is plan.rows[0] else op.forward_parts(q_s)
            for i, tile in enumerate(row.plans):
                if tile is not None:
                    k_s, v_s = columns[i]
                    parts.add(k_s, v_s, tile)
            if row is plan.rows[0]:
                continue
            if row.receives:
                returns.send(list(parts.finish()), row.source)
            if row.sends:
                shape = (q.shape[0], q.shape[2], q.shape[1])
                buffers = [q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)]
                returns.expect(buffers, row.target, own.add_result)
            returns.post()
        columns.finish()
        returns.settle()
        out, lse = own.finish()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q, k, v, out, lse = saved
        travels = gradient_dtype.dtype(self.grad_dtype)
        columns = _Columns(k, v, plan, comm)
        grads: dict[int, torch.Tensor] = {}  # dK and dV of each column, float32
        returns = Returns(comm)
        own = op.backward_parts(dout, q, out, lse)
        for row, (q_s, dout_s, delta_s, lse_s) in _visits(
            plan, (q, dout, row_delta(dout, out), lse), comm
        ):
            parts = own
            if row is not plan.rows[0]:
                parts = op.lent_parts(dout_s, q_s, delta_s, lse_s)
            for i, tile in enumerate(row.plans):
                if tile is not None:
                    k_s, v_s = columns[i]
                    grads[i] = op.add_up(grads.get(i), parts.add(k_s, v_s, tile))
            if row is plan.rows[0]:
                continue
            if row.receives:
                returns.send([parts.finish(travels)], row.source)
            if row.sends:
                returns.expect([q.new_empty(q.shape, dtype=travels)], row.target, own.add_result)
            returns.post()
        columns.finish()

        def add(found: torch.Tensor) -> None:
            grads[0] = op.add_up(grads.get(0), found.unbind())

        for i, column in list(enumerate(plan.columns))[1:]:
            if column.receives:
                returns.send([grads[i].to(travels)], column.source)
            if column.sends:
                returns.expect([k.new_empty((2, *k.shape), dtype=travels)], column.target, add)
            returns.post()
        returns.settle()
        dk, dv = grads[0].to(k.dtype) if 0 in grads else (torch.zeros_like(k), torch.zeros_like(v))
        return own.finish(), dk, dv


class _Columns:
    """The keys of every column, all asked for at once and waited for when first used."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, comm: Comm) -> None:
        self._kv: list[Any] = [(k, v)]
        self._handles: list[Any] = [Done()]
        for column in plan.columns[1:]:
            kv = (k.new_empty(k.shape), v.new_empty(v.shape)) if column.receives else ()
            sends = [(x, column.target) for x in (k, v) if column.sends]
            self._handles.append(comm.exchange(sends, [(x, column.source) for x in kv], "keys"))
            self._kv.append(kv)

    def __getitem__(self, i: int) -> Any:
        self._handles[i].wait()
        self._handles[i] = Done()
        return self._kv[i]

    def finish(self) -> None:
        """Wait for those that nobody asked for: our own may still be on their way."""
        for handle in self._handles:
            handle.wait()


def _visits(plan: Plan, queries: tuple[Any, ...], comm: Comm) -> Iterator[tuple[Row, Any]]:
    """Each row and its queries; the next row's are on their way meanwhile, in two buffers."""
    buffers: list[tuple[Any, ...]] = []
    here, coming, handle = queries, queries, Done()
    for turn, row in enumerate(plan.rows):
        handle.wait()
        here = coming
        if turn + 1 < len(plan.rows):
            following = plan.rows[turn + 1]
            if len(buffers) < 2:
                buffers.append(tuple(x.new_empty(x.shape) for x in queries))
            coming = buffers[turn % 2]
            sends = [(x, following.target) for x in queries if following.sends]
            recvs = [(x, following.source) for x in coming if following.receives]
            handle = comm.exchange(sends, recvs, "queries")  # type: ignore[assignment]
        yield row, here


def least_traffic(problem: Problem, tokens: int, size: int) -> int:
    """The number of rows that sends the least in the forward pass."""
    lse = 4 * problem.batch * tokens * problem.heads_q
    q, kv = 2 * problem.q_bytes(tokens) + lse, problem.kv_bytes(tokens)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda rows: (rows - 1) * q + (size // rows - 1) * kv)


def _others(mesh: Mesh, rank: int, axis: str) -> list[tuple[int, int]]:
    """From whom something comes and to whom it goes, turn by turn; the rank itself at turn 0."""
    group = mesh.group(rank, axis)
    me, size = group.index(rank), len(group)
    return [(group[(me - t) % size], group[(me + t) % size]) for t in range(size)]
