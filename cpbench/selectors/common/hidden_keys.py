"""The keys that queries do not see, of blocks that they see only in part.

Legend: S queries; Y blocks of w keys; p pairs of a query and a block that it sees in part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.selectors.selections import Grid

if TYPE_CHECKING:
    import torch


def hidden_key_table(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden keys of partial blocks, cached in the grid: ``[S, Y]`` int32 indices (-1 for other
    blocks) into ``[p, w]`` booleans."""
    if "hidden_keys" not in grid.cache:
        grid.cache["hidden_keys"] = _build_hidden_keys(grid)
    table: tuple[torch.Tensor, torch.Tensor] = grid.cache["hidden_keys"]
    return table


def _build_hidden_keys(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    partial = grid.allowed & ~grid.full
    queries, blocks = torch.nonzero(partial).cpu().numpy().T
    device = grid.areas.device
    hidden_index = torch.full(grid.areas.shape, -1, dtype=torch.int32, device=device)
    hidden_index[partial] = torch.arange(len(queries), dtype=torch.int32, device=device)
    hidden = np.ones((len(queries), grid.block_k), dtype=np.bool_)
    order = np.argsort(blocks, kind="stable")
    ends = np.searchsorted(blocks[order], np.arange(grid.areas.shape[1] + 1))
    transposed = grid.mask.transpose()
    for y in range(grid.areas.shape[1]):
        entries = order[ends[y] : ends[y + 1]]
        if len(entries):
            block_queries = queries[entries]
            k0, k1 = y * grid.block_k, min((y + 1) * grid.block_k, grid.mask.seq_k)
            first, last = int(block_queries[0]), int(block_queries[-1]) + 1
            dense = transposed.crop(k0, k1, first, last).to_dense().T
            hidden[entries, : k1 - k0] = ~dense[block_queries - first]
    return hidden_index, torch.as_tensor(hidden, device=device)
