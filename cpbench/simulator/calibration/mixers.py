"""Constants of a sequence mixer, fitted to times of single ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cpbench.core.problem import Problem
from cpbench.simulator.calibration.kernels import SPAN, errors_out_of_fold, points_by_phase
from cpbench.simulator.calibration.solve import Fit, Residuals, solve_identified
from cpbench.simulator.cluster import MixerCosts, MixerPhase
from cpbench.simulator.costs import mix_seconds
from cpbench.simulator.events import Mix

NEUTRAL = {"token_us": 0.0, "call_us": 0.0}


class MixerPoint(NamedTuple):
    """The measured time of a phase of one problem on one rank, and its FLOPs."""

    phase: str
    problem: Problem
    flops: int
    seconds: float

    @property
    def step(self) -> Mix:
        """The whole pass as one step."""
        return Mix(self.phase, self.phase, self.problem.seq_q, self.flops)


@dataclass(frozen=True)
class MixerFit:
    """A fitted mixer: as :class:`~cpbench.simulator.calibration.kernels.KernelFit`."""

    costs: MixerCosts
    fits: Mapping[str, Fit]
    errors: Sequence[float]
    unidentified: Sequence[str]


def fit_mixer(points: Sequence[MixerPoint], operator: str, source: str) -> MixerFit:
    """Fit a mixer to points of one operator, dtype and head_dim.

    Raises:
        ValueError: for fewer than ``LEAST`` points of a phase, in one line.
    """
    problem = points[0].problem
    by_phase = points_by_phase(points, operator, "lengths and numbers of heads")
    fits = {name: _fit_phase(rows) for name, rows in by_phase.items()}
    costs = MixerCosts(
        source=source, operators=(operator,), dtype=problem.dtype, head_dim=problem.head_dim,
        **{name: MixerPhase(**fit.constants) for name, fit in fits.items()},
    )  # fmt: skip
    errors = [
        error
        for rows in by_phase.values()
        for error in errors_out_of_fold(rows, lambda seen: _fit_phase(seen).constants, _residuals)
    ]
    unidentified = [f"{name}.{x}" for name, fit in fits.items() for x in fit.unidentified]
    return MixerFit(costs, fits, errors, unidentified)


def _fit_phase(rows: Sequence[MixerPoint]) -> Fit:
    """The constants of a phase, from the highest rate of any point and tenths of its times."""
    guess = {
        "tflops": max(row.flops / row.seconds for row in rows) / 1e12,
        "token_us": min(0.1 * row.seconds / row.problem.seq_q for row in rows) * 1e6,
        "call_us": min(0.1 * row.seconds for row in rows) * 1e6,
    }
    return solve_identified(_residuals(rows), guess, NEUTRAL, span=SPAN)


def _residuals(rows: Sequence[MixerPoint]) -> Residuals:
    """Log of predicted over measured times, for given constants."""

    def residuals(constants: Mapping[str, float]) -> list[float]:
        phase = MixerPhase(**constants)
        costs = MixerCosts(source="", operators=(), dtype="", head_dim=0, fwd=phase, bwd=phase)
        return [math.log(mix_seconds(row.step, costs) / row.seconds) for row in rows]

    return residuals
