"""Gradients that flow through the log-sum-exp, by any operator whose backward takes out and lse.

With the scores s, probabilities P = exp(s - lse) and dlse the gradient of lse, the gradient of the
scores has another term, P * dlse.  A second backward pass computes it: from v = 1 in a few lanes,
dout = dlse in these lanes, and out = 0, a backward pass computes P * (dout v^T - sum(dout * out)) =
P * dlse.  None of these depends on which tokens or heads a rank holds, so it is the same for every
strategy.  In 16 bits dlse is split over three lanes, so that none of its float32 is lost; in
float16 it is scaled by a power of two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from cpbench.parallel.strategy import Saved

if TYPE_CHECKING:
    from cpbench.api.group_member import GroupMember
    from cpbench.api.prepared import Attention
    from cpbench.core.operator import Gradients

MOST_LANES = 3  # 3 * 8 bits of bfloat16, 3 * 11 of float16


def add_lse_gradient(
    gradients: Gradients,
    dlse: torch.Tensor,
    saved: object,
    work: Attention,
    member: GroupMember | None,
) -> Gradients:
    """Add the gradient through lse to dq and dk.

    Args:
        gradients: dq, dk, dv through out.
        dlse: ``[B, H, S]`` float32, finite.
        saved: of the forward pass.

    Raises:
        RuntimeError: if the operator or strategy cannot compute it.
    """
    if not work.op.info.external_lse or not work.info.traced:
        who = work.op.info.name if not work.op.info.external_lse else work.info.name
        raise RuntimeError(
            f"no gradient flows through the lse of {who}: use lse.detach(), or another "
            f"{'operator' if not work.op.info.external_lse else 'strategy'}"
        )
    dq, dk, dv = gradients
    lanes = min(MOST_LANES if dq.element_size() == 2 else 1, dv.shape[-1])
    factor = _power_of_two(dlse, member) if dq.dtype == torch.float16 else 1.0
    rest = dlse.float().transpose(1, 2) / factor  # [B, S, H]
    dout = dq.new_zeros((*dq.shape[:-1], dv.shape[-1]))
    for lane in range(lanes):
        dout[..., lane] = rest
        rest = rest - dout[..., lane].float()
    comm = member.comm if member else None
    more_dq, more_dk, _ = work.backward(dout, _with_constant_values(saved, lanes), comm)
    if factor == 1.0:
        return dq + more_dq, dk + more_dk, dv
    sums = (x.float().add(more.float(), alpha=factor) for x, more in ((dq, more_dq), (dk, more_dk)))
    dq, dk = (x.to(dv.dtype) for x in sums)
    return dq, dk, dv


def _power_of_two(dlse: torch.Tensor, member: GroupMember | None) -> float:
    """The power of two next to the largest value, over all ranks; 1 for zeros."""
    largest = float(dlse.abs().max()) if dlse.numel() else 0.0
    if member is not None:
        largest = member.control.max(largest)
    return 2.0 ** math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0


def _with_constant_values(saved: object, lanes: int) -> object:
    """The saved values with v = 1 in the first lanes, 0 elsewhere, and out = 0."""
    replaced: dict[int, torch.Tensor] = {}  # by identity: strategies compare tensors by it

    def constant(v: torch.Tensor) -> torch.Tensor:
        if id(v) not in replaced:
            replaced[id(v)] = torch.zeros_like(v)
            replaced[id(v)][..., :lanes] = 1
        return replaced[id(v)]

    def replace(part: object) -> object:
        if isinstance(part, Saved):
            last = part.last and tuple(
                x if i % 2 == 0 else constant(x) for i, x in enumerate(part.last)
            )
            return part._replace(v=constant(part.v), out=torch.zeros_like(part.out), last=last)
        assert isinstance(part, list), "strategies save Saved, or lists of it"
        return [replace(item) for item in part]

    return replace(saved)
