"""Each selector's scores from its definition, in float64 and loops, and whether a choice fits them.

Nothing here is shared with the selectors.  Ties are tolerated: a choice fits when what it leaves
out scores no higher than what it takes.
"""

from __future__ import annotations

import math

import torch

TOLERANCE = 1e-5
Rows = list[list[float]]


def probabilities(q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, T]`` of full attention within ``seen`` ``[S, T]``."""
    wide = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bshd,bthd->bhst", q.double(), wide) * q.shape[3] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def ranges(tokens: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, tokens)) for i in range(0, tokens, block)]


def mean(x: torch.Tensor, of: slice) -> torch.Tensor:
    return x[of].double().mean(0)


class Head:
    """One head of one batch, ``[S, D]`` and ``[T, D]``."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, b: int, h: int) -> None:
        self.q, self.k = q[b, :, h].double(), k[b, :, h // (q.shape[2] // k.shape[2])].double()


def oracle(head: Head, probs: torch.Tensor, block: int) -> Rows:
    """Mass of blocks; probs ``[S, T]``."""
    rows, columns = ranges(len(head.q), block), ranges(len(head.k), block)
    return [[float(probs[x, y].sum()) for y in columns] for x in rows]


def quest(head: Head, block_q: int, block: int) -> Rows:
    found = []
    for x in ranges(len(head.q), block_q):
        row = []
        for y in ranges(len(head.k), block):
            high, low = head.k[y].max(0).values, head.k[y].min(0).values
            bounds = [float(torch.maximum(one * high, one * low).sum()) for one in head.q[x]]
            row.append(max(bounds))
        found.append(row)
    return found


def moba(head: Head, block: int) -> Rows:
    """-inf where a block is not wholly past, +inf for the own one."""
    found = []
    for t in range(len(head.q)):
        row = []
        for i, y in enumerate(ranges(len(head.k), block)):
            gate = float(head.q[t] @ mean(head.k, y))
            own, past = i == t // block, (i + 1) * block <= t
            row.append(math.inf if own else gate if past else -math.inf)
        found.append(row)
    return found


def xattention(head: Head, block: int, stride: int) -> Rows:
    """Antidiagonal mass of blocks under a causal mask of groups."""
    n, dim = head.q.shape
    groups = -(-n // stride)
    wide_q, wide_k = (torch.zeros(groups * stride, dim, dtype=torch.float64) for _ in "qk")
    wide_q[:n], wide_k[:n] = head.q, head.k
    logits = torch.full((groups, groups), -torch.inf, dtype=torch.float64)
    for i in range(groups):
        for j in range(i + 1):
            total = 0.0
            for s in range(stride):
                total += float(wide_q[i * stride + stride - 1 - s] @ wide_k[j * stride + s])
            logits[i, j] = total / math.sqrt(dim) / stride
    probs = logits.softmax(-1)
    per = block // stride
    blocks = range(-(-n // block))
    return [
        [float(probs[x * per : (x + 1) * per, y * per : (y + 1) * per].sum()) for y in blocks]
        for x in blocks
    ]


def pooled(head: Head, block: int) -> Rows:
    """Mean query times mean key."""
    rows, columns = ranges(len(head.q), block), ranges(len(head.k), block)
    return [[float(mean(head.q, x) @ mean(head.k, y)) for y in columns] for x in rows]


def nsa(
    q: torch.Tensor, k: torch.Tensor, b: int, g: int, block: int, size: int, stride: int
) -> Rows:
    """Probabilities of compressed keys, added up over the group and spread by the weights of the
    paper's equation 9: a window counts as often as it covers a stride of the block."""
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    windows = [slice(i, i + size) for i in range(0, n - size + 1, stride)]
    means = torch.stack([mean(k[b, :, g], w) for w in windows])
    found = []
    for t in range(n):
        total = [0.0] * len(windows)
        past = [i for i, w in enumerate(windows) if w.stop - 1 <= t]
        for h in range(g * group, (g + 1) * group):
            if past:
                scores = means[past] @ q[b, t, h].double() * q.shape[3] ** -0.5
                for i, p in zip(past, scores.softmax(0).tolist(), strict=True):
                    total[i] += p
        row = []
        for y in ranges(n, block):
            tokens = range(y.start, y.start + block)
            cover = [len(set(tokens) & set(range(w.start, w.stop))) / stride for w in windows]
            row.append(sum(p * c for p, c in zip(total, cover, strict=True)))
        found.append(row)
    return found


def dsa(q: torch.Tensor, k: torch.Tensor, b: int, t: int) -> torch.Tensor:
    """``[T]``: the index of one query."""
    group = q.shape[2] // k.shape[2]
    total = torch.zeros(k.shape[1], dtype=torch.float64)
    for h in range(q.shape[2]):
        total += (k[b, :, h // group].double() @ q[b, t, h].double()).clamp(min=0)
    return total


def takes_the_best(
    kept: torch.Tensor, scores: list[float], allowed: torch.Tensor, forced: set[int], count: int
) -> None:
    """Assert that a row keeps so many of the allowed, the forced ones and then the best.

    Args:
        kept, allowed: ``[n]`` booleans.
    """
    chosen = set(torch.nonzero(kept)[:, 0].tolist())
    there = set(torch.nonzero(allowed)[:, 0].tolist())
    forced = forced & there
    assert chosen <= there
    assert forced <= chosen
    assert len(chosen) == min(max(count, len(forced)), len(there))
    free, left = chosen - forced, there - chosen
    if free and left:
        scale = max(abs(scores[i]) for i in there if math.isfinite(scores[i])) or 1.0
        assert min(scores[i] for i in free) >= max(scores[i] for i in left) - TOLERANCE * scale


def covers(
    kept: torch.Tensor, mass: list[float], allowed: torch.Tensor, forced: set[int], share: float
) -> None:
    """Assert that a row keeps the forced and then the fewest of the best that hold a share."""
    chosen = set(torch.nonzero(kept)[:, 0].tolist())
    there = set(torch.nonzero(allowed)[:, 0].tolist())
    total = sum(mass[i] for i in there)
    takes_the_best(kept, mass, allowed, forced, len(chosen))
    held = sum(mass[i] for i in chosen)
    slack = TOLERANCE * max(total, 1.0)
    assert held >= share * total - slack
    free = chosen - forced
    if free:
        assert held - min(mass[i] for i in free) < share * total + slack
