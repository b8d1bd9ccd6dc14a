"""The peak memory of a strategy: live bytes while its code runs on tensors without data.

Excludes the temporaries of the operator; includes its results, their float32 sums and all that the
strategy sends, receives or saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.partial_results.accumulators import BackwardAccumulator, ForwardAccumulator
from cpbench.parallel.partial_results.repeated_heads import repeat_heads, sum_repeated_heads
from cpbench.parallel.trace import TraceComm, TracedOperator, TracedPlan, empty_inputs

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.world import World


class _PeakTracker(TorchDispatchMode):
    """Tracks the peak bytes of live storages, apart from those of ``excluded``."""

    def __init__(self, excluded: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        tensors = [x for x in tree_leaves(excluded) if _is_tensor(x)]
        self._excluded = {x.untyped_storage()._cdata for x in tensors}
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if args and result is args[0]:  # in place
            return result
        for x in tree_leaves(result):
            if _is_tensor(x) and x.untyped_storage()._cdata not in self._excluded:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._storages.values()))


def _is_tensor(x: object) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor)


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

    def forward(self, qkv: QKV, plan: TracedPlan) -> OutLse:
        repeated = [repeat_heads(x, plan.kv_heads) for x in (qkv.k, qkv.v)]
        result = super().forward(qkv, plan)
        del repeated
        return result

    def backward(self, x: BackwardInputs, plan: TracedPlan) -> Gradients:
        k, v = (repeat_heads(kv, plan.kv_heads) for kv in (x.k, x.v))
        dq, dk, dv = super().backward(x._replace(k=k, v=v), plan)
        if plan.kv_heads:
            dk, dv = (sum_repeated_heads(dkv, plan.kv_heads) for dkv in (dk, dv))
        return dq, dk, dv


def peak_bytes(strategy: Strategy, operator: OperatorInfo, world: World, rank: int) -> int:
    """The peak bytes of the phases of the problem on one rank, in addition to its inputs (and, for
    ``bwd`` alone, to what the forward pass saved)."""
    op, comm = _AccumulatingOperator(operator), TraceComm(rank, world.size)
    plan = strategy.prepare(op, world, rank)
    qkv, dout = empty_inputs(world)
    tracker = _PeakTracker((qkv, dout))
    if world.problem.direction == "bwd":
        _, _, saved = strategy.forward(qkv, plan, op, comm, need_lse=False)
        tracker = _PeakTracker((qkv, dout, saved))
        with tracker:
            strategy.backward(dout, saved, plan, op, comm)
        return tracker.peak
    with tracker:
        forward_result = strategy.forward(qkv, plan, op, comm, need_lse=False)
        if world.problem.backward:
            strategy.backward(dout, forward_result[2], plan, op, comm)
    del forward_result
    return tracker.peak
