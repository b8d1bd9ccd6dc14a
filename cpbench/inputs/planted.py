"""Inputs with something to find: sinks, and needles that later queries look for.

With an orthonormal basis U projected out of normal queries and keys, a direction u times a is added
to some keys and to the queries that look for them, so that their scores are a^2 / sqrt(D) and all
else scores as before.  N keys of independent normals add up to about N sqrt(e) in the softmax, so a
needle of m keys gets a share of about p when a^2 / sqrt(D) = ln N + 1/2 + ln(p / (1 - p)) - ln m;
a span of many keys has normals of its own, and the 1/2 goes.

Legend: T tokens at work, H heads at work, D head dim.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import Wanted
from cpbench.inputs.normal import GOLDEN, mix64, normal_rows, shifted, signed64

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Case
    from cpbench.masks.attn_mask import IntArray


class Needles:
    """Spans of ``length`` keys that later queries look for, and sinks.

    Needles lie in the first three quarters, one in each of ``count`` equal parts, in other places
    for each batch and key/value head.  Queries look in runs of ``run`` neighbours, a share
    ``looking`` of the runs, each for one needle that is past when the run begins.

    Args:
        count, length: needles, and keys of each.
        mass: share of a looking query's attention on its needle, about, with all keys visible.
        looking, run: see above.
        sinks, sink_mass: first keys, and the share that they together draw from looking queries.
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
        for key, value, least in (
            ("count", count, 0), ("length", length, 1), ("run", run, 1), ("sinks", sinks, 0)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"inputs: {key} = {value} must be at least {least}")
        for key, share in (("mass", mass), ("looking", looking), ("sink_mass", sink_mass)):
            if not 0 <= share < 1 and not (key == "looking" and share == 1):
                raise ValueError(f"inputs: {key} = {share} must be from 0 to below 1")
        if mass + sink_mass >= 1:
            raise ValueError(f"inputs: mass + sink_mass = {mass + sink_mass:g} must be below 1")
        if sink_mass and not sinks:
            raise ValueError("inputs: sink_mass without sinks; give sinks, as sinks=4")
        self.count, self.length, self.mass, self.looking = count, length, mass, looking
        self.run, self.sinks, self.sink_mass = run, sinks, sink_mass

    def check(self, case: Case) -> None:
        """Raise ``ValueError`` where needles find no place or no direction."""
        if 2 * (self.count + 1) > case.head_dim:
            raise ValueError(
                f"inputs: {self.count} needles and the sinks take {self.count + 1} directions; "
                f"head_dim = {case.head_dim} has room for {case.head_dim // 2}"
            )
        if self.count and self._part(case.seq_len) < self.length:
            raise ValueError(
                f"inputs: {self.count} needles of {self.length} tokens do not fit "
                f"seq_len = {case.seq_len}"
            )

    def make(self, wanted: Wanted) -> torch.Tensor:
        import torch

        name, problem, device = wanted.name, wanted.problem, wanted.device
        if name not in "qk":
            return normal_rows(wanted, problem.dtype)
        x = normal_rows(wanted, "float64" if problem.dtype == "float64" else "float32")
        at = wanted.positions + (problem.seq_k - problem.seq_q if name == "q" else 0)
        for i, b in enumerate(wanted.batches):
            for j, h in enumerate(wanted.heads):
                g = h if name == "k" else h // problem.group
                basis, starts = self._planted(wanted.seed, b, g, problem.head_dim, problem.seq_k)
                added = np.zeros((len(at), len(basis)))
                needle, sink = self._strengths(problem.seq_k, problem.head_dim)
                if name == "k":
                    added[at < self.sinks, 0] = sink
                    place = np.searchsorted(starts, at, side="right") - 1
                    ends = np.append(starts + self.length, 0)  # of none before the first
                    inside = at < ends[place]
                    added[inside, 1 + place[inside]] = needle
                else:
                    added[:, 0] = sink
                    needles = self._wanted(wanted.seed, b, h, at, starts)
                    added[needles >= 0, 1 + needles[needles >= 0]] = needle
                u = torch.as_tensor(basis, device=device, dtype=x.dtype)
                rest = x[i, :, j] - (x[i, :, j] @ u.T) @ u
                x[i, :, j] = rest + torch.as_tensor(added, device=device, dtype=x.dtype) @ u
        return x.to(getattr(torch, problem.dtype))

    def _part(self, tokens: int) -> int:
        """Tokens from the place of one needle to that of the next."""
        return (3 * tokens // 4 - self.sinks) // max(self.count, 1)

    def _strengths(self, tokens: int, head_dim: int) -> tuple[float, float]:
        """a of needles and of sinks."""
        rest = 1 - self.mass - self.sink_mass

        def amplitude(share: float, keys: int) -> float:
            if not share or not keys:
                return 0.0
            single = 0.5 if keys == 1 else 0.0
            logit = math.log(tokens) + single + math.log(share / rest) - math.log(keys)
            return math.sqrt(max(logit, 0.0) * math.sqrt(head_dim))

        return amplitude(self.mass, self.length), amplitude(self.sink_mass, self.sinks)

    def _planted(
        self, seed: int, b: int, g: int, dim: int, tokens: int
    ) -> tuple[np.typing.NDArray[np.float64], IntArray]:
        return _planted(
            seed, b, g, dim, self.count, self.sinks, self.length, max(self._part(tokens), 1)
        )

    def _wanted(self, seed: int, b: int, h: int, at: IntArray, starts: IntArray) -> IntArray:
        """``[T]``: the needle that each query looks for, -1 for none."""
        run = at // self.run
        known = np.searchsorted(starts + self.length, run * self.run, side="right")
        dice = _dice(seed, b, h, run)
        looks = (dice[0] < self.looking) & (known > 0)
        return np.where(looks, (dice[1] * known).astype(np.int64), -1)


class Sinks(Needles):
    """Normals whose first ``count`` keys draw a share ``mass`` of every query's attention."""

    def __init__(self, count: int, mass: float) -> None:
        if count < 1:
            raise ValueError(f"inputs: count = {count} must be at least 1")
        super().__init__(0, 1, 0.0, 0.0, 1, count, mass)


@functools.lru_cache(maxsize=1024)
def _planted(
    seed: int, b: int, g: int, dim: int, count: int, sinks: int, length: int, part: int
) -> tuple[np.typing.NDArray[np.float64], IntArray]:
    """Directions ``[1 + count, D]``, the sinks' first, and where needles begin."""
    chance = np.random.default_rng([seed, b, g, dim])
    basis = np.linalg.qr(chance.standard_normal((dim, 1 + count)))[0].T
    within = chance.integers(0, max(part - length, 0) + 1, count)
    starts = sinks + part * np.arange(count) + within
    return basis, starts.astype(np.int64)


def _dice(seed: int, b: int, h: int, runs: IntArray) -> np.typing.NDArray[np.float64]:
    """``[2, T]`` uniform numbers of each run, alike wherever the run is asked for."""
    import torch

    start = (seed * 1_000_003 + b * 8191 + h * 131 + 17) % 2**63
    word = torch.as_tensor(runs) * signed64(GOLDEN) + start
    found = [
        shifted(mix64(word + signed64(salt * 0xD1B54A32D192ED03 % 2**64)), 11, 64)
        for salt in (1, 2)
    ]
    return np.stack([x.numpy() / float(1 << 53) for x in found])
