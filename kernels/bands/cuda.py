"""The `bands` operator on CUDA: one windowed FlashAttention-2 call per band slice.

``aten._flash_attention_forward`` takes windows that are aligned at the bottom right: query i of n
sees keys j of m with ``-left <= j - i - (m - n) <= right``.  A canonical slice is a tight rectangle
with tight offsets, so a bound that hides something is never negative.  Written against the
operator's schema in torch 2.13; not yet run on a GPU.

Legend: B batch, S queries, H query heads, D head dim; n queries and m keys of a slice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import Q0, Q1, canonical
from cpbench.parallel.bound_operator import merge

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem


UNBOUNDED = -1  # a bound that hides nothing


class Call(NamedTuple):
    """One windowed call: queries ``[q0, q1)``, keys ``[k0, k1)`` and the bounds of the window."""

    q0: int
    q1: int
    k0: int
    k1: int
    left: int
    right: int


def unsupported(problem: Problem) -> str | None:
    """Why torch's FlashAttention-2 cannot do this, or None."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"bands on cuda needs float16 or bfloat16 (FlashAttention-2), not {problem.dtype}"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return f"bands on cuda needs head_dim a multiple of 8 up to 256, not {problem.head_dim}"
    if problem.deterministic and problem.backward:
        return "bands on cuda sums dq in any order: its backward is not deterministic"
    return None


def plan_calls(mask: AttnMask) -> tuple[Call, ...]:
    """The calls of a mask: one per slice, or up to three for a slice with more queries than keys.

    The kernel treats a bound of at least as many tokens as there are keys as unbounded, and an
    unbounded right side beside a left bound as a bound of that many.  With more queries than keys
    that hides or shows too much, so the queries of such a slice that a bound cuts (fewer than there
    are keys) get calls of their own.
    """
    slices = mask.simplify().slices
    q0, q1, k0, k1, lo, hi = slices.T
    # Slices whose right bound the kernel would misread.
    misread = np.where(hi < k1 - 1 - q0, hi + q1 - k1, q1 - q0 - 1) >= k1 - k0
    # The first query that sees the last key, and the first that does not see the first key.
    cuts = np.clip([k1 - 1 - hi, k0 - lo + 1], q0, q1)
    edges = np.stack([q0, *np.where(misread, cuts, [q0, q1]), q1])
    strips = []
    for begin, end in pairwise(edges):
        strip = slices.copy()
        strip[:, Q0], strip[:, Q1] = begin, end
        strips.append(strip)
    calls = []
    for q0, q1, k0, k1, lo, hi in canonical(np.concatenate(strips)).tolist():
        left = k1 - q1 - lo if lo > k0 - q1 + 1 else UNBOUNDED
        right = hi - (k1 - q1) if hi < k1 - 1 - q0 else UNBOUNDED
        calls.append(Call(q0, q1, k0, k1, left, right))
    return tuple(calls)


def forward(qkv: QKV, calls: tuple[Call, ...], scale: float) -> OutLse:
    """Attention over all calls, merged by log-sum-exp in float32."""
    import torch

    q, k, v = qkv
    B, S, H, _ = q.shape
    out_BSHD = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    lse_BHS = q.new_full((B, H, S), -torch.inf, dtype=torch.float32)
    for q0, q1, k0, k1, left, right in calls:
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], None, None, q1 - q0, k1 - k0, 0.0, False, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        merged = out_BSHD[:, q0:q1], lse_BHS[..., q0:q1]  # out is merged in place
        lse_BHS[..., q0:q1] = merge(*merged, o.float(), lse[..., : q1 - q0])[1]
    return out_BSHD.to(q.dtype), lse_BHS


def backward(x: BackwardInputs, calls: tuple[Call, ...], scale: float) -> Gradients:
    """Gradients of all calls, summed in float32; out and lse are those of the whole mask."""
    import torch

    dout, q, k, v, out, lse = x
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    # exp(scores - inf) is 0: rows that see nothing contribute nothing.
    lse_BHS = lse.masked_fill(lse == -torch.inf, torch.inf)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # not read without dropout
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    for q0, q1, k0, k1, left, right in calls:
        grads = torch.ops.aten._flash_attention_backward(
            dout[:, q0:q1], q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], out[:, q0:q1],
            lse_BHS[..., q0:q1].contiguous(), None, None, q1 - q0, k1 - k0, 0.0, False, seed,
            unused, scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        dq[:, q0:q1] += grads[0]
        dk[:, k0:k1] += grads[1]
        dv[:, k0:k1] += grads[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
