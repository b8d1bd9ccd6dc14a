"""The peak memory of a strategy: live bytes while its code runs on tensors without data, those of
the device and those of host memory beside it.

Excludes the temporaries of the operator; includes its results, their float32 sums and all that the
strategy sends, receives or saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.core.operator import MixerBackwardInputs
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.host_memory.account import MemoryAccount, PeakBytes
from cpbench.parallel.partial_results.accumulators import BackwardAccumulator, ForwardAccumulator
from cpbench.parallel.partial_results.repeated_heads import repeat_heads, sum_repeated_heads
from cpbench.parallel.tracing.trace import CountingComm, empty_inputs
from cpbench.parallel.tracing.traced_operator import Traceable, TracedOperator, TracedPlan

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import QKV, BackwardInputs, Gradients, MixerInputs, OutLse
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.world import World


class _ForwardAccumulator(ForwardAccumulator):
    """An accumulator with float32 buffers but no arithmetic, which takes a millisecond per merge on
    tensors without data."""

    def add_partial(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            self._out, partial = self._out.float(), out.float()
            del partial


class _AccumulatingOperator(TracedOperator):
    """An operator that computes nothing but accumulates partial results as a real one does."""

    forward_accumulator_type = _ForwardAccumulator
    backward_accumulator_type = BackwardAccumulator
    output_with_delta = staticmethod(BoundOperator.output_with_delta)
    sum_float32 = BoundOperator.sum_float32
    empty = BoundOperator.empty

    def forward(self, qkv: QKV | MixerInputs, plan: TracedPlan) -> OutLse:
        repeated = [repeat_heads(x, plan.kv_heads) for x in (qkv.k, qkv.v)]
        result = super().forward(qkv, plan)
        del repeated
        return result

    def backward(self, x: BackwardInputs | MixerBackwardInputs, plan: TracedPlan) -> Gradients:
        if isinstance(x, MixerBackwardInputs):
            return super().backward(x, plan)
        k, v = (repeat_heads(kv, plan.kv_heads) for kv in (x.k, x.v))
        dq, dk, dv = super().backward(x._replace(k=k, v=v), plan)
        if plan.kv_heads:
            dk, dv = (sum_repeated_heads(dkv, plan.kv_heads) for dkv in (dk, dv))
        return dq, dk, dv


def peak_bytes(strategy: Strategy, operator: Traceable, world: World, rank: int) -> PeakBytes:
    """The peak bytes of the phases of the problem on one rank, in addition to its inputs (and, for
    ``bwd`` alone, to what the forward pass saved)."""
    op, comm = _AccumulatingOperator(operator), CountingComm(rank, world.size)
    plan = strategy.prepare(op, world, rank)
    qkv, dout = empty_inputs(world, op.info.kind, rank)
    account = MemoryAccount((qkv, dout))
    if world.problem.direction == "bwd":
        _, _, saved = strategy.forward(qkv, plan, op, comm, need_lse=False)
        account = MemoryAccount((qkv, dout, saved))
        with account:
            strategy.backward(dout, saved, plan, op, comm)
        return account.peak
    with account:
        forward_result = strategy.forward(qkv, plan, op, comm, need_lse=False)
        if world.problem.backward:
            strategy.backward(dout, forward_result[2], plan, op, comm)
    del forward_result
    return account.peak
