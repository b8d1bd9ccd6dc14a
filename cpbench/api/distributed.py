"""Context-parallel attention on the shards of a process group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cpbench.api.autograd import AttentionFunction
from cpbench.api.group_member import Call, GroupMember, Tensors, member_of
from cpbench.api.inputs import (
    make_problem,
    need_gradients,
    require_scale,
    require_types,
    under_autocast,
    with_positive_scale,
)
from cpbench.api.prepared import Attention
from cpbench.api.public_operator import PublicOperator
from cpbench.core.registry import strategy_info
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


@untraced
def distributed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: AttnMask,
    strategy: Spec | str = "ring",
    layout: Spec | str = "zigzag",
    operator: Spec | str = "bands",
    group: Any = None,
    scale: float | None = None,
    placement: str = "",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Context-parallel attention on local shards, differentiable in out and lse.

    Every rank of ``group`` calls it with the tokens that ``layout`` assigns to it: see
    ``cpbench.layout.build(layout, seq_len, world_size, mask)`` and its ``shard``,
    ``unshard`` and ``positions``.  Under autocast it computes in the dtype of autocast.

    Args:
        q: ``[B, L, H, D]``; k: ``[B, L, G, D]``; v: ``[B, L, G, Dv]``; L is the layout's
            ``local_len``.  In host memory, best pinned, for a strategy with ``offload=host``.
        mask: the global mask; if it has fewer queries than keys, the layout assigns both, each by
            its own length.
        strategy, layout, operator: names, with parameters.
        group: a torch.distributed group or a ``DeviceMesh`` of one dimension; the default group
            unless given.
        scale: multiplies the scores; ``D ** -0.5`` unless given.
        placement: the axis of the strategy's mesh to place inside nodes.

    Returns:
        out ``[B, L, H, Dv]`` and lse ``[B, H, L]``.

    Raises:
        ValueError: on every rank, if the tensors of one do not fit the mask or layout, or a name is
            unknown.
        Unsupported: on every rank, with the reason, before anything is sent.
        RuntimeError: on every rank, if ranks disagree on the problem.  In the backward pass, for a
            gradient through the lse of an operator or strategy that cannot compute it, and for a
            second derivative.
    """
    member = member_of(group)

    def read() -> tuple[AttentionCall, Tensors]:
        require_types(q, k, v, mask)
        require_scale(scale)
        cast, keys, values = under_autocast(q, k, v)
        queries, positive = with_positive_scale(cast, scale)
        backward = need_gradients(queries, keys, values)
        problem = make_problem(queries, keys, values, mask, positive, backward)
        method = (Spec.parse(operator), Spec.parse(strategy), Spec.parse(layout), placement)
        device = device_of(member, queries, method[1])
        call = AttentionCall(*method, mask, problem, device)
        return call, {"q": queries, "k": keys, "v": values}

    work, tensors = member.agree(read)
    shards = (x.contiguous() for x in tensors.values())
    return AttentionFunction.apply(*shards, work, member)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class AttentionCall(Call[Attention]):
    """A call of :func:`distributed_attention`."""

    operator: Spec
    strategy: Spec
    layout: Spec
    placement: str
    mask: AttnMask
    problem: Problem
    device: str

    @property
    def text(self) -> str:
        method = f"{self.operator} {self.strategy} {self.layout} {self.placement}".rstrip()
        device = self.device.partition(":")[0]
        return f"{method}, mask {self.mask.digest}, {self.problem}, on {device}"

    def world(self, member: GroupMember) -> World:
        mask = self.mask
        keys = layouts.build(self.layout, mask.seq_k, member.control.size, mask)
        return World.of(self.problem, mask, keys, member.ranks_per_node, self.placement)

    def prepare(self, world: World, member: GroupMember, tensors: Tensors) -> Attention:
        method, rank = (self.operator, self.strategy), member.control.rank
        return Attention(*method, world, rank, self.device, PublicOperator)


def device_of(member: GroupMember, q: torch.Tensor, strategy: Spec) -> str:
    """The device that computes: that of q, or, where tensors stay in host memory, the current GPU
    if the group is one of GPUs.

    Raises:
        ValueError: if tensors that have to be in host memory are not.
    """
    if not strategy_info(strategy.name).is_offloaded(strategy.kwargs):
        return str(q.device)
    if q.device.type != "cpu":
        raise ValueError(
            f"{strategy} takes q, k and v in host memory (x.cpu().pin_memory()), not on {q.device}"
        )
    return "cuda" if member.comm.on_gpus else "cpu"
