"""Key/value heads that are repeated for an operator, so that each has equally many query heads.

Legend: B batch, T tokens, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def repeat_heads(x_BTGD: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """The heads of these numbers, which ascend and of which some occur repeatedly; () for all."""
    import torch

    if not heads:
        return x_BTGD
    return torch.cat([x_BTGD[:, :, head : head + 1] for head in heads], dim=2)


def sum_repeated_heads(grad_BTGD: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """The gradient of each head: the float32 sum over its repetitions, in the dtype given."""
    import torch

    counts = [heads.count(head) for head in sorted(set(heads))]
    parts = grad_BTGD.split(counts, dim=2)
    sums = [x if x.shape[2] == 1 else x.float().sum(2, keepdim=True) for x in parts]
    return torch.cat([x.to(grad_BTGD.dtype) for x in sums], dim=2)
