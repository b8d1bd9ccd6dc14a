"""How much memory a strategy itself needs: its code run on tensors without data, live bytes.

What an operator allocates for its own purposes is left out; its results, the float32 sums around
it and everything a strategy sends, receives or keeps are in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cpbench.parallel.bound_operator import BoundOperator, ForwardParts
from cpbench.parallel.trace import TraceComm, TracedOperator, empty_inputs

if TYPE_CHECKING:
    from cpbench.core.registry import OperatorInfo
    from cpbench.parallel.strategy import Strategy
    from cpbench.parallel.world import World


class _Live(TorchDispatchMode):
    """The most bytes of storages that were alive at once, those of ``held`` left out."""

    def __init__(self, held: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held = {x.untyped_storage()._cdata for x in tree_leaves(held) if _is_tensor(x)}
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if args and found is args[0]:  # in place
            return found
        for x in tree_leaves(found):
            if _is_tensor(x) and x.untyped_storage()._cdata not in self._held:
                self._add(x.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._storages.values()))


def _is_tensor(x: object) -> TypeGuard[torch.Tensor]:
    return isinstance(x, torch.Tensor)


class _ForwardParts(ForwardParts):
    """As its base, which merges in float32, without the arithmetic: on tensors without data that
    takes a millisecond each time."""

    def add_result(self, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if self._out is None:
            self._out, self._lse = out, lse
        else:
            self._out, part = self._out.float(), out.float()
            del part


class _Whole(TracedOperator):
    """Computes nothing, but its partial results are kept as real ones are."""

    def forward_parts(self, q: torch.Tensor) -> ForwardParts:
        return _ForwardParts(self, q)

    backward_parts = BoundOperator.backward_parts
    lent_parts = BoundOperator.lent_parts
    add_up = BoundOperator.add_up


def peak_bytes(strategy: Strategy, operator: OperatorInfo, world: World, rank: int) -> int:
    """The most bytes that a pass over the phases of the problem holds at once on one rank, on top
    of its inputs (for ``bwd`` alone, of the forward pass too)."""
    op, comm = _Whole(operator), TraceComm(rank, world.size)
    plan = strategy.prepare(op, world, rank)
    q, k, v, dout = empty_inputs(world)
    live = _Live((q, k, v, dout))
    if world.problem.direction == "bwd":
        _, _, saved = strategy.forward(q, k, v, plan, op, comm, need_lse=False)
        live = _Live((q, k, v, dout, saved))
        with live:
            strategy.backward(dout, saved, plan, op, comm)
        return live.peak
    with live:
        kept = strategy.forward(q, k, v, plan, op, comm, need_lse=False)
        if world.problem.backward:
            strategy.backward(dout, kept[2], plan, op, comm)
    del kept
    return live.peak
