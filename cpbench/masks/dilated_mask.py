"""LongNet's dilated attention: which pairs its branches see, each as often as it occurs.

A branch ``(segment, dilation)`` cuts the sequence into segments and lets every ``dilation``-th
token of a segment see the others that are picked, beginning at token ``head mod dilation`` of it.
A pair that several branches see counts that many times in the softmax: a bias of the logarithm of
how often it occurs.  That is what LongNet computes by weighting its branches with their softmax
denominators.  Source: LongNet, arXiv 2307.02486.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cpbench.masks.attn_mask import BoolArray, IntArray


@dataclass(frozen=True)
class DilatedMask:
    """The pairs of every head, with how often each occurs.

    Attributes:
        seq_len: queries, and keys.
        heads: query heads.
        branches: ``(segment, dilation)`` each.
        causal: whether keys after the query are hidden.
        turned: whether queries and keys have changed places.
    """

    seq_len: int
    heads: int
    branches: tuple[tuple[int, int], ...]
    causal: bool
    turned: bool = False

    kind = "dilated"

    @property
    def seq_q(self) -> int:
        return self.seq_len

    @property
    def seq_k(self) -> int:
        return self.seq_len

    def picked(self, branch: int, head: int) -> Iterator[IntArray]:
        """The tokens of each segment of a branch that see each other in a head."""
        segment, dilation = self.branches[branch]
        for start in range(0, self.seq_len, segment):
            end = min(start + segment, self.seq_len)
            tokens = np.arange(start + head % dilation, end, dilation)
            if len(tokens):
                yield tokens

    @functools.cached_property
    def area(self) -> float:
        """Pairs of a head, each as often as it occurs, on average over heads."""
        total = 0
        for head in range(self.heads):
            for branch in range(len(self.branches)):
                for tokens in self.picked(branch, head):
                    n = len(tokens)
                    total += n * (n + 1) // 2 if self.causal else n * n
        return total / self.heads

    @property
    def density(self) -> float:
        return self.area / self.seq_len**2

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def slices(self) -> IntArray:
        """One slice around everything: where checks look for corners."""
        n = self.seq_len
        return np.array([[0, n, 0, n, 1 - n, n - 1]], dtype=np.int64)

    def transpose(self) -> DilatedMask:
        """Queries and keys exchanged."""
        return replace(self, turned=not self.turned)

    def resized(self, seq_len: int) -> DilatedMask:
        """The same pattern over fewer tokens."""
        return replace(self, seq_len=min(seq_len, self.seq_len))

    def seen(self, head: int, query: int) -> IntArray:
        """Keys that a query sees in a head, each as often as it occurs."""
        parts = [np.zeros(0, dtype=np.int64)]
        for segment, dilation in self.branches:
            start = query // segment * segment
            first = start + head % dilation
            if query < first or (query - first) % dilation:
                continue
            end = min(start + segment, self.seq_len)
            keys = np.arange(first, end, dilation)
            if self.causal:
                keys = keys[keys >= query] if self.turned else keys[keys <= query]
            parts.append(keys)
        return np.concatenate(parts)

    def counts(self, begin: int, end: int) -> npt.NDArray[np.float64]:
        """``(heads, end - begin, seq_len)``, how often queries ``[begin, end)`` see each key."""
        found = np.zeros((self.heads, end - begin, self.seq_len))
        for head in range(self.heads):
            for query in range(begin, end):
                np.add.at(found[head, query - begin], self.seen(head, query), 1)
        return found

    def empty_rows(self) -> BoolArray:
        """``(heads, seq_len)`` true for queries that no branch picks."""
        blind = np.ones((self.heads, self.seq_len), dtype=np.bool_)
        for head in range(self.heads):
            for branch in range(len(self.branches)):
                for tokens in self.picked(branch, head):
                    blind[head, tokens] = False
        return blind
