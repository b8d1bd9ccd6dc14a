"""The ``autograd.Function`` of attention, of every operator under every strategy.

What the backward pass needs is saved by ``save_for_backward``: so hooks on saved tensors
(checkpointing, offloading) see it, it is freed by the first backward pass, and a tensor that was
changed in place is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from cpbench.api.lse_gradient import add_lse_gradient
from cpbench.core.operator import QKV
from cpbench.parallel.strategy import Saved

if TYPE_CHECKING:
    from cpbench.api.group_member import GroupMember
    from cpbench.api.inputs import Tensors
    from cpbench.api.prepared import Attention
    from cpbench.core.operator import Gradients


def no_autocast(device: torch.device) -> Any:
    """Inside, operations run in the dtype of their inputs."""
    return torch.autocast(device.type, enabled=False)


class AttentionFunction(torch.autograd.Function):
    """out and lse of a prepared computation, both differentiable; once."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        work: Attention,
        member: GroupMember | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        with no_autocast(torch.device(work.op.device)):
            out, lse, saved = work.forward(QKV(q, k, v), member.comm if member else None)
        if any(ctx.needs_input_grad):
            _save(ctx, saved, work, (q, k, v), lse)
        ctx.work, ctx.member, ctx.out_shape, ctx.out_dtype = work, member, out.shape, out.dtype
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        saved, lse = _restore(ctx)
        if lse is not None and some_rank_has(dlse, ctx.member) and dlse is None:
            dlse = torch.zeros_like(lse)
        if dout is None:
            device = ctx.saved_tensors[0].device
            dout = torch.zeros(ctx.out_shape, dtype=ctx.out_dtype, device=device)
        return *differentiate(ctx.work, saved, lse, dout, dlse, ctx.member), None, None


def some_rank_has(dlse: torch.Tensor | None, member: GroupMember | None) -> bool:
    """Whether any rank has a gradient of lse, which is another pass: all ranks take it, or none."""
    has_own = dlse is not None
    return has_own if member is None else bool(member.control.max(float(has_own)))


def differentiate(
    work: Attention,
    saved: Any,
    lse: torch.Tensor | None,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    member: GroupMember | None,
) -> Gradients:
    """dq, dk and dv from the gradients of out and lse.

    Args:
        saved: of the forward pass.
        lse: ``[B, H, S]``, its result.
        dlse: None if nothing depends on lse.
    """
    with no_autocast(torch.device(work.op.device)):
        gradients = work.backward(dout.contiguous(), saved, member.comm if member else None)
        if dlse is not None:
            # Queries that see nothing have no lse: its gradient may be infinite.
            assert lse is not None
            dlse = dlse.masked_fill(torch.isneginf(lse), 0.0)
            gradients = add_lse_gradient(gradients, dlse, saved, work, member)
    return gradients


def _save(ctx: Any, saved: Any, work: Attention, qkv: Tensors, lse: torch.Tensor | None) -> None:
    """Save the values of a forward pass, with what the operator keeps for its outputs."""
    graph = not isinstance(saved, Saved | list)  # inside a library: hold its inputs to be unchanged
    others = (lse, qkv if graph else ())
    leaves = pytree.tree_leaves(saved)
    states = [work.op.take_state(x) if isinstance(x, torch.Tensor) else None for x in leaves]
    values, ctx.structure = pytree.tree_flatten((saved, states, others))
    indices: dict[int, int] = {}  # of saved tensors, by the identity of the tensor
    tensors: list[torch.Tensor] = []
    ctx.values = []
    for value in values:
        if not isinstance(value, torch.Tensor) or _has_inner_graph(value, qkv):
            ctx.values.append(value)
            continue
        if id(value) not in indices:
            indices[id(value)] = len(tensors)
            tensors.append(value)
        ctx.values.append(_Index(indices[id(value)]))
    ctx.save_for_backward(*tensors)


def _restore(ctx: Any) -> tuple[Any, torch.Tensor | None]:
    """The saved values, and lse."""
    tensors = ctx.saved_tensors
    values = [tensors[value] if isinstance(value, _Index) else value for value in ctx.values]
    saved, states, (lse, _) = pytree.tree_unflatten(values, ctx.structure)
    for leaf, state in zip(pytree.tree_leaves(saved), states, strict=True):
        if state is not None:
            ctx.work.op.restore_state(leaf, state)
    return saved, lse


class _Index(int):
    """The position of a tensor among those saved for the backward pass."""


def _has_inner_graph(x: torch.Tensor, inputs: Tensors) -> bool:
    """Whether a tensor belongs to a graph that was recorded inside the forward pass."""
    return x.requires_grad and not any(x is tensor for tensor in inputs)
