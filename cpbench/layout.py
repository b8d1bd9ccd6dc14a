"""Which rank owns which tokens.

A layout deals the tokens of one sequence to ranks as lists of segments ``start, start + step, …``.
Every rank holds ``local_len`` tokens; when they do not divide, the sequence is padded at its end
with tokens that are in no slice of any mask, so they see nothing and nobody sees them.

Adding a layout is one function that returns segments, registered with ``@_layout``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.mask import HI, LO, Q0, Q1, AttnMask, IntArray, areas, cut_axis
from cpbench.registry import check_params
from cpbench.spec import Spec

if TYPE_CHECKING:
    import torch

Segments = IntArray  # (n, 3) rows (rank, start, length), in local order within each rank
_LAYOUTS: dict[str, Callable[[int, int], tuple[Segments, int]]] = {}


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of every rank.

    Attributes:
        name: registered name.
        seq_len: real tokens.
        world_size: P, ranks.
        step: distance between the tokens of a segment (1, or P for striped).
        segments: ``(n, 3)`` int64 rows (rank, start, length); the local tokens of a rank are its
            segments one after another, and together they cover ``P * local_len`` positions.
    """

    name: str
    seq_len: int
    world_size: int
    step: int
    segments: Segments

    @property
    def local_len(self) -> int:
        """Tokens on each rank, padding included."""
        return int(self.segments[self.segments[:, 0] == 0, 2].sum())

    @property
    def padded_len(self) -> int:
        """Tokens on all ranks, padding included."""
        return self.local_len * self.world_size

    def ranges(self, rank: int) -> IntArray:
        """``(n, 2)`` rows (start, length) of one rank's segments."""
        return self.segments[self.segments[:, 0] == rank, 1:]

    def positions(self, rank: int) -> IntArray:
        """``(local_len,)`` global position of each local token, for RoPE, labels and inputs.

        Positions from ``seq_len`` on are padding.
        """
        parts = [start + self.step * np.arange(n) for start, n in self.ranges(rank)]
        return np.concatenate(parts).astype(np.int64)

    def local_mask(self, mask: AttnMask, q_rank: int, k_ranks: Sequence[int]) -> AttnMask:
        """The mask between the queries of one rank and the keys of some, concatenated."""
        if self.step > 1:
            return _fit(mask, self).stride(self.step, q_rank, k_ranks).simplify()
        keys = np.concatenate([self.ranges(rank) for rank in k_ranks])
        return mask.restrict(self.ranges(q_rank), keys).simplify()

    def gathered_mask(self, mask: AttnMask) -> AttnMask:
        """The mask over all tokens in rank-major order, as they stand after an all-gather."""
        everyone = range(self.world_size)
        if self.step == 1:
            ranges = self.segments[:, 1:]
            return mask.restrict(ranges, ranges).simplify()
        parts = [self.local_mask(mask, rank, everyone).slices for rank in everyone]
        shift = np.repeat(np.arange(self.world_size) * self.local_len, [len(p) for p in parts])
        slices = np.concatenate(parts)
        slices[:, [Q0, Q1]] += shift[:, None]
        slices[:, [LO, HI]] -= shift[:, None]
        return AttnMask.from_slices(self.padded_len, self.padded_len, slices)

    def area_matrix(self, mask: AttnMask) -> IntArray:
        """``(P, P)`` visible pairs between the queries of rank r (row) and the keys of rank s.

        O(slices that the segments cut out); for striped layouts O(tokens), from per-row counts.
        """
        p = self.world_size
        if self.step > 1:
            return _striped_areas(mask, p)
        ranges, owner = self.segments[:, 1:], self.segments[:, 0]
        cut, _, part_q = cut_axis(mask.slices, ranges, axis=0)
        cut, source, part_k = cut_axis(cut, ranges, axis=1)
        pair = owner[part_q[source]] * p + owner[part_k]
        found = np.bincount(pair, weights=areas(cut).astype(np.float64), minlength=p * p)
        return _exact(found).reshape(p, p)

    def shard(self, x: torch.Tensor, rank: int, dim: int = 1) -> torch.Tensor:
        """The tokens of one rank along ``dim`` of a global tensor; padding is zeros."""
        import torch

        positions = torch.as_tensor(self.positions(rank), device=x.device)
        local = x.index_select(dim, positions.clamp(max=self.seq_len - 1))
        padding = torch.nonzero(positions >= self.seq_len).flatten()
        return local.index_fill(dim, padding, 0) if len(padding) else local

    def unshard(self, shards: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
        """The global tensor from the shards of all ranks in order; padding is dropped."""
        import torch

        first = shards[0]
        shape = list(first.shape)
        shape[dim] = self.padded_len
        full = first.new_empty(shape)
        for rank, local in enumerate(shards):
            positions = torch.as_tensor(self.positions(rank), device=first.device)
            full.index_copy_(dim, positions, local)
        return full.narrow(dim, 0, self.seq_len)


def names() -> list[str]:
    """The registered layouts."""
    return sorted(_LAYOUTS)


def summary(name: str) -> str:
    """One line on a layout, for people."""
    return (_LAYOUTS[name].__doc__ or "").splitlines()[0]


def build(spec: Spec | str, seq_len: int, world_size: int) -> Layout:
    """A layout by name.

    Raises:
        ValueError: for an unknown name or parameter, listing what there is.
    """
    spec = Spec.parse(spec)
    if spec.name not in _LAYOUTS:
        raise ValueError(f"no layout {spec.name!r}; there are: {', '.join(names())}")
    check_params("layout", spec.name, spec.kwargs, ())
    segments, step = _LAYOUTS[spec.name](seq_len, world_size)
    return Layout(spec.name, seq_len, world_size, step, segments)


def _layout(
    function: Callable[[int, int], tuple[Segments, int]],
) -> Callable[[int, int], tuple[Segments, int]]:
    _LAYOUTS[function.__name__] = function
    return function


@_layout
def contiguous(seq_len: int, world_size: int) -> tuple[Segments, int]:
    """Rank r holds one run of S/P tokens."""
    local = -(-seq_len // world_size)
    rank = np.arange(world_size)
    return np.column_stack([rank, rank * local, np.full(world_size, local)]), 1


@_layout
def zigzag(seq_len: int, world_size: int) -> tuple[Segments, int]:
    """Of 2P chunks, rank r holds chunk r and chunk 2P-1-r, which balances causal masks.

    Source: Llama 3 (arXiv 2407.21783) and ring-flash-attention's zigzag ring.
    """
    chunk = -(-seq_len // (2 * world_size))
    rank = np.repeat(np.arange(world_size), 2)
    index = np.column_stack([np.arange(world_size), 2 * world_size - 1 - np.arange(world_size)])
    return np.column_stack([rank, index.reshape(-1) * chunk, np.full(2 * world_size, chunk)]), 1


@_layout
def striped(seq_len: int, world_size: int) -> tuple[Segments, int]:
    """Token t is on rank t mod P.

    Source: Striped Attention (arXiv 2311.09431).
    """
    local = -(-seq_len // world_size)
    rank = np.arange(world_size)
    return np.column_stack([rank, rank, np.full(world_size, local)]), world_size


def _fit(mask: AttnMask, layout: Layout) -> AttnMask:
    """The mask on the padded extents, so that every stripe has ``local_len`` tokens."""
    return AttnMask(layout.padded_len, layout.padded_len, mask.slices)


def _striped_areas(mask: AttnMask, p: int) -> IntArray:
    """Areas under striping: a row that sees keys [a, b) gives every rank (b - a) // P of them and
    one more to the ranks in a cyclic range, which enters as a difference array."""
    total = np.zeros((p, p), dtype=np.int64)
    edge = np.zeros((p, p + 1), dtype=np.int64)
    q0, q1, k0, k1, lo, hi = mask.slices.T
    rows = q1 - q0
    source = np.repeat(np.arange(len(rows)), rows)
    i = np.arange(len(source)) - np.repeat(np.cumsum(rows) - rows, rows) + q0[source]
    a = np.maximum(k0[source], i + lo[source])
    count = np.minimum(k1[source], i + hi[source] + 1) - a
    rank = i % p
    total += np.bincount(rank, weights=count // p, minlength=p).astype(np.int64)[:, None]
    begin, extra = a % p, count % p
    end = begin + extra
    width = p + 1
    flat = np.bincount(rank * width + begin, minlength=p * width)
    flat -= np.bincount(rank * width + np.minimum(end, p), minlength=p * width)
    wrapped = end > p
    flat += np.bincount(rank[wrapped] * width, minlength=p * width)
    flat -= np.bincount(rank[wrapped] * width + end[wrapped] - p, minlength=p * width)
    edge += flat.reshape(p, width)
    return total + np.cumsum(edge, axis=1)[:, :p]


def _exact(sums: np.typing.NDArray[Any]) -> IntArray:
    assert sums.max(initial=0) < 2**53, "areas no longer fit a float64 exactly"
    return sums.astype(np.int64)
