"""Constants with the least relative residuals, their intervals, and which are not identified."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Residuals = Callable[[dict[str, float]], Sequence[float]]  # log of predicted over measured

SPAN = 20.0  # factor around the first guess within which a constant is searched
SCALE = 0.05  # residual from where on the loss is linear
WIDE = 2.0  # factor: a constant whose interval is wider is not identified
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Fit:
    """Fitted constants.

    Attributes:
        constants: by name.
        intervals: of 95 %, from the covariance of the logarithms; from 0 to infinity where there
            are no more points than constants.
        unidentified: names of constants that the points do not determine to a factor of ``WIDE``.
        cost: half the sum of squared residuals, large ones counted linearly.
    """

    constants: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    unidentified: tuple[str, ...]
    cost: float


def solve(
    residuals: Residuals,
    guess: Mapping[str, float],
    most: Mapping[str, float] | None = None,
    span: float = SPAN,
    tolerance: float = 1e-3,
) -> Fit:
    """Search constants by their logarithms, from a first guess.

    Args:
        most: bounds of some constants.
        span: factor around the guess within which they are searched.
    """
    from scipy.optimize import least_squares

    names, most = list(guess), most or {}

    def of_vector(x: Any) -> Any:
        return np.array(residuals(dict(zip(names, np.exp(x).tolist(), strict=True))))

    bounds = np.log([most.get(name, np.inf) for name in names])
    start = np.minimum(np.log([guess[name] for name in names]), bounds - 0.01)
    box = (start - np.log(span), np.minimum(start + np.log(span), bounds))
    found = least_squares(of_vector, start, loss="soft_l1", f_scale=SCALE, bounds=box,
                          diff_step=0.01, xtol=tolerance, ftol=tolerance)  # fmt: skip
    widths = _half_widths(found.jac, found.cost)
    logs = dict(zip(names, zip(found.x.tolist(), widths, strict=True), strict=True))
    constants = {name: math.exp(x) for name, (x, _) in logs.items()}
    unidentified = [
        name for name, (_, width) in logs.items()
        if width > math.log(WIDE) or constants[name] > 0.98 * most.get(name, math.inf)
    ]  # fmt: skip
    intervals = {name: (_exp(x - width), _exp(x + width)) for name, (x, width) in logs.items()}
    return Fit(constants, intervals, tuple(unidentified), float(found.cost))


def solve_identified(
    residuals: Residuals, guess: Mapping[str, float], neutral: Mapping[str, float],
    span: float = SPAN,
) -> Fit:  # fmt: skip
    """As :func:`solve`; a constant that is not identified takes its neutral value, if it has one,
    and the others are fitted again: the one with the widest interval first."""
    remaining, left_out = dict(guess), dict[str, float]()
    while True:
        fit = solve(lambda x: residuals({**left_out, **x}), remaining, span=span)
        width = {name: high / low if low else math.inf for name, (low, high) in
                 fit.intervals.items()}  # fmt: skip
        droppable = [name for name in fit.unidentified if name in neutral]
        if not droppable:
            break
        worst = max(droppable, key=lambda name: width[name])
        left_out[worst] = neutral[worst]
        del remaining[worst]
    constants = {name: {**fit.constants, **left_out}[name] for name in guess}
    unidentified = tuple(name for name in guess if name in (*fit.unidentified, *left_out))
    return Fit(constants, fit.intervals, unidentified, fit.cost)


def _half_widths(jacobian: Any, cost: float) -> list[float]:
    """Half-widths of the intervals of the logarithms; infinite without a degree of freedom, and in
    directions in which nothing changes."""
    from scipy.special import stdtrit

    points, count = jacobian.shape
    if points <= count:
        return [math.inf] * count
    _, singular, rotation = np.linalg.svd(jacobian, full_matrices=False)
    tiny = singular <= 1e-9 * max(singular.max(initial=0.0), 1e-30)
    variances = (rotation**2 / np.where(tiny, 1.0, singular)[:, None] ** 2)[~tiny].sum(0)
    free = (rotation[tiny] ** 2 > 1e-12).any(0)
    deviation = np.sqrt(variances * 2 * cost / (points - count))
    quantile = float(stdtrit(points - count, 0.5 + CONFIDENCE / 2))
    return [math.inf if f else quantile * d for f, d in zip(free, deviation.tolist(), strict=True)]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
