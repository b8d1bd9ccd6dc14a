"""The `bands` operator on CUDA: one windowed FlashAttention-2 call per band slice.

``aten._flash_attention_forward`` takes windows that are aligned at the bottom right: query i of n
sees keys j of m with ``-left <= j - i - (m - n) <= right``.  A canonical slice is a tight rectangle
with tight offsets, so a bound that hides something is never negative.  Written
against the operator's schema in torch 2.13; not yet run on a GPU.

Legend: B batch, S queries, H query heads, D head dim; n queries and m keys of a slice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.masks.attn_mask import Q0, Q1, AttnMask, canonical
from cpbench.parallel.bound_operator import merge

if TYPE_CHECKING:
    from cpbench.core.operator import QKV, BackwardInputs, Gradients, OutLse
    from cpbench.core.problem import Problem


NONE = -1  # a bound that hides nothing


class Call(NamedTuple):
    """Queries ``[q0, q1)``, keys ``[k0, k1)`` and the window between them."""

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
        return "bands on cuda adds up dq in any order: its backward is not deterministic"
    return None


def calls(mask: AttnMask) -> tuple[Call, ...]:
    """One call a slice, or up to three of a slice with more queries than keys.

    The kernel takes a bound of as many tokens as there are keys for none, and none ahead, beside
    one behind, for that many: with more queries than keys that hides or shows too much.  Where such
    a slice has queries that a bound cuts, fewer than there are keys, they get calls of their own.
    """
    slices = mask.simplify().slices
    q0, q1, k0, k1, lo, hi = slices.T
    lost = np.where(hi < k1 - 1 - q0, hi + q1 - k1, q1 - q0 - 1) >= k1 - k0  # the bound ahead
    # The first queries that see the last key, and the first that do not see the first one.
    cuts = np.clip([k1 - 1 - hi, k0 - lo + 1], q0, q1)
    edges = np.stack([q0, *np.where(lost, cuts, [q0, q1]), q1])
    parts = []
    for begin, end in pairwise(edges):
        part = slices.copy()
        part[:, Q0], part[:, Q1] = begin, end
        parts.append(part)
    found = []
    for q0, q1, k0, k1, lo, hi in canonical(np.concatenate(parts)).tolist():
        left = k1 - q1 - lo if lo > k0 - q1 + 1 else NONE
        right = hi - (k1 - q1) if hi < k1 - 1 - q0 else NONE
        found.append(Call(q0, q1, k0, k1, left, right))
    return tuple(found)


def forward(qkv: QKV, plan: tuple[Call, ...], scale: float) -> OutLse:
    """Attention over all calls, merged by log-sum-exp in float32."""
    import torch

    q, k, v = qkv
    B, S, H, _ = q.shape
    out_BSHD = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
    lse_BHS = q.new_full((B, H, S), -torch.inf, dtype=torch.float32)
    for q0, q1, k0, k1, left, right in plan:
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], None, None, q1 - q0, k1 - k0, 0.0, False, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        so_far = out_BSHD[:, q0:q1], lse_BHS[..., q0:q1]
        lse_BHS[..., q0:q1] = merge(*so_far, o.float(), lse[..., : q1 - q0])[1]
    return out_BSHD.to(q.dtype), lse_BHS


def backward(x: BackwardInputs, plan: tuple[Call, ...], scale: float) -> Gradients:
    """Gradients of all calls, added in float32; out and lse are of the whole row."""
    import torch

    dout, q, k, v, out, lse = x
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    # exp(scores - inf) is 0: rows that see nothing contribute nothing.
    lse_BHS = lse.masked_fill(lse == -torch.inf, torch.inf)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # without dropout it is not read
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    for q0, q1, k0, k1, left, right in plan:
        grads = torch.ops.aten._flash_attention_backward(
            dout[:, q0:q1], q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], out[:, q0:q1],
            lse_BHS[..., q0:q1].contiguous(), None, None, q1 - q0, k1 - k0, 0.0, False, seed,
            unused, scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        dq[:, q0:q1] += grads[0]
        dk[:, k0:k1] += grads[1]
        dv[:, k0:k1] += grads[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
