"""Dispatch: every rank receives only the keys that its queries see.

A group-cast sends them in stages: those of the next stage are in transfer while the previous stage
is computed, the first while a rank attends to its local keys.  In the backward pass the keys are
sent again, and a group-reduce returns their gradients stage by stage to their owners, which add
them up.  The plan fixes all messages; the layout ``dispatch`` also balances the work of the ranks
and keeps the traffic low.

Source: MagiAttention's group collectives and multi-stage overlap (https://github.com/SandAI-org/
MagiAttention); the solver is our own (``cpbench.parallel.dispatch_solver``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import StrategyInfo
from cpbench.parallel.comm import CompletedHandle
from cpbench.parallel.kv_requirements import KeyTransfers, group_cast_transfers
from cpbench.parallel.partial_results.accumulators import unpacked
from cpbench.parallel.strategy import Saved
from cpbench.strategies.common import gradient_dtype
from cpbench.strategies.common.collectives import to_token_major
from cpbench.strategies.common.return_results import ResultExchange

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, Gradients
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm, Handle
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World

STRATEGY = StrategyInfo(
    name="dispatch",
    summary="send each rank only the keys that its queries see, in overlapped stages",
    source="MagiAttention's group collectives",
    load="cpbench.strategies.dispatch:Dispatch",
    layouts=("contiguous", "zigzag", "zigzag_document", "dispatch"),
    value_dims=True,
    merges=True,
    params=("stages", "grad_dtype"),
    variants=("stages=1", "stages=3"),
)


Runs = tuple[tuple[int, int], ...]  # (start, length) of local tokens


@dataclass(frozen=True)
class Stage:
    """The messages and the computation of one rank in one stage.

    Attributes:
        sends: by receiver, the local tokens that it requires.
        receives: rows (owner, first, length): position of each owner's tokens in the buffer.
        tokens: number of tokens received.
        plan: of the operator, for all received keys; None if there are none.
    """

    sends: tuple[tuple[int, Runs], ...] = ()
    receives: tuple[tuple[int, int, int], ...] = ()
    tokens: int = 0
    plan: Any = None


class Dispatch:
    """The strategy.

    Args:
        stages: number of stages in which keys are sent; 0 chooses the best for the plan.
        grad_dtype: in which dK and dV are sent.
    """

    def __init__(self, stages: int = 0, grad_dtype: str = "float32") -> None:
        if stages < 0:
            raise ValueError(f"dispatch: stages = {stages} must be 1 or more, or 0 to choose")
        self.stages, self.grad_dtype = stages, gradient_dtype.validate("dispatch", grad_dtype)

    def unsupported(self, world: World) -> str | None:
        return gradient_dtype.refusal("dispatch", self.grad_dtype, world.problem)

    def prepare(self, op: BoundOperator, world: World, rank: int) -> tuple[Stage, ...]:
        """Plan the stages; the first one computes with the local keys."""
        local = world.subproblem([rank], [rank])
        if world.size == 1:
            return (Stage(plan=op.prepare(local)),)
        transfers = group_cast_transfers(world, self.stages)
        count = int(transfers.stage.max(initial=-1)) + 1
        concerned = (transfers.receiver == rank) | (transfers.owner == rank)
        transfers = transfers.select(np.flatnonzero(concerned))
        by_stage = [
            transfers.select(np.flatnonzero(transfers.stage == stage)) for stage in range(count)
        ]
        return (
            Stage(plan=op.prepare(local) if local.area else None),
            *(_plan_stage(op, world, rank, stage_transfers) for stage_transfers in by_stage),
        )

    def forward(
        self, qkv: QKV, plan: tuple[Stage, ...], op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        q, k, v = qkv
        accumulator = op.forward_accumulator(q, v.shape[3])
        for stage, k_s, v_s in _group_cast(plan, k, v, comm):
            if stage.plan is not None:
                accumulator.add(k_s, v_s, stage.plan)
        out, lse = accumulator.finish()
        return out, lse, Saved(q, k, v, out, lse)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: tuple[Stage, ...], op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        q, k, v, out, lse, _ = saved
        send_dtype = gradient_dtype.torch_dtype(self.grad_dtype)
        accumulator = op.backward_accumulator(dout, q, out, lse)
        results = ResultExchange(comm)
        for stage, k_s, v_s in _group_cast(plan, k, v, comm):
            gradients: Sequence[torch.Tensor] = ()
            if stage.plan is not None:
                gradients = accumulator.add(k_s, v_s, stage.plan)
            if stage is plan[0]:
                gradients = gradients or (torch.zeros_like(k), torch.zeros_like(v))
                dk_dv = op.sum_float32(None, gradients)
                continue
            gradients = [to_token_major(x.to(send_dtype)) for x in gradients]
            for owner, first, n in stage.receives:
                results.send([x.narrow(0, first, n) for x in gradients], owner)
            for receiver, runs in stage.sends:
                buffers = _kv_buffers(k, v, sum(n for _, n in runs), send_dtype)
                sums = unpacked(dk_dv, [k.shape, v.shape])
                results.receive(buffers, receiver, _gradient_adder(sums, runs))
            results.post()
        results.wait()
        dk, dv = unpacked(dk_dv.to(k.dtype), [k.shape, v.shape])
        return accumulator.finish(), dk, dv


def _plan_stage(op: BoundOperator, world: World, rank: int, transfers: KeyTransfers) -> Stage:
    """Plan one stage of a rank from the transfers that it takes part in."""
    sent = transfers.select(np.flatnonzero(transfers.owner == rank))
    sends: dict[int, list[tuple[int, int]]] = {}
    for receiver, start, n in zip(
        sent.receiver.tolist(), sent.local.tolist(), sent.length.tolist(), strict=True
    ):
        sends.setdefault(receiver, []).append((start, n))
    received = transfers.select(np.flatnonzero(transfers.receiver == rank))
    counts = np.bincount(received.owner, weights=received.length, minlength=world.size).astype(int)
    first = np.cumsum(counts) - counts
    owners = np.flatnonzero(counts)
    keys = np.column_stack([received.start, received.length])
    return Stage(
        sends=tuple((receiver, tuple(runs)) for receiver, runs in sends.items()),
        receives=tuple(
            zip(owners.tolist(), first[owners].tolist(), counts[owners].tolist(), strict=True)
        ),
        tokens=int(counts.sum()),
        plan=op.prepare(world.key_subset(rank, keys)) if len(keys) else None,
    )


def _group_cast(
    plan: tuple[Stage, ...], k: torch.Tensor, v: torch.Tensor, comm: Comm
) -> Iterator[tuple[Stage, torch.Tensor, torch.Tensor]]:
    """Iterate over stages with their keys and values, ``[B, tokens, G, …]``, first the local ones,
    while those of the next stage are in transfer."""
    local = [to_token_major(x) for x in (k, v)] if len(plan) > 1 else []
    current: tuple[torch.Tensor, torch.Tensor] = (k, v)
    for i, stage in enumerate(plan):
        received = list[Any]()
        handle: Handle = CompletedHandle()
        if i + 1 < len(plan):
            next_stage = plan[i + 1]
            received = _kv_buffers(k, v, next_stage.tokens, k.dtype)
            handle = comm.exchange(
                [(_select_runs(x, runs), peer) for peer, runs in next_stage.sends for x in local],
                [
                    (x.narrow(0, first, n), owner)
                    for owner, first, n in next_stage.receives
                    for x in received
                ],
                "keys",
            )
        yield stage, *current
        handle.wait()
        if received:
            current = (received[0].transpose(0, 1), received[1].transpose(0, 1))


def _kv_buffers(
    k: torch.Tensor, v: torch.Tensor, tokens: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Make buffers ``[tokens, B, G, …]`` for keys and values like these."""
    return [x.new_empty((tokens, len(x), *x.shape[2:]), dtype=dtype) for x in (k, v)]


def _select_runs(x: torch.Tensor, runs: Runs) -> torch.Tensor:
    """Select runs of tokens of ``[L, …]``; a copy unless it is one run."""
    import torch

    slices = [x.narrow(0, start, n) for start, n in runs]
    return slices[0] if len(slices) == 1 else torch.cat(slices)


def _gradient_adder(sums: Sequence[torch.Tensor], runs: Runs) -> Any:
    """A function that adds returned dK and dV, ``[tokens, B, G, …]``, to ``[B, L, G, …]`` each."""

    def add(*gradients: torch.Tensor) -> None:
        for local_sum, gradient in zip(sums, gradients, strict=True):
            offset = 0
            for start, n in runs:
                run = gradient.narrow(0, offset, n).transpose(0, 1)
                local_sum.narrow(1, start, n).add_(run)
                offset += n

    return add
