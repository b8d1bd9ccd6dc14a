"""Reference for tests, independent of the package: dense float64 attention under autograd."""

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
    repeated_k, repeated_v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, repeated_k) * q.shape[3] ** -0.5
    visible = torch.as_tensor(mask.to_dense())
    lse = torch.logsumexp(scores.masked_fill(~visible, -torch.inf), dim=-1)
    # A finite lse makes the gradient of rows without visible keys 0 rather than NaN.
    finite = torch.where(torch.isneginf(lse), 0.0, lse)
    probs = torch.where(visible, torch.exp(scores - finite.unsqueeze(-1)), 0.0)
    out = torch.einsum("bhst,bthd->bshd", probs, repeated_v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error; infinite if -inf is not in the same places."""
    actual, expected = actual.double(), expected.double()
    if not torch.equal(torch.isneginf(actual), torch.isneginf(expected)):
        return float("inf")
    actual, expected = (x.masked_fill(torch.isneginf(x), 0.0) for x in (actual, expected))
    difference = float((actual - expected).detach().norm())
    return (
        difference / (float(expected.detach().norm()) or 1.0)
        if difference == difference
        else float("inf")
    )


def random_inputs(
    batch: int,
    tokens: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    value_dim: int = 0,
) -> list[torch.Tensor]:
    """Standard normal q, k, v and dout, ``[batch, tokens, heads, head_dim]``; the head_dim of v and
    dout is ``value_dim``, if given."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype)
        for heads, dim in (
            (heads_q, head_dim), (heads_kv, head_dim),
            (heads_kv, value_dim or head_dim), (heads_q, value_dim or head_dim),
        )
    ]  # fmt: skip
