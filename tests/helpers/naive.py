"""An independent reference for tests: dense float64 softmax attention under autograd."""

from __future__ import annotations

import torch

from cpbench.masks.attn_mask import AttnMask

TENSORS = ("out", "lse", "dq", "dk", "dv")


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, mask: AttnMask
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of ``[B, S, H, D]`` inputs, from the definition."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, wide_k) * q.shape[3] ** -0.5
    seen = torch.as_tensor(mask.to_dense())
    lse = torch.logsumexp(scores.masked_fill(~seen, -torch.inf), dim=-1)
    # A finite stand-in keeps the gradient of rows that see nothing at 0 rather than NaN.
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    probs = torch.where(seen, torch.exp(scores - finite.unsqueeze(-1)), 0.0)
    out = torch.einsum("bhst,bthd->bshd", probs, wide_v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """L2 norm of the difference relative to the reference; infinite where -inf does not match."""
    found, want = found.double(), want.double()
    if not torch.equal(torch.isneginf(found), torch.isneginf(want)):
        return float("inf")
    found, want = (x.masked_fill(torch.isneginf(x), 0.0) for x in (found, want))
    difference = float((found - want).norm())
    return difference / (float(want.norm()) or 1.0) if difference == difference else float("inf")


def random_inputs(
    batch: int,
    tokens: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> list[torch.Tensor]:
    """q, k, v, dout."""
    chance = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, heads, head_dim, generator=chance).to(dtype)
        for heads in (heads_q, heads_kv, heads_kv, heads_q)
    ]
