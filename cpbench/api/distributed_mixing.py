"""Context-parallel sequence mixers on the shards of a process group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from cpbench.api.autograd import no_autocast, some_rank_has
from cpbench.api.group_member import Call, GroupMember, Tensors, member_of
from cpbench.api.inputs import make_problem, require_scale, under_autocast
from cpbench.api.mixing import (
    MaskLike,
    find_mask,
    require_inputs,
    require_mask,
)
from cpbench.api.prepared_mixer import PreparedMixer, find_strategy
from cpbench.core.operator import MixerInputs
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.kernels.mixers import forms
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

if TYPE_CHECKING:
    from cpbench.core.problem import Problem
    from cpbench.masks.attn_mask import AttnMask


@untraced
def distributed_mix(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    mixer: Spec | str = "gated_deltanet",
    mask: MaskLike | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    strategy: Spec | str = "scan",
    layout: Spec | str = "contiguous",
    group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`cpbench.mix` on local shards, differentiable in all tensors and both results.

    Every rank of ``group`` calls it with the tokens that ``layout`` assigns to it: see
    ``cpbench.layout.build(layout, seq_len, world_size, mask)`` and its ``shard``, ``unshard`` and
    ``positions``.

    Args:
        q, k: ``[B, L, H, K]``; v: ``[B, L, H, V]``; L is the layout's ``local_len``.
        g: log decay, ``[B, L, H]`` or ``[B, L, H, K]``; beta: ``[B, L, H]``; as for ``mix``.
        mixer, scale: as for ``mix``.
        mask: causal (unless given) or causal within documents; ``"full"`` for ``linear`` under
            ``ulysses`` alone.  A name stands for a mask of ``P * L`` tokens; where the sequence
            does not divide, pass a mask of its length.
        initial_state: ``[B, H, K, V]``, the same on all ranks.  Its gradient on a rank is what the
            tokens of that rank contribute, as of any replicated parameter: the sum over ranks is
            the gradient.
        strategy: ``scan`` (``by=allgather``, ``ring`` or ``doubling``; ``blocks`` of a ring) on
            layouts of runs, or ``ulysses`` (``pad=true`` where the ranks do not divide the heads)
            on any layout.
        layout: name, with parameters.
        group: a torch.distributed group or a ``DeviceMesh`` of one dimension; the default group
            unless given.

    Returns:
        out ``[B, L, H, V]``, and the state after the last token ``[B, H, K, V]``, on all ranks;
        what depends on it on each of them counts.

    Raises:
        ValueError: on every rank, if the tensors of one do not fit the mask or layout, or a name is
            unknown.
        Unsupported: on every rank, with the reason, before anything is sent.
        RuntimeError: on every rank, if ranks disagree on the problem; in the backward pass, for a
            second derivative.
    """
    member = member_of(group)

    def read() -> tuple[MixerCall, Tensors]:
        form, *_ = forms.parse(mixer)
        require_inputs(form, q, k, v, g, beta, initial_state)
        require_scale(scale)
        method = (Spec.parse(mixer), Spec.parse(strategy), Spec.parse(layout))
        find_strategy(method[1].name)
        qkv = under_autocast(q, k, v)
        given = MixerInputs(*qkv, g, beta, initial_state)
        tensors = {n: x for n, x in given.by_token._asdict().items() if x is not None}
        found = find_mask(mask, q.shape[1] * member.control.size)
        require_mask(form, found)
        backward = any(x.requires_grad for x in (q, k, v, *given.given[3:]))
        problem = make_problem(*qkv, found, scale, backward and torch.is_grad_enabled())
        gates = ((n, x) for n, x in (("g", g), ("beta", beta)) if x is not None)
        lanes = tuple((n, x.shape[3] if x.ndim == 4 else 0) for n, x in gates)
        problem = replace(problem, gates=lanes)
        dtypes = {n: str(x.dtype).removeprefix("torch.") for n, x in tensors.items()}
        if initial_state is not None:
            dtypes["initial_state"] = ""
        call = MixerCall(*method, found, problem, tuple(dtypes.items()), str(q.device))
        return call, tensors

    work, tensors = member.agree(read)
    x = MixerInputs.of(tensors)._replace(initial_state=initial_state)
    return DistributedMixerFunction.apply(work, member, *x)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class MixerCall(Call[PreparedMixer]):
    """A call of :func:`distributed_mix`.

    Attributes:
        tensors: the names of those that are given, with their dtypes.
    """

    mixer: Spec
    strategy: Spec
    layout: Spec
    mask: AttnMask
    problem: Problem
    tensors: tuple[tuple[str, str], ...]
    device: str

    @property
    def text(self) -> str:
        given = ", ".join(f"{name} {dtype}".rstrip() for name, dtype in self.tensors)
        method = f"{self.mixer} of {given}, {self.strategy} {self.layout}"
        device = self.device.partition(":")[0]
        return f"{method}, mask {self.mask.digest}, {self.problem}, on {device}"

    def world(self, member: GroupMember) -> World:
        tokens = self.mask.seq_k
        keys = layouts.build(self.layout, tokens, member.control.size, self.mask)
        return World.of(self.problem, self.mask, keys, member.ranks_per_node)

    def prepare(self, world: World, member: GroupMember, tensors: Tensors) -> PreparedMixer:
        local = {name: x.new_empty(x.shape, device="meta") for name, x in tensors.items()}
        rank = member.control.rank
        return PreparedMixer(
            self.mixer, self.strategy, world, rank, self.device, MixerInputs.of(local)
        )


class DistributedMixerFunction(torch.autograd.Function):
    """out and state of a mixer on the shards of a group, both differentiable; once."""

    @staticmethod
    def forward(
        ctx: Any,
        work: PreparedMixer,
        member: GroupMember,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        state: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        x = MixerInputs(q, k, v, g, beta, state)
        with no_autocast(q.device):
            out, last, saved = work.forward(x, member.comm)
        assert last is not None
        if any(ctx.needs_input_grad):
            leaves, ctx.structure = pytree.tree_flatten((x, saved))
            ctx.save_for_backward(*leaves)
        ctx.work, ctx.member = work, member
        return out, last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dstate: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, saved = pytree.tree_unflatten(list(ctx.saved_tensors), ctx.structure)
        work, member = ctx.work, ctx.member
        if dout is None:
            dout = torch.zeros_like(x.v)
        if some_rank_has(dstate, member) and dstate is None:
            B, _, H, K = x.q.shape
            dtype = torch.float64 if x.q.dtype == torch.float64 else torch.float32
            dstate = x.q.new_zeros((B, H, K, x.v.shape[3]), dtype=dtype)
        with no_autocast(dout.device):
            grads = x.named(work.backward(dout, dstate, saved, member.comm))
        if x.initial_state is not None and grads.initial_state is not None:
            grads = grads._replace(initial_state=grads.initial_state.to(x.initial_state.dtype))
        needed = ctx.needs_input_grad[2:]
        return None, None, *(y if want else None for y, want in zip(grads, needed, strict=True))
