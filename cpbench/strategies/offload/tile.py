"""``tile:offload=host``: the queries of a rank's row and the keys of its column are received chunk
by chunk and kept in host memory; results are returned, and merged, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV
from cpbench.parallel.host_memory import allocation
from cpbench.parallel.partial_results.accumulators import row_delta
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.offload import attention, exchange
from cpbench.strategies.offload.grid import Grid, plan_grid, spans
from cpbench.strategies.offload.option import DEFAULT_CHUNK, Offloaded
from cpbench.strategies.offload.stream import Reader, Writer
from cpbench.strategies.tile import Peers, Tile, ring_peers, rows_with_least_traffic

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

    Combine = Callable[[int, int, Iterator[list[torch.Tensor]]], None]


@dataclass(frozen=True)
class Plan:
    """The grid of the tile, and the turns in which queries (``rows``) and keys are exchanged; the
    first of each is the rank itself."""

    grid: Grid
    rows: tuple[Peers, ...]
    columns: tuple[Peers, ...]


class OffloadedTile(Offloaded):
    """The strategy.

    Args:
        chunk: as for ``Offloaded``; rows, grad_dtype: as for ``Tile``.
    """

    name = "tile"

    def __init__(
        self, chunk: int = DEFAULT_CHUNK, rows: int = 0, grad_dtype: str = "float32"
    ) -> None:
        super().__init__(chunk)
        self._whole = Tile(rows, grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return super().unsupported(world) or self._whole.unsupported(world)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> Plan:
        tokens = world.keys.local_len
        count = self._whole.rows or rows_with_least_traffic(world.problem, tokens, world.size)
        mesh = world.mesh(keys=world.size // count, queries=count)
        row_peers, column_peers = (ring_peers(mesh, rank, axis) for axis in ("queries", "keys"))
        rows, columns = ([source for source, _ in x] for x in (row_peers, column_peers))

        def sees(queries: Sequence[int], keys: Sequence[int]) -> bool:
            return bool(world.subproblem(queries, keys).area)

        return Plan(
            plan_grid(op, world.subproblem(rows, columns), self.chunk),
            rows=tuple(
                Peers(
                    source, target, sees([rank], mesh.group(target, "keys")),
                    sees([source], columns),
                )
                for source, target in row_peers
            ),
            columns=tuple(
                Peers(
                    source, target, sees(mesh.group(target, "queries"), [rank]),
                    sees(rows, [source]),
                )
                for source, target in column_peers
            ),
        )  # fmt: skip

    def forward(
        self, qkv: QKV, plan: Plan, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        q_all = self._receive(q, plan.rows, op, comm, "queries")
        k_all, v_all = (self._receive(x, plan.columns, op, comm, "keys") for x in (k, v))
        partial = attention.forward(QKV(q_all, k_all, v_all), plan.grid, op, comm)
        out, lse = self._merge(*partial, plan.rows, op, comm)
        return out, lse, Saved(q_all, k_all, v_all, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Plan, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        _, _, _, out, lse, _ = saved
        local = (dout, self._delta(dout, out, op, comm), lse.transpose(1, 2))
        dout_all, delta_all, lse_all = (
            self._receive(x, plan.rows, op, comm, "queries") for x in local
        )
        dq, dk, dv = attention.backward(
            dout_all, saved._replace(lse=lse_all.transpose(1, 2)), plan.grid, op, comm,
            delta=delta_all, dq_dtype=torch.float32, dkv_dtype=torch.float32,
        )  # fmt: skip
        return (
            self._sum(dq, plan.rows, dout.dtype, op, comm),
            self._sum(dk, plan.columns, dout.dtype, op, comm),
            self._sum(dv, plan.columns, dout.dtype, op, comm),
        )

    def _receive(
        self, x: torch.Tensor, turns: Sequence[Peers], op: BoundOperator, comm: Comm, what: str
    ) -> torch.Tensor:
        """``[B, L, …]`` of this rank, then of the source of each turn, along one axis; zeros where
        it is not received."""
        tokens, chunks = x.shape[1], spans(x.shape[1], self.chunk)
        shape = (x.shape[0], len(turns) * tokens, *x.shape[2:])
        received = allocation.empty(shape, x.dtype, op.device)
        received[:, :tokens].copy_(x)
        sent = [(span,) for turn in turns[1:] if turn.sends for span in chunks]
        reader, writer = Reader((x,), sent, op, comm), Writer(comm)
        for number, turn in enumerate(turns[1:], start=1):
            place = received[:, number * tokens : (number + 1) * tokens]
            if not turn.receives:
                place.zero_()
            for start, end in chunks:
                sends = [(y, turn.target) for y in (reader.next() if turn.sends else ())]
                buffers = [_like(x, end - start, op)] if turn.receives else []
                comm.exchange(sends, [(y, turn.source) for y in buffers], what).wait()
                writer.release()
                for buffer in buffers:
                    writer.write(place[:, start:end], buffer)
        writer.finish()
        return received

    def _merge(
        self,
        out_all: torch.Tensor,
        lse_all: torch.Tensor,
        turns: Sequence[Peers],
        op: BoundOperator,
        comm: Comm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return partial results to the owners of their queries; the merged ones of this rank."""
        import torch

        b, all_tokens, h, dim = out_all.shape
        tokens = all_tokens // len(turns)
        out = allocation.empty((b, tokens, h, dim), out_all.dtype, op.device)
        lse = allocation.empty((b, tokens, h), torch.float32, op.device)
        writer = Writer(comm)

        def merge(start: int, end: int, partials: Iterator[list[torch.Tensor]]) -> None:
            accumulator = None
            for part, part_lse in partials:
                if accumulator is None:
                    accumulator = op.forward_accumulator(part, dim)
                accumulator.add_partial(part, part_lse.transpose(1, 2).contiguous())
            assert accumulator is not None
            merged, merged_lse = accumulator.finish()
            assert merged_lse is not None
            writer.release()
            writer.write(out[:, start:end], merged)
            writer.write(lse[:, start:end], merged_lse.transpose(1, 2).contiguous())

        self._return((out_all, lse_all.transpose(1, 2)), None, turns, merge, op, comm)
        writer.finish()
        return out, lse.transpose(1, 2)

    def _sum(
        self,
        sums: torch.Tensor,
        turns: Sequence[Peers],
        dtype: torch.dtype,
        op: BoundOperator,
        comm: Comm,
    ) -> torch.Tensor:
        """Return float32 sums to the owners of their tokens; those of this rank in ``dtype``."""
        tokens = sums.shape[1] // len(turns)
        result = allocation.empty((sums.shape[0], tokens, *sums.shape[2:]), dtype, op.device)
        send_dtype = gradient_dtype.torch_dtype(self._whole.grad_dtype)
        writer = Writer(comm)

        def add(start: int, end: int, partials: Iterator[list[torch.Tensor]]) -> None:
            total = None
            for (part,) in partials:
                total = part if total is None else total.add_(part)
            assert total is not None
            writer.release()
            writer.write(result[:, start:end], total.to(dtype))

        self._return((sums,), send_dtype, turns, add, op, comm)
        writer.finish()
        return result

    def _return(
        self,
        tensors: Sequence[torch.Tensor],
        send_dtype: torch.dtype | None,
        turns: Sequence[Peers],
        combine: Combine,
        op: BoundOperator,
        comm: Comm,
    ) -> None:
        """Return what was computed for others, chunk by chunk.

        Args:
            tensors: ``[B, turns * L, …]`` each, in host memory.
            send_dtype: in which they are sent, if another one than their own.
            combine: called for every chunk of this rank with its span, and an iterator over the
                partial results for it, its own first; they may be overwritten.
        """
        tokens = tensors[0].shape[1] // len(turns)
        chunks = spans(tokens, self.chunk)
        computed = [number for number, turn in enumerate(turns) if turn.receives or not number]
        order = [
            ((number * tokens + start, number * tokens + end),)
            for start, end in chunks
            for number in computed
        ]
        reader = Reader(tensors, order, op, comm)

        def partials(count: int) -> Iterator[list[torch.Tensor]]:
            yield [x.clone() for x in reader.next()]
            for turn in turns[1:]:
                sends = [
                    (x.to(send_dtype or x.dtype), turn.source)
                    for x in (reader.next() if turn.receives else ())
                ]
                received = [
                    _like(x, count, op, send_dtype) for x in (tensors if turn.sends else ())
                ]
                comm.exchange(sends, [(x, turn.target) for x in received], "results").wait()
                if received:
                    yield received

        for start, end in chunks:
            combine(start, end, partials(end - start))

    def _delta(
        self, dout: torch.Tensor, out: torch.Tensor, op: BoundOperator, comm: Comm
    ) -> torch.Tensor:
        """``row_delta`` of tensors in host memory."""
        import torch

        delta = allocation.empty(dout.shape[:3], torch.float32, op.device)
        chunks = exchange.of_one_rank(dout.shape[1], self.chunk)
        exchange.by_chunk((dout, out), delta, chunks, chunks, row_delta, op, comm)
        return delta


def _like(
    x: torch.Tensor, tokens: int, op: BoundOperator, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Device memory for so many tokens of a host tensor ``[B, S, …]``."""
    return op.empty((x.shape[0], tokens, *x.shape[2:]), dtype or x.dtype)
