"""Layouts: the assignment of tokens to ranks.

A layout assigns the tokens of one sequence to ranks, as lists of segments ``start, start + step,
…``.  Every rank holds ``local_len`` tokens; if they do not divide, the sequence is padded at its
end with tokens that are in no slice of any mask: they see nothing and are not seen.

A new layout is one function that returns segments, registered with ``@_register``.
:func:`area_matrix` computes the visible areas of all pairs of ranks at once;
``cpbench.parallel.local_masks`` cuts their masks out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.registry import check_params
from cpbench.core.spec import Spec
from cpbench.core.untraced import untraced
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.slices import Q0, Q1, IntArray, areas, canonical_indexed, cut_axis, strided
from cpbench.parallel.dispatch_solver import assign_tokens

if TYPE_CHECKING:
    import torch

Segments = IntArray  # (n, 3) rows (rank, start, length), in local order within each rank
_Assign = Callable[
    [int, int, AttnMask | None], tuple[Segments, int]
]  # returns segments and their step
_LAYOUTS: dict[str, _Assign] = {}
MAX_SEGMENT_PAIRS = 1 << 25  # more take minutes and gigabytes to compute areas for


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of every rank.

    Attributes:
        name: registered name.
        seq_len: tokens without padding.
        world_size: number of ranks, P.
        step: distance between the tokens of a segment (1, or P for striped).
        segments: ``(n, 3)`` int64 rows (rank, start, length), sorted by rank; the local tokens of
            a rank are its segments one after another, and together they cover ``P * local_len``
            positions.
    """

    name: str
    seq_len: int
    world_size: int
    step: int
    segments: Segments

    @functools.cached_property
    def local_len(self) -> int:
        """Tokens on each rank, padding included."""
        return int(self.ranges(0)[:, 1].sum())

    @property
    def padded_len(self) -> int:
        """Tokens on all ranks, padding included."""
        return self.local_len * self.world_size

    def ranges(self, rank: int) -> IntArray:
        """The segments of one rank: ``(n, 2)`` rows (start, length)."""
        first, last = np.searchsorted(self.segments[:, 0], [rank, rank + 1])
        return self.segments[first:last, 1:]

    def windows(self, first: int, last: int) -> IntArray:
        """The local tokens from ``first`` to before ``last`` of every rank, as rows (start, length)
        in order of ranks; for layouts of step 1."""
        assert self.step == 1
        rank, start, length = self.segments.T
        local = np.cumsum(length) - length - rank * self.local_len
        begin, end = np.maximum(local, first), np.minimum(local + length, last)
        runs = np.column_stack([start + begin - local, end - begin])
        return runs[runs[:, 1] > 0]

    def positions(self, rank: int) -> IntArray:
        """The global position of each local token, ``(local_len,)``, for RoPE, labels and inputs.

        Positions from ``seq_len`` on are padding.
        """
        segments = [start + self.step * np.arange(n) for start, n in self.ranges(rank)]
        return np.concatenate(segments).astype(np.int64)

    def merged(self, groups: Sequence[Sequence[int]]) -> Layout:
        """Merge each group of ranks into one rank, in the order of groups and members.

        Args:
            groups: equally large groups that together hold every rank once.
        """
        order = np.concatenate([np.asarray(group) for group in groups])
        position = np.argsort(order)[self.segments[:, 0]]
        segments = self.segments[np.argsort(position, kind="stable")].copy()
        segments[:, 0] = np.sort(position) // (self.world_size // len(groups))
        return Layout(self.name, self.seq_len, len(groups), self.step, segments)

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


@functools.lru_cache(maxsize=4)  # shared by the worlds of all strategies
def area_matrix(mask: AttnMask, queries: Layout, keys: Layout) -> IntArray:
    """Visible pairs between the queries of rank r (row) and the keys of rank s, ``(P, P)``.

    O(slices that the segments cut out); for striped layouts O(slices) for every pair of stripes, or
    O(tokens), from per-row counts, if those are fewer.
    """
    p = keys.world_size
    if keys.step > 1:  # areas between stripes, of which a rank may hold several
        areas_of_stripes = _striped_area_matrix(mask, keys.step)
        (q_rank, q_stripe, _), (k_rank, k_stripe, _) = queries.segments.T, keys.segments.T
        total = np.zeros((p, p), dtype=np.int64)
        stripes = np.ix_(q_stripe % keys.step, k_stripe % keys.step)
        np.add.at(total, np.ix_(q_rank, k_rank), areas_of_stripes[stripes])
        return _read_only(total)
    cut, _, part_q = cut_axis(mask.slices, queries.segments[:, 1:], axis=0)
    cut, source, part_k = cut_axis(cut, keys.segments[:, 1:], axis=1)
    pair = queries.segments[:, 0][part_q[source]] * p + keys.segments[:, 0][part_k]
    sums = np.bincount(pair, weights=areas(cut).astype(np.float64), minlength=p * p)
    return _read_only(_to_int(sums).reshape(p, p))


def _read_only(x: IntArray) -> IntArray:
    x.setflags(write=False)
    return x


def names() -> list[str]:
    """The names of the registered layouts."""
    return sorted(_LAYOUTS)


def summary(name: str) -> str:
    """A one-line description of a layout."""
    return (_LAYOUTS[name].__doc__ or "").splitlines()[0]


@untraced
def build(spec: Spec | str, seq_len: int, world_size: int, mask: AttnMask | None = None) -> Layout:
    """Build a layout by name.

    Args:
        mask: of ``seq_len`` keys; required by ``zigzag_document`` and ``dispatch``.

    Raises:
        ValueError: for an unknown name or parameter, listing the available ones, or for a missing
            mask.
    """
    spec = Spec.parse(spec)
    if spec.name not in _LAYOUTS:
        raise ValueError(f"no layout {spec.name!r}; there are: {', '.join(names())}")
    check_params("layout", spec.name, spec.kwargs, ())
    segments, step = _LAYOUTS[spec.name](seq_len, world_size, mask)
    return Layout(spec.name, seq_len, world_size, step, segments)


def _register(function: _Assign) -> _Assign:
    _LAYOUTS[function.__name__] = function
    return function


@_register
def contiguous(seq_len: int, world_size: int, mask: AttnMask | None) -> tuple[Segments, int]:
    """One run of S/P consecutive tokens per rank."""
    local = -(-seq_len // world_size)
    rank = np.arange(world_size)
    return np.column_stack([rank, rank * local, np.full(world_size, local)]), 1


@_register
def zigzag(seq_len: int, world_size: int, mask: AttnMask | None) -> tuple[Segments, int]:
    """Chunks r and 2P-1-r of 2P on rank r: balances causal masks.

    Source: Llama 3 (arXiv 2407.21783) and ring-flash-attention's zigzag ring.
    """
    chunk = -(-seq_len // (2 * world_size))
    rank = np.repeat(np.arange(world_size), 2)
    index = np.column_stack([np.arange(world_size), 2 * world_size - 1 - np.arange(world_size)])
    return np.column_stack([rank, index.reshape(-1) * chunk, np.full(2 * world_size, chunk)]), 1


@_register
def zigzag_document(seq_len: int, world_size: int, mask: AttnMask | None) -> tuple[Segments, int]:
    """Zigzag inside every document of the mask: balances causal documents.

    Documents are the diagonal blocks of the mask.  Their lengths need not divide: remaining tokens
    go to the chunks in turn, from document to document.

    Source: ring-flash-attention's zigzag for packed sequences, which requires multiples of 2P.
    """
    if mask is None:
        raise ValueError("layout zigzag_document depends on the documents of a mask: pass the mask")
    chunks = 2 * world_size
    starts = mask.diagonal_blocks()
    lengths = np.diff(np.append(starts, seq_len))
    segment_pairs = int((np.minimum(lengths, chunks) ** 2).sum())
    if segment_pairs > MAX_SEGMENT_PAIRS:
        raise ValueError(
            f"layout zigzag_document would cut {len(lengths)} documents into {segment_pairs} pairs "
            f"of segments on {world_size} ranks, more than {MAX_SEGMENT_PAIRS}; "
            "use zigzag or fewer ranks"
        )
    base, extra = np.divmod(lengths, chunks)
    first = (np.cumsum(extra) - extra) % chunks  # the chunk that gets the first remaining token
    turn = (np.arange(chunks)[None, :] - first[:, None]) % chunks
    count = base[:, None] + (turn < extra[:, None])
    begin = starts[:, None] + np.cumsum(count, axis=1) - count
    rank = np.broadcast_to(
        np.minimum(np.arange(chunks), chunks - 1 - np.arange(chunks)), begin.shape
    )
    segments = np.column_stack([x.reshape(-1) for x in (rank, begin, count)])
    segments = segments[segments[:, 2] > 0]
    held = np.bincount(segments[:, 0], weights=segments[:, 2], minlength=world_size).astype(int)
    missing = max(-(-seq_len // world_size), int(held.max())) - held
    padding = seq_len + np.cumsum(missing) - missing
    tail = np.column_stack([np.arange(world_size), padding, missing])[missing > 0]
    segments = np.concatenate([segments, tail])
    return segments[np.lexsort((segments[:, 1], segments[:, 0]))], 1


@_register
def dispatch(seq_len: int, world_size: int, mask: AttnMask | None) -> tuple[Segments, int]:
    """Nearly equal visible area per rank for any mask, at low communication volume.

    Tokens that are not those of the mask, such as a few queries, are assigned in contiguous runs.
    """
    if mask is None:
        raise ValueError("layout dispatch depends on the areas of a mask: pass the mask")
    if (mask.seq_q, mask.seq_k) != (seq_len, seq_len):
        mask = AttnMask.from_slices(seq_len, seq_len, [])
    return assign_tokens(mask, world_size), 1


@_register
def striped(seq_len: int, world_size: int, mask: AttnMask | None) -> tuple[Segments, int]:
    """Token t on rank t mod P.

    Source: Striped Attention (arXiv 2311.09431).
    """
    local = -(-seq_len // world_size)
    rank = np.arange(world_size)
    return np.column_stack([rank, rank, np.full(world_size, local)]), world_size


def _striped_area_matrix(mask: AttnMask, p: int) -> IntArray:
    """The area matrix of striped layouts."""
    rows = int((mask.slices[:, Q1] - mask.slices[:, Q0]).sum())
    few_rows = rows < len(mask.slices) * p * p
    return _area_matrix_of_rows(mask, p) if few_rows else _area_matrix_of_pairs(mask, p)


def _area_matrix_of_pairs(mask: AttnMask, p: int) -> IntArray:
    """The area matrix of striped layouts, from the part of each slice in every pair of stripes."""
    q, k = np.divmod(np.arange(p * p), p)
    total = np.zeros(p * p, np.int64)
    for row in mask.slices:
        kept, pair = canonical_indexed(strided(np.broadcast_to(row, (p * p, 6)), p, q, k))
        total[pair] += areas(kept)
    return total.reshape(p, p)


def _area_matrix_of_rows(mask: AttnMask, p: int) -> IntArray:
    """The area matrix of striped layouts, from the intervals of keys that each query sees.

    Of an interval [a, b) every rank holds (b - a) // P keys, and the ranks of a cyclic range hold
    one more, which is accumulated in a difference array.
    """
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


def _to_int(sums: np.typing.NDArray[Any]) -> IntArray:
    """Convert float64 sums of integers, which are exact below 2**53."""
    assert sums.max(initial=0) < 2**53, "areas no longer fit a float64 exactly"
    return sums.astype(np.int64)
