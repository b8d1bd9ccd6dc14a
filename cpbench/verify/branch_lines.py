"""Rows, columns and windows of the branches of a selector, for checks in float64.

Legend: T tokens, D head dim; n windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.base import Branch
from cpbench.selectors.common.pooling import Pool
from cpbench.verify.at_size import visible_keys
from cpbench.verify.fit import chunks

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem


def rows_in_chunks(
    branch: Branch, problem: Problem, b: int, heads: range, column: int, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Query heads, each with the rows of a branch that see one of its columns."""
    elements = branch.pool_q.size * problem.head_dim
    for h in heads:
        rows = visible_rows(branch, b, h, column, device)
        for part in chunks(len(rows), elements):
            yield h, rows[part]


def window_at(pool: Pool, token: int, tokens: int) -> slice:
    """The tokens of the window that starts in the stride of ``token``."""
    begin = token // pool.stride * pool.stride
    return slice(begin, min(begin + pool.size, tokens))


def windows_with(pool: Pool, token: int, tokens: int) -> range:
    """The windows that contain ``token``."""
    last = token // pool.stride
    first = max(last - pool.size // pool.stride + 1, 0)
    return range(first, min(last + 1, pool.num_windows(tokens)))


def window_sums(x_TD: torch.Tensor, pool: Pool, windows: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` float64 sums over windows."""
    import torch

    tokens = len(x_TD)
    if pool.size == 1:
        return x_TD[windows].double()
    sums = []
    for part in chunks(len(windows), pool.size * x_TD.shape[1]):
        starts = windows[part, None] * pool.stride
        indices = starts + torch.arange(pool.size, device=windows.device)
        valid = indices < tokens
        rows = x_TD[indices.clamp(max=tokens - 1)].double() * valid[..., None]
        sums.append(rows.sum(1))
    return torch.cat(sums)


def window_means(x_TD: torch.Tensor, pool: Pool, windows: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` float64 means over windows."""
    lengths = (len(x_TD) - windows * pool.stride).clamp(max=pool.size)
    return window_sums(x_TD, pool, windows) / lengths[:, None]


def visible_columns(branch: Branch, b: int, h: int, row: int, device: torch.device) -> torch.Tensor:
    """The columns (keys, or windows of keys) of a branch that one of its rows sees."""
    import torch

    if isinstance(branch.mask, AttnMask):
        return torch.as_tensor(visible_keys(branch.mask, row), device=device)
    return branch.mask.visible_keys(b, h, row)


def visible_rows(branch: Branch, b: int, h: int, column: int, device: torch.device) -> torch.Tensor:
    """The rows of a branch that see one of its columns."""
    import torch

    if isinstance(branch.mask, AttnMask):
        return torch.as_tensor(visible_keys(branch.mask.transpose(), column), device=device)
    return branch.mask.visible_queries(b, h, column)
