"""Context-parallel attention on the shards of a process group.

Every call begins with one small all-reduce over Gloo, in which ranks compare what they are about to
compute: so a rank that was given something else makes all ranks raise the same error, and none
waits for messages that never come.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpbench.api.autograd import AttentionFunction
from cpbench.api.inputs import (
    Tensors,
    make_problem,
    need_gradients,
    require_scale,
    require_types,
    under_autocast,
    with_positive_scale,
)
from cpbench.api.prepared import Attention, find_disagreement, require_agreement
from cpbench.api.public_operator import PublicOperator
from cpbench.core.operator import Unsupported
from cpbench.core.registry import strategy_info
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.parallel import layout as layouts
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.process_group import is_alive
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask

MOST_PREPARED = 64  # computations kept for each group


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
    member = _member_of(group)
    call, work, refusal, cause = None, None, "", None
    try:
        require_types(q, k, v, mask)
        require_scale(scale)
        q, k, v = under_autocast(q, k, v)
        q, scale = with_positive_scale(q, scale)
        problem = make_problem(q, k, v, mask, scale, need_gradients(q, k, v))
        method = (Spec.parse(operator), Spec.parse(strategy), Spec.parse(layout), placement)
        call = Call(*method, mask, problem, member.device_of(q, method[1]))
        call, work = member.prepared.get(call, (call, None))  # the former has its checksum
        refusal = _wrong_length(work.world, q, k, v) if work else ""
    except Exception as error:  # whatever it is, the other ranks must hear of it
        refusal, cause = " ".join(str(error).split()) or type(error).__name__, error
    checksum = call.checksum if call else 0
    if not member.control.agree(checksum, ready=work is not None and not refusal):
        try:
            work = member.prepare(call, refusal, (q, k, v))
        except ValueError as refused:
            raise refused from cause
    assert work is not None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return AttentionFunction.apply(q, k, v, work, member)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Call:
    """What all ranks must call with the same values, but for the device."""

    operator: Spec
    strategy: Spec
    layout: Spec
    placement: str
    mask: AttnMask
    problem: Problem
    device: str

    @functools.cached_property
    def text(self) -> str:
        """The values in words, equal on all ranks."""
        method = f"{self.operator} {self.strategy} {self.layout} {self.placement}".rstrip()
        device = self.device.partition(":")[0]
        return f"{method}, mask {self.mask.digest}, {self.problem}, on {device}"

    @functools.cached_property
    def checksum(self) -> int:
        """63 bits."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big") >> 1


class GroupMember:
    """One rank of a process group: its communicators, and the computations prepared on it.

    The first call is collective.
    """

    def __init__(self, group: Any) -> None:
        self.control = Control(group)
        self.comm = TorchComm(group)
        self.ranks_per_node = self.control.ranks_per_node()
        self.prepared: dict[Call, tuple[Call, Attention]] = {}  # the last ones, in their order

    def device_of(self, q: torch.Tensor, strategy: Spec) -> str:
        """The device that computes: that of q, or, where tensors stay in host memory, the current
        GPU if the group is one of GPUs.

        Raises:
            ValueError: if tensors that have to be in host memory are not.
        """
        if not strategy_info(strategy.name).is_offloaded(strategy.kwargs):
            return str(q.device)
        if q.device.type != "cpu":
            raise ValueError(
                f"{strategy} takes q, k and v in host memory (x.cpu().pin_memory()), not on "
                f"{q.device}"
            )
        return "cuda" if self.comm.on_gpus else "cpu"

    def prepare(self, call: Call | None, refusal: str, inputs: Tensors) -> Attention:
        """Prepare a call on all ranks; all of them raise if one refuses or disagrees.

        Args:
            call: None if ``refusal`` says why this rank has none.
            inputs: q, k and v.
        """
        calls = self.control.all_gather((refusal, call.text if call else ""))
        _raise_first([reason for reason, _ in calls], ValueError)
        if message := find_disagreement([(text, 0) for _, text in calls]):
            raise RuntimeError(message)
        assert call is not None
        work, wrong_length = None, ""
        try:
            mask, problem = call.mask, call.problem
            keys = layouts.build(call.layout, mask.seq_k, self.control.size, mask)
            world = World.of(problem, mask, keys, self.ranks_per_node, call.placement)
            wrong_length = _wrong_length(world, *inputs)
            method, rank = (call.operator, call.strategy), self.control.rank
            work = Attention(*method, world, rank, call.device, PublicOperator)
        except ValueError as error:
            refusal = str(error)
        fingerprint = work.fingerprint if work else ("", 0)
        ranks = self.control.all_gather((wrong_length, refusal, fingerprint))
        _raise_first([reason for reason, _, _ in ranks], ValueError)
        _raise_first([reason for _, reason, _ in ranks], Unsupported)
        assert work is not None
        require_agreement(self.control, work, [fingerprint for _, _, fingerprint in ranks])
        work.connect(self.comm)
        self.prepared[call] = (call, work)
        if len(self.prepared) > MOST_PREPARED:
            del self.prepared[next(iter(self.prepared))]
        return work


def _wrong_length(world: World, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Why the local tensors do not fit the layouts, or an empty text."""
    tensors = (("q", q, world.queries), ("k", k, world.keys), ("v", v, world.keys))
    for name, tensor, layout in tensors:
        if tensor.shape[1] != layout.local_len:
            return (
                f"{name} has {tensor.shape[1]} tokens; layout {layout.name} assigns "
                f"{layout.local_len} of {layout.seq_len} to each of {world.size} ranks"
            )
    return ""


def _raise_first(refusals: list[str], kind: type[ValueError]) -> None:
    """Raise the first refusal, with the number of its rank unless all ranks have the same."""
    first = next((rank for rank, reason in enumerate(refusals) if reason), None)
    if first is not None:
        alone = len(set(refusals)) > 1
        raise kind(f"rank {first}: {refusals[first]}" if alone else refusals[first])


_MEMBERS: dict[Any, GroupMember] = {}


def _member_of(group: Any) -> GroupMember:
    """This rank's part of a process group.

    Raises:
        ValueError: if there is none.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised: call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ()
            example = f", such as mesh[{names[-1]!r}]" if names else ""
            raise ValueError(f"group is a DeviceMesh of {group.ndim} dimensions: use one{example}")
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this rank belongs to, not {group!r}")
    if group not in _MEMBERS:
        for other in [other for other in _MEMBERS if not is_alive(other)]:
            member = _MEMBERS.pop(other)
            member.comm.destroy()
            member.control.destroy()
        _MEMBERS[group] = GroupMember(group)
    return _MEMBERS[group]
