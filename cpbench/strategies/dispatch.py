"""Dispatch: every rank is sent the keys that its queries see, and no others.

A group-cast brings them, in stages: those of the next stage travel while the ones before are
computed, the first while a rank attends to its own keys.  In the backward pass keys come again the
same way, and a group-reduce takes their gradients home, stage by stage, where they add up.  The
plan alone says who sends what; with the layout ``dispatch`` it is also made so that all ranks have
the same work and little need travel.

Source: MagiAttention's group collectives and multi-stage overlap (https://github.com/SandAI-org/
MagiAttention); the solver is our own (``cpbench.parallel.dispatch_solver``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.comm import Done
from cpbench.parallel.kv_requirements import Parcels, group_cast
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.collectives import tokens_first
from cpbench.strategies.common.return_results import Returns

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="dispatch",
    summary="send each rank the keys its queries see, and no others, in overlapped stages",
    source="MagiAttention's group collectives",
    load="cpbench.strategies.dispatch:Dispatch",
    layouts=("contiguous", "zigzag", "zigzag_document", "dispatch"),
    merges=True,
    params=("stages", "grad_dtype"),
    variants=("stages=1", "stages=3"),
)


Runs = tuple[tuple[int, int], ...]  # (start, length) of own tokens


@dataclass(frozen=True)
class Stage:
    """What one rank gets and sends in one stage.

    Attributes:
        sends: by receiver, the own tokens that it needs.
        receives: rows (owner, first, length): where the tokens of each owner are laid out.
        tokens: how many come.
        plan: of the operator, for all that comes; None where nothing does.
    """

    sends: tuple[tuple[int, Runs], ...] = ()
    receives: tuple[tuple[int, int, int], ...] = ()
    tokens: int = 0
    plan: Any = None


class Dispatch:
    """The strategy.

    Args:
        stages: in which keys are sent; 0 for the number that the plan does best with.
        grad_dtype: in which dK and dV go home.
    """

    def __init__(self, stages: int = 0, grad_dtype: str = "float32") -> None:
        if stages < 0:
            raise ValueError(f"dispatch: stages = {stages} must be 1 or more, or 0 to choose")
        self.stages, self.grad_dtype = stages, gradient_dtype.checked("dispatch", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal("dispatch", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> tuple[Stage, ...]:
        """The first stage is that of the own keys."""
        own = world.part([rank], [rank])
        if world.size == 1:
            return (Stage(plan=op.prepare(own)),)
        parcels = group_cast(world, self.stages)
        count = int(parcels.stage.max(initial=-1)) + 1
        mine = parcels.of(np.flatnonzero((parcels.receiver == rank) | (parcels.owner == rank)))
        return (
            Stage(plan=op.prepare(own) if own.area else None),
            *(
                _stage(op, world, rank, mine.of(np.flatnonzero(mine.stage == number)))
                for number in range(count)
            ),
        )

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: tuple[Stage, ...],
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        parts = op.forward_parts(q)
        for stage, k_s, v_s in _cast(plan, k, v, comm):
            if stage.plan is not None:
                parts.add(k_s, v_s, stage.plan)
        out, lse = parts.finish()
        return out, lse, (q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: tuple[Stage, ...], op: BoundOperator, comm: Comm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        q, k, v, out, lse = saved
        travels = gradient_dtype.dtype(self.grad_dtype)
        parts = op.backward_parts(dout, q, out, lse)
        returns = Returns(comm)
        for stage, k_s, v_s in _cast(plan, k, v, comm):
            found = parts.add(k_s, v_s, stage.plan) if stage.plan is not None else ()
            if stage is plan[0]:
                own = op.add_up(None, found or (torch.zeros_like(k), torch.zeros_like(v)))
                continue
            grads = [tokens_first(x.to(travels)) for x in found]
            for owner, first, n in stage.receives:
                returns.send([x.narrow(0, first, n) for x in grads], owner)
            for receiver, runs in stage.sends:
                returns.expect(
                    _buffers(k, sum(n for _, n in runs), travels), receiver, _adding(own, runs)
                )
            returns.post()
        returns.settle()
        dk, dv = own.to(k.dtype)
        return parts.finish(), dk, dv


def _stage(op: BoundOperator, world: World, rank: int, parcels: Parcels) -> Stage:
    """Of the parcels of one stage that concern a rank."""
    going = parcels.of(np.flatnonzero(parcels.owner == rank))
    sends: dict[int, list[tuple[int, int]]] = {}
    for receiver, start, n in zip(
        going.receiver.tolist(), going.local.tolist(), going.length.tolist(), strict=True
    ):
        sends.setdefault(receiver, []).append((start, n))
    coming = parcels.of(np.flatnonzero(parcels.receiver == rank))
    counts = np.bincount(coming.owner, weights=coming.length, minlength=world.size).astype(int)
    first = np.cumsum(counts) - counts
    owners = np.flatnonzero(counts)
    keys = np.column_stack([coming.start, coming.length])
    return Stage(
        sends=tuple((receiver, tuple(runs)) for receiver, runs in sends.items()),
        receives=tuple(
            zip(owners.tolist(), first[owners].tolist(), counts[owners].tolist(), strict=True)
        ),
        tokens=int(counts.sum()),
        plan=op.prepare(world.piece(rank, keys)) if len(keys) else None,
    )


def _cast(
    plan: tuple[Stage, ...], k: torch.Tensor, v: torch.Tensor, comm: Comm
) -> Iterator[tuple[Stage, torch.Tensor, torch.Tensor]]:
    """Each stage with its keys and values, ``[B, tokens, G, D]``, while the next are on their way;
    the first are the own ones."""
    mine = [tokens_first(x) for x in (k, v)] if len(plan) > 1 else []
    here: tuple[torch.Tensor, torch.Tensor] = (k, v)
    for i, stage in enumerate(plan):
        coming = list[Any]()
        handle: Handle = Done()
        if i + 1 < len(plan):
            following = plan[i + 1]
            coming = _buffers(k, following.tokens, k.dtype)
            handle = comm.exchange(
                [(_taken(x, runs), to) for to, runs in following.sends for x in mine],
                [
                    (x.narrow(0, first, n), owner)
                    for owner, first, n in following.receives
                    for x in coming
                ],
                "keys",
            )
        yield stage, *here
        handle.wait()
        if coming:
            here = (coming[0].transpose(0, 1), coming[1].transpose(0, 1))


def _buffers(like: torch.Tensor, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two of ``[tokens, B, G, D]``, for keys and values."""
    b, _, g, d = like.shape
    return [like.new_empty((tokens, b, g, d), dtype=dtype) for _ in range(2)]


def _taken(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Some tokens of ``[L, …]``; a copy unless they are one run."""
    import torch

    parts = [x.narrow(0, start, n) for start, n in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _adding(total: torch.Tensor, runs: Runs) -> Any:
    """Adds dK and dV that came home, each ``[tokens, B, G, D]``, to ``[2, B, L, G, D]``."""

    def add(*found: torch.Tensor) -> None:
        for into, x in zip(total, found, strict=True):
            at = 0
            for start, n in runs:
                into.narrow(1, start, n).add_(x.narrow(0, at, n).transpose(0, 1))
                at += n

    return add
