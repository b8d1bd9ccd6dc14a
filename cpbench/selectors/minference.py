"""Selectors `minference.*`: A-shape, vertical-slash, and block-sparse by pooled means.

Source: MInference, arXiv 2407.02490, and its code (gather_last_q_vertical_slash_topk_v4,
block_sparse_attention).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.masks.patterns import streaming
from cpbench.selectors.common.base import Branch, Plan, Selector
from cpbench.selectors.common.pooled_keys import PooledKeySelector
from cpbench.selectors.common.ranking import (
    block_means,
    check_minimum,
    qk_scores,
    split_into_blocks,
    top_blocks,
    top_k_mask,
    upcast,
)
from cpbench.selectors.selections import Blocks, Grid, Lines

if TYPE_CHECKING:
    import torch


def _info(name: str, summary: str, load: str, **declared: Any) -> OperatorInfo:
    return OperatorInfo(
        name=f"minference.{name}",
        summary=summary,
        source="MInference, arXiv 2407.02490",
        load=f"cpbench.selectors.minference:{load}",
        external_lse=False,
        selects=True,
        selects_for="head",
        **declared,
    )


OPERATORS = (
    _info(
        "a_shape",
        "sinks and a sliding window, independent of the inputs: the baseline of selectors",
        "AShape",
        masks=("causal",),
        params=("num_sinks", "window", "kernel"),
        selects_from="keys",
        variants=("num_sinks=4,window=40",),
    ),
    _info(
        "vertical_slash",
        "columns and diagonals with the most attention of the last 64 queries",
        "VerticalSlash",
        masks=("causal",),
        params=("vertical", "slash", "block_size", "whole_blocks", "kernel"),
        variants=(
            "vertical=40,slash=110,block_size=16",
            "vertical=40,slash=110,block_size=16,whole_blocks=true",
        ),
        looks_ahead="sequence",
    ),
    _info(
        "block_sparse",
        "top-k blocks by mean query times mean key",
        "BlockSparse",
        params=("block_size", "top_k", "keep", "kernel"),
        variants=("block_size=16,top_k=4",),
        selects_from="pooled_keys",
        looks_ahead="block",
    ),
)


class AShape(Selector):
    """The streaming mask: attention sinks and a sliding window, independent of the inputs.

    Args:
        num_sinks: first keys, visible to every query.
        window: keys before each query that it sees.
        kernel: see :class:`Selector`.
    """

    name = "minference.a_shape"
    branch_kinds = ("mask",)

    def __init__(self, num_sinks: int = 128, window: int = 3968, kernel: str = "") -> None:
        super().__init__(kernel)
        check_minimum(self.name, 0, num_sinks=num_sinks, window=window)
        self.num_sinks, self.window = num_sinks, window

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        n = plan.mask.seq_k
        shape = {"num_sinks": min(self.num_sinks, n), "window": min(self.window, n - 1)}
        return (Branch(mask=plan.of_queries(streaming(n, **shape))),)


LAST_QUERIES = 64  # queries whose attention is estimated
FORCED_COLUMNS, FORCED_DIAGONALS = 30, 100  # always kept, and counted


class VerticalSlash(Selector):
    """Columns of keys, and diagonals, of which a block of queries keeps the keys of all of them.

    The authors' kernel (convert_vertical_slash_indexes) also lets these keys begin where the
    diagonal does, but rounds the runs of overlapping diagonals up to whole blocks.

    The last queries decide for all earlier ones, so it suits neither decoding nor training.

    Args:
        vertical: columns to keep, including the first 30.
        slash: diagonals to keep, including the nearest 100.
        block_size: queries of a block, which has as many keys of each diagonal.
        whole_blocks: keep whole blocks of as many keys instead, the two in which a diagonal is and
            that of each column, for kernels that take only blocks.
        kernel: see :class:`Selector`.
    """

    name = "minference.vertical_slash"

    def __init__(
        self,
        vertical: int = 1000,
        slash: int = 6096,
        block_size: int = 64,
        whole_blocks: bool = False,
        kernel: str = "",
    ) -> None:
        super().__init__(kernel)
        check_minimum(self.name, 1, vertical=vertical, slash=slash, block_size=block_size)
        self.vertical, self.slash, self.block_size = vertical, slash, block_size
        self.whole_blocks = whole_blocks
        self.branch_kinds = ("blocks" if whole_blocks else "lines",)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        n = k.shape[1]
        grid = plan.grid(self.block_size, self.block_size)
        if max(self.vertical, self.slash) >= n:  # all of them
            lines = torch.ones((len(q), q.shape[2], n), dtype=torch.bool, device=q.device)
            return (self._branch(grid, lines, lines),)
        probs = last_query_probs(q, k, min(LAST_QUERIES, n), plan.problem.softmax_scale)
        column_mass = probs.sum(2)
        column_mass[..., :FORCED_COLUMNS] = torch.inf
        distance_mass = sum_by_distance(probs)
        distance_mass[..., :FORCED_DIAGONALS] = torch.inf
        columns = top_k_mask(column_mass, min(max(self.vertical, FORCED_COLUMNS), n))
        distances = top_k_mask(distance_mass, min(max(self.slash, FORCED_DIAGONALS), n))
        return (self._branch(grid, distances, columns),)

    def _branch(self, grid: Grid, distances: torch.Tensor, columns: torch.Tensor) -> Branch:
        if not self.whole_blocks:
            return Branch(mask=Lines(grid, distances, columns))
        kept = diagonal_blocks(distances, self.block_size, grid.areas.shape[0])
        kept = kept | split_into_blocks(columns, self.block_size, 2).any(3)[:, :, None]
        return Branch(mask=Blocks(grid, kept & grid.allowed))


def last_query_probs(q: torch.Tensor, k: torch.Tensor, last: int, scale: float) -> torch.Tensor:
    """Causal attention probabilities of the last queries, ``[B, H, last, T]``."""
    import torch

    scores = qk_scores(upcast(q[:, -last:]), upcast(k)).mul_(scale)
    hidden = torch.ones(last, last, dtype=torch.bool, device=q.device).triu_(1)
    scores[..., -last:].masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def sum_by_distance(probs: torch.Tensor) -> torch.Tensor:
    """Sum probabilities ``[B, H, last, T]`` of the last queries by the distance between query and
    key, ``[B, H, T]``."""
    import torch

    last, n = probs.shape[2:]
    # Rows that are longer by one element move to the right one by one, if read without it.
    skewed = torch.nn.functional.pad(probs.flip(2), (0, last)).flatten(2)
    skewed = skewed[..., : last * (n + last - 1)].unflatten(2, (last, -1))
    by_distance: torch.Tensor = skewed.sum(2)[..., :n].flip(2)
    return by_distance


def diagonal_blocks(distances: torch.Tensor, block: int, rows: int) -> torch.Tensor:
    """Blocks ``[B, H, X, X]`` that contain a pair at one of the distances ``[B, H, T]``."""
    import torch

    by_block = split_into_blocks(distances, block, 2)
    # Distance m * block occurs only m blocks away; distances up to the next multiple also at m + 1.
    near = by_block.any(3)
    far = torch.nn.functional.pad(by_block[..., 1:].any(3), (1, 0))[..., :-1]
    position = torch.arange(rows, device=distances.device)
    block_distance = position[:, None] - position
    kept: torch.Tensor = (near | far)[:, :, block_distance.clamp(min=0)]
    return kept & (block_distance >= 0)


class BlockSparse(PooledKeySelector):
    """Blocks by mean query times mean key; no block is forced, not even the diagonal one.

    Args:
        block_size: tokens per block, of queries and keys.
        top_k: blocks per row.
        keep: share of the visible blocks instead, unless 0.
        kernel: see :class:`Selector`.
    """

    name = "minference.block_sparse"

    def __init__(
        self, block_size: int = 64, top_k: int = 100, keep: float = 0.0, kernel: str = ""
    ) -> None:
        super().__init__(block_size, top_k, keep, kernel)
        self.query_block = block_size

    def pool_keys(self, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (block_means(k, self.block_size),)

    def select_by(
        self, q: torch.Tensor, pooled: tuple[torch.Tensor, ...], plan: Plan
    ) -> tuple[Branch, ...]:
        grid = plan.grid(self.block_size, self.block_size)
        scores = qk_scores(block_means(q, self.block_size), *pooled)
        kept = top_blocks(scores, self.budget(grid), grid)
        return (Branch(mask=Blocks(grid, kept)),)
