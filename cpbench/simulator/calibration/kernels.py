"""Constants of a kernel, fitted to times of single ranks.

The tiles are not known of every library, and CPU operators divide a mask in ways of their own: of
the usual extents the one is taken that fits best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from cpbench.core.problem import DTYPE_BYTES, Problem
from cpbench.masks.attn_mask import AttnMask
from cpbench.simulator.calibration.solve import Fit, Residuals, solve, solve_identified
from cpbench.simulator.cluster import Gpu, KernelCosts, Phase
from cpbench.simulator.costs import kernel_seconds
from cpbench.simulator.events import Kernel
from cpbench.simulator.tiles import GRIDS, Tiling

P = TypeVar("P")
LEAST = 4  # points of a phase
FOLDS = 4
EXTENTS = (32, 64, 128, 256)  # of tiles and blocks
# Constants that are left out where they are not identified: costs of nothing, and the usual rate.
NEUTRAL = {"tile_us": 0.0, "empty_us": 0.0, "tail": 0.0, "call_us": 0.0, "full_rate": 1.0}
SPAN = 1e3  # factor around the first guess
SLOW = 1e-4  # TFLOP/s at which everything but the blocks of a kernel is negligible


class Point(NamedTuple):
    """The measured time of a phase of one problem on one rank."""

    phase: str
    mask: AttnMask
    problem: Problem
    seconds: float

    def kernel(self, tiling: Tiling) -> Kernel:
        """The call of the kernel."""
        x = self.problem
        return Kernel.of_mask(
            self.phase, self.mask, tiling, x.batch, (x.heads_q, x.heads_kv),
            (x.head_dim, x.head_dim_v or x.head_dim), DTYPE_BYTES[x.dtype],
        )  # fmt: skip


@dataclass(frozen=True)
class KernelFit:
    """A fitted kernel.

    Attributes:
        costs: its constants; fits: of each phase, with the intervals.
        errors: relative errors of the points, each predicted by constants fitted to others.
        unidentified: what the points do not tell, as ``fwd.tile_us``, or ``grid``.
    """

    costs: KernelCosts
    fits: Mapping[str, Fit]
    errors: Sequence[float]
    unidentified: Sequence[str]


class _Choice(NamedTuple):
    """A description of the tiles of a phase, and how well it fits."""

    tiling: Tiling
    cost: float


class _OfPhase(Protocol):
    @property
    def phase(self) -> str: ...
    @property
    def problem(self) -> Problem: ...


AnyPoint = TypeVar("AnyPoint", bound=_OfPhase)


def points_by_phase(
    points: Sequence[AnyPoint], operator: str, vary: str
) -> dict[str, list[AnyPoint]]:
    """The points of each phase that was timed.

    Args:
        vary: what to measure more of if there are too few, for the message.

    Raises:
        ValueError: for fewer than ``LEAST`` points of a phase, in one line.
    """
    by_phase = {name: [p for p in points if p.phase == name] for name in ("fwd", "bwd")}
    problem = points[0].problem
    of = f"{operator} in {problem.dtype} with head_dim {problem.head_dim}"
    if not by_phase["fwd"]:
        raise ValueError(f"no forward pass of {of} was timed")
    by_phase = {name: rows for name, rows in by_phase.items() if rows}
    for name, rows in by_phase.items():
        if len(rows) < LEAST:
            raise ValueError(
                f"only {len(rows)} of the {LEAST} or more cases of {of} ({name}) that a fit needs "
                f"were timed: measure more {vary}"
            )
    return by_phase


def fit_kernel(points: Sequence[Point], operator: str, gpu: Gpu, source: str) -> KernelFit:
    """Fit a kernel to points of one operator, dtype and head_dim.

    Raises:
        ValueError: for fewer than ``LEAST`` points of a phase, in one line.
    """
    problem, by_phase = points[0].problem, points_by_phase(points, operator, "masks and lengths")
    tiling, grid_known = choose_tiling(by_phase, gpu)
    fits = {name: fit_phase(rows, tiling, gpu) for name, rows in by_phase.items()}
    errors = [
        error
        for rows in by_phase.values()
        for error in errors_out_of_fold(
            rows,
            lambda seen: fit_phase(seen, tiling, gpu).constants,
            lambda held_out: _residuals(held_out, tiling, gpu),
        )
    ]
    phases = {name: _phase(name, fit.constants, tiling) for name, fit in fits.items()}
    costs = KernelCosts(
        source=source, operators=(operator,), dtype=problem.dtype, head_dim=problem.head_dim,
        grid=tiling.grid, packs_heads=tiling.packs_heads, fwd=phases["fwd"], bwd=phases.get("bwd"),
    )  # fmt: skip
    unidentified = [] if grid_known else ["grid"]
    unidentified += [
        f"{name}.{x}"
        for name, fit in fits.items()
        for x in ("tflops", *NEUTRAL)
        if x in fit.unidentified or x not in fit.constants
    ]
    return KernelFit(costs, fits, errors, unidentified)


def choose_tiling(by_phase: Mapping[str, Sequence[Point]], gpu: Gpu) -> tuple[Tiling, bool]:
    """The tiles that fit best, and whether the points tell the two kinds of grid apart."""
    grouped = any(p.problem.heads_q > p.problem.heads_kv for p in by_phase["fwd"])
    costs: dict[Tiling, float] = {}
    for grid, packs in itertools.product(GRIDS, (False, True) if grouped else (False,)):
        best = {name: _best_tile(rows, grid, packs, gpu) for name, rows in by_phase.items()}
        fwd = best["fwd"].tiling.fwd
        bwd = best["bwd"].tiling.bwd if "bwd" in best else fwd
        total = sum(choice.cost for choice in best.values())
        costs[Tiling(fwd, bwd, grid, packs)] = total
    chosen = min(costs, key=lambda tiling: costs[tiling])
    of_grid = [min(c for t, c in costs.items() if t.grid == grid) for grid in GRIDS]
    return chosen, not math.isclose(*of_grid, rel_tol=1e-6)


def _best_tile(rows: Sequence[Point], grid: str, packs: bool, gpu: Gpu) -> _Choice:
    """The extents of tiles of a phase with which its constants fit best."""
    choices = []
    for tile in itertools.product(EXTENTS, EXTENTS):
        tiling = Tiling(tile, tile, grid, packs)
        fit = solve(
            _residuals(rows, tiling, gpu), _guess(rows, tiling, gpu), span=SPAN, tolerance=1e-2
        )
        choices.append(_Choice(tiling, fit.cost))
    return min(choices, key=lambda choice: choice.cost)


def fit_phase(rows: Sequence[Point], tiling: Tiling, gpu: Gpu) -> Fit:
    """The constants of a phase with these tiles."""
    return solve_identified(
        _residuals(rows, tiling, gpu), _guess(rows, tiling, gpu), NEUTRAL, span=SPAN
    )


def errors_out_of_fold(
    rows: Sequence[P],
    fit: Callable[[Sequence[P]], dict[str, float]],
    residuals: Callable[[Sequence[P]], Residuals],
) -> list[float]:
    """The error of each point, predicted by constants that were fitted to the other folds."""
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    errors = []
    for fold in range(FOLDS):
        held_out = shuffled[fold::FOLDS]
        seen = [row for i, row in enumerate(shuffled) if i % FOLDS != fold]
        errors += [abs(math.exp(x) - 1) for x in residuals(held_out)(fit(seen))]
    return errors


def _residuals(rows: Sequence[Point], tiling: Tiling, gpu: Gpu) -> Residuals:
    """Log of predicted over measured times, for given constants."""
    kernels = [row.kernel(tiling) for row in rows]

    def residuals(constants: Mapping[str, float]) -> list[float]:
        costs = _costs(rows[0].phase, constants, tiling)
        return [
            math.log(kernel_seconds(kernel, costs, gpu) / row.seconds)
            for kernel, row in zip(kernels, rows, strict=True)
        ]

    return residuals


def _costs(phase: str, constants: Mapping[str, float], tiling: Tiling) -> KernelCosts:
    """A kernel with these constants in both phases."""
    of_phase = _phase(phase, constants, tiling)
    return KernelCosts(
        source="", operators=(), dtype="", head_dim=0, grid=tiling.grid, fwd=of_phase, bwd=of_phase
    )


def _guess(rows: Sequence[Point], tiling: Tiling, gpu: Gpu) -> dict[str, float]:
    """First guesses: the highest rate of any point, and costs that are a tenth of a time.

    Constants that no point can tell are not among them: with one multiprocessor the largest tile
    ends when all do, a mask without empty thread blocks has none, and the rate of full rectangles
    is relative to that of others.
    """
    kernels = [row.kernel(tiling) for row in rows]
    slow = _costs(rows[0].phase, {"tflops": SLOW}, tiling)
    rates = [
        SLOW * kernel_seconds(kernel, slow, gpu) / row.seconds
        for kernel, row in zip(kernels, rows, strict=True)
    ]
    guess = {"tflops": max(rates)}
    for name in ("tiles", "empty"):
        tenths = [
            0.1 * row.seconds * gpu.sms / (kernel.heads_q * count)
            for kernel, row in zip(kernels, rows, strict=True)
            if (count := getattr(kernel.tiles, name))
        ]
        if tenths:
            guess[{"tiles": "tile_us", "empty": "empty_us"}[name]] = min(tenths) * 1e6
    guess["call_us"] = min(row.seconds for row in rows) * 0.1 * 1e6
    if gpu.sms > 1:
        guess["tail"] = 0.5
    if len({kernel.full for kernel in kernels}) > 1:
        guess["full_rate"] = 1.0
    return guess


def _phase(name: str, constants: Mapping[str, float], tiling: Tiling) -> Phase:
    tile = tiling.fwd if name == "fwd" else tiling.bwd
    return Phase(tile=tile, **{**NEUTRAL, **constants})
