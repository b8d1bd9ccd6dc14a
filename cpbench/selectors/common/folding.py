"""Batches folded into heads, for kernels whose masks differ from head to head but not by batch.

Legend: B batch, S queries, H heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fold_batch(x_BSHD: torch.Tensor) -> torch.Tensor:
    """Fold batches into heads: ``[1, S, B * H, D]``."""
    if len(x_BSHD) == 1:
        return x_BSHD
    return x_BSHD.transpose(0, 1).flatten(1, 2)[None]


def unfold_batch(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`fold_batch`: ``[B, S, H, D]``."""
    return x if len(x) == batch else x[0].unflatten(1, (batch, -1)).transpose(0, 1)


def fold_lse(lse_BHS: torch.Tensor) -> torch.Tensor:
    """``[1, B * H, S]`` from ``[B, H, S]``."""
    folded: torch.Tensor = lse_BHS.flatten(0, 1)[None]
    return folded


def unfold_lse(lse: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of :func:`fold_lse`: ``[B, H, S]``."""
    return lse if len(lse) == batch else lse[0].unflatten(0, (batch, -1))
