"""Inputs with needles at a given depth that the last queries ask for, and whose values can be read.

As the needle-in-a-haystack test and those of RULER (arXiv 2404.06654), for a single call of
attention.  A needle is a span of keys with a direction of its own, and its values are one of the
codes, which are orthogonal.  The last queries ask for a needle: the code with the largest product
with their output should be its own.  Whatever computes the output can be asked, be it exact, sparse
or pooled.

- ``keys``: of this many needles with keys of their own one is asked for (RULER's multi-key).
- ``values``: the key that is asked for has this many needles, of all of which the codes should be
  read (multi-value).
- ``hops``: the needle that is asked for is the last of a chain: its tokens, as queries, ask for the
  one before it, and so on to the one at ``depth`` (variable tracking).

All else is normal, or captured from a model (``file``, see :mod:`cpbench.inputs.in_captured`).
Among normals directions have the amplitude of ``planted`` and are in the pairs of dimensions that
RoPE turns the slowest, where models match contents whatever their distance, and rows are turned
after they are planted.  So they are found also by what rotates by itself, or gives keys other
positions.

Where a batch is decoded, its sequences have needles of their own, at ``depth`` of their lengths,
for which their single queries ask.

Shapes: T is the number of requested tokens, D the head dimension.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.registry import operator_info
from cpbench.inputs import InputRequest, InputSequence
from cpbench.inputs.captured import Captured
from cpbench.inputs.in_captured import embed
from cpbench.inputs.normal import normal_rows
from cpbench.inputs.planted import amplitude, replace_components, slow_directions

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case, Problem
    from cpbench.inputs import Part
    from cpbench.masks.slices import IntArray

    Floats = np.typing.NDArray[np.float64]

JITTER = 50  # the needle is up to one in so many tokens beside its depth, by key/value head
MAX_CODES = 64
CAPTURED_SINKS = 4  # first tokens of a captured sequence, which are no needles


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
        key: number of the direction that they ask for.
        answers: numbers of codes.
    """

    tokens: IntArray
    key: int
    answers: IntArray


@dataclass(frozen=True)
class Haystack:
    """Normals, or captured tensors, with needles that the last queries ask for.

    Args:
        depth: place of the needle, from 0 (the first token) to 1 (the last before the queries).
        keys, values, hops: see above; ``values`` and ``hops`` are not both above 1.
        length: tokens of each needle.
        mass: share of the attention of a query that asks on what it asks for; among normals
            approximate.
        queries: last tokens, which ask; of a sequence with fewer queries all of these.
        file: of captured q, k and v; "" for normals.

    Raises:
        ValueError: for values out of range, or a file that does not hold q, k and v.
    """

    depth: float
    keys: int
    values: int
    hops: int
    length: int
    mass: float
    queries: int
    file: str

    def __post_init__(self) -> None:
        for name in ("keys", "values", "hops", "length", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"inputs: {name} = {getattr(self, name)} must be at least 1")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"inputs: depth = {self.depth} must be from 0 to 1")
        if not 0 < self.mass < 1:
            raise ValueError(f"inputs: mass = {self.mass} must be above 0 and below 1")
        if self.values > 1 and self.hops > 1:
            raise ValueError(
                f"inputs: values = {self.values} and hops = {self.hops}: one of them must be 1"
            )
        _ = self.captured

    @functools.cached_property
    def captured(self) -> Captured | None:
        """What needles are planted in, if not normals."""
        return Captured(self.file) if self.file else None

    @property
    def needles(self) -> int:
        """How many there are."""
        return self.hops + self.values - 1 + self.keys - 1

    @property
    def directions(self) -> int:
        """How many different keys they have."""
        return self.hops + self.keys - 1

    @property
    def first(self) -> int:
        """The first token that may be a needle."""
        return CAPTURED_SINKS if self.file else 0

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` if the needles do not fit the sequences or the head dimensions, or
        the captured tensors the case."""
        if self.captured is not None:
            self.captured.check(case)
            _require_as_captured(case)
        if self.hops > 1 and case.queries not in (0, case.seq_len):
            raise ValueError(
                f"inputs: hops = {self.hops}: the tokens of needles ask for one another, but "
                f"queries = {case.queries} are the last tokens of a sequence; give hops = 1"
            )
        room = case.head_dim // 2 if case.head_dim % 2 == 0 else 0
        if self.directions > room:
            raise ValueError(
                f"inputs: {self.directions} keys of needles need as many directions; head_dim = "
                f"{case.head_dim} has room for {room}"
            )
        codes = _num_codes(case.problem.value_dim)
        if self.needles >= codes:
            raise ValueError(f"inputs: {self.needles} needles need more than {codes} codes")
        for tokens in case.lengths:
            sequence = InputSequence(0, tokens, case.queries or self.queries)
            if not self.fits(sequence):
                raise ValueError(
                    f"inputs: {self.needles} needles of {self.length} tokens at depth "
                    f"{self.depth} and {self.asking(sequence)} queries do not fit seq_len = "
                    f"{tokens}"
                )

    def asking(self, sequence: InputSequence) -> int:
        """How many of its last tokens ask."""
        return min(self.queries, sequence.queries)

    def fits(self, sequence: InputSequence) -> bool:
        """Whether the needles fit."""
        room = sequence.length - self.asking(sequence) - self.first
        chain = (1 - self.depth) * (room - self.length) / self.hops if self.hops > 1 else room
        return 4 * self.needles * self.length <= room and chain >= self.length + room // JITTER

    def make(self, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem."""
        import torch

        name, problem = request.name, request.problem
        precise = "float64" if problem.dtype == "float64" else "float32"
        if name not in "qkv":
            return normal_rows(request, problem.dtype)
        x = self.captured.make(request) if self.captured else normal_rows(request, precise)
        plant = self._plant_in_captured if self.captured else self._plant
        for part in request.parts():
            for j, h in enumerate(request.heads) if self.fits(part.sequence) else ():
                rows = x[part.at, part.rows, j]
                plant(rows, request, part, h)
                x[part.at, part.rows, j] = rows
        return x.to(getattr(torch, problem.dtype))

    def planted(self, seed: int, problem: Problem, sequence: InputSequence, g: int) -> Planted:
        """What is planted for a key/value head of a sequence, which :meth:`fits`."""
        return _planted(self, seed, sequence, g, problem.head_dim, problem.value_dim)

    def questions(
        self, seed: int, problem: Problem, sequence: InputSequence, g: int
    ) -> tuple[Planted, list[Question]]:
        """What queries of the heads of a key/value head ask: the last ones, then each link of the
        chain."""
        planted = self.planted(seed, problem, sequence, g)
        last = np.arange(sequence.length - self.asking(sequence), sequence.length)
        asked = Question(last, 0, planted.code[: planted.asked])
        links = [
            Question(planted.starts[i] + np.arange(self.length), i + 1, planted.code[i + 1 : i + 2])
            for i in range(self.hops - 1)
        ]
        return planted, [asked, *links]

    def needle_of(self, tokens: IntArray, starts: IntArray) -> IntArray:
        """``[T]``: the needle in which each token is, -1 for none."""
        order = np.argsort(starts)
        before = np.searchsorted(starts[order], tokens, side="right") - 1
        number = order[before]
        inside = (before >= 0) & (tokens < starts[number] + self.length)
        return np.where(inside, number, -1)

    def _plant(self, rows: torch.Tensor, request: InputRequest, part: Part, h: int) -> None:
        """Plant into normal rows ``[T, D]`` of a head."""
        import torch

        name, problem, (sequence, _, _, tokens) = request.name, request.problem, part
        g = h // problem.group if name == "q" else h
        planted = self.planted(request.seed, problem, sequence, g)
        needle = self.needle_of(tokens, planted.starts)
        inside = np.flatnonzero(needle >= 0)
        if name == "v":
            codes = planted.codes[planted.code[needle[inside]]] * problem.value_dim**0.5
            rows[torch.as_tensor(inside)] = torch.as_tensor(codes).to(rows)
            return
        size = amplitude(
            self.mass, 1 - self.mass, self.length * planted.asked, sequence.length,
            problem.head_dim, request.deviation,
        ) / request.deviation  # fmt: skip
        wanted = np.zeros((len(tokens), len(planted.directions)))
        if name == "k":
            wanted[inside, planted.key[needle[inside]]] = size
        else:
            links = inside[needle[inside] < self.hops - 1]
            wanted[links, needle[links] + 1] = size
            wanted[tokens >= sequence.length - self.asking(sequence), 0] = size
        replace_components(rows, planted.directions, wanted)

    def _plant_in_captured(
        self, rows: torch.Tensor, request: InputRequest, part: Part, h: int
    ) -> None:
        """Plant into captured rows ``[T, D]`` of a head."""
        import torch

        assert self.captured is not None
        name, problem, (sequence, _, _, tokens) = request.name, request.problem, part
        g = h // problem.group if name == "q" else h
        planted = self.planted(request.seed, problem, sequence, g)
        made = embed(self, self.captured.source, request.seed, problem, sequence, g)
        needle = self.needle_of(tokens, planted.starts)
        inside = np.flatnonzero(needle >= 0)
        if name == "q":
            number = np.minimum(np.searchsorted(made.asking, tokens), len(made.asking) - 1)
            inside = np.flatnonzero(made.asking[number] == tokens)
            new = made.queries[number[inside], h % problem.group]
        elif name == "k":
            new = made.keys[planted.key[needle[inside]]]
        else:
            new = planted.codes[planted.code[needle[inside]]] * made.value_norm
        rows[torch.as_tensor(inside)] = torch.as_tensor(new).to(rows)


def _require_as_captured(case: Case) -> None:
    """Raise ``ValueError`` where captured queries and keys would be turned after needles are
    planted: their directions are not among the pairs that turn slowly."""
    operator = operator_info(case.operator.name)
    turning = f"{operator.name} applies RoPE" if operator.rotates else f"rope = {case.rope}"
    if operator.rotates or case.rope.name != "none":
        raise ValueError(
            f"inputs = {case.inputs}: {turning}, after which needles in captured q and k would "
            "not be found"
        )


def _num_codes(value_dim: int) -> int:
    return min(value_dim, MAX_CODES)


@functools.lru_cache(maxsize=256)
def _planted(
    haystack: Haystack, seed: int, sequence: InputSequence, g: int, dim: int, value_dim: int
) -> Planted:
    """See :meth:`Haystack.planted`."""
    depth, hops, values, length = haystack.depth, haystack.hops, haystack.values, haystack.length
    count, tokens, first = haystack.needles, sequence.length, haystack.first
    rng = np.random.default_rng([seed, sequence.batch, g, dim, tokens])
    last = tokens - haystack.asking(sequence) - length
    codes = np.linalg.qr(rng.standard_normal((value_dim, _num_codes(value_dim))))[0].T
    at = depth + (1 - depth) * np.arange(hops - 1, -1, -1) / hops  # from the latest to the first
    places = at * last
    jitter = rng.integers(0, max(tokens // JITTER, 1))
    chain = np.clip(places.astype(np.int64) + (jitter if depth < 0.5 else -jitter), first, last)
    free = np.arange(first, last, 2 * length)
    free = free[(np.abs(free[:, None] - chain) >= length).all(1)]
    others = rng.choice(free, count - hops, replace=False)
    key = np.concatenate([
        np.arange(hops), np.zeros(values - 1, np.int64), hops + np.arange(haystack.keys - 1)
    ])  # fmt: skip
    starts = np.concatenate([chain, others]).astype(np.int64)
    code = rng.choice(len(codes), count, replace=False)
    directions = slow_directions(rng, dim, haystack.directions)
    return Planted(directions, codes, starts, key, code, values)
