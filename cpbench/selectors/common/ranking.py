"""What selectors share: scores between blocks, and the blocks that the highest of them keep.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, D head dim; X blocks of
queries, Y blocks of keys; n of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cpbench.selectors.common.pooling import Pool

if TYPE_CHECKING:
    import torch

    from cpbench.selectors.common.selection import Grid

CELLS = {"cpu": 1 << 22, "cuda": 1 << 28}  # scores held at once: few launches of many on a GPU


def block_means(x_BTHD: torch.Tensor, block: int) -> torch.Tensor:
    """``[B, n, H, D]`` float32 means of blocks of tokens; the last may be shorter."""
    return Pool(block, block, partial=True).mean(working(x_BTHD))


def working(x: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def products(q_BSHD: torch.Tensor, k_BTGD: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, T]``: every query head with its key/value head."""
    groups = k_BTGD.shape[2]
    q = q_BSHD.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)  # [B, G, R * S, D]
    scores: torch.Tensor = (q @ k_BTGD.permute(0, 2, 3, 1)).unflatten(2, (-1, q_BSHD.shape[1]))
    return scores.flatten(1, 2)


def in_blocks(x: torch.Tensor, block: int, dim: int) -> torch.Tensor:
    """An axis in blocks, ``[…, blocks, block, …]``, the last one filled with zeros."""
    import torch

    short = -x.shape[dim] % block
    if short:
        x = torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 1 - dim), 0, short))
    found: torch.Tensor = x.unflatten(dim, (-1, block))
    return found


def probabilities(
    q_BSHD: torch.Tensor, k_BTGD: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """``[B, H, S, T]`` softmax over what is ``seen`` ``[S, T]``, 0 for queries that see nothing."""
    import torch

    scores = products(working(q_BSHD), working(k_BTGD)).mul_(scale)
    return torch.softmax(scores.masked_fill_(~seen, -torch.inf), -1).nan_to_num_(0.0)


def block_sums(x: torch.Tensor, block_q: int, block_k: int) -> torch.Tensor:
    """``[…, X, Y]`` sums over blocks of the last two axes."""
    columns = in_blocks(x, block_k, x.ndim - 1).sum(-1)
    return in_blocks(columns, block_q, x.ndim - 2).sum(-2)


def highest(scores: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Booleans: the highest of each row, so many of all rows or of each."""
    import torch

    order = scores.argsort(dim=-1, descending=True, stable=True)
    number = torch.arange(scores.shape[-1], device=scores.device)
    counted = number < (count[..., None] if isinstance(count, torch.Tensor) else count)
    found = torch.zeros_like(scores, dtype=torch.bool)
    return found.scatter_(-1, order, counted.expand(scores.shape))


def spans(
    rows: int, cells: int, device: torch.device, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Ranges of rows, a multiple each, with about ``CELLS`` scores at ``cells`` a row."""
    most = CELLS.get(device.type, CELLS["cpu"])
    step = max(most // max(cells, 1) // multiple, 1) * multiple
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def budget(name: str, top_k: int, keep: float) -> None:
    """Refuse a budget that is none.

    Raises:
        ValueError: unless ``top_k`` is at least 1 and ``keep`` a share.
    """
    if top_k < 1:
        raise ValueError(f"{name}: top_k = {top_k} must be at least 1")
    if isinstance(keep, bool) or not 0 <= keep <= 1:
        raise ValueError(f"{name}: keep = {keep} is a share of the visible blocks, from 0 to 1")


def at_least(name: str, least: int, **values: int) -> None:
    """Refuse a parameter below ``least``.

    Raises:
        ValueError: that names it.
    """
    for key, value in values.items():
        if value < least:
            raise ValueError(f"{name}: {key} = {value} must be at least {least}")


def counts(visible: torch.Tensor, top_k: int, keep: float) -> torch.Tensor:
    """``[X]`` blocks to keep of so many visible ones: a share of them, or else ``top_k``; at least
    one, where there is one."""
    if keep:
        wanted = (visible * keep + 0.5).long().clamp(min=1)
    else:
        wanted = visible.new_full(visible.shape, top_k)
    return wanted.minimum(visible)


def top(
    scores: torch.Tensor, wanted: torch.Tensor, grid: Grid, always: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, H, X, Y]`` booleans: in each row the blocks with the highest scores.

    Args:
        scores: ``[B, H, X, Y]``, overwritten; blocks with nothing to see are never taken.
        wanted: ``[X]`` how many.
        always: ``[X, Y]`` taken first, and counted; all of them, even where they are more.
    """
    return _top(scores, wanted, grid.allowed, always)


def top_of_rows(
    scores_of: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    wanted: torch.Tensor,
    grid: Grid,
    always: torch.Tensor,
) -> torch.Tensor:
    """As :func:`top`, some rows at a time: for grids with a row for each query.

    Args:
        scores_of: makes the scores of a range of rows.
        shape: B and H.
    """
    import torch

    rows, columns = grid.areas.shape
    kept = torch.empty((*shape, rows, columns), dtype=torch.bool, device=grid.areas.device)
    for begin, end in spans(rows, shape[0] * shape[1] * columns, kept.device):
        here = slice(begin, end)
        some = _top(scores_of(begin, end), wanted[here], grid.allowed[here], always[here])
        kept[:, :, here] = some
    return kept


def _top(
    scores: torch.Tensor,
    wanted: torch.Tensor,
    allowed: torch.Tensor,
    always: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    if always is not None:
        always = always & allowed
        scores.masked_fill_(always, torch.inf)
        wanted = wanted.maximum(always.sum(1))
    scores.masked_fill_(~allowed, -torch.inf)
    most = int(wanted.max()) if len(wanted) else 0
    places = scores.topk(most, dim=-1).indices
    number = torch.arange(most, device=scores.device)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(3, places, (number < wanted[:, None]).expand(places.shape))
    return kept.logical_and_(allowed)


def covering(
    mass: torch.Tensor, share: float, grid: Grid, always: torch.Tensor | None = None
) -> torch.Tensor:
    """``[B, H, X, Y]`` booleans: in each row the fewest blocks whose mass is a share of the row's.

    What is ``always`` taken counts towards it; the others follow by mass, the largest first, until
    the share is reached.
    """
    import torch

    mass = mass.masked_fill(~grid.allowed, 0.0)
    total = mass.sum(-1, True)
    forced = torch.zeros_like(grid.allowed) if always is None else always & grid.allowed
    have = (mass * forced).sum(-1, True)
    rest, order = mass.masked_fill(forced, -1.0).sort(dim=-1, descending=True)
    before = rest.clamp(min=0.0).cumsum(-1) - rest.clamp(min=0.0)
    taken = (have + before < share * total) & (rest >= 0)
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(3, order, taken)
    return (kept | forced).logical_and_(grid.allowed)


def first(grid: Grid) -> torch.Tensor:
    """``[X, Y]``: the first block of keys, where it is visible."""
    import torch

    found = torch.zeros_like(grid.allowed)
    found[:, :1] = grid.allowed[:, :1]
    return found
