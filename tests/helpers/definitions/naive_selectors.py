"""Scores of each selector by its definition, in float64 loops, and checks of selections.

No code is shared with the selectors.  Ties are tolerated: a selection is right if nothing outside
it scores higher than something in it.
"""

from __future__ import annotations

import math

import torch
from naive_joined import turned

TOLERANCE = 1e-5
Rows = list[list[float]]


def probabilities(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Probabilities ``[B, H, S, T]`` of full attention within a mask ``[S, T]``."""
    repeated = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bshd,bthd->bhst", q.double(), repeated) * q.shape[3] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)


def ranges(tokens: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, tokens)) for i in range(0, tokens, block)]


def mean(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    return x[tokens].double().mean(0)


class Head:
    """q ``[S, D]`` and k ``[T, D]`` of one query head of one batch."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, b: int, h: int) -> None:
        self.q, self.k = q[b, :, h].double(), k[b, :, h // (q.shape[2] // k.shape[2])].double()


def oracle(head: Head, probs: torch.Tensor, block: int) -> Rows:
    """Attention mass of blocks; probs ``[S, T]``."""
    rows, columns = ranges(len(head.q), block), ranges(len(head.k), block)
    return [[float(probs[x, y].sum()) for y in columns] for x in rows]


def quest(head: Head, block_q: int, block: int) -> Rows:
    """Upper bounds of pages: the maximum over the queries of a block."""
    rows = []
    for x in ranges(len(head.q), block_q):
        row = []
        for y in ranges(len(head.k), block):
            high, low = head.k[y].max(0).values, head.k[y].min(0).values
            bounds = [float(torch.maximum(query * high, query * low).sum()) for query in head.q[x]]
            row.append(max(bounds))
        rows.append(row)
    return rows


def moba(head: Head, block: int) -> Rows:
    """Gates: -inf for a block that is not entirely past, +inf for the query's own."""
    rows = []
    for t in range(len(head.q)):
        row = []
        for i, y in enumerate(ranges(len(head.k), block)):
            gate = float(head.q[t] @ mean(head.k, y))
            own, past = i == t // block, (i + 1) * block <= t
            row.append(math.inf if own else gate if past else -math.inf)
        rows.append(row)
    return rows


def xattention(head: Head, block: int, stride: int) -> Rows:
    """Antidiagonal mass of blocks under a causal mask of groups."""
    n, dim = head.q.shape
    groups = -(-n // stride)
    padded_q, padded_k = (torch.zeros(groups * stride, dim, dtype=torch.float64) for _ in "qk")
    padded_q[:n], padded_k[:n] = head.q, head.k
    logits = torch.full((groups, groups), -torch.inf, dtype=torch.float64)
    for i in range(groups):
        for j in range(i + 1):
            total = 0.0
            for s in range(stride):
                total += float(padded_q[i * stride + stride - 1 - s] @ padded_k[j * stride + s])
            logits[i, j] = total / math.sqrt(dim) / stride
    probs = logits.softmax(-1)
    blocks = ranges(groups, block // stride)
    return [[float(probs[x, y].sum()) for y in blocks] for x in blocks]


def pooled(head: Head, block: int) -> Rows:
    """Mean query times mean key."""
    rows, columns = ranges(len(head.q), block), ranges(len(head.k), block)
    return [[float(mean(head.q, x) @ mean(head.k, y)) for y in columns] for x in rows]


def nsa(
    q: torch.Tensor, k: torch.Tensor, b: int, g: int, block: int, size: int, stride: int
) -> Rows:
    """Probabilities of compressed keys, summed over the group and distributed over blocks by the
    weights of the paper's equation 9: a window counts as often as it covers a stride of the
    block."""
    n, group = q.shape[1], q.shape[2] // k.shape[2]
    windows = [slice(i, i + size) for i in range(0, n - size + 1, stride)]
    means = torch.stack([mean(k[b, :, g], w) for w in windows])
    rows = []
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
        rows.append(row)
    return rows


def dsa(q: torch.Tensor, k: torch.Tensor, b: int, t: int) -> torch.Tensor:
    """``[T]``: index scores of one query."""
    group = q.shape[2] // k.shape[2]
    total = torch.zeros(k.shape[1], dtype=torch.float64)
    for h in range(q.shape[2]):
        total += (k[b, :, h // group].double() @ q[b, t, h].double()).clamp(min=0)
    return total


def retrieval(head: Head, t: int, sinks: int, window: int, step: int) -> dict[int, float]:
    """Products of a query with the keys outside its sinks and window, which begins at the last
    multiple of ``step`` that leaves it ``window`` keys."""
    begin = 0
    while begin + step <= t + 1 - window:
        begin += step
    return {j: float(head.q[t] @ head.k[j]) for j in range(sinks, begin)}


def recycled(
    head: Head, visible: torch.Tensor, i: int, full: int, first: int
) -> tuple[set[int], dict[int, float]]:
    """The keys that a query sees in any case, and the products of those that its last full step
    ranks.

    Args:
        visible: ``[S, T]``.
        i, full: a query and its last full step.
        first: the position of query 0.
    """
    keys = [j for j in range(len(head.k)) if visible[i, j]]
    if i == full:
        return set(keys), {}
    ranked = [j for j in range(first + full + 1) if visible[full, j]]
    since = {j for j in keys if j > first + full}
    return since, {j: float(head.q[full] @ head.k[j]) for j in ranked}


def hax_buckets(x: torch.Tensor, buckets: int, hash: str) -> list[int]:
    """The bucket of each vector ``[T, D]``."""
    bits = int(math.log2(buckets))
    generator = torch.Generator().manual_seed(0)
    shape = (x.shape[1], bits if hash == "sign" else buckets // 2)
    directions = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = []
    for row in (x.double() @ directions).tolist():
        if hash == "sign":
            found.append(sum(2**i for i, value in enumerate(row) if value > 0))
        else:
            both = row + [-value for value in row]
            found.append(both.index(max(both)))
    return found


def hax(
    head: Head, buckets: int, latest: int, top_k: int, hash: str, center: bool
) -> list[set[int]]:
    """The keys of each query: the latest of its bucket, and those with the largest norms so far."""
    keys = head.k
    if center:
        keys = torch.stack([keys[t] - keys[: t + 1].mean(0) for t in range(len(keys))])
    bucket_q, bucket_k = (hax_buckets(x, buckets, hash) for x in (head.q, keys))
    norms, rows = head.k.norm(dim=1).tolist(), []
    for t in range(len(head.q)):
        in_bucket = [j for j in range(t + 1) if bucket_k[j] == bucket_q[t]][-latest:]
        largest = sorted(range(t + 1), key=lambda j: -norms[j])[:top_k]
        rows.append({*in_bucket, *largest})
    return rows


def msa(
    q: torch.Tensor,
    k: torch.Tensor,
    b: int,
    documents: list[range],
    query: range,
    chunk: int,
    over: tuple[str, str],
) -> list[float]:
    """Scores of documents: the best of their chunks, by cosines of mean keys with a query."""
    of_heads, of_tokens = over
    scores, heads = [], [Head(q, k, b, h) for h in range(q.shape[2])]
    for document in documents:
        best = -math.inf
        for begin in range(document.start, document.stop, chunk):
            by_token = []
            for t in query if of_tokens != "last" else query[-1:]:
                cosines = []
                for head in heads:
                    key = mean(head.k, slice(begin, begin + chunk))
                    cosines.append(float(head.q[t] @ key / head.q[t].norm() / key.norm()))
                by_token.append(max(cosines) if of_heads == "max" else sum(cosines) / len(cosines))
            score = max(by_token) if of_tokens == "max" else sum(by_token) / len(by_token)
            best = max(best, score)
        scores.append(best)
    return scores


def longheads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: int, h: int, size: int
) -> list[torch.Tensor]:
    """The representative of each whole chunk for one head: attention of the mean result of
    attention within the chunk, to its keys, by RoPE from its first token on."""
    head, values = Head(q, k, b, h), Head(q, v, b, h).k
    found = []
    for begin in range(0, len(head.k) - size + 1, size):
        tokens = slice(begin, begin + size)
        own_q, own_k = (turned(x[tokens], list(range(size))) for x in (head.q, head.k))
        scale, total = q.shape[3] ** -0.5, torch.zeros(q.shape[3], dtype=torch.float64)
        for query in own_q:
            total += (own_k @ query * scale).softmax(0) @ values[tokens]
        found.append((own_k @ (total / size) * scale).softmax(0) @ own_k)
    return found


def seer(
    head: Head, block: int, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None
) -> Rows:
    """Gates of blocks: products of mapped pooled queries and keys."""
    rows = []
    for x in ranges(len(head.q), block):
        row = []
        for y in ranges(len(head.k), block):
            keys = head.k[y]
            high, low = keys.max(0).values, keys.min(0).values
            if q_weight is None or k_weight is None:
                row.append(float(mean(head.q, x) @ (high + low + keys.mean(0)) / 3))
            else:
                pooled = torch.cat([high, low, keys.mean(0)])
                row.append(float((mean(head.q, x) @ q_weight) @ (pooled @ k_weight)))
        rows.append(row)
    return rows


def assert_top_k(
    kept: torch.Tensor, scores: list[float], allowed: torch.Tensor, forced: set[int], count: int
) -> None:
    """Assert that a row keeps ``count`` of the allowed ones: the forced and then the highest.

    Args:
        kept, allowed: ``[n]`` booleans.
    """
    selected = set(torch.nonzero(kept)[:, 0].tolist())
    candidates = set(torch.nonzero(allowed)[:, 0].tolist())
    forced = forced & candidates
    assert selected <= candidates
    assert forced <= selected
    assert len(selected) == min(max(count, len(forced)), len(candidates))
    free, rejected = selected - forced, candidates - selected
    if free and rejected:
        scale = max(abs(scores[i]) for i in candidates if math.isfinite(scores[i])) or 1.0
        assert min(scores[i] for i in free) >= max(scores[i] for i in rejected) - TOLERANCE * scale


def assert_top_p(
    kept: torch.Tensor, mass: list[float], allowed: torch.Tensor, forced: set[int], share: float
) -> None:
    """Assert that a row keeps the forced and then the fewest of the highest that hold a share."""
    selected = set(torch.nonzero(kept)[:, 0].tolist())
    candidates = set(torch.nonzero(allowed)[:, 0].tolist())
    total = sum(mass[i] for i in candidates)
    assert_top_k(kept, mass, allowed, forced, len(selected))
    selected_mass = sum(mass[i] for i in selected)
    slack = TOLERANCE * max(total, 1.0)
    assert selected_mass >= share * total - slack
    free = selected - forced
    if free:
        assert selected_mass - min(mass[i] for i in free) < share * total + slack
