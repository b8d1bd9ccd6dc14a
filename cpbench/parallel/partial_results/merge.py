"""The merge of two partial results in float32: one Triton kernel on GPUs, torch on CPUs.

Legend: B batch, S queries, H query heads, D head dim.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROWS = 16  # tokens of one head that a program merges


def merge(
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    partial_BSHD: torch.Tensor,
    partial_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial results over disjoint keys, of any dtype, into float32.

    The lse becomes ``logaddexp(lse, partial_lse)`` and the outputs are weighted by the sigmoids of
    the difference, which sum to 1 however large the lse are (``exp(lse - merged)`` does not: a
    float32 near 5000 is 5e-4 coarse).  Where both are -inf the output stays 0 and the lse -inf.
    A float32 out is overwritten with the result; so may be the partial one.

    Source: FlashAttention's online softmax (arXiv 2205.14135), as used between blocks by Ring
    Attention (arXiv 2310.01889).
    """
    if out_BSHD.is_cuda and out_BSHD.stride(3) == 1 and _has_triton():
        return merge_fused(out_BSHD, lse_BHS, partial_BSHD, partial_lse)
    return merge_eager(out_BSHD.float(), lse_BHS, partial_BSHD.float(), partial_lse)


def merge_eager(
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    partial_BSHD: torch.Tensor,
    partial_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`merge` of float32 results in torch; overwrites both outputs."""
    import torch

    difference = partial_lse - lse_BHS
    for x_BSHD, sign in ((out_BSHD, -1), (partial_BSHD, 1)):
        weight = torch.sigmoid(sign * difference).nan_to_num_(0.0)
        x_BSHD.mul_(weight.transpose(1, 2).unsqueeze(-1))
    return out_BSHD.add_(partial_BSHD), torch.logaddexp(lse_BHS, partial_lse)


def merge_fused(
    out_BSHD: torch.Tensor,
    lse_BHS: torch.Tensor,
    partial_BSHD: torch.Tensor,
    partial_lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`merge` in one kernel, which reads and writes every element once; the last axis of out
    is contiguous."""
    import torch

    from cpbench.parallel.partial_results.merge_device import merge_results

    B, S, H, D = out_BSHD.shape
    target = (
        out_BSHD
        if out_BSHD.dtype == torch.float32
        else out_BSHD.new_empty(out_BSHD.shape, dtype=torch.float32)
    )
    lse = lse_BHS.new_empty(lse_BHS.shape, dtype=torch.float32)
    if partial_BSHD.stride(3) != 1:
        partial_BSHD = partial_BSHD.contiguous()
    strides = [
        stride
        for x in (out_BSHD, partial_BSHD, target, lse_BHS, partial_lse, lse)
        for stride in x.stride()[:3]
    ]
    context = torch.cuda.device(out_BSHD.device) if out_BSHD.is_cuda else contextlib.nullcontext()
    with context:
        merge_results[(-(-S // ROWS), B * H)](
            out_BSHD, partial_BSHD, target, lse_BHS, partial_lse, lse, *strides, H, S,
            ROWS=ROWS, D=triton_size(D), HEAD_DIM=D,
        )  # fmt: skip
    return target, lse


def triton_size(number: int) -> int:
    """The least power of two of at least ``number``, as shapes in Triton must be."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
