"""Correctness checks against float64; no time is reported without them.

*Small*: operator and strategy run on about 320 tokens of the measured mask (windows of tokens
around the corners of its slices), and every output and gradient is compared in full.
*Sampled*: at the measured size, about 64 query rows and key columns, spread over ranks, batches and
heads and always including those at edges, are recomputed in float64.  This finds errors that only
appear at size (index overflow, stale buffers, a last partial tile); see ``cpbench.verify.at_size``.

Errors are relative to the reference, over all ranks: ``rel_l2`` is the L2 norm of the difference
over the L2 norm of the reference, of the worst batch and head where all are compared; ``max_rms``
is the largest difference over the root mean square of the reference (or an eighth of its largest
value, where that is more).  For lse both are absolute (rms and largest difference in nats), and
infinite where only one side is -inf; ``largest`` is its largest magnitude.  Scores have a rounding
error proportional to their size, so the limits grow with the largest lse.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask, IntArray
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.parallel.comm import Comm, Control

SMALL_TOKENS = 320
SELECTION_TOKENS = 1024  # for selectors, which need more blocks to select from
WINDOW_TOKENS = 32

# Limits of (rel_l2, max_rms); measured errors are at least three times smaller (docs/method.md).
TOLERANCE = {
    "float64": (1e-12, 1e-10),
    "float32": (5e-6, 1e-4),
    "bfloat16": (2.5e-2, 0.25),
    "float16": (4e-3, 4e-2),
}

PEAK_OVER_RMS = 8  # the largest value of normals is at most about this many rms
TOLERANCE_LSE = 8.0  # nats: TOLERANCE holds for an lse up to this, and grows in proportion above

Errors = dict[str, dict[str, float]]
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class RankContext:
    """The device of a rank and its communicators, which are None in a single process."""

    device: str
    comm: Comm | None = None
    control: Control | None = None

    def gather(self, value: ErrorSums) -> list[ErrorSums]:
        return self.control.all_gather(value) if self.control else [value]


@dataclass
class TensorErrorSums:
    """Sums from which the errors of one tensor are computed, additive over ranks.  The arrays are
    ``(groups,)``, one element per batch and head, or of length 1."""

    squared_error: np.typing.NDArray[np.float64]
    squared_reference: np.typing.NDArray[np.float64]
    largest_error: float
    count: int
    largest: float = 0.0  # magnitude in the reference

    @classmethod
    def between(
        cls, result: torch.Tensor, reference: torch.Tensor, groups: int = 1
    ) -> TensorErrorSums:
        """The sums for two tensors whose leading axis can be split into ``groups``."""
        import torch

        result, reference = (x.reshape(groups, -1).double() for x in (result, reference))
        both_neginf = torch.isneginf(result) & torch.isneginf(reference)
        error = torch.where(both_neginf, 0.0, result - reference).abs()
        error = error.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        finite = reference.masked_fill(torch.isneginf(reference), 0.0)
        return cls(
            error.square().sum(1).cpu().numpy(),
            finite.square().sum(1).cpu().numpy(),
            float(error.max()) if error.numel() else 0.0,
            error.numel(),
            float(finite.abs().max()) if finite.numel() else 0.0,
        )

    def add(self, other: TensorErrorSums) -> TensorErrorSums:
        return TensorErrorSums(
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
            max(self.largest_error, other.largest_error),
            self.count + other.count,
            max(self.largest, other.largest),
        )

    def errors(self, absolute: bool) -> dict[str, float]:
        """``rel_l2`` and ``max_rms``; absolute ones also where the reference is zero."""
        error, reference = self.squared_error, self.squared_reference
        if absolute or not reference.any():
            rms = float(np.sqrt(error.sum() / max(self.count, 1)))
            return {"rel_l2": rms, "max_rms": self.largest_error, "largest": self.largest}
        # A group whose reference is zero (it sees nothing) is compared with the sum of all groups.
        norms = np.where(reference > 0, reference, reference.sum())
        scale = max(float(np.sqrt(reference.sum() / self.count)), self.largest / PEAK_OVER_RMS)
        return {
            "rel_l2": float(np.sqrt((error / norms).max())),
            "max_rms": self.largest_error / scale,
        }


ErrorSums = dict[str, TensorErrorSums]


def combined_errors(ranks: list[ErrorSums]) -> Errors:
    """The errors of each tensor, from the sums of every rank."""
    total: ErrorSums = {}
    for rank in ranks:
        for name, sums in rank.items():
            total[name] = total[name].add(sums) if name in total else sums
    return {name: sums.errors(absolute=name == "lse") for name, sums in total.items()}


def tolerance_violation(errors: Errors, dtype: str) -> str | None:
    """The first error above its limit, in one line; None when all are within tolerance."""
    limits = dict(zip(("rel_l2", "max_rms"), TOLERANCE[dtype], strict=True))
    largest_lse = errors.get("lse", {}).get("largest", 0.0)
    for name, metrics in errors.items():
        for metric, base_limit in limits.items():
            limit = base_limit * max(1.0, largest_lse / TOLERANCE_LSE)
            if not metrics[metric] <= limit:
                return f"{name} differs from float64: {metric} {metrics[metric]:.3g} > {limit:g}"
    return None


def make_inputs(
    problem: Problem, queries: IntArray, keys: IntArray, recipe: Recipe, device: str
) -> Tensors:
    """q, k, v and (with a backward pass) dout of the given tokens, ``[B, tokens, heads, D]``.

    Args:
        queries: global positions of the tokens of q and dout.
        keys: global positions of the tokens of k and v.
    """

    def make(name: str) -> torch.Tensor:
        return recipe.make(
            name,
            problem,
            keys if name in "kv" else queries,
            batches=range(problem.batch),
            heads=range(problem.heads_kv if name in "kv" else problem.heads_q),
            device=device,
        )

    return {name: make(name) for name in ("q", "k", "v", "dout")[: 4 if problem.backward else 3]}


def rank_inputs(work: Attention, recipe: Recipe, device: str) -> Tensors:
    """The inputs of the tokens of the rank that ``work`` is planned for."""
    queries, keys = (x.positions(work.rank) for x in (work.world.queries, work.world.keys))
    return make_inputs(work.problem, queries, keys, recipe, device)


def run_pass(work: Attention, inputs: Tensors, comm: Comm | None) -> Tensors:
    """Run one pass; returns out, lse if the operator has one, and gradients if asked for."""
    out, lse, saved = work.forward(QKV.of(inputs), comm)
    results = {"out": out}
    if lse is not None:
        results["lse"] = lse
    if work.problem.backward:
        grads = work.backward(inputs["dout"], saved, comm)
        results.update(zip(("dq", "dk", "dv"), grads, strict=True))
    return results


# --- small --------------------------------------------------------------------------------------


def reduced_mask(mask: Mask, tokens: int = SMALL_TOKENS) -> Mask:
    """The mask restricted to windows of tokens around the corners of its slices, spread over the
    sequence, or the mask itself if it is small.  Of the same kind, and equal on all ranks."""
    if max(mask.seq_q, mask.seq_k) <= tokens:
        return mask
    if isinstance(mask, DilatedMask):
        return mask.resized(tokens)
    q0, q1, k0, k1, lo, hi = mask.slices.T
    at_queries, at_keys = [q0, q1, k0 - hi, k1 - lo], [k0, k1, q0 + lo, q0 + hi]
    if mask.seq_q == mask.seq_k:
        at_queries = at_keys = [q0, q1, *at_keys]
    queries = _token_windows(mask.seq_q, np.concatenate(at_queries), tokens)
    keys = _token_windows(mask.seq_k, np.concatenate(at_keys), tokens)
    # Simplified, so that a causal mask stays causal and takes the code path that is measured.
    return mask.restrict(queries, keys).simplify()


def _token_windows(n: int, corners: IntArray, tokens: int) -> IntArray:
    """``(m, 2)`` starts and lengths of windows out of ``n`` tokens, at corners and between."""
    if n <= tokens:
        return np.array([[0, n]])
    corners = np.unique(np.append(corners[(corners >= 0) & (corners <= n)], [0, n]))
    count = tokens // WINDOW_TOKENS
    at_corners = corners[np.unique(np.linspace(0, len(corners) - 1, count).astype(int))]
    evenly = np.linspace(0, n, count - len(at_corners) + 2).astype(int)[1:-1]
    starts = np.concatenate([at_corners, evenly]) - WINDOW_TOKENS // 2
    starts = np.unique(np.clip(starts, 0, n - WINDOW_TOKENS))
    ends = np.minimum(starts + WINDOW_TOKENS, np.append(starts[1:], n))
    return np.column_stack([starts, ends - starts])


def reduced_world(work: Attention) -> World:
    """The world for :func:`check_small`: that of ``work`` with a reduced mask, same layout."""
    world = work.world
    tokens = SELECTION_TOKENS if work.op.info.selects else SMALL_TOKENS
    # A multiple that layouts split evenly, since some strategies do not pad.
    mask = reduced_mask(work.mask, tokens - tokens % (2 * world.size))
    problem = replace(world.problem, seq_q=mask.seq_q, seq_k=mask.seq_k)
    shared_mask = mask if isinstance(mask, AttnMask) else None
    layout = layouts.build(world.keys.name, mask.seq_k, world.size, shared_mask)
    return World.of(problem, mask, layout, world.ranks_per_node, world.placement)


def check_small(work: Attention, recipe: Recipe, context: RankContext) -> Errors:
    """Errors of every output and gradient of a problem of :func:`reduced_world`."""
    results = run_pass(work, rank_inputs(work, recipe, context.device), context.comm)
    reference = _reference_results(work.mask, work.problem, recipe, context.device)
    sums = {}
    for name, value in results.items():
        layout = work.world.keys if name in ("dk", "dv") else work.world.queries
        positions = layout.positions(work.rank)
        real = np.flatnonzero(positions < layout.seq_len)
        heads_first = value if name == "lse" else value.transpose(1, 2)
        own = heads_first.index_select(2, as_index(real, context.device))
        expected = reference[name].to(context.device)
        expected = expected.index_select(2, as_index(positions[real], context.device))
        groups = own.shape[0] * own.shape[1]
        sums[name] = TensorErrorSums.between(own, expected, groups)
    return combined_errors(context.gather(sums))


@functools.lru_cache(maxsize=16)
def _reference_results(mask: Mask, problem: Problem, recipe: Recipe, device: str) -> Tensors:
    """The float64 results ``[B, heads, S, …]`` for the inputs as rounded to the problem's dtype;
    cached in host memory, to leave device memory to the measurement."""
    from cpbench.kernels.reference import backward64, forward64

    scale = problem.softmax_scale
    x = make_inputs(problem, np.arange(mask.seq_q), np.arange(mask.seq_k), recipe, device)
    out, lse = forward64(QKV.of(x), mask, scale)
    results = {"out": out.transpose(1, 2), "lse": lse}
    if problem.backward:
        grads = backward64(BackwardInputs(x["dout"], *QKV.of(x), out, lse), mask, scale)
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            results[name] = grad.transpose(1, 2)
    return {name: value.cpu() for name, value in results.items()}


# --- timed --------------------------------------------------------------------------------------


def checksums(tensors: Tensors) -> Tensors:
    """Sums and absolute sums over tokens and head dimension, ``[2, B, heads]`` float64 per tensor,
    to compare the results of timed calls with the checked ones at low cost."""
    import torch

    return {
        name: torch.stack([x.double().sum((1, 3)), x.double().abs().sum((1, 3))]).cpu()
        for name, x in tensors.items()
        if x.ndim == 4
    }


def changed_tensor(before: Tensors, after: Tensors, dtype: str) -> str | None:
    """The name of the first tensor whose checksums differ; None if there is none."""
    import torch

    limit = TOLERANCE[dtype][0]
    for name in before.keys() & after.keys():
        scale = before[name][1].clamp(min=1e-30)
        if not torch.all((after[name] - before[name]).abs() <= limit * scale):
            return name
    return None


def as_index(values: object, device: str) -> torch.Tensor:
    """An index tensor on ``device``."""
    import torch

    return torch.as_tensor(values, device=device)
