"""Queries and keys of each head in blocks, of equal or varying size; for `flashinfer.variable`.

Legend: B batch, H query heads; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.attn_mask import K0, K1, Q0, Q1, AttnMask, IntArray, areas

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Partition:
    """Which blocks each head keeps, all of them entirely visible.

    Attributes:
        kept: ``[1 or B, H, X, Y]`` booleans.
        rows, cols: ``[H, X]`` and ``[H, Y]`` int32, tokens of each block.
    """

    kept: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor

    def to(self, device: str) -> Partition:
        return Partition(*(x.to(device) for x in (self.kept, self.rows, self.cols)))

    def spread(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[1 or B, H, S]`` of tokens, from ``[1 or B, H, X]`` of blocks of queries."""
        import torch

        each = [
            blocks[:, h].repeat_interleave(self.rows[h].long(), 1) for h in range(len(self.rows))
        ]
        return torch.stack(each, 1)


def rectangles(masks: tuple[AttnMask, ...]) -> bool:
    """Whether no band cuts a slice."""
    return not any(
        (areas(s) != (s[:, Q1] - s[:, Q0]) * (s[:, K1] - s[:, K0])).any()
        for s in (mask.slices for mask in masks)
    )


def of_heads(masks: tuple[AttnMask, ...]) -> Partition | None:
    """The blocks of masks that are rectangles, or None where a band cuts one.

    All heads get as many blocks as the one with the most: the longest ones of the others are cut.
    """
    import torch

    if not rectangles(masks):
        return None
    edges_q = _equal([_cuts(mask.slices[:, [Q0, Q1]], mask.seq_q) for mask in masks])
    edges_k = _equal([_cuts(mask.slices[:, [K0, K1]], mask.seq_k) for mask in masks])
    kept = np.zeros((len(masks), edges_q.shape[1] - 1, edges_k.shape[1] - 1), dtype=np.bool_)
    for h, mask in enumerate(masks):
        q0, q1 = (np.searchsorted(edges_q[h], mask.slices[:, c]) for c in (Q0, Q1))
        k0, k1 = (np.searchsorted(edges_k[h], mask.slices[:, c]) for c in (K0, K1))
        change = np.zeros((edges_q.shape[1], edges_k.shape[1]), dtype=np.int32)
        for row, col, sign in ((q0, k0, 1), (q1, k0, -1), (q0, k1, -1), (q1, k1, 1)):
            np.add.at(change, (row, col), sign)
        kept[h] = change.cumsum(0).cumsum(1)[:-1, :-1] > 0
    rows, cols = (torch.as_tensor(np.diff(edges).astype(np.int32)) for edges in (edges_q, edges_k))
    return Partition(torch.as_tensor(kept[None]), rows, cols)


def _cuts(ends: IntArray, length: int) -> list[int]:
    found: list[int] = np.unique(np.append(ends.ravel(), [0, length])).tolist()
    return found


def _equal(edges: list[list[int]]) -> IntArray:
    """As many edges for all: the longest block is halved until there are."""
    most = max(map(len, edges))
    for mine in edges:
        while len(mine) < most:
            sizes = np.diff(mine)
            at = int(sizes.argmax())
            mine.insert(at + 1, mine[at] + int(sizes[at]) // 2)
    return np.array(edges, dtype=np.int64)
