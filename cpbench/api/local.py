"""Attention on one device."""

from __future__ import annotations

import torch

from cpbench.api import compiled
from cpbench.api.autograd import AttentionFunction, no_autocast
from cpbench.api.inputs import (
    need_gradients,
    require_scale,
    require_types,
    under_autocast,
    with_contiguous_heads,
    with_positive_scale,
)
from cpbench.api.on_one_rank import prepare_on_one_rank
from cpbench.api.public_operator import autograd_records
from cpbench.core.operator import QKV
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.masks.head_masks import Mask

OutLse = tuple[torch.Tensor, torch.Tensor | None]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: Spec | str = "bands",
    scale: float | None = None,
) -> OutLse:
    """Attention on one device with any registered operator, differentiable in out and lse.

    Under autocast it computes in the dtype of autocast, as torch's own attention does.

    Args:
        q: ``[B, S, H, D]``; k: ``[B, T, G, D]`` with ``H % G == 0``; v: ``[B, T, G, Dv]``.
        mask: ``[S, T]`` mask, e.g. ``cpbench.masks.build("causal", seq_len=S)``, or one per query
            head, e.g. ``cpbench.masks.build_heads("vertical_slash", S, num_heads=H)``.
        operator: name, with parameters (``"bands"``, ``"sdpa.cpu_flash"``, ``"./mine.py:op"``).
        scale: multiplies the scores; ``D ** -0.5`` unless given.

    Returns:
        out ``[B, S, H, Dv]`` and lse ``[B, H, S]`` (None from operators that return none).

    Raises:
        ValueError: if shapes, dtype, mask or scale do not fit, or the operator is unknown.
        Unsupported: if the operator does not support the problem or the device.
        RuntimeError: in the backward pass, for a gradient through the lse of an operator whose
            backward does not take the lse, and for a second derivative.
    """
    if torch.compiler.is_compiling() and compiled.stays_in_graph(q, k, v, mask, operator, scale):
        q, k, v = under_autocast(q, k, v)
        return compiled.attention(q, k, v, mask, str(operator), scale)
    return _attention(q, k, v, mask, operator, scale)


@untraced
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: Spec | str,
    scale: float | None,
) -> OutLse:
    require_types(q, k, v, mask)
    require_scale(scale)
    q, k, v = under_autocast(q, k, v)
    q, scale = with_positive_scale(q, scale)
    work = prepare_on_one_rank(q, k, v, mask, operator, scale, need_gradients(q, k, v))
    q, k, v = with_contiguous_heads(q, k, v)
    if work.problem.backward and autograd_records(work.op, QKV(q, k, v), work.plan):
        with no_autocast(q.device):
            out, lse, _ = work.forward(QKV(q, k, v), None)
        return out, lse
    return AttentionFunction.apply(q, k, v, work, None)  # type: ignore[no-any-return, no-untyped-call]
