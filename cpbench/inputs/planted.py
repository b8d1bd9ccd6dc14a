"""Inputs with planted attention: sinks, and needles that later queries look for.

An orthonormal basis U is projected out of normal queries and keys.  Then a vector of U times an
amplitude a is added to some keys and to the queries that look for them, so that their scores are
a^2 / sqrt(D) and all others are as before.  N keys of independent normals add up to about N sqrt(e)
in the softmax, so a needle of m keys gets a share of about p of the attention if
a^2 / sqrt(D) = ln N + 1/2 + ln(p / (1 - p)) - ln m.  In a span of many keys, whose own normals
vary, the 1/2 cancels.  Rows that are rotated (RoPE) are rotated before, or queries would not find
their keys; a rotation that also multiplies them by f makes the 1/2 of independent normals f^4 / 2.
Where the operator rotates them by itself, later, U is in the pairs of dimensions that turn the
slowest.

Shapes: T is the number of requested tokens, D the head dimension.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import InputRequest
from cpbench.inputs.normal import GOLDEN, logical_shift, mix64, normal_rows, signed64

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.masks.slices import IntArray


class Needles:
    """Normals with needles (spans of keys that later queries look for) and sinks.

    Needles are in the first three quarters of the sequence, one in each of ``count`` equal parts,
    at positions that differ by batch and key/value head.  Queries are divided into runs of ``run``
    neighbours.  A share ``looking`` of the runs looks for a needle, one that ends before the run
    begins.

    Args:
        count, length: number of needles, and keys of each.
        mass: approximate share of a looking query's attention on its needle, with all keys visible.
        looking, run: see above.
        sinks, sink_mass: number of first keys, and the share of a looking query's attention that
            they get together.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        count: int,
        length: int,
        mass: float,
        looking: float,
        run: int,
        sinks: int,
        sink_mass: float,
    ) -> None:
        for key, value, minimum in (
            ("count", count, 0), ("length", length, 1), ("run", run, 1), ("sinks", sinks, 0)
        ):  # fmt: skip
            if value < minimum:
                raise ValueError(f"inputs: {key} = {value} must be at least {minimum}")
        for key, share in (("mass", mass), ("looking", looking), ("sink_mass", sink_mass)):
            if not 0 <= share < 1 and not (key == "looking" and share == 1):
                raise ValueError(f"inputs: {key} = {share} must be from 0 to below 1")
        if mass + sink_mass >= 1:
            raise ValueError(f"inputs: mass + sink_mass = {mass + sink_mass:g} must be below 1")
        if sink_mass and not sinks:
            raise ValueError("inputs: sink_mass without sinks; give sinks, e.g. sinks=4")
        self.count, self.length, self.mass, self.looking = count, length, mass, looking
        self.run, self.sinks, self.sink_mass = run, sinks, sink_mass

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` if the needles do not fit the sequence or the head dimension."""
        if 2 * (self.count + 1) > case.head_dim:
            raise ValueError(
                f"inputs: {self.count} needles and the sinks need {self.count + 1} directions; "
                f"head_dim = {case.head_dim} has room for {case.head_dim // 2}"
            )
        if self.sinks > case.seq_len:
            raise ValueError(f"inputs: {self.sinks} sinks do not fit seq_len = {case.seq_len}")
        if self.count and self._part_length(case.seq_len) < self.length:
            raise ValueError(
                f"inputs: {self.count} needles of {self.length} tokens do not fit "
                f"seq_len = {case.seq_len}"
            )

    def make(self, request: InputRequest) -> torch.Tensor:
        """Normals; of q and k in float32 at least, as :meth:`plant` takes them."""
        problem = request.problem
        precise = "float64" if problem.dtype == "float64" else "float32"
        return normal_rows(request, precise if request.name in "qk" else problem.dtype)

    def plant(self, x: torch.Tensor, request: InputRequest) -> torch.Tensor:
        """The requested rows, in the dtype of the problem.

        Args:
            x: what :meth:`make` returned, rotated; overwritten.
        """
        import torch

        name, problem = request.name, request.problem
        if name not in "qk":
            return x
        tokens = request.positions + (problem.seq_k - problem.seq_q if name == "q" else 0)
        needle, sink = self._amplitudes(problem.seq_k, problem.head_dim, request.deviation)
        slow = request.turned_later
        for i, b in enumerate(request.batches):
            for j, h in enumerate(request.heads):
                g = h if name == "k" else h // problem.group
                basis, starts = self._planted(
                    request.seed, b, g, problem.head_dim, problem.seq_k, slow
                )
                amplitudes = np.zeros((len(tokens), len(basis)))
                if name == "k":
                    amplitudes[tokens < self.sinks, 0] = sink
                    number = np.searchsorted(starts, tokens, side="right") - 1
                    ends = np.append(starts + self.length, 0)  # 0: before the first needle
                    inside = tokens < ends[number]
                    amplitudes[inside, 1 + number[inside]] = needle
                else:
                    amplitudes[:, 0] = sink
                    number = self._needle_of_queries(request.seed, b, h, tokens, starts)
                    amplitudes[number >= 0, 1 + number[number >= 0]] = needle
                replace_components(x[i, :, j], basis, amplitudes)
        return x.to(getattr(torch, problem.dtype))

    def _part_length(self, tokens: int) -> int:
        """Tokens of each of the equal parts that hold one needle."""
        return (3 * tokens // 4 - self.sinks) // max(self.count, 1)

    def _amplitudes(self, tokens: int, head_dim: int, deviation: float) -> tuple[float, float]:
        """The amplitudes a of needles and of sinks."""
        rest, shape = 1 - self.mass - self.sink_mass, (tokens, head_dim, deviation)
        needle = amplitude(self.mass, rest, self.length, *shape)
        return needle, amplitude(self.sink_mass, rest, self.sinks, *shape)

    def _planted(
        self, seed: int, b: int, g: int, dim: int, tokens: int, slow: bool
    ) -> tuple[np.typing.NDArray[np.float64], IntArray]:
        """See :func:`_planted`."""
        part = max(self._part_length(tokens), 1)
        return _planted(seed, b, g, dim, self.count, self.sinks, self.length, part, slow)

    def _needle_of_queries(
        self, seed: int, b: int, h: int, tokens: IntArray, starts: IntArray
    ) -> IntArray:
        """``[T]``: the number of the needle that each query looks for, -1 for none."""
        run = tokens // self.run
        past = np.searchsorted(starts + self.length, run * self.run, side="right")
        uniform = _uniform_of_runs(seed, b, h, run)
        looks = (uniform[0] < self.looking) & (past > 0)
        return np.where(looks, (uniform[1] * past).astype(np.int64), -1)


def amplitude(
    share: float, rest: float, keys: int, tokens: int, head_dim: int, deviation: float
) -> float:
    """That of ``keys`` keys, and of the queries that look for them, for these to get a share of the
    attention, of which others get ``rest``; 0 for none.

    Args:
        deviation: standard deviation of the others.
    """
    if not share or not keys:
        return 0.0
    single_key = deviation**4 / 2 if keys == 1 else 0.0
    logit = math.log(tokens) + single_key + math.log(share / rest) - math.log(keys)
    return math.sqrt(max(logit, 0.0) * math.sqrt(head_dim))


def replace_components(
    rows: torch.Tensor,
    basis: np.typing.NDArray[np.float64],
    wanted: np.typing.NDArray[np.float64],
) -> None:
    """Give rows ``[T, D]`` the components ``[T, n]`` along an orthonormal basis ``[n, D]``."""
    import torch

    # Not a product of matrices, whose rounding depends on how many rows it has: rows are the same
    # whatever others are made with them.
    components, directions = (
        torch.as_tensor(x, device=rows.device, dtype=rows.dtype) for x in (wanted, basis)
    )
    present = [(rows * u).sum(-1) for u in directions]
    for n, u in enumerate(directions):
        rows += (components[:, n] - present[n])[:, None] * u


def slow_directions(
    rng: np.random.Generator, dim: int, count: int
) -> np.typing.NDArray[np.float64]:
    """``[count, D]`` orthonormal directions in the pairs of dimensions that RoPE turns the slowest,
    as few as have room for them."""
    pairs = -(-count // 2)
    inner = np.linalg.qr(rng.standard_normal((2 * pairs, count)))[0].T
    basis = np.zeros((count, dim))
    basis[:, dim // 2 - pairs : dim // 2], basis[:, dim - pairs :] = np.split(inner, 2, axis=1)
    return basis


class Sinks(Needles):
    """Normals whose first ``count`` keys get a share ``mass`` of every query's attention."""

    def __init__(self, count: int, mass: float) -> None:
        if count < 1:
            raise ValueError(f"inputs: count = {count} must be at least 1")
        super().__init__(0, 1, 0.0, 0.0, 1, count, mass)


@functools.lru_cache(maxsize=1024)
def _planted(
    seed: int, b: int, g: int, dim: int, count: int, sinks: int, length: int, part: int, slow: bool
) -> tuple[np.typing.NDArray[np.float64], IntArray]:
    """``[1 + count, D]`` directions, that of the sinks first, and ``[count]`` starts of needles."""
    rng = np.random.default_rng([seed, b, g, dim])
    if slow:
        basis = slow_directions(rng, dim, 1 + count)
    else:
        basis = np.linalg.qr(rng.standard_normal((dim, 1 + count)))[0].T
    offsets = rng.integers(0, max(part - length, 0) + 1, count)
    starts = sinks + part * np.arange(count) + offsets
    return basis, starts.astype(np.int64)


def _uniform_of_runs(seed: int, b: int, h: int, runs: IntArray) -> np.typing.NDArray[np.float64]:
    """``[2, T]`` uniform numbers, a function of the run of each query."""
    import torch

    start = (seed * 1_000_003 + b * 8191 + h * 131 + 17) % 2**63
    word = torch.as_tensor(runs) * signed64(GOLDEN) + start
    words = [
        logical_shift(mix64(word + signed64(salt * 0xD1B54A32D192ED03 % 2**64)), 11, 64)
        for salt in (1, 2)
    ]
    return np.stack([x.numpy() / float(1 << 53) for x in words])
