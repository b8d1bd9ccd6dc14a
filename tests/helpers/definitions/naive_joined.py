"""Selectors whose branches are joined, by their definitions: float64 loops over queries and keys,
which autograd differentiates.  No code is shared with the selectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Rows = tuple[torch.Tensor, torch.Tensor]  # out [D] and lse of a query
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], Rows]


def results(
    inputs: list[torch.Tensor], attend: Callable[[int, int], Attend]
) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk and dv.

    Args:
        inputs: q, k, v and dout.
        attend: by batch and query head, a function of q, k, v of the head ``[T, D]`` and a query.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in inputs[:3])
    (batch, tokens, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    out, lse = torch.zeros_like(q), torch.zeros(batch, heads, tokens, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            of_head = attend(b, h)
            rows = [
                of_head(q[b, :, h], k[b, :, h // group], v[b, :, h // group], t)
                for t in range(tokens)
            ]
            out[b, :, h] = torch.stack([row for row, _ in rows])
            lse[b, h] = torch.stack([value for _, value in rows])
    grads = torch.autograd.grad(out, (q, k, v), inputs[3].double())
    return {
        "out": out.detach(),
        "lse": lse.detach(),
        **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
    }


def softmax_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor) -> Rows:
    """One query on keys that count ``counts`` times each."""
    scores = k @ q * len(q) ** -0.5 + counts.log()
    return scores.softmax(0) @ v, scores.logsumexp(0)


def turned(x: torch.Tensor, positions: list[int], base: float = 10000.0) -> torch.Tensor:
    """RoPE of vectors ``[n, D]``: the elements i and i + D / 2 of each, as a complex number, times
    a phase of ``position * base ** (-2 i / D)``."""
    half = x.shape[1] // 2
    angles = [[position * base ** (-i / half) for i in range(half)] for position in positions]
    phases = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
    pairs = torch.complex(x[:, :half], x[:, half:]) * phases
    return torch.cat([pairs.real, pairs.imag], 1)


def lm_infinite(sinks: int, window: int, base: float) -> Attend:
    """One softmax over sinks and window, each key turned by its distance up to ``window``."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        keys = [j for j in range(t + 1) if j < sinks or t - j <= window]
        at = turned(k[keys], [-min(t - j, window) for j in keys], base)
        return softmax_of(q[t], at, v[keys], torch.ones(len(keys)).double())

    return attend


def msa_documents(tokens: int, lens: list[int], query_len: int, prefix: int, chunk: int) -> tuple:
    """The tokens of each document, and of the query after them."""
    end = prefix
    while end + chunk + query_len <= tokens:
        end += chunk
    documents, begin = [], prefix
    while begin < end:
        length = lens[len(documents) % len(lens)]
        documents.append(range(begin, min(begin + length, end)))
        begin += length
    return documents, range(end, tokens)


def msa(
    documents: list[range], query: range, chosen: list[int], prefix: int, chunk: int, at: int
) -> Attend:
    """One softmax: of the query over the prefix, means of chunks of the chosen documents and
    itself; of others over their own document.  The query begins at position ``at``."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        position = {j: j for j in range(prefix)}
        for document in documents:
            position |= {j: j - document.start for j in document}
        position |= {j: j - query.start + at for j in query}
        at_k = turned(k, [position[j] for j in range(len(k))])
        (own,) = (part for part in (range(prefix), *documents, query) if t in part)
        keys, values = list(at_k[own.start : t + 1]), list(v[own.start : t + 1])
        if own is query:
            keys += list(at_k[:prefix])
            values += list(v[:prefix])
            for number in chosen:
                for begin in range(documents[number].start, documents[number].stop, chunk):
                    keys.append(at_k[begin : begin + chunk].mean(0))
                    values.append(v[begin : begin + chunk].mean(0))
        (at_q,) = turned(q[t : t + 1], [position[t]])
        return softmax_of(at_q, torch.stack(keys), torch.stack(values), torch.ones(len(keys)))

    return attend


def longheads(chosen: list[list[int]], size: int) -> Attend:
    """One softmax over the chosen chunks of each query, at contiguous positions."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        keys = [j for c in chosen[t] for j in range(c * size, (c + 1) * size) if j <= t]
        (at_q,) = turned(q[t : t + 1], [len(keys) - 1])
        at_k = turned(k[keys], list(range(len(keys))))
        return softmax_of(at_q, at_k, v[keys], torch.ones(len(keys)).double())

    return attend


def landmark(chosen: set[int] | list[set[int]], block: int) -> Attend:
    """Grouped softmax: own tokens and landmarks of the chosen blocks of each query share one; the
    probability of a landmark is divided by the softmax within its block."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        own = t // block
        tokens = [j for j in range(own * block, t + 1) if j % block != block - 1]
        blocks = sorted(chosen[t])  # type: ignore[index]
        landmarks = [c * block + block - 1 for c in blocks]
        scores = torch.stack([k[j] @ q[t] for j in tokens + landmarks]) * q.shape[1] ** -0.5
        probs, out = scores.softmax(0), torch.zeros_like(q[t])
        for p, j in zip(probs, tokens, strict=False):
            out = out + p * v[j]
        for p, c in zip(probs[len(tokens) :], blocks, strict=True):
            inside = slice(c * block, c * block + block - 1)
            out = out + p * ((k[inside] @ q[t] * q.shape[1] ** -0.5).softmax(0) @ v[inside])
        return out, scores.logsumexp(0)

    return attend


def cca(group: int, window: int) -> Attend:
    """One softmax over the cores of the groups before the window and the window."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        begin, keys, values = 0, [], []
        while begin + group <= t + 1 - window:  # the whole group is before the window
            tokens = slice(begin, begin + group)
            weights = (k[tokens] @ q[begin + group - 1] * q.shape[1] ** -0.5).softmax(0)
            keys.append(weights @ k[tokens])
            values.append(weights @ v[tokens])
            begin += group
        keys += list(k[begin : t + 1])
        values += list(v[begin : t + 1])
        return softmax_of(q[t], torch.stack(keys), torch.stack(values), torch.ones(len(keys)))

    return attend


def pyramid_runs(t: int, window: int, ratio: int, scales: int) -> list[range]:
    """The runs of keys that a query sees as one, from the nearest to the farthest: at least
    ``window`` of a scale, and then as many more as complete runs of the next scale need."""
    runs, end = [], t + 1
    for scale in range(scales + 1):
        size, number = ratio**scale, 0
        last = scale == scales
        while end > 0 and (last or number < window or end % (size * ratio)):
            runs.append(range(end - size, end))
            end, number = end - size, number + 1
    assert end == 0
    return runs


def pyramid(window: int, ratio: int, scales: int) -> Attend:
    """One softmax over means, each of which counts as often as it has tokens."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, t: int) -> Rows:
        runs = [slice(run.start, run.stop) for run in pyramid_runs(t, window, ratio, scales)]
        means_k, means_v = (torch.stack([x[run].mean(0) for run in runs]) for x in (k, v))
        counts = torch.tensor([float(run.stop - run.start) for run in runs]).double()
        return softmax_of(q[t], means_k, means_v, counts)

    return attend
