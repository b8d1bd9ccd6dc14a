"""The chunks of queries and keys of a subproblem, and which of them see each other."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpbench.masks.slices import IntArray, areas, cut_axis
from cpbench.parallel.world import Chunk

if TYPE_CHECKING:
    from cpbench.masks.head_masks import SlicedMask
    from cpbench.parallel.bound_operator import BoundOperator
    from cpbench.parallel.world import Subproblem, World

Span = tuple[int, int]  # first token of a chunk, and the one after its last


class Tile(NamedTuple):
    """A chunk of keys that a chunk of queries sees: its number, and the plan of the operator."""

    column: int
    plan: Any


class Row(NamedTuple):
    """A chunk of queries, and the chunks of keys that it sees, in order."""

    span: Span
    tiles: tuple[Tile, ...]


class Visit(NamedTuple):
    """A chunk of keys on the device, for one row or for consecutive ones.

    Attributes:
        column: its number.
        first, last: whether it has not been there before, and will not be again.
    """

    column: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Grid:
    """The chunks of a subproblem: queries in ``rows``, keys in ``columns``."""

    rows: tuple[Row, ...]
    columns: tuple[Span, ...]

    @functools.cached_property
    def visits(self) -> tuple[Visit, ...]:
        """The chunks of keys that pass through the device, in order."""
        tiles = (tile.column for row in self.rows for tile in row.tiles)
        columns = [column for column, _ in itertools.groupby(tiles)]
        last = {column: number for number, column in enumerate(columns)}
        first = {column: number for number, column in reversed(list(enumerate(columns)))}
        return tuple(
            Visit(column, first[column] == number, last[column] == number)
            for number, column in enumerate(columns)
        )

    @functools.cached_property
    def unseen(self) -> tuple[Span, ...]:
        """The chunks of keys that no query sees."""
        seen = {visit.column for visit in self.visits}
        return tuple(span for number, span in enumerate(self.columns) if number not in seen)


def spans(tokens: int, chunk: int) -> tuple[Span, ...]:
    """``tokens`` in chunks, of which the last may be shorter."""
    return tuple((start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


class Cut(NamedTuple):
    """A subproblem in chunks: its mask, their spans, and the visible pairs of every chunk of
    queries with every chunk of keys (the mean over heads)."""

    mask: Any
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    areas: np.typing.NDArray[np.float64]


@functools.lru_cache(maxsize=2)  # ranks of a trace may have the same
def cut(subproblem: Subproblem, chunk: int) -> Cut:
    """Cut a subproblem into chunks of ``chunk`` tokens."""
    mask: Any = subproblem.mask
    rows, columns = spans(mask.seq_q, chunk), spans(mask.seq_k, chunk)
    return Cut(mask, rows, columns, _areas(mask, rows, columns))


def plan_grid(
    op: BoundOperator, subproblem: Subproblem, chunk: int, world: World | None = None
) -> Grid:
    """Plan a subproblem in chunks of ``chunk`` tokens.

    Args:
        world: with the heads to compute; that of the subproblem unless given.

    Raises:
        Unsupported: if the operator does not take the mask or problem of a tile.
    """
    mask, rows, columns, visible = cut(subproblem, chunk)
    world = world or subproblem.world
    full_plans: dict[tuple[int, int], Any] = {}

    def plan(q: Span, k: Span, area: int) -> Any:
        tile = Chunk(world, mask, (*q, *k), area)
        extents = (q[1] - q[0], k[1] - k[0])
        if area < extents[0] * extents[1]:
            return op.prepare(tile)
        if extents not in full_plans:  # most tiles of a long causal mask
            full_plans[extents] = op.prepare(tile)
        return full_plans[extents]

    return Grid(
        rows=tuple(
            Row(
                q,
                tuple(
                    Tile(column, plan(q, columns[column], math.ceil(visible[number, column])))
                    for column in np.flatnonzero(visible[number]).tolist()
                ),
            )
            for number, q in enumerate(rows)
        ),
        columns=columns,
    )


def _areas(
    mask: SlicedMask, rows: tuple[Span, ...], columns: tuple[Span, ...]
) -> np.typing.NDArray[np.float64]:
    """Visible pairs of every chunk of queries with every chunk of keys; the mean over heads."""
    cut, _, row = cut_axis(mask.slices, _ranges(rows), axis=0)
    cut, source, column = cut_axis(cut, _ranges(columns), axis=1)
    sums = np.zeros((len(rows), len(columns)))
    np.add.at(sums, (row[source], column), areas(cut).astype(np.float64))
    return sums / getattr(mask, "heads", 1)


def _ranges(chunks: tuple[Span, ...]) -> IntArray:
    return np.array([(start, end - start) for start, end in chunks], dtype=np.int64)
