"""Limits of the errors that checks against float64 allow.

Errors are relative to the reference:

* ``rel_l2``: L2 norm of the difference over that of the reference, of the worst batch and head
  where all are compared;
* ``max_rms``: largest difference over the root mean square of the reference (or an eighth of its
  largest value, where that is more);
* ``bias``: by what fraction a result is too long or too short along the reference, beyond what its
  scatter explains.  Rounding has none, scaling errors have little else;
* ``tile``: rel_l2 of the worst tile, where tiles are compared.  This is for rubbish: its limit is
  far above rounding, also where all of a tile is nearly zero.

For lse, rel_l2 and max_rms are absolute (root mean square and largest difference in nats), and
infinite where only one side is -inf.

Scores are rounded in proportion to their size, of which the largest lse is a measure, also that of
a selector's branches where the result has none (``scores``).  So limits grow with it, by the
precision in which the operator declares to hold its scores, up to a cap.

A sequence mixer multiplies its state by a rounded decay in every chunk, always by the same one
where decays are fixed; so limits grow with the number of tokens.  Sums of log decays over a chunk
are rounded in proportion to their size, ``nats``, which shows in the gradient of the log decay.
States are held in float32 whatever the dtype of the inputs, unless a mixer declares to round what
it adds to them (``rounds_states``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cpbench.core.problem import INITIAL_STATE
from cpbench.core.registry import OperatorInfo

Errors = Mapping[str, Mapping[str, float]]
StoredErrors = Mapping[str, Mapping[str, float | None]]  # of a record: None is infinite

# Limits of (rel_l2, max_rms, bias) for small scores; measured errors are several times smaller (see
# docs/method.md).
LIMITS = {
    "float64": (1e-12, 1e-10, 1e-12),
    "float32": (2e-6, 4e-5, 5e-7),
    "bfloat16": (2.5e-2, 0.25, 1e-3),
    "float16": (4e-3, 4e-2, 2e-4),
}
METRICS = ("rel_l2", "max_rms", "bias")
TILE_LIMITS = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
LSE_ERROR = 1e-5  # nats, beyond the rounding of scores
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
KERNEL_LSE_ERROR = 2e-4  # of what selectors may call in 16 bits: that of ``sdpa.cpu_flash``
GROWTH = 8  # rounding errors of a score, per nat of the largest lse, in units of EPSILON
MAX_GROWTH, MAX_GROWTH_ROUNDED = 1e-2, 1e-1  # caps of rel_l2; the second for rounded scores
MIXER_CHUNK = 64  # tokens, after which a state is multiplied by a decay
MIXER_STATE = {"rel_l2": 5e-4, "max_rms": 1e-2, "bias": 5e-4}  # of inputs of 16 bits
MAX_RMS_GROWTH = 20  # max_rms grows by so much more than rel_l2


def limits(
    dtype: str, info: OperatorInfo, largest_lse: float, tokens: int = 0
) -> dict[str, dict[str, float]]:
    """Return the limits of ``lse`` and of all other tensors (``*``) by metric.

    Args:
        dtype: of the inputs.
        info: declaration of the operator: ``rounds_scores``, ``rounds_states`` and ``lse_error``
            are looser limits.
        largest_lse: largest magnitude of the reference's lse, in nats.
        tokens: of a mixer's sequence.
    """
    accumulator = "float64" if dtype == "float64" else "float32"
    growth = GROWTH * EPSILON[dtype if info.rounds_scores else accumulator] * largest_lse
    if info.mixer:
        growth = EPSILON[accumulator] / 2 * tokens / MIXER_CHUNK
    capped = min(growth, MAX_GROWTH_ROUNDED if info.rounds_scores else MAX_GROWTH)
    rel_l2, max_rms, bias = LIMITS[dtype]
    of_kernels = KERNEL_LSE_ERROR if info.selects else 0.0
    lse = max(info.lse_error, of_kernels) if dtype in ("bfloat16", "float16") else LSE_ERROR
    lse += 2 * (capped if info.rounds_scores else growth)
    exact_states = dtype in ("bfloat16", "float16") and not info.rounds_states
    states = dict.fromkeys(("state", f"d{INITIAL_STATE}"), MIXER_STATE) if exact_states else {}
    return {
        "lse": {"rel_l2": lse, "max_rms": lse},
        **states,
        "*": {
            "rel_l2": rel_l2 + capped,
            "max_rms": max_rms + MAX_RMS_GROWTH * capped,
            "bias": bias + capped,
            "tile": TILE_LIMITS[dtype] + capped,
        },
    }


def violation(errors: Errors, dtype: str, info: OperatorInfo, tokens: int = 0) -> str | None:
    """The first error above its limit, in one line; None when all are within tolerance."""
    for name, metric, error, limit in _errors_with_limits(errors, dtype, info, tokens):
        if not error <= limit:
            return f"{name} differs from float64: {metric} {error:.3g} > {limit:.3g}"
    return None


def grows(small: StoredErrors, at_size: StoredErrors, dtype: str) -> bool:
    """Whether errors at size are well above those of the small check, though within limits."""
    noticeable = LIMITS[dtype][0] / 20
    for name in (small.keys() & at_size.keys()) - {"lse"}:
        before, after = small[name]["rel_l2"], at_size[name]["rel_l2"]
        if before is not None and after is not None and after > max(4 * before, noticeable):
            return True
    return False


def largest_share(errors: StoredErrors, dtype: str, info: OperatorInfo, tokens: int = 0) -> float:
    """The largest error as a fraction of its limit; 0 without errors."""
    finite = {
        name: {metric: math.inf if x is None else x for metric, x in metrics.items()}
        for name, metrics in errors.items()
    }
    found = _errors_with_limits(finite, dtype, info, tokens)
    shares = [error / limit for *_, error, limit in found]
    return max(shares, default=0.0)


def _errors_with_limits(
    errors: Errors, dtype: str, info: OperatorInfo, tokens: int
) -> Iterator[tuple[str, str, float, float]]:
    """Every tensor and metric with its error and limit."""
    largest = max(errors.get(x, {}).get(y, 0.0) for x, y in (("lse", "largest"), ("out", "scores")))
    allowed = limits(dtype, info, largest, tokens)
    for name, metrics in errors.items():
        more = EPSILON["float32"] * metrics.get("nats", 0.0)
        for metric, limit in allowed.get(name, allowed["*"]).items():
            if metric in metrics:
                growth = more * (MAX_RMS_GROWTH if metric == "max_rms" else 1)
                yield name, metric, metrics[metric], limit + growth
