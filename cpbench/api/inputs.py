"""What both public functions ask of q, k and v, and the dtype in which they compute."""

from __future__ import annotations

import math
from typing import Any

import torch

from cpbench.core.problem import DTYPE_BYTES, Problem, different_or_zero
from cpbench.masks.head_masks import Mask

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def require_types(q: Any, k: Any, v: Any, mask: Any) -> None:
    """Raise a ValueError for anything but tensors of four axes on one device, and a mask."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_dense(name, x, q, 4, "[B, S, H, D]")
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask must be one of cpbench.masks, such as cpbench.masks.build('causal', seq_len=8), "
            f"not {short(mask)}"
        )


def require_dense(name: str, x: Any, q: Any, axes: int, shape: str) -> None:
    """Raise a ValueError for anything but a dense tensor on the device of q.

    Args:
        name: of x, for the message.
        axes: that x must have.
        shape: of x, in words.
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, not {short(x)}")
    if x.ndim != axes:
        raise ValueError(f"{name} has shape {list(x.shape)}; shapes are {shape}")
    if x.device != q.device:
        raise ValueError(f"q is on {q.device} and {name} on {x.device}")
    if x.device.type not in ("cpu", "cuda") or x.layout != torch.strided:
        kind = f"{x.layout} on {x.device}"
        raise ValueError(f"{name} must be a dense tensor on cpu or cuda, not {kind}")


def under_autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Cast the inputs to the dtype of autocast, where it is on, as for torch's own
    ``scaled_dot_product_attention``: all but float64, and the result stays in that dtype."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
    )
    return q, k, v


def with_positive_scale(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float | None]:
    """The same scores with a positive scale: kernels multiply the -inf of hidden pairs by it."""
    if scale is None or scale > 0:
        return q, scale
    return (q * -1, -scale) if scale < 0 else (q * 0, 1.0)


def with_contiguous_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """Copies of the inputs whose last axis is strided."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def require_scale(scale: Any) -> None:
    """Raise a ValueError for anything but a finite number or None."""
    try:
        finite = scale is None or (isinstance(scale, int | float) and math.isfinite(scale))
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"scale must be a finite number or None, not {short(scale)}")


def need_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float | None,
    backward: bool,
) -> Problem:
    """The problem of ``mask`` with the batch, heads and dtype of these tensors.

    Raises:
        ValueError: if they do not fit each other.
    """
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {list(k.shape)} and v {list(v.shape)} must have the same shape, but for head_dim"
        )
    if (
        (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3])
        or k.shape[2] == 0
        or q.shape[2] % k.shape[2]
    ):
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} must agree in batch and head_dim, and the "
            "heads of q must be a multiple of those of k; shapes are [B, S, H, D]"
        )
    if 0 in (q.shape[0], q.shape[2], q.shape[3]):
        raise ValueError(f"q {list(q.shape)} must have a batch, heads and a head_dim of at least 1")
    if v.shape[3] == 0:
        raise ValueError(f"v {list(v.shape)} must have a head_dim of at least 1")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    dtype = str(q.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"q, k and v must be {', '.join(DTYPE_BYTES)}, not {dtype}")
    require_scale(scale)
    return Problem(
        batch=q.shape[0],
        seq_q=mask.seq_q,
        seq_k=mask.seq_k,
        heads_q=q.shape[2],
        heads_kv=k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=different_or_zero(v.shape[3], q.shape[3]),
        dtype=dtype,
        direction="fwd_bwd" if backward else "fwd",
        scale=None if scale is None else float(scale),
    )


def short(value: Any) -> str:
    """A value as it is written, in at most 60 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
