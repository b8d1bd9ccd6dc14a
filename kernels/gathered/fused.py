"""Attention of some queries to some keys: torch's fused kernel on CPUs, plain elsewhere.

Legend: h parts, n queries and c keys of each, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NO_LSE = -1e30  # of a row that sees nothing: finite, so that partial results merge without NaN


def attend(
    q_hnD: torch.Tensor,
    k_hcD: torch.Tensor,
    v_hcD: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[h, n, D]`` and lse ``[h, n]``; 0 and ``NO_LSE`` for rows that see nothing."""
    import torch

    if q_hnD.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        inputs = (x[None] for x in (q_hnD, k_hcD, v_hcD))
        out, lse = (x[0] for x in op(*inputs, 0.0, causal, attn_mask=bias_nc, scale=scale))
    else:
        scores = _scores(q_hnD, k_hcD, scale, causal, bias_nc)
        lse = torch.logsumexp(scores, -1)
        out = torch.softmax(scores, -1) @ v_hcD
    if bias_nc is not None:  # the fused kernel has an lse of 0 where nothing is seen
        blind = bias_nc.amax(-1) == -torch.inf
        lse, out = lse.masked_fill(blind, NO_LSE), out.masked_fill(blind[:, None], 0.0)
    return out, lse


def attend_backward(
    do_hnD: torch.Tensor,
    q_hnD: torch.Tensor,
    k_hcD: torch.Tensor,
    v_hcD: torch.Tensor,
    out_hnD: torch.Tensor,
    lse_hn: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv for the out and lse of all keys; an lse of inf for rows that see nothing."""
    if q_hnD.device.type == "cpu":
        import torch

        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        inputs = (x[None] for x in (do_hnD, q_hnD, k_hcD, v_hcD, out_hnD, lse_hn))
        grads = op(*inputs, 0.0, causal, attn_mask=bias_nc, scale=scale)
        return tuple(grad[0] for grad in grads)
    p_hnc = (_scores(q_hnD, k_hcD, scale, causal, bias_nc) - lse_hn[..., None]).exp()
    delta_hn1 = (do_hnD * out_hnD).sum(-1, True)
    ds_hnc = (do_hnD @ v_hcD.mT - delta_hn1) * p_hnc * scale
    return ds_hnc @ k_hcD, ds_hnc.mT @ q_hnD, p_hnc.mT @ do_hnD


def _scores(
    q_hnD: torch.Tensor,
    k_hcD: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    scores = (q_hnD @ k_hcD.mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores if bias_nc is None else scores + bias_nc
