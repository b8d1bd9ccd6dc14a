"""The recurrence itself, token by token: slow, and exact where chunks are not.

In a chunk a hidden pair is a product with 0, and 0 times a NaN is a NaN; here it is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.kernels.mixers.chunks import Inputs, Plan, state_dtype

if TYPE_CHECKING:
    import torch


def recur(x: Inputs, plan: Plan, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[B, S, H, V]`` and the state at the end, from the definition; autograd differentiates
    it."""
    import torch

    B, S, H, K = x.q.shape
    dtype = state_dtype(x.q)
    q, k, v = (y.to(dtype) for y in (x.q, x.k, x.v))
    if state is None:
        state = q.new_zeros((B, H, K, v.shape[3]))
    current = read = state.to(dtype)
    outs = []
    for t in range(S):
        if t in plan.resets:
            current = torch.zeros_like(current)
        if t % plan.chunk == 0:
            read = current  # of the chunk, which a lagging form reads
        key, value = k[:, t].unsqueeze(-1), v[:, t].unsqueeze(-2)
        if x.g is not None:
            decay = x.g[:, t].to(dtype).exp()
            current = current * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
        if x.beta is not None:
            beta = x.beta[:, t].to(dtype)[..., None, None]
            value = beta * (value - (current * key).sum(2, keepdim=True))
        current = current + key * value
        seen = read if plan.form.lagging else current
        outs.append((seen * (plan.scale * q[:, t]).unsqueeze(-1)).sum(2))
    return torch.stack(outs, 1).to(x.v.dtype), current
