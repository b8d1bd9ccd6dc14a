"""The mask of LongNet's dilated attention: pairs with multiplicities.

A branch ``(segment, dilation)`` divides the sequence into segments; in each, every ``dilation``-th
token, starting at token ``head mod dilation``, attends to the other such tokens.  A pair that is
visible in several branches counts that many times in the softmax, as if the logarithm of its
multiplicity were a bias.  LongNet computes the same by weighting its branches with their softmax
denominators.  Source: LongNet, arXiv 2307.02486.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cpbench.masks import living
from cpbench.masks.slices import BoolArray, IntArray


@dataclass(frozen=True)
class DilatedMask(living.PickledByFields):
    """The visible pairs of every head, with multiplicities.

    Attributes:
        seq_len: number of queries, and of keys.
        heads: number of query heads.
        branches: ``(segment, dilation)`` of each branch, tokens.
        causal: whether keys after the query are hidden.
        turned: whether queries and keys are exchanged (:meth:`transpose`).
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

    def segment_tokens(self, branch: int, head: int) -> Iterator[IntArray]:
        """Yield, for each segment of a branch, the tokens that attend to each other in a head."""
        segment, dilation = self.branches[branch]
        for start in range(0, self.seq_len, segment):
            end = min(start + segment, self.seq_len)
            tokens = np.arange(start + head % dilation, end, dilation)
            if len(tokens):
                yield tokens

    @functools.cached_property
    def area(self) -> float:
        """Visible pairs with multiplicities, mean over heads."""
        total = 0
        for head in range(self.heads):
            for branch in range(len(self.branches)):
                for tokens in self.segment_tokens(branch, head):
                    n = len(tokens)
                    total += n * (n + 1) // 2 if self.causal else n * n
        return total / self.heads

    @property
    def density(self) -> float:
        """``area`` over the number of all pairs."""
        return self.area / self.seq_len**2

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the attributes."""
        return living.register(self, hashlib.sha256(repr(self).encode()).hexdigest()[:16])

    @property
    def slices(self) -> IntArray:
        """One slice that covers everything; checks sample rows at its corners."""
        n = self.seq_len
        return np.array([[0, n, 0, n, 1 - n, n - 1]], dtype=np.int64)

    def transpose(self) -> DilatedMask:
        """The mask with queries and keys exchanged."""
        return replace(self, turned=not self.turned)

    def resized(self, seq_len: int) -> DilatedMask:
        """The same pattern on at most ``seq_len`` tokens."""
        return replace(self, seq_len=min(seq_len, self.seq_len))

    def visible_keys(self, head: int, query: int) -> IntArray:
        """``(n,)`` visible keys of a query in a head, repeated by multiplicity."""
        keys_by_branch = [np.zeros(0, dtype=np.int64)]
        for segment, dilation in self.branches:
            start = query // segment * segment
            first = start + head % dilation
            if query < first or (query - first) % dilation:
                continue
            end = min(start + segment, self.seq_len)
            keys = np.arange(first, end, dilation)
            if self.causal:
                keys = keys[keys >= query] if self.turned else keys[keys <= query]
            keys_by_branch.append(keys)
        return np.concatenate(keys_by_branch)

    def counts(self, begin: int, end: int) -> npt.NDArray[np.float64]:
        """``(heads, end - begin, seq_len)`` multiplicity of each key for queries [begin, end)."""
        counts = np.zeros((self.heads, end - begin, self.seq_len))
        for head in range(self.heads):
            for query in range(begin, end):
                np.add.at(counts[head, query - begin], self.visible_keys(head, query), 1)
        return counts

    def empty_rows(self) -> BoolArray:
        """``(heads, seq_len)`` true for queries that are in no branch."""
        empty = np.ones((self.heads, self.seq_len), dtype=np.bool_)
        for head in range(self.heads):
            for branch in range(len(self.branches)):
                for tokens in self.segment_tokens(branch, head):
                    empty[head, tokens] = False
        return empty
