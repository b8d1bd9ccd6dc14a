"""Scores of blocks, and the selection of blocks by score: top-k, or top-p of a mass.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; X blocks of
queries, Y blocks of keys; n blocks of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cpbench.selectors.common.pooling import Pool

if TYPE_CHECKING:
    import torch

    from cpbench.selectors.selections import Grid

MAX_SCORES = {"cpu": 1 << 22, "cuda": 1 << 28}  # scores in memory at once; few launches on a GPU


def block_means(x_BTHD: torch.Tensor, block: int) -> torch.Tensor:
    """Means of blocks of tokens, ``[B, n, H, D]`` float32; the last block may be shorter."""
    return Pool(block, block, partial=True).mean(upcast(x_BTHD))


def block_extremes(x_BTHD: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and minimum of blocks of tokens, by channel, ``[B, n, H, D]`` float32 each."""
    import torch

    x = upcast(x_BTHD)
    missing = -x.shape[1] % block
    if missing:  # repeat the last token, which changes neither maximum nor minimum
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1)], 1)
    blocks = x.unflatten(1, (-1, block))
    return blocks.amax(2), blocks.amin(2)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32; float64 stays."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def qk_scores(q_BSHD: torch.Tensor, k_BTGD: torch.Tensor) -> torch.Tensor:
    """Unscaled scores ``[B, H, S, T]`` of every query head with its key/value head."""
    groups = k_BTGD.shape[2]
    q = q_BSHD.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, R * S, D]
    scores: torch.Tensor = (q @ k_BTGD.permute(0, 2, 3, 1)).unflatten(2, (-1, q_BSHD.shape[1]))
    return scores.flatten(1, 2)


def split_into_blocks(x: torch.Tensor, block: int, dim: int) -> torch.Tensor:
    """Split an axis into ``[…, blocks, block, …]``; the last block is padded with zeros."""
    import torch

    missing = -x.shape[dim] % block
    if missing:
        x = torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 1 - dim), 0, missing))
    blocks: torch.Tensor = x.unflatten(dim, (-1, block))
    return blocks


def probabilities(
    q_BSHD: torch.Tensor, k_BTGD: torch.Tensor, visible_ST: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention probabilities ``[B, H, S, T]`` within a mask ``[S, T]``; 0 for queries that see
    nothing."""
    import torch

    scores = qk_scores(upcast(q_BSHD), upcast(k_BTGD)).mul_(scale)
    return torch.softmax(scores.masked_fill_(~visible_ST, -torch.inf), -1).nan_to_num_(0.0)


def block_sums(x: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    """Sums over blocks of the last two axes, ``[…, X, Y]``."""
    columns = split_into_blocks(x, block_k, x.ndim - 1).sum(-1)
    return split_into_blocks(columns, block_q, x.ndim - 2).sum(-2)


def top_k_mask(scores: torch.Tensor, k: torch.Tensor | int) -> torch.Tensor:
    """Booleans of the k highest scores along the last axis.

    Args:
        k: one number, or a tensor with one number per row.
    """
    import torch

    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    in_top = rank < (k[..., None] if isinstance(k, torch.Tensor) else k)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order, in_top.expand(scores.shape))


def lower_bound(scores: torch.Tensor, k: int) -> torch.Tensor | None:
    """A lower bound of the k-th largest of each row ``[..., n]``: the k-th largest of maxima over
    strided groups, which about 1.15 k elements reach if they are independent.  None where it would
    not help :func:`largest`."""
    n = scores.shape[-1]
    group = n // max(4 * k, 1)
    if scores.device.type != "cpu" or not k or group < 4:
        return None
    maxima = scores[..., : n // group * group].unflatten(-1, (group, -1)).amax(-2)
    bound: torch.Tensor = maxima.topk(k, dim=-1, sorted=False).values.amin(-1, True)
    return bound


def largest(
    scores: torch.Tensor, k: int, bound: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row ``[..., n]`` and their positions, in any order; k is at most n.

    torch's selection on CPUs costs several nanoseconds an element, so it selects among the few that
    reach a lower bound.  NaN counts as the largest; positions of elements of -inf mean nothing.

    Args:
        bound: of :func:`lower_bound`, if it is known.
    """
    import numpy as np
    import torch

    n = scores.shape[-1]
    bound = lower_bound(scores, k) if bound is None else bound
    if bound is None:
        top = scores.topk(k, dim=-1, sorted=False)
        return top.values, top.indices
    # NumPy's takes a third of the time of torch's; a bound that is NaN holds nothing back.
    reach = np.flatnonzero((scores < bound).logical_not_().numpy())
    row_start = torch.arange(scores[..., 0].numel())[:, None] * n
    edges = torch.from_numpy(np.searchsorted(reach, np.append(row_start, scores.numel())))
    found, first, counts = torch.from_numpy(reach), edges[:-1], edges.diff()
    rank = torch.arange(int(counts.max()))
    padding = rank >= counts[:, None]
    position = found[(first[:, None] + rank).clamp_(max=len(found) - 1)]
    candidates = scores.reshape(-1)[position].masked_fill_(padding, -torch.inf)
    top = candidates.topk(k, dim=-1, sorted=False)
    indices = position.gather(1, top.indices).sub_(row_start)
    shape = (*scores.shape[:-1], k)
    return top.values.view(shape), indices.view(shape)


def row_chunks(
    rows: int, scores_per_row: int, device: torch.device, multiple: int = 1, chunks: int = 1
) -> Iterator[tuple[int, int]]:
    """Split rows into ranges of at most about ``MAX_SCORES`` scores, each a multiple of
    ``multiple``; into ``chunks`` if fewer would do."""
    max_scores = MAX_SCORES.get(device.type, MAX_SCORES["cpu"])
    max_rows = max_scores // max(scores_per_row, 1)
    step = max(min(max_rows // multiple, -(-rows // (chunks * multiple))), 1) * multiple
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def check_minimum(name: str, minimum: int, **parameters: int) -> None:
    """Check that parameters are not below a minimum.

    Raises:
        ValueError: naming the first one that is.
    """
    for key, value in parameters.items():
        if value < minimum:
            raise ValueError(f"{name}: {key} = {value} must be at least {minimum}")


def top_blocks(
    scores: torch.Tensor, counts: torch.Tensor, grid: Grid, forced: torch.Tensor | None = None
) -> torch.Tensor:
    """Select the blocks with the highest scores in each row, ``[B, H, X, Y]`` booleans.

    Args:
        scores: ``[B, H, X, Y]``, overwritten; blocks that are not allowed are never selected.
        counts: ``[X]``, blocks to select per row.
        forced: ``[X, Y]`` booleans, selected first and counted; all of them, even if they exceed
            the count.
    """
    return _top_blocks(scores, counts, grid.allowed, forced)


def top_blocks_in_chunks(
    score_rows: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    counts: torch.Tensor,
    grid: Grid,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`top_blocks`, a range of rows at a time; for grids with one row per query.

    Args:
        score_rows: computes the scores of rows ``[begin, end)``.
        shape: B and H.
    """
    import torch

    rows, columns = grid.areas.shape
    kept = torch.empty((*shape, rows, columns), dtype=torch.bool, device=grid.areas.device)
    for begin, end in row_chunks(rows, shape[0] * shape[1] * columns, kept.device):
        chunk = slice(begin, end)
        first = None if forced is None else forced[chunk]
        kept[:, :, chunk] = _top_blocks(
            score_rows(begin, end), counts[chunk], grid.allowed[chunk], first
        )
    return kept


def _top_blocks(
    scores: torch.Tensor,
    counts: torch.Tensor,
    allowed: torch.Tensor,
    forced: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    if forced is not None:
        forced = forced & allowed
        scores.masked_fill_(forced, torch.inf)
        counts = counts.maximum(forced.sum(1))
    scores.masked_fill_(~allowed, -torch.inf)
    max_count = int(counts.max()) if len(counts) else 0
    indices = scores.topk(max_count, dim=-1).indices
    rank = torch.arange(max_count, device=scores.device)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(3, indices, (rank < counts[:, None]).expand(indices.shape))
    return kept.logical_and_(allowed)


def top_p_blocks(
    mass: torch.Tensor, share: float, grid: Grid, forced: torch.Tensor | None = None
) -> torch.Tensor:
    """Select the fewest blocks per row whose mass reaches a share of the row's (top-p),
    ``[B, H, X, Y]`` booleans.

    Forced blocks ``[X, Y]`` are selected first and count towards the share; others follow in order
    of decreasing mass.
    """
    import torch

    mass = mass.masked_fill(~grid.allowed, 0.0)
    total = mass.sum(-1, True)
    forced = torch.zeros_like(grid.allowed) if forced is None else forced & grid.allowed
    forced_mass = (mass * forced).sum(-1, True)
    ranked, order = mass.masked_fill(forced, -1.0).sort(dim=-1, descending=True)
    mass_before = ranked.clamp(min=0.0).cumsum(-1) - ranked.clamp(min=0.0)
    needed = (forced_mass + mass_before < share * total) & (ranked >= 0)
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(3, order, needed)
    return (kept | forced).logical_and_(grid.allowed)


def first_blocks(grid: Grid) -> torch.Tensor:
    """``[X, Y]`` booleans: the first block of keys, where it is allowed."""
    import torch

    first = torch.zeros_like(grid.allowed)
    first[:, :1] = grid.allowed[:, :1]
    return first
