"""Tensors in host memory that pass through device buffers in chunks.

A copy to the device is posted one chunk ahead and waited for at the use of the chunk, a copy to the
host is waited for after the next one has been computed: both overlap with computation.

Legend: B batch, S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.host_memory import allocation
from cpbench.parallel.partial_results.accumulators import unpacked

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.strategies.offload.grid import Span, Visit


class DeviceBuffers:
    """Device memory for one chunk of each of some host tensors ``[B, S, …]``."""

    def __init__(self, tensors: Sequence[torch.Tensor], tokens: int, device: str) -> None:
        import torch

        self._tensors = tensors
        self._memory = [
            torch.empty(x[:, :tokens].numel(), dtype=x.dtype, device=device) for x in tensors
        ]

    def views(self, tokens: int) -> list[torch.Tensor]:
        """The memory as contiguous tensors of so many tokens."""
        views = []
        for x, memory in zip(self._tensors, self._memory, strict=True):
            shape = (x.shape[0], tokens, *x.shape[2:])
            views.append(memory[: math.prod(shape)].view(shape))
        return views


class Reader:
    """Reads chunks of host tensors ``[B, S, …]`` in a known order.

    Args:
        order: the chunks, each as the spans of tokens that it consists of.
        buffers: 2 to read one chunk ahead; 1 to read a chunk when it is asked for.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        order: Sequence[Sequence[Span]],
        op: BoundOperator,
        comm: Comm,
        buffers: int = 2,
    ) -> None:
        self._tensors, self._order, self._comm = tensors, order, comm
        largest = max(map(_tokens, order), default=0)
        self._buffers = [
            DeviceBuffers(tensors, largest, op.device) for _ in range(min(buffers, len(order)))
        ]
        self._posted: list[tuple[list[torch.Tensor], list[Handle]]] = []
        self._turn = 0
        if buffers > 1:
            self._post()

    def next(self) -> list[torch.Tensor]:
        """The next chunk of each tensor, in a buffer that is overwritten by the second one after it
        (or, with one buffer, by the next)."""
        if not self._posted:
            self._post()
        views, handles = self._posted.pop()
        _wait_for_all(handles)
        if len(self._buffers) > 1:
            self._post()
        return views

    def _post(self) -> None:
        """Start to copy the next chunk, if there is one more."""
        if self._turn == len(self._order):
            return
        chunk = self._order[self._turn]
        views = self._buffers[self._turn % len(self._buffers)].views(_tokens(chunk))
        handles = []
        for view, x in zip(views, self._tensors, strict=True):
            offset = 0
            for start, end in chunk:
                target = view[:, offset : offset + end - start]
                handles.append(self._comm.to_device(target, x[:, start:end]))
                offset += end - start
        self._posted.append((views, handles))
        self._turn += 1


class Writer:
    """Writes results to host tensors; they are kept until :meth:`release`."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._handles: list[Handle] = []
        self._kept: list[torch.Tensor] = []

    def write(self, out: torch.Tensor, x: torch.Tensor) -> Handle:
        """Start to copy the device tensor x to ``out``."""
        handle = self._comm.to_host(out, x)
        self._handles.append(handle)
        self._kept.append(x)
        return handle

    def release(self) -> None:
        """Wait for what has been posted, so that its device memory is free again."""
        _wait_for_all(self._handles)
        self._kept.clear()

    def finish(self) -> None:
        """Block until the CPU may read what was written."""
        self.release()
        self._comm.finish_copies()


class GradientSums:
    """float32 sums of dk and dv of the chunks of keys on the device, which are kept in host memory
    between their visits, and written to dk and dv after the last one.

    Args:
        visits, spans: of the chunks of keys.
        dk, dv: host tensors of the results, of any dtype.
    """

    def __init__(
        self,
        visits: Sequence[Visit],
        spans: Sequence[Span],
        dk: torch.Tensor,
        dv: torch.Tensor,
        op: BoundOperator,
        writer: Writer,
        comm: Comm,
    ) -> None:
        import torch

        self._visits, self._spans, self._results = visits, spans, (dk, dv)
        self._comm, self._writer = comm, writer
        sizes = {visit.column: sum(x.numel() for x in self._parts(visit)) for visit in visits}
        self._kept = {
            visit.column: allocation.empty((sizes[visit.column],), torch.float32, op.device)
            for visit in visits
            if not visit.last
        }
        self._buffers = [
            torch.empty(max(sizes.values()), dtype=torch.float32, device=op.device)
            for _ in range(min(2, len(visits)))
        ]
        self._sizes, self._turn = sizes, -1
        self._loading: Handle = CompletedHandle()
        self._leaving: list[list[Handle]] = [[] for _ in self._buffers]  # copies that read a buffer
        self._stored: dict[int, Handle] = {}  # copies that write kept sums

    def next(self) -> torch.Tensor:
        """The flat sums of dk and dv of the next visit; those of the last one leave the device."""
        if self._turn >= 0:
            self._store()
        self._turn += 1
        self._loading.wait()
        total, leaving = self._buffer(self._turn)
        _wait_for_all(leaving)
        if self._visits[self._turn].first:
            total.zero_()
        self._load_next()
        return total

    def finish(self) -> None:
        """Write the sums of the last visit."""
        if self._visits:
            self._store()
        for leaving in self._leaving:
            _wait_for_all(leaving)

    def _buffer(self, turn: int) -> tuple[torch.Tensor, list[Handle]]:
        index = turn % len(self._buffers)
        return self._buffers[index][: self._sizes[self._visits[turn].column]], self._leaving[index]

    def _parts(self, visit: Visit) -> list[torch.Tensor]:
        """The results of a chunk."""
        start, end = self._spans[visit.column]
        return [x[:, start:end] for x in self._results]

    def _load_next(self) -> None:
        """Start to copy the sums of the next visit to the device, if there are any."""
        self._loading = CompletedHandle()
        following = self._visits[self._turn + 1 : self._turn + 2]
        for visit in following:
            if not visit.first:
                buffer, leaving = self._buffer(self._turn + 1)
                after = [*leaving, self._stored[visit.column]]
                self._loading = self._comm.to_device(buffer, self._kept[visit.column], after)

    def _store(self) -> None:
        """Start to copy the sums of the present visit to the host."""
        visit = self._visits[self._turn]
        total, leaving = self._buffer(self._turn)
        if visit.last:
            parts = self._parts(visit)
            for part, x in zip(parts, unpacked(total, [x.shape for x in parts]), strict=True):
                leaving.append(self._writer.write(part, x.to(part.dtype)))
        else:
            self._stored[visit.column] = self._comm.to_host(self._kept[visit.column], total)
            leaving.append(self._stored[visit.column])


def _wait_for_all(handles: list[Handle]) -> None:
    for handle in handles:
        handle.wait()
    handles.clear()


def _tokens(chunk: Sequence[Span]) -> int:
    return sum(end - start for start, end in chunk)
