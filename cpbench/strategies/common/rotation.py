"""Blocks that rotate round a ring of ranks, and gradients that follow them.  Not a strategy.

At step t of a plain ring, rank r holds the block of rank r - t.  With windows of w ranks it is a
double ring: in outer round o the block of window W - o rotates inside a window for w steps, while
the block of the next window is sent across during the whole round.  A plain ring is one window.

Hops across windows take a lane of their own (``Comm.lane``): on a GPU, those inside would wait for
them.  All others of a ring go to the same neighbour and would only share its link.

A block is sent only as far as some rank needs it.  Its gradient starts at the first rank (in each
round) that contributes to it, follows it one step behind, and is sent home in one hop from the
last; the contribution of its owner is never sent.

Source: Ring Attention (arXiv 2310.01889); double ring: LoongTrain (arXiv 2406.18485).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.masks.slices import BoolArray, IntArray
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.partial_results.accumulators import unpacked

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle

    Batch = tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]  # sends, receives

NO_PEER = -1


WINDOWS = "windows"  # the lane of hops across windows


class Step(NamedTuple):
    """One ring step of one rank; peers are ranks, ``NO_PEER`` where nothing is sent.

    Attributes:
        outer: the outer round.
        source: owner of the current block.
        computes: whether this rank computes with the current block.
        send_to: receiver of the current block; recv_from: sender of the next block.
        outer_send_to, outer_recv_from: the same across windows, during a whole round.
        grad_send_to: receiver of the block's gradient after this step, the next rank or the owner.
        grad_recv_from: sender of the gradient of the next step's block.
        home_recv_from: sender of a gradient of the local block, after this step.
        plan: the plan of the operator if the rank computes.
    """

    outer: int
    source: int
    computes: bool
    send_to: int
    recv_from: int
    outer_send_to: int
    outer_recv_from: int
    grad_send_to: int
    grad_recv_from: int
    home_recv_from: int
    plan: Any = None


@dataclass(frozen=True)
class Rotation:
    """The ring steps of one rank, and whether the ring has several windows."""

    steps: tuple[Step, ...]
    windows: bool

    def lane_across(self, comm: Comm) -> Comm:
        """What hops across windows are sent over; all ranks of the ring call it."""
        return comm.lane(WINDOWS) if self.windows else comm


def plan_rotation(
    needed: BoolArray, rank: int, window: int, plan: Callable[[int], Any]
) -> Rotation:
    """The ring steps of one rank, without those in which it neither computes nor communicates.

    Args:
        needed: ``(P, P)`` true where the rank of the row computes with the block of the column.
        window: ranks per window, a divisor of P.
        plan: makes the operator's plan for a block, given its owner.
    """
    table = _cached_schedule(needed.tobytes(), len(needed), window)[rank]
    steps = []
    for row in table[(table[:, 2] > 0) | (table[:, 3:].max(axis=1) > NO_PEER)].tolist():
        steps.append(Step._make([*row, plan(row[1]) if row[2] else None]))
    return Rotation(tuple(steps), window < len(needed))


@functools.lru_cache(maxsize=4)
def _cached_schedule(needed: bytes, size: int, window: int) -> IntArray:
    """:func:`_compute_schedule`, cached for all ranks."""
    return _compute_schedule(np.frombuffer(needed, dtype=np.bool_).reshape(size, size), window)


def _compute_schedule(needed: BoolArray, window: int) -> IntArray:
    """The fields of every step of every rank, ``(ranks, steps, 10)``.

    Legend of axes: (block s, round o, turn i) or (round o, turn i, rank r).
    """
    size, rounds = len(needed), len(needed) // window
    s, o, i = np.ogrid[:size, :rounds, :window]
    holder = (s // window + o) % rounds * window + (s % window + i) % window  # (s, o, i)
    need = needed[holder, s]
    need[:, 0, 0] = False  # the owner itself
    any_need = need.any(2)
    first = np.argmax(need, axis=2)[:, :, None]
    last = np.where(any_need, window - 1 - np.argmax(need[:, :, ::-1], axis=2), NO_PEER)[:, :, None]
    last_round = np.where(any_need.any(1), rounds - 1 - np.argmax(any_need[:, ::-1], axis=1), 0)
    next_holder = np.roll(holder, -1, axis=2)

    moves_on = i < last
    crosses_window = o < last_round[:, None, None]  # (s, o, 1)
    grad = any_need[:, :, None] & (first <= i) & (i <= last)
    goes_home = grad & (i == last)

    r, o, i = np.arange(size)[None, None, :], *np.ogrid[:rounds, :window]
    o, i = o[:, :, None], i[:, :, None]
    source = (r // window - o) % rounds * window + (r % window - i) % window  # (o, i, r)
    rank = np.broadcast_to(r, source.shape)
    next_source = np.roll(source, -1, axis=1)  # of the next turn; not used after the last one
    next_outer = np.broadcast_to(np.roll(source[:, :1], -1, axis=0), source.shape)
    has_next = i < window - 1

    def at(block: IntArray, table: Any) -> Any:
        """Values of ``table`` (by block, round, turn) for ``block`` at the current turn."""
        return np.broadcast_to(table, (size, rounds, window))[block, o, i]

    def peer_if(condition: Any, peer: Any) -> Any:
        return np.where(condition, peer, NO_PEER)

    fields = [
        np.broadcast_to(o, source.shape),
        source,
        needed[rank, source],
        peer_if(at(source, moves_on), at(source, next_holder)),
        peer_if(at(next_source, moves_on) & has_next, at(next_source, holder)),
        peer_if(at(source, crosses_window) & (i == 0), (r + window) % size),
        peer_if(at(next_outer, crosses_window) & (i == 0), (r - window) % size),
        peer_if(at(source, grad), np.where(at(source, goes_home), source, at(source, next_holder))),
        peer_if(at(next_source, grad & moves_on) & has_next, at(next_source, holder)),
        peer_if(at(rank, goes_home), at(rank, holder)),
    ]
    table = np.stack([field.astype(np.int32) for field in fields], axis=-1)
    return table.reshape(rounds * window, size, len(fields)).transpose(1, 0, 2).copy()


def rotate_blocks(
    rotation: Rotation, block: tuple[torch.Tensor, ...], comm: Comm, what: str = "keys"
) -> Iterator[tuple[Step, Any]]:
    """Iterate over the steps of a rotation with their blocks, while the next ones are in transfer.

    Uses two buffers in a ring of any size, four in a double ring.  ``what`` names the content.
    """
    local, current, outer_block = block, block, None
    across = rotation.lane_across(comm)
    free_buffers: list[tuple[torch.Tensor, ...]] = []
    outer_handle: Any = None
    outer_sent_block: tuple[torch.Tensor, ...] | None = None  # still being sent to the next window
    outer = 0

    def buffer() -> tuple[torch.Tensor, ...]:
        return free_buffers.pop() if free_buffers else tuple(x.new_empty(x.shape) for x in local)

    def release(old: tuple[torch.Tensor, ...]) -> None:
        if old is not local and old is not outer_sent_block:
            free_buffers.append(old)

    for step in rotation.steps:
        if step.outer != outer:
            outer = step.outer
            if outer_handle is not None:
                outer_handle.wait()
                last, outer_sent_block = outer_sent_block, None
                if last is not None and last is not current:
                    release(last)
                outer_handle = None
            if outer_block is not None:
                release(current)
                current, outer_block = outer_block, None
        if step.outer_send_to != NO_PEER or step.outer_recv_from != NO_PEER:
            sends = []
            if step.outer_send_to != NO_PEER:
                sends = [(x, step.outer_send_to) for x in current]
            outer_sent_block = current if sends else None
            outer_block = buffer() if step.outer_recv_from != NO_PEER else None
            recvs = [(x, step.outer_recv_from) for x in outer_block or ()]
            outer_handle = across.exchange(sends, recvs, f"{what} of another window")
        next_block = buffer() if step.recv_from != NO_PEER else None
        sends = [(x, step.send_to) for x in current] if step.send_to != NO_PEER else []
        recvs = [(x, step.recv_from) for x in next_block or ()]
        handle = comm.exchange(sends, recvs, what) if sends or recvs else CompletedHandle()
        yield step, current
        handle.wait()
        if next_block is not None:
            release(current)
            current = next_block
    if outer_handle is not None:
        outer_handle.wait()


class GradientRotation:
    """Gradients of rotating blocks, which follow them one step behind.

    Args:
        shapes: of the gradients of one block, which travel as one flat tensor.
        dtype: in which they are sent; sums on a rank are always float32.
        op: the operator whose results are added up.
        rotation: of the blocks.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        op: BoundOperator,
        rotation: Rotation,
        comm: Comm,
    ) -> None:
        self._shapes, self._dtype, self._op, self._comm = shapes, dtype, op, comm
        self._numel = sum(map(math.prod, shapes))
        self._across = rotation.lane_across(comm)
        self._local: torch.Tensor | None = None
        self._incoming: torch.Tensor | None = None
        self._home_gradient: torch.Tensor | None = None
        self._handles: list[Handle] = []

    def add(self, step: Step, gradients: Sequence[torch.Tensor] | None) -> None:
        """Add the gradients computed at a step (or None), and post the messages of that step."""
        self._wait()
        current, self._incoming = self._incoming, None
        if gradients is not None and step.source == self._comm.rank:
            self._local = self._op.sum_float32(self._local, gradients)
        elif gradients is not None:
            current = self._op.sum_float32(None if current is None else current.float(), gradients)
        here: Batch = ([], [])
        home: Batch = ([], []) if step.outer else here  # the owner is in another window, or not
        if step.grad_send_to != NO_PEER:
            assert current is not None
            sends, _ = home if step.grad_send_to == step.source else here
            sends.append((current.to(self._dtype), step.grad_send_to))
        if step.grad_recv_from != NO_PEER:
            self._incoming = self._buffer(self._dtype)
            here[1].append((self._incoming, step.grad_recv_from))
        if step.home_recv_from != NO_PEER:
            self._home_gradient = self._buffer(self._dtype)
            home[1].append((self._home_gradient, step.home_recv_from))
        self._handles = [self._comm.exchange(*here, "gradients")] if any(here) else []
        if home is not here and any(home):
            self._handles.append(self._across.exchange(*home, "gradients"))

    def finish(self) -> list[torch.Tensor]:
        """The gradients of the local block, float32."""
        import torch

        self._wait()
        if self._local is None:
            self._local = self._buffer(torch.float32).zero_()
        return unpacked(self._local, self._shapes)

    def _wait(self) -> None:
        """Wait for the exchange of the previous step."""
        for handle in self._handles:
            handle.wait()
        if self._home_gradient is not None:
            arrived, self._home_gradient = self._home_gradient, None
            self._local = arrived.float() if self._local is None else self._local.add_(arrived)

    def _buffer(self, dtype: torch.dtype) -> torch.Tensor:
        return self._op.empty((self._numel,), dtype)
