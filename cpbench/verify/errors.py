"""Errors of results against a reference, over all ranks; their definitions and limits are in
``cpbench.core.tolerance``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench.core.tolerance import METRICS

if TYPE_CHECKING:
    import torch

PEAK_OVER_RMS = 8  # the largest value of normals is at most about this many rms
BIAS_DEVIATIONS = 4  # standard deviations of a scaling error that scatter may explain
MIN_ROWS_FOR_BIAS = 8  # effectively, by weight

Errors = dict[str, dict[str, float]]
Floats = np.typing.NDArray[np.float64]


@dataclass
class TensorErrorSums:
    """Sums from which the errors of one tensor are computed, additive over ranks.

    The arrays are ``(groups,)``, one element per batch and head, or of length 1.  With e the error
    of a row along the reference, <result - reference, reference>, and w = <reference, reference>
    they hold, for each group, sums over rows.
    """

    squared_error: Floats
    w: Floats
    e: Floats
    e_e: Floats
    e_w: Floats
    w_w: Floats
    largest_error: float
    count: int
    largest: float = 0.0  # magnitude in the reference

    @classmethod
    def between(
        cls, result: torch.Tensor, reference: torch.Tensor, groups: int = 1
    ) -> TensorErrorSums:
        """The sums for two tensors ``[…, rows, D]`` whose leading axes make up ``groups``; a vector
        is a single row."""
        import torch

        columns = result.shape[-1] if result.ndim else 1
        result, reference = (x.reshape(groups, -1, columns).double() for x in (result, reference))
        both_neginf = torch.isneginf(result) & torch.isneginf(reference)
        finite = reference.masked_fill(torch.isneginf(reference), 0.0)
        error = torch.where(both_neginf, 0.0, result - reference)
        size = error.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        e, w = (error.nan_to_num(0.0, 0.0, 0.0) * finite).sum(-1), finite.square().sum(-1)
        sums = {"squared_error": size.square().sum(2), "w": w, "e": e}
        sums |= {"e_e": e * e, "e_w": e * w, "w_w": w * w}
        arrays: dict[str, Any] = {name: x.sum(1).cpu().numpy() for name, x in sums.items()}
        return cls(
            **arrays,
            largest_error=float(size.max()) if size.numel() else 0.0,
            count=size.numel(),
            largest=float(finite.abs().max()) if finite.numel() else 0.0,
        )

    def add(self, other: TensorErrorSums) -> TensorErrorSums:
        """The sums over the rows of both."""
        values: dict[str, Any] = {}
        for item in fields(self):
            own, others = getattr(self, item.name), getattr(other, item.name)
            values[item.name] = max(own, others) if "largest" in item.name else own + others
        return TensorErrorSums(**values)

    def errors(self, absolute: bool) -> dict[str, float]:
        """The errors by metric; absolute ones, without a bias, also where the reference is zero."""
        if absolute or not self.w.any():
            rms = float(np.sqrt(self.squared_error.sum() / max(self.count, 1)))
            absolute_errors = (rms, self.largest_error, 0.0)
            return {**dict(zip(METRICS, absolute_errors, strict=True)), "largest": self.largest}
        # A group whose reference is zero (it sees nothing) is compared with the sum of all groups.
        norms = np.where(self.w > 0, self.w, self.w.sum())
        scale = max(float(np.sqrt(self.w.sum() / self.count)), self.largest / PEAK_OVER_RMS)
        return {
            "rel_l2": float(np.sqrt((self.squared_error / norms).max())),
            "max_rms": self.largest_error / scale,
            "bias": self.bias,
        }

    @property
    def bias(self) -> float:
        """The largest |slope - 1| of any group, less ``BIAS_DEVIATIONS`` standard deviations, where
        the slope is that of the regression of the result on the reference through the origin; of
        groups with enough rows.

        Source: the deviation is the sandwich estimator with a cluster for every row (White, "A
        heteroskedasticity-consistent covariance matrix estimator", 1980), since a few rows may have
        most of the weight.
        """
        w = np.where(self.w > 0, self.w, np.inf)
        slope_error = self.e / w
        scores = self.e_e - 2 * slope_error * self.e_w + slope_error**2 * self.w_w
        deviation = np.sqrt(np.maximum(scores, 0.0)) / w
        bias = np.maximum(np.abs(slope_error) - BIAS_DEVIATIONS * deviation, 0.0)
        enough_rows = self.w**2 >= MIN_ROWS_FOR_BIAS * self.w_w
        return float(bias[enough_rows].max(initial=0.0))


ErrorSums = dict[str, TensorErrorSums]


def combined_errors(ranks: list[ErrorSums]) -> Errors:
    """The errors of each tensor, from the sums of every rank."""
    total: ErrorSums = {}
    for rank in ranks:
        for name, sums in rank.items():
            total[name] = total[name].add(sums) if name in total else sums
    return {name: sums.errors(absolute=name == "lse") for name, sums in total.items()}


def worst_errors(errors: Sequence[Errors]) -> Errors:
    """The largest of each error."""
    worst: Errors = {}
    for one in errors:
        for name, metrics in one.items():
            known = worst.setdefault(name, dict(metrics))
            for metric, value in metrics.items():
                known[metric] = max(known.get(metric, value), value)
    return worst
