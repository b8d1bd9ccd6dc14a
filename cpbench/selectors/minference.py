"""Selectors `minference.*`: A-shape, vertical-slash, and blocks by pooled means.

Source: MInference, arXiv 2407.02490, and its code (gather_last_q_vertical_slash_topk_v4,
block_sparse_attention).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cpbench.core.registry import OperatorInfo
from cpbench.masks.patterns import streaming
from cpbench.selectors.common.base import Branch, Plan, Selecting
from cpbench.selectors.common.ranking import (
    at_least,
    block_means,
    budget,
    counts,
    highest,
    in_blocks,
    products,
    top,
    working,
)
from cpbench.selectors.common.selection import Blocks

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
        **declared,
    )


OPERATORS = (
    _info(
        "a_shape",
        "sinks and a window, whatever the inputs: what every selector must beat",
        "AShape",
        masks=("causal",),
        params=("num_sinks", "window", "kernel"),
        variants=("num_sinks=4,window=40",),
    ),
    _info(
        "vertical_slash",
        "columns and diagonals that the last 64 queries favour",
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
        "blocks by the product of their mean query and mean key",
        "BlockSparse",
        params=("block_size", "top_k", "keep", "kernel"),
        variants=("block_size=16,top_k=4",),
        looks_ahead="block",
    ),
)


class AShape(Selecting):
    """The streaming mask; nothing is looked at.

    Args:
        num_sinks: first keys that everybody sees.
        window: keys before each query that it sees.
        kernel: see :class:`Selecting`.
    """

    name = "minference.a_shape"
    forms = ("mask",)

    def __init__(self, num_sinks: int = 128, window: int = 3968, kernel: str = "") -> None:
        super().__init__(kernel)
        at_least(self.name, 0, num_sinks=num_sinks, window=window)
        self.num_sinks, self.window = num_sinks, window

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        n = plan.mask.seq_k
        shape = {"num_sinks": min(self.num_sinks, n), "window": min(self.window, n - 1)}
        return (Branch(seen=streaming(n, **shape)),)


LAST = 64  # queries that speak for all
SINKS, LOCAL = 30, 100  # columns and diagonals that are always kept, and counted


class VerticalSlash(Selecting):
    """Whole columns of keys, and the blocks that hold a kept diagonal.

    The original shifts blocks so that a diagonal fits one; these are aligned, so a diagonal keeps
    two of them.  The last queries decide for all before them: no choice for decoding or training.

    Args:
        vertical: columns to keep, the first 30 always among them.
        slash: diagonals to keep, the last 100 always among them.
        block_size: tokens of a block of diagonals.
        whole_blocks: keep the whole block of a column, for kernels that take blocks alone.
        kernel: see :class:`Selecting`.
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
        at_least(self.name, 1, vertical=vertical, slash=slash, block_size=block_size)
        self.vertical, self.slash, self.block_size = vertical, slash, block_size
        self.whole_blocks = whole_blocks
        self.forms = ("blocks" if whole_blocks else "lines",)

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        import torch

        n = k.shape[1]
        cells = plan.cells(self.block_size, self.block_size)
        probs = last_probs(q, k, min(LAST, n), plan.problem.softmax_scale)
        of_columns = probs.sum(2)
        of_columns[..., :SINKS] = torch.inf
        of_diagonals = by_distance(probs)
        of_diagonals[..., :LOCAL] = torch.inf
        columns = highest(of_columns, min(max(self.vertical, SINKS), n))
        distances = highest(of_diagonals, min(max(self.slash, LOCAL), n))
        kept = diagonal_blocks(distances, self.block_size, cells.areas.shape[0])
        if self.whole_blocks:
            kept = kept | in_blocks(columns, self.block_size, 2).any(3)[:, :, None]
            return (Branch(seen=Blocks(cells, kept & cells.allowed)),)
        return (Branch(seen=Blocks(cells, kept & cells.allowed, columns)),)


def last_probs(q: torch.Tensor, k: torch.Tensor, last: int, scale: float) -> torch.Tensor:
    """``[B, H, last, T]``: probabilities of the last queries under a causal mask."""
    import torch

    scores = products(working(q[:, -last:]), working(k)).mul_(scale)
    hidden = torch.ones(last, last, dtype=torch.bool, device=q.device).triu_(1)
    scores[..., -last:].masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def by_distance(probs: torch.Tensor) -> torch.Tensor:
    """``[B, H, T]``: sums over the last queries' keys at each distance."""
    import torch

    last, n = probs.shape[2:]
    row = torch.arange(last, device=probs.device)[:, None]
    key = n - last + row - torch.arange(n, device=probs.device)
    found = probs.gather(3, key.clamp(min=0).expand(probs.shape))
    return found.masked_fill_(key < 0, 0.0).sum(2)


def diagonal_blocks(distances: torch.Tensor, block: int, rows: int) -> torch.Tensor:
    """``[B, H, X, X]``: blocks that hold a pair at one of the distances ``[B, H, T]``."""
    import torch

    wide = in_blocks(distances, block, 2)
    # Distance m * block is in the blocks m away alone, those up to the next also in m + 1.
    away = wide.any(3)
    further = torch.nn.functional.pad(wide[..., 1:].any(3), (1, 0))[..., :-1]
    offset = torch.arange(rows, device=distances.device)
    away_by = offset[:, None] - offset
    found: torch.Tensor = (away | further)[:, :, away_by.clamp(min=0)]
    return found & (away_by >= 0)


class BlockSparse(Selecting):
    """No block is always kept, not even the diagonal one.

    Args:
        block_size: tokens of a block, of queries and keys.
        top_k: blocks of each row.
        keep: share of the visible blocks instead, where it is not 0.
        kernel: see :class:`Selecting`.
    """

    name = "minference.block_sparse"

    def __init__(
        self, block_size: int = 64, top_k: int = 100, keep: float = 0.0, kernel: str = ""
    ) -> None:
        super().__init__(kernel)
        at_least(self.name, 1, block_size=block_size)
        budget(self.name, top_k, keep)
        self.block_size, self.top_k, self.keep = block_size, top_k, keep

    def select(self, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> tuple[Branch, ...]:
        cells = plan.cells(self.block_size, self.block_size)
        scores = products(block_means(q, self.block_size), block_means(k, self.block_size))
        kept = top(scores, counts(cells.visible, self.top_k, self.keep), cells)
        return (Branch(seen=Blocks(cells, kept)),)
