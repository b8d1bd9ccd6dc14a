"""What the published implementations do, as events of the simulator.

These are not strategies of cpbench: they are the baselines of MagiAttention's benchmark, written
down from reading its public code (SandAI-org/MagiAttention, exps/dist_attn at 2c64135).  What they
do beside attention differs from what our strategies do:

- every kernel call gathers its inputs from padded rows and scatters its results into zeroed ones;
- a hop of a ring is a send and a receive, not one batch: between two ranks one after the other;
- zigzag halves of the queries or keys are copied out, and partial outputs are merged in bfloat16 at
  the end, one step after another;
- documents stay in the grid of a kernel where they have no tokens in it, beside the longest;
- an all-gather is reordered by a gather, and its gradients are sums over all keys.

One rank stands for all, replayed alone: the last one, which in a causal zigzag ring has the most
work beside attention, as every step takes all of its queries and half of the keys.

Legend: n tokens of a rank, P ranks, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from published_sequence import ITEM, NODE, D, G, H, Sequence, halves, padded_tokens

from cpbench.masks.slices import IntArray
from cpbench.simulator.events import Program


def ulysses(lengths: IntArray, causal: bool, phase: str, size: int) -> Program:
    """All-to-all of q, k and v one after another, attention over all tokens, and back."""
    one, members = Sequence(size - 1, size), tuple(range(size))
    tokens = -(-int(lengths.sum()) // size)
    heads_kv = max(G, size)  # repeated before, outside of what is timed

    def attention() -> None:
        rows = tokens * size
        one.attention(phase, lengths, lengths, causal, rows, H // size, heads_kv // size)

    _with_heads_exchanged(one, members, tokens, (H, heads_kv, heads_kv), phase, attention)
    return tuple(one.events)


def _with_heads_exchanged(
    one: Sequence, members: tuple[int, ...], tokens: int, heads: tuple[int, int, int], phase: str,
    attention: Any,
) -> None:  # fmt: skip
    """What runs between all-to-alls: each tensor is transposed, sent and transposed again."""

    def exchange(heads: int) -> None:
        nbytes = tokens * heads * D * ITEM
        one.stream(2 * nbytes)
        one.collective("all_to_all", members, nbytes / len(members))
        one.stream(2 * nbytes)

    for tensor in heads if phase == "fwd" else heads[:1]:
        exchange(tensor)
    attention()
    for tensor in heads[:1] if phase == "fwd" else heads:
        exchange(tensor)


def zigzag_ring(lengths: IntArray, causal: bool, phase: str, size: int) -> Program:
    """A zigzag ring over all ranks."""
    one, ring = Sequence(size - 1, size), tuple(range(size))
    (ring_forward if phase == "fwd" else ring_backward)(one, ring, lengths, causal, H, G)
    return tuple(one.events)


def _step(lengths: IntArray, causal: bool, ring: int, rank: int, source: int) -> tuple[Any, ...]:
    """Queries and keys of a step, whether it is causal, and whether it takes half of either."""
    if not causal or source == rank:
        own = halves(lengths, ring, rank, True, True)
        return own, halves(lengths, ring, source, True, True), causal and source == rank, "", rank
    if source < rank:
        own = halves(lengths, ring, rank, True, True)
        return own, halves(lengths, ring, source, True, False), False, "keys", rank
    own = halves(lengths, ring, rank, False, True)
    return own, halves(lengths, ring, source, True, True), False, "queries", rank


def _sizes(lengths: IntArray, ring: int, heads: int, heads_kv: int) -> tuple[int, int, int, int]:
    """Rows of a rank, and the bytes of its queries, of its keys and values, and of an lse."""
    rows = padded_tokens(lengths, ring)
    return rows, rows * heads * D * ITEM, 2 * rows * heads_kv * D * ITEM, rows * heads * 4


def _ring_kernel(
    one: Sequence, phase: str, step: tuple[Any, ...], rows: int, q: int, kv: int, heads: int,
    heads_kv: int,
) -> None:  # fmt: skip
    """Copies out the half of the queries or keys that a step takes, and computes."""
    queries, keys, causal, half, _ = step
    if half == "keys":
        one.stream(kv)
    elif half == "queries":
        one.stream(q * (1 if phase == "fwd" else 3), 1 if phase == "fwd" else 3)
    own = rows // 2 if half == "queries" else rows
    one.attention(phase, queries, keys, causal, own, heads, heads_kv)


def ring_forward(
    one: Sequence, ring: tuple[int, ...], lengths: IntArray, causal: bool, heads: int, heads_kv: int
) -> None:
    """Keys are sent on during every step; outputs are merged after the last."""
    size, rank = len(ring), ring.index(one.rank)
    rows, q, kv, lse = _sizes(lengths, size, heads, heads_kv)
    one.stream(2 * kv)
    posts: list[int] = []
    steps = [_step(lengths, causal, size, rank, (rank - i) % size) for i in range(size)]
    for i, step in enumerate(steps):
        one.wait(posts)
        posts = one.hop(ring, kv) if i < size - 1 else []
        _ring_kernel(one, "fwd", step, rows, q, kv, heads, heads_kv)
    merge_outputs(one, steps, q, lse)


def merge_outputs(one: Sequence, steps: list[tuple[Any, ...]], q: int, lse: int) -> None:
    """The lse of all steps, and then their outputs, are merged one after another."""
    one.stream(q + 2 * lse, 2)
    for step in steps[1:]:
        one.stream(3 * lse * (0.5 if step[3] == "queries" else 1))
    for step in steps:
        one.merge((3 * q + 2 * lse) * (0.5 if step[3] == "queries" else 1))


def ring_backward(
    one: Sequence, ring: tuple[int, ...], lengths: IntArray, causal: bool, heads: int, heads_kv: int
) -> None:
    """Keys and their gradients are sent on in one message, which is waited for in every step."""
    size, rank = len(ring), ring.index(one.rank)
    rows, q, kv, _ = _sizes(lengths, size, heads, heads_kv)
    one.stream(2 * kv)
    for i in range(size):
        posts = []
        if size > 1:
            posts = one.hop(ring, kv * (1 if i in (0, size - 1) else 2), step=-1)
        step = _step(lengths, causal, size, rank, (rank + i + 1) % size)
        _ring_kernel(one, "bwd", step, rows, q, kv, heads, heads_kv)
        update_gradients(one, step, i == 0, q, kv, posts)


def update_gradients(
    one: Sequence, step: tuple[Any, ...], first: bool, q: int, kv: int, posts: list[int]
) -> None:
    """dQ is added up; dK and dV are joined, and added to what has arrived."""
    half = step[3]
    terms = 2 if first else 3
    one.stream(terms * q * (0.5 if half == "queries" else 1))
    one.wait(posts)
    one.stream(2 * kv * (0.5 if half == "keys" else 1))
    one.stream(terms * kv * (0.5 if half == "keys" else 1))


def all_gather(lengths: IntArray, causal: bool, phase: str, size: int) -> Program:
    """Keys are gathered and reordered; the two chunks of the queries are computed one by one."""
    rank = size - 1
    one, members = Sequence(rank, size), tuple(range(size))
    rows, q, kv, lse = _sizes(lengths, size, H, G)
    total = kv * size
    if phase == "bwd":
        one.stream(total, 2)  # zeroed gradients of all keys
    for _ in range(2):
        one.collective("all_gather", members, kv / 2)
        one.gather(total / 2)
    chunk = -(-lengths // (2 * size))
    for first in (True, False):
        place = rank if first else 2 * size - 1 - rank
        queries = halves(lengths, size, rank, first, not first)
        keys = np.minimum(lengths, chunk * (place + 1)) if causal else lengths
        one.stream(q * (1 if phase == "fwd" else 2), 1 if phase == "fwd" else 2)
        one.attention(phase, queries, keys, causal, rows // 2, H, G)
        one.stream(q)
        if phase == "fwd":
            one.stream(10 * lse, 3)
        else:  # results are scattered into rows for all keys, and added to the sums
            seen = (queries > 0) & (keys > 0)
            one.stream(max(total - 2 * int(keys[seen].sum()) * G * D * ITEM, 0), 0)
            one.stream(3 * total, 2)
    if phase == "bwd":
        one.gather(total, 2)
        for _ in range(2):
            one.collective("reduce_scatter", members, kv / 2)
    return tuple(one.events)


def _hybrid(lengths: IntArray, causal: bool, phase: str, size: int, ring_pass: Any) -> Program:
    """Ulysses inside the nodes, a ring across them."""
    rank, rings = size - 1, size // NODE
    one = Sequence(rank, size)
    node = tuple(range(size - NODE, size))
    ring = tuple(range(NODE - 1, size, NODE))
    rows = padded_tokens(lengths, rings)

    def attention() -> None:
        ring_pass(one, ring, lengths, causal, H // NODE, G // NODE)

    _with_heads_exchanged(one, node, -(-rows // NODE), (H, G, G), phase, attention)
    return tuple(one.events)


def usp(lengths: IntArray, causal: bool, phase: str, size: int) -> Program:
    """Ulysses inside the nodes, a zigzag ring across them."""
    return _hybrid(lengths, causal, phase, size, ring_forward if phase == "fwd" else ring_backward)


def loongtrain(lengths: IntArray, causal: bool, phase: str, size: int) -> Program:
    """Ulysses inside the nodes, a double ring across them."""
    ring_pass = double_ring_forward if phase == "fwd" else double_ring_backward
    return _hybrid(lengths, causal, phase, size, ring_pass)


def windows(ring: int) -> int:
    """The number of windows of a double ring: the largest divisor up to the square root."""
    count = max(i for i in range(1, ring + 1) if ring % i == 0 and i <= ring // i)
    return 1 if count >= ring else count


def _double_steps(
    lengths: IntArray, causal: bool, size: int, rank: int, outer: int
) -> list[list[tuple[Any, ...]]]:
    """The steps of every window of one rank."""
    inner = size // outer
    place, own = divmod(rank, inner)
    return [
        [
            _step(lengths, causal, size, rank, (place - w) % outer * inner + (own - i) % inner)
            for i in range(inner)
        ]
        for w in range(outer)
    ]


def _rings(ring: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ring inside the window of a rank, and that across windows."""
    outer = windows(len(ring))
    inner = len(ring) // outer
    place, own = divmod(ring.index(rank), inner)
    return ring[place * inner : (place + 1) * inner], ring[own::inner]


def double_ring_forward(
    one: Sequence, ring: tuple[int, ...], lengths: IntArray, causal: bool, heads: int, heads_kv: int
) -> None:
    """Keys go round a window while those of the next window arrive."""
    size, rank = len(ring), ring.index(one.rank)
    rows, q, kv, lse = _sizes(lengths, size, heads, heads_kv)
    inside, across = _rings(ring, one.rank)
    one.stream(2 * kv)
    steps = _double_steps(lengths, causal, size, rank, len(across))
    outer_posts: list[int] = []
    for w, window in enumerate(steps):
        one.wait(outer_posts)
        outer_posts = one.hop(across, kv, lane="outer") if w + 1 < len(across) else []
        one.stream(2 * kv)
        posts: list[int] = []
        for i, step in enumerate(window):
            one.wait(posts)
            posts = one.hop(inside, kv) if i + 1 < len(inside) else []
            _ring_kernel(one, "fwd", step, rows, q, kv, heads, heads_kv)
    merge_outputs(one, [step for window in steps for step in window], q, lse)


def double_ring_backward(
    one: Sequence, ring: tuple[int, ...], lengths: IntArray, causal: bool, heads: int, heads_kv: int
) -> None:
    """Gradients follow their keys in groups of their own, and cross at the end of every window."""
    size, rank = len(ring), ring.index(one.rank)
    rows, q, kv, _ = _sizes(lengths, size, heads, heads_kv)
    inside, across = _rings(ring, one.rank)
    one.stream(2 * kv)
    outer_keys: list[int] = []
    outer_gradients: list[int] = []
    for w, window in enumerate(_double_steps(lengths, causal, size, rank, len(across))):
        one.wait(outer_keys)
        outer_keys = one.hop(across, kv, lane="outer") if w + 1 < len(across) else []
        one.stream(2 * kv)
        posts: list[int] = []
        gradients: list[int] = []
        for i, step in enumerate(window):
            one.wait(posts)
            posts = one.hop(inside, kv) if i + 1 < len(inside) else []
            _ring_kernel(one, "bwd", step, rows, q, kv, heads, heads_kv)
            awaited = outer_gradients if w and i == 0 else gradients
            update_gradients(one, step, w == i == 0, q, kv, awaited)
            if len(inside) > 1:
                gradients = one.hop(inside, kv, lane="gradients")
            else:
                gradients = []
                one.stream(2 * kv)
        one.wait(gradients)
        one.stream(2 * kv)
        if len(across) > 1:
            outer_gradients = one.hop(across, kv, lane="outer gradients")
        else:
            one.stream(2 * kv)
    one.wait(outer_gradients)


BASELINES = {
    "ulysses": ulysses,
    "ring (zigzag)": zigzag_ring,
    "ring_allgather (zigzag)": all_gather,
    "usp": usp,
    "loongtrain": loongtrain,
}
