"""What strategies that wrap a library share: refusals, one differentiable call, its traffic.

Not a strategy.  A library's public function is called as its users call it, on leaves that require
gradients; its backward pass is autograd's.  What it computes wrongly is for the check to find.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from cpbench.core.operator import Unsupported
from cpbench.parallel.comm import TorchComm
from cpbench.strategies.libraries.traffic import Listener

if TYPE_CHECKING:
    import torch

    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.comm import Comm
    from cpbench.parallel.world import World

Tensors = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def refusal(name: str, world: World, masks: tuple[str, ...] = ("full", "causal")) -> str | None:
    """Why a library cannot do this, for reasons that most of them share; None if it can."""
    mask, dealt = world.mask, world.keys
    if mask.kind not in masks:
        return f"{name} takes {' and '.join(masks)} masks; this one is {mask.kind}"
    if mask.seq_q != mask.seq_k:
        return f"{name} takes as many queries as keys, not {mask.seq_q} and {mask.seq_k}"
    if dealt.padded_len != dealt.seq_len:
        return (
            f"{name} pads nothing: layout {dealt.name} does not deal {dealt.seq_len} tokens "
            f"evenly to {world.size} ranks"
        )
    return None


def process_group(comm: Comm) -> Any:
    """The process group under a communicator.

    Raises:
        Unsupported: where there is none, under another transport.
    """
    import torch.distributed as dist

    if not isinstance(comm, TorchComm):
        raise Unsupported("libraries call torch.distributed themselves: no other transport will do")
    return comm.group or dist.group.WORLD


_SUBGROUPS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = weakref.WeakKeyDictionary()


def subgroup(group: Any, members: Sequence[int]) -> Any:
    """The process group of some ranks of another, made once; all of its members ask for it, in one
    order of such groups."""
    import torch.distributed as dist

    ranks = [dist.get_process_group_ranks(group)[member] for member in members]
    if len(ranks) == dist.get_world_size(group):
        return group
    known = _SUBGROUPS.setdefault(group, {})
    if tuple(ranks) not in known:
        known[tuple(ranks)] = dist.new_group(ranks, use_local_synchronization=True)
    return known[tuple(ranks)]


class Library(ABC):
    """The part of a strategy that is the same for every library.

    A subclass plans in ``prepare``; its plan has ``backward``: whether gradients are asked for.
    """

    def __init__(self) -> None:
        self._listener = Listener()

    @abstractmethod
    def call(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        op: BoundOperator,
        group: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The library's function: out, and the lse ``[B, H, L]`` where it tells."""

    @abstractmethod
    def within(self, plan: Any, op: BoundOperator, group: Any) -> AbstractContextManager[Any]:
        """What holds during each pass, forward and backward."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: Any,
        op: BoundOperator,
        comm: Comm,
        need_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        import torch

        group = process_group(comm)
        leaves = q, k, v = tuple(x.detach().requires_grad_(plan.backward) for x in (q, k, v))
        with self.within(plan, op, group), torch.set_grad_enabled(plan.backward):
            out, lse = self._listener.run(
                "fwd", comm.traffic, group, lambda: self.call(q, k, v, plan, op, group)
            )
        return out.detach(), None if lse is None else lse.detach(), (out, leaves)

    def backward(
        self, dout: torch.Tensor, saved: Any, plan: Any, op: BoundOperator, comm: Comm
    ) -> Tensors:
        import torch

        out, leaves = saved
        group = process_group(comm)
        with self.within(plan, op, group):
            # The graph is kept: a backward pass alone is repeated on one forward result.
            dq, dk, dv = self._listener.run(
                "bwd",
                comm.traffic,
                group,
                lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
            )
        return dq, dk, dv
