"""Ring attention: keys and values travel from rank to rank while queries stay.

At step t, rank r holds the keys of rank r - t and attends to them while they go on to r + 1.  Keys
go only as far as some rank needs them (contiguous causal: no rank before their owner does), and
two receive buffers serve any number of ranks.  In the backward pass the gradient of a rank's keys
follows them one step behind in float32, each rank adding its part, and goes home in one hop from
the last rank that had something to add; the owner's part never travels.

Source: Ring Attention (arXiv 2310.01889); layouts make it zigzag or striped (arXiv 2311.09431).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.mask import IntArray
from cpbench.problem import Problem, local_problem
from cpbench.registry import StrategyInfo

if TYPE_CHECKING:
    import torch

    from cpbench.comm import Comm
    from cpbench.layout import Layout
    from cpbench.mask import AttnMask
    from cpbench.merge import BoundOperator

STRATEGY = StrategyInfo(
    name="ring",
    summary="keys travel round a ring, overlapped; steps that the mask leaves empty are skipped",
    source="Ring Attention, arXiv 2310.01889",
    load="cpbench.strategies.ring:Ring",
    merges=True,
)


@dataclass(frozen=True)
class Step:
    """What one rank does at one step; peers are ranks, None where nothing moves.

    Attributes:
        plan: the operator's plan for these keys, None where the mask is empty.
        kv_to, kv_from: where the present keys go, and where the next ones come from.
        grad_starts: the travelling gradient of these keys begins here (else it has arrived).
        grad_to: where it goes after this step: onward, or home.
        grad_from: where the gradient for the next step's keys comes from.
        home_from: where the gradient of our own keys comes home from, after this step.
    """

    plan: Any
    kv_to: int | None
    kv_from: int | None
    grad_starts: bool
    grad_to: int | None
    grad_from: int | None
    home_from: int | None


class Ring:
    def unsupported(self, problem: Problem, mask: AttnMask, layout: Layout) -> str | None:
        return None

    def prepare(
        self, op: BoundOperator, mask: AttnMask, layout: Layout, problem: Problem, rank: int
    ) -> tuple[Step, ...]:
        size, length = layout.world_size, layout.local_len
        first, last = hops(layout.area_matrix(mask))
        local = local_problem(problem, length, length, problem.heads_q, problem.heads_kv)

        def carries_grad(source: int, t: int) -> bool:
            return bool(0 < first[source] <= t <= last[source])

        steps = []
        for t in range(int(last.max()) + 1):
            source, coming = (rank - t) % size, (rank - t - 1) % size
            part = layout.local_mask(mask, rank, [source]) if t <= last[source] else None
            grad = carries_grad(source, t)
            steps.append(
                Step(
                    plan=op.prepare(part, local) if part is not None and part.area else None,
                    kv_to=(rank + 1) % size if t < last[source] else None,
                    kv_from=(rank - 1) % size if t < last[coming] else None,
                    grad_starts=t == first[source],
                    grad_to=((rank + 1) % size if t < last[source] else source) if grad else None,
                    grad_from=(rank - 1) % size
                    if carries_grad(coming, t) and t < last[coming]
                    else None,
                    home_from=(rank + t) % size if t == last[rank] and t > 0 else None,
                )
            )
        return tuple(steps)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: tuple[Step, ...],
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        parts = op.forward_parts(q)
        travel = _Travel(k, v, comm)
        for step in plan:
            travel.start(step)
            if step.plan is not None:
                parts.add(*travel.kv, step.plan)
            travel.finish()
        out, lse = parts.finish()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self,
        dout: torch.Tensor,
        saved: Any,
        plan: tuple[Step, ...],
        op: BoundOperator,
        comm: Comm,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q, k, v, out, lse = saved
        parts = op.backward_parts(dout, q, out, lse)
        travel = _Travel(k, v, comm)

        def buffer() -> torch.Tensor:
            return torch.empty((2, *k.shape), dtype=torch.float32, device=k.device)

        own: torch.Tensor | None = None  # the gradient of our own keys
        home: torch.Tensor | None = None  # what other ranks added to it
        arriving: torch.Tensor | None = None
        moving = comm.exchange([], [])
        for t, step in enumerate(plan):
            travel.start(step)
            dk_dv = parts.add(*travel.kv, step.plan) if step.plan is not None else None
            travel.finish()
            moving.wait()  # what arrived for these keys, posted one step ago
            if t == 0:
                here = own = _stacked(dk_dv, k)
            elif step.grad_starts:
                here = _stacked(dk_dv, k)
            elif arriving is not None:
                here = arriving
                if dk_dv is not None:
                    here[0].add_(dk_dv[0])
                    here[1].add_(dk_dv[1])
            arriving = buffer() if step.grad_from is not None else None
            home = buffer() if step.home_from is not None else home
            sends = [(here, step.grad_to)] if step.grad_to is not None else []
            recvs = []
            if arriving is not None and step.grad_from is not None:
                recvs.append((arriving, step.grad_from))
            if home is not None and step.home_from is not None:
                recvs.append((home, step.home_from))
            moving = comm.exchange(sends, recvs)
        moving.wait()
        assert own is not None
        if home is not None:
            own.add_(home)
        return parts.finish(), own[0].to(k.dtype), own[1].to(v.dtype)


class _Travel:
    """Keys and values on their way round: the ones here, and two buffers in turn."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, comm: Comm) -> None:
        self.kv = (k, v)
        self._comm = comm
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._turn = 0
        self._next: tuple[torch.Tensor, torch.Tensor] | None = None

    def start(self, step: Step) -> None:
        self._next = self._buffer() if step.kv_from is not None else None
        sends = [(x, step.kv_to) for x in self.kv] if step.kv_to is not None else []
        recvs = []
        if self._next is not None and step.kv_from is not None:
            recvs = [(x, step.kv_from) for x in self._next]
        self._handle = self._comm.exchange(sends, recvs)

    def finish(self) -> None:
        self._handle.wait()
        if self._next is not None:
            self.kv = self._next

    def _buffer(self) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._buffers) < 2:
            self._buffers.append(
                (self.kv[0].new_empty(self.kv[0].shape), self.kv[1].new_empty(self.kv[1].shape))
            )
        self._turn += 1
        return self._buffers[(self._turn - 1) % 2]


def hops(area: IntArray) -> tuple[IntArray, IntArray]:
    """First and last hop at which the keys of each rank are needed by another, 0 where never.

    Args:
        area: ``(P, P)`` visible pairs, queries by row.
    """
    size = len(area)
    hop = (np.arange(size)[None, :] + np.arange(size)[:, None]) % size  # (source, t) -> rank
    needed = area[hop, np.arange(size)[:, None]] > 0
    needed[:, 0] = False
    last = np.where(needed.any(1), size - 1 - np.argmax(needed[:, ::-1], axis=1), 0)
    return np.argmax(needed, axis=1), last


def _stacked(dk_dv: tuple[torch.Tensor, torch.Tensor] | None, k: torch.Tensor) -> torch.Tensor:
    import torch

    if dk_dv is None:
        return torch.zeros((2, *k.shape), dtype=torch.float32, device=k.device)
    return torch.stack([x.float() for x in dk_dv])
