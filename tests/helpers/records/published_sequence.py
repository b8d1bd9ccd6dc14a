"""The events of one rank of a published implementation, and the work beside attention that all of
them have: see ``published_baselines``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cpbench.masks.slices import IntArray
from cpbench.simulator.events import Event, Kernel, Post, SideWork, Wait
from cpbench.simulator.tiles import TileCounts, Tiling, count_by_slice, count_documents, transposed

H, G, D, ITEM, NODE = 64, 8, 128, 2, 8
TILING = Tiling(fwd=(128, 128), bwd=(64, 128), grid="slices")


class Sequence:
    """The events of one rank, and the operations that it has posted."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.events = rank, size, list[Event]()
        self._posts = 0

    def stream(self, nbytes: float, launches: int = 1) -> None:
        self.events.append(SideWork(stream=int(nbytes), launches=launches))

    def merge(self, nbytes: float) -> None:
        """Rows are merged by a kernel that searches for the document of each."""
        self.events.append(SideWork(scatter=int(nbytes), launches=1))

    def gather(self, nbytes: float, launches: int = 1) -> None:
        """Rows of so many bytes are read and written."""
        self.events.append(SideWork(gather=int(2 * nbytes), launches=launches))

    def scatter(self, nbytes: float, launches: int = 1) -> None:
        """Rows are scattered into zeros."""
        work = SideWork(stream=int(nbytes), scatter=int(2 * nbytes), launches=2 * launches)
        self.events.append(work)

    def post(
        self, operation: str, members: tuple[int, ...], sends: Any, receives: Any, lane: str = ""
    ) -> int:
        self._posts += 1
        post = Post(self._posts, operation, members, lane, tuple(sends), tuple(receives))
        self.events.append(post)
        return self._posts

    def wait(self, posts: list[int]) -> None:
        self.events += [Wait(number) for number in posts]

    def collective(self, operation: str, members: tuple[int, ...], nbytes: float) -> None:
        """One that is waited for at once, with so many bytes to and from each other member."""
        if len(members) > 1:
            rows = [(peer, int(nbytes)) for peer in members if peer != self.rank]
            self.wait([self.post(operation, members, rows, rows)])

    def hop(self, ring: tuple[int, ...], nbytes: float, step: int = 1, lane: str = "") -> list[int]:
        """A send to the next rank of a ring and then a receive from the previous one.

        What is not batched uses a communicator of every pair of ranks (torch's ProcessGroupNCCL,
        initialised lazily): in a ring of two ranks the receive follows the send."""
        place = ring.index(self.rank)
        ahead, behind = (ring[(place + way * step) % len(ring)] for way in (1, -1))
        to, of = (tuple(sorted((self.rank, peer))) for peer in (ahead, behind))
        return [
            self.post("exchange", to, [(ahead, int(nbytes))], [], lane),
            self.post("exchange", of, [], [(behind, int(nbytes))], lane),
        ]

    def attention(
        self, phase: str, queries: IntArray, keys: IntArray, causal: bool, rows: int, heads: int,
        heads_kv: int,
    ) -> None:  # fmt: skip
        """A kernel call on documents, with the gathers before and the scatters after it.

        Args:
            queries, keys: lengths of all documents, 0 where one has none.
            rows: rows of the padded queries.
        """
        seen = (queries > 0) & (keys > 0)
        row = heads * D * ITEM
        q = int(queries[seen].sum()) * row
        kv = int(keys[seen].sum()) * heads_kv * D * ITEM
        lse = q // (D * ITEM) * 4
        if phase == "fwd":
            self.gather(q + 2 * kv, 3)
        else:
            self.gather(3 * q + lse + 2 * kv, 6)
        group = heads // heads_kv if phase == "fwd" else 1
        self.events.append(
            Kernel(
                phase=phase, tiles=_tiles(phase, queries, keys, causal, group),
                heads_q=heads // group,
                heads_kv=heads_kv, seq_q=_accumulated(queries, seen, 4 / 7),
                seq_k=_accumulated(keys, seen, 4 / 5),
                head_dim=D, value_dim=D, itemsize=ITEM,
                full=not causal,
            )
        )  # fmt: skip
        if phase == "fwd":
            self.scatter(q + lse, 2)
        else:
            self.scatter(q + 2 * kv, 3)
        padding = rows * row - q
        if padding > 0:
            self.stream(padding, 0)


def _tiles(phase: str, queries: IntArray, keys: IntArray, causal: bool, group: int) -> TileCounts:
    """Tiles of packed documents; in the forward pass one holds all query heads of a group."""
    tile, block = TILING.fwd[0] // group, TILING.fwd[1]
    if phase == "bwd":
        block, tile = TILING.bwd
        counts = _transposed_documents(queries, keys, causal, tile, block)
    else:
        counts = count_documents(queries, keys, causal, tile, block)
    own = queries if phase == "fwd" else keys
    unused = int(((queries == 0) | (keys == 0)).sum())  # documents that stay in the grid
    return replace(counts, empty=counts.empty + unused * -(-int(own.max()) // tile))


def _accumulated(lengths: IntArray, seen: Any, share: float) -> int:
    """Tokens that a backward pass moves beside its tiles: of that, a share is in float32 buffers
    with a tile of padding for every document."""
    return int(lengths[seen].sum() + share * TILING.bwd[1] * len(lengths))


def _transposed_documents(
    queries: IntArray, keys: IntArray, causal: bool, tile: int, block: int
) -> TileCounts:
    """Tiles of keys that visit blocks of queries."""
    seen = np.flatnonzero((queries > 0) & (keys > 0))
    q, k = queries[seen], keys[seen]
    zero = np.zeros_like(q)
    slices = np.column_stack([zero, q, zero, k, -q, k - q if causal else k])
    return count_by_slice(transposed(slices), tile, block)


def halves(lengths: IntArray, ring: int, rank: int, first: bool, second: bool) -> IntArray:
    """Tokens of every document on one rank of a zigzag ring, of its first or second chunk or both;
    documents are padded to multiples of two chunks a rank."""
    chunk = -(-lengths // (2 * ring))
    held = np.zeros_like(lengths)
    if first:
        held += np.clip(lengths - rank * chunk, 0, chunk)
    if second:
        held += np.clip(lengths - (2 * ring - 1 - rank) * chunk, 0, chunk)
    return held


def padded_tokens(lengths: IntArray, ring: int) -> int:
    """Tokens of one rank of a zigzag ring, padding included."""
    return int((-(-lengths // (2 * ring)) * 2).sum())
