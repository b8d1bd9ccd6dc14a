"""Base of strategies that wrap a library: refusals, one differentiable call, its traffic.

Not a strategy.  A library's public function is called as by its users, on leaves that require
gradients; its backward pass is that of autograd.  Wrong results are left for the check to detect.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import QKV, Unsupported
from cpbench.parallel.comm_torch import TorchComm
from cpbench.strategies.libraries.traffic import TrafficRecorder

if TYPE_CHECKING:
    import torch

    from cpbench.core.operator import Gradients, OutLse
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.strategy import Forward
    from cpbench.parallel.world import World


def common_refusal(
    name: str, world: World, masks: tuple[str, ...] = ("full", "causal")
) -> str | None:
    """The reason why a library does not support a world, as far as most share it; else None."""
    mask, layout = world.mask, world.keys
    if mask.kind not in masks:
        return f"{name} takes {' and '.join(masks)} masks; this one is {mask.kind}"
    if mask.seq_q != mask.seq_k:
        return f"{name} takes as many queries as keys, not {mask.seq_q} and {mask.seq_k}"
    if layout.padded_len != layout.seq_len:
        return (
            f"{name} takes no padding: layout {layout.name} does not divide "
            f"{layout.seq_len} tokens evenly by {world.size} ranks"
        )
    return None


def process_group(comm: Comm) -> Any:
    """The process group of a communicator.

    Raises:
        Unsupported: if another transport is used.
    """
    import torch.distributed as dist

    if not isinstance(comm, TorchComm):
        raise Unsupported("libraries call torch.distributed themselves: use the transport torch")
    return comm.group or dist.group.WORLD


_SUBGROUPS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def subgroup(group: Any, members: Sequence[int]) -> Any:
    """A cached process group of a subset of the ranks of another; all members must create their
    groups in the same order."""
    import torch.distributed as dist

    ranks = [dist.get_process_group_ranks(group)[member] for member in members]
    if len(ranks) == dist.get_world_size(group):
        return group
    subgroups = _SUBGROUPS.setdefault(group, {})
    if tuple(ranks) not in subgroups:
        subgroups[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
    return subgroups[tuple(ranks)]


class LibraryStrategy(ABC):
    """Base class of strategies that wrap a library.

    Subclasses plan in ``prepare``; their plans have ``backward``: whether gradients are needed.
    """

    def __init__(self) -> None:
        self._recorder = TrafficRecorder()

    @abstractmethod
    def call(self, qkv: QKV, plan: Any, op: BoundOperator, group: Any) -> OutLse:
        """Call the library: out, and the lse ``[B, H, L]`` if it returns one."""

    @abstractmethod
    def pass_context(self, plan: Any, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        """The context manager of each forward and backward pass."""

    def forward(
        self, qkv: QKV, plan: Any, op: BoundOperator, comm: Comm, need_lse: bool
    ) -> Forward:
        import torch

        group = process_group(comm)
        leaves = QKV(*(x.detach().requires_grad_(plan.backward) for x in qkv))
        with self.pass_context(plan, op, group), torch.set_grad_enabled(plan.backward):
            out, lse = self._recorder.run(
                "fwd", comm.traffic, group, lambda: self.call(leaves, plan, op, group)
            )
        return out.detach(), None if lse is None else lse.detach(), (out, leaves)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> Gradients:
        import torch

        out, leaves = saved
        group = process_group(comm)
        with self.pass_context(plan, op, group):
            # The graph is retained: a backward pass alone is repeated on one forward result.
            dq, dk, dv = self._recorder.run(
                "bwd",
                comm.traffic,
                group,
                lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
            )
        return dq, dk, dv
