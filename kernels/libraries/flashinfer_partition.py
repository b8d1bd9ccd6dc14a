"""Partitions of queries and keys into blocks per head, for `flashinfer.variable`.

Legend: B batch, H query heads; X blocks of queries, Y blocks of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import K0, K1, Q0, Q1, IntArray, areas

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Partition:
    """Blocks of each head, of equal or varying size, and which of them are visible.

    Attributes:
        kept: ``[1 or B, H, X, Y]`` booleans, entirely visible blocks; the others are hidden.
        rows, cols: ``[H, X]`` and ``[H, Y]`` int32, tokens of each block.
    """

    kept: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor

    def to(self, device: str) -> Partition:
        return Partition(*(x.to(device) for x in (self.kept, self.rows, self.cols)))

    def to_tokens(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[1 or B, H, S]`` values of queries, from ``[1 or B, H, X]`` values of their blocks."""
        import torch

        heads = [
            blocks[:, h].repeat_interleave(self.rows[h].long(), 1) for h in range(len(self.rows))
        ]
        return torch.stack(heads, 1)

    def is_shared(self, heads_kv: int) -> bool:
        """Whether query heads that share a key/value head have equal blocks."""
        kept = self.kept.unflatten(1, (heads_kv, -1))
        sizes = [x.unflatten(0, (heads_kv, -1)) for x in (self.rows, self.cols)]
        same_kept = bool((kept == kept[:, :, :1]).all())
        return same_kept and all(bool((x == x[:, :1]).all()) for x in sizes)


def are_rectangles(masks: tuple[AttnMask, ...]) -> bool:
    """Whether all slices are rectangles, not cut by their band."""
    return not any(
        (areas(s) != (s[:, Q1] - s[:, Q0]) * (s[:, K1] - s[:, K0])).any()
        for s in (mask.slices for mask in masks)
    )


def partition_masks(masks: tuple[AttnMask, ...]) -> Partition | None:
    """The partition of masks whose slices are rectangles; None for other masks.

    All heads get as many blocks as the head with the most: the largest blocks of the others are
    halved.
    """
    import torch

    if not are_rectangles(masks):
        return None
    edges_q = _same_count([_edges(mask.slices[:, [Q0, Q1]], mask.seq_q) for mask in masks])
    edges_k = _same_count([_edges(mask.slices[:, [K0, K1]], mask.seq_k) for mask in masks])
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


def _edges(ends: IntArray, length: int) -> list[int]:
    """The edges of the blocks into which slices divide ``[0, length)``."""
    edges: list[int] = np.unique(np.append(ends.ravel(), [0, length])).tolist()
    return edges


def _same_count(head_edges: list[list[int]]) -> IntArray:
    """Give all heads as many edges as the head with the most, by halving the largest blocks."""
    max_count = max(map(len, head_edges))
    for edges in head_edges:
        while len(edges) < max_count:
            sizes = np.diff(edges)
            largest = int(sizes.argmax())
            edges.insert(largest + 1, edges[largest] + int(sizes[largest]) // 2)
    return np.array(head_edges, dtype=np.int64)
