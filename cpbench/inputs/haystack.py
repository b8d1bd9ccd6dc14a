"""Inputs with needles at a given depth that the last queries ask for, and whose values can be read.

As the needle-in-a-haystack test and those of RULER (arXiv 2404.06654), for a single call of
attention.  A needle is a span of keys with a direction of its own, added with the amplitude of
``planted``, and its values are one of the codes, which are orthogonal.  The last queries ask for a
needle: the code with the largest product with their output should be its own.  Whatever computes
the output can be asked, be it exact, sparse or pooled.

- ``keys``: of this many needles with keys of their own one is asked for (RULER's multi-key).
- ``values``: the key that is asked for has this many needles, of all of which the codes should be
  read (multi-value).
- ``hops``: the needle that is asked for is the last of a chain: its tokens, as queries, ask for the
  one before it, and so on to the one at ``depth`` (variable tracking).

Directions are in the pairs of dimensions that RoPE turns the slowest, where models match contents
whatever their distance, and rows are turned after they are planted.  So they are found also by what
rotates by itself, or gives keys other positions.

Shapes: T is the number of requested tokens, D the head dimension.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import InputRequest
from cpbench.inputs.normal import normal_rows
from cpbench.inputs.planted import amplitude, replace_components, slow_directions

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.masks.slices import IntArray

    Floats = np.typing.NDArray[np.float64]

JITTER = 50  # the needle is up to one in so many tokens beside its depth, by key/value head
MAX_CODES = 64


@dataclass(frozen=True)
class Planted:
    """What is planted for a key/value head.

    Attributes:
        directions: ``[n, D]`` of keys; codes: ``[C, Dv]``: of values.
        starts, key, code: of each needle its first token, direction and code.  Those of the chain
            come first, from the one that is asked for to the one at ``depth``.
        asked: how many needles have the direction that the last queries ask for.
    """

    directions: Floats
    codes: Floats
    starts: IntArray
    key: IntArray
    code: IntArray
    asked: int


@dataclass(frozen=True)
class Question:
    """Queries, and the codes that their outputs should show.

    Attributes:
        tokens: their positions in the sequence.
        answers: numbers of codes.
    """

    tokens: IntArray
    answers: IntArray


class Haystack:
    """Normals with needles that the last queries ask for.

    Args:
        depth: place of the needle, from 0 (the first token) to 1 (the last before the queries).
        keys, values, hops: see above; ``values`` and ``hops`` are not both above 1.
        length: tokens of each needle.
        mass: approximate share of the attention of a query that asks on what it asks for.
        queries: last tokens, which ask.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self, depth: float, keys: int, values: int, hops: int, length: int, mass: float,
        queries: int,
    ) -> None:  # fmt: skip
        counts = {"keys": keys, "values": values, "hops": hops, "length": length,
                  "queries": queries}  # fmt: skip
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"inputs: {name} = {count} must be at least 1")
        if not 0 <= depth <= 1:
            raise ValueError(f"inputs: depth = {depth} must be from 0 to 1")
        if not 0 < mass < 1:
            raise ValueError(f"inputs: mass = {mass} must be above 0 and below 1")
        if values > 1 and hops > 1:
            raise ValueError(f"inputs: values = {values} and hops = {hops}: one of them must be 1")
        self.depth, self.keys, self.values, self.hops = depth, keys, values, hops
        self.length, self.mass, self.queries = length, mass, queries

    @property
    def needles(self) -> int:
        """How many there are."""
        return self.hops + self.values - 1 + self.keys - 1

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` if the needles do not fit the sequence or the head dimensions."""
        directions = self.hops + self.keys - 1
        room = case.head_dim // 2 if case.head_dim % 2 == 0 else 0
        if directions > room:
            raise ValueError(
                f"inputs: {directions} keys of needles need as many directions; head_dim = "
                f"{case.head_dim} has room for {room}"
            )
        codes = _num_codes(case.problem.value_dim)
        if self.needles >= codes:
            raise ValueError(f"inputs: {self.needles} needles need more than {codes} codes")
        room = case.seq_len - self.queries
        chain = (1 - self.depth) * (room - self.length) / self.hops if self.hops > 1 else room
        if 4 * self.needles * self.length > room or chain < self.length + room // JITTER:
            raise ValueError(
                f"inputs: {self.needles} needles of {self.length} tokens at depth {self.depth} and "
                f"{self.queries} queries do not fit seq_len = {case.seq_len}"
            )

    def make(self, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem."""
        import torch

        name, problem = request.name, request.problem
        precise = "float64" if problem.dtype == "float64" else "float32"
        x = normal_rows(request, precise if name in "qkv" else problem.dtype)
        if name not in "qkv":
            return x
        tokens = request.positions + (problem.seq_k - problem.seq_q if name == "q" else 0)
        for i, b in enumerate(request.batches):
            for j, h in enumerate(request.heads):
                planted = self.planted(request, b, h // problem.group if name == "q" else h)
                needle = self._needle_of(tokens, planted.starts)
                inside = np.flatnonzero(needle >= 0)
                if name == "v":
                    rows = planted.codes[planted.code[needle[inside]]] * problem.value_dim**0.5
                    x[i, torch.as_tensor(inside), j] = torch.as_tensor(rows).to(x)
                    continue
                size = amplitude(
                    self.mass, 1 - self.mass, self.length * planted.asked, problem.seq_k,
                    problem.head_dim, request.deviation,
                ) / request.deviation  # fmt: skip
                wanted = np.zeros((len(tokens), len(planted.directions)))
                if name == "k":
                    wanted[inside, planted.key[needle[inside]]] = size
                else:
                    links = inside[needle[inside] < self.hops - 1]
                    wanted[links, needle[links] + 1] = size
                    wanted[tokens >= problem.seq_k - self.queries, 0] = size
                replace_components(x[i, :, j], planted.directions, wanted)
        return x.to(getattr(torch, problem.dtype))

    def questions(self, request: InputRequest, b: int, g: int) -> tuple[Planted, list[Question]]:
        """What queries of the heads of a key/value head ask: the last ones, then each link of the
        chain."""
        planted, tokens = self.planted(request, b, g), request.problem.seq_k
        last = np.arange(tokens - self.queries, tokens)
        asked = Question(last, planted.code[: planted.asked])
        links = [
            Question(planted.starts[i] + np.arange(self.length), planted.code[i + 1 : i + 2])
            for i in range(self.hops - 1)
        ]
        return planted, [asked, *links]

    def planted(self, request: InputRequest, b: int, g: int) -> Planted:
        """What is planted for a key/value head."""
        problem = request.problem
        shape = problem.seq_k, problem.head_dim, problem.value_dim
        return _planted(self.depth, self.keys, self.values, self.hops, self.length, self.queries,
                        request.seed, b, g, *shape)  # fmt: skip

    def _needle_of(self, tokens: IntArray, starts: IntArray) -> IntArray:
        """``[T]``: the needle in which each token is, -1 for none."""
        order = np.argsort(starts)
        before = np.searchsorted(starts[order], tokens, side="right") - 1
        number = order[before]
        inside = (before >= 0) & (tokens < starts[number] + self.length)
        return np.where(inside, number, -1)


def _num_codes(value_dim: int) -> int:
    return min(value_dim, MAX_CODES)


@functools.lru_cache(maxsize=256)
def _planted(
    depth: float, keys: int, values: int, hops: int, length: int, queries: int, seed: int, b: int,
    g: int, tokens: int, dim: int, value_dim: int,
) -> Planted:  # fmt: skip
    """See :meth:`Haystack.planted`."""
    rng = np.random.default_rng([seed, b, g, dim, tokens])
    count, last = hops + values - 1 + keys - 1, tokens - queries - length
    codes = np.linalg.qr(rng.standard_normal((value_dim, _num_codes(value_dim))))[0].T
    at = depth + (1 - depth) * np.arange(hops - 1, -1, -1) / hops  # from the latest to the first
    places = at * last
    jitter = rng.integers(0, max(tokens // JITTER, 1))
    chain = np.clip(places.astype(np.int64) + (jitter if depth < 0.5 else -jitter), 0, last)
    free = np.arange(0, last, 2 * length)
    free = free[(np.abs(free[:, None] - chain) >= length).all(1)]
    others = rng.choice(free, count - hops, replace=False)
    key = np.concatenate([
        np.arange(hops), np.zeros(values - 1, np.int64), hops + np.arange(keys - 1)
    ])  # fmt: skip
    starts = np.concatenate([chain, others]).astype(np.int64)
    code = rng.choice(len(codes), count, replace=False)
    directions = slow_directions(rng, dim, hops + keys - 1)
    return Planted(directions, codes, starts, key, code, values)
