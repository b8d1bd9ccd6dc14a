"""Attention of some rows of a head to some keys: torch's fused kernel on CPUs, plain elsewhere.

Legend: n rows, c keys, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NO_LSE = -1e30  # of a row that sees nothing: finite, so that partial results merge without NaN


def attend(
    q_nD: torch.Tensor,
    k_cD: torch.Tensor,
    v_cD: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[n, D]`` and lse ``[n]``; 0 and ``NO_LSE`` for rows that see nothing."""
    import torch

    if q_nD.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        inputs = (x[None, None] for x in (q_nD, k_cD, v_cD))
        out, lse = (x[0, 0] for x in op(*inputs, 0.0, causal, attn_mask=bias_nc, scale=scale))
    else:
        scores = _scores(q_nD, k_cD, scale, causal, bias_nc)
        lse = torch.logsumexp(scores, -1)
        out = torch.softmax(scores, -1) @ v_cD
    if bias_nc is not None:  # the fused kernel has an lse of 0 where nothing is seen
        blind = bias_nc.amax(-1) == -torch.inf
        lse, out = lse.masked_fill(blind, NO_LSE), out.masked_fill(blind[:, None], 0.0)
    return out, lse


def attend_backward(
    do_nD: torch.Tensor,
    q_nD: torch.Tensor,
    k_cD: torch.Tensor,
    v_cD: torch.Tensor,
    out_nD: torch.Tensor,
    lse_n: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv for the out and lse of all keys; an lse of inf for rows that see nothing."""
    if q_nD.device.type == "cpu":
        import torch

        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        inputs = (x[None, None] for x in (do_nD, q_nD, k_cD, v_cD, out_nD, lse_n))
        grads = op(*inputs, 0.0, causal, attn_mask=bias_nc, scale=scale)
        return tuple(grad[0, 0] for grad in grads)
    p_nc = (_scores(q_nD, k_cD, scale, causal, bias_nc) - lse_n[:, None]).exp()
    delta_n1 = (do_nD * out_nD).sum(-1, True)
    ds_nc = (do_nD @ v_cD.mT - delta_n1) * p_nc * scale
    return ds_nc @ k_cD, ds_nc.mT @ q_nD, p_nc.mT @ do_nD


def _scores(
    q_nD: torch.Tensor,
    k_cD: torch.Tensor,
    scale: float,
    causal: bool,
    bias_nc: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    scores = (q_nD @ k_cD.mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores if bias_nc is None else scores + bias_nc
