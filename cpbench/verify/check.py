"""No number without a green check: against float64, at a small size and at the measured one.

*Small*: the operator under its strategy on some 320 tokens of the very mask that is measured
(windows of tokens around the corners of its slices), every output and gradient compared in full.
*Sampled*: at the measured size, some 64 query rows and key columns, spread over ranks, batches and
heads and always with those at edges, recomputed in float64: that catches what only appears at size
(index overflow, stale buffers, a last partial tile).  It is in ``check_at_size``.

Errors are relative to the reference, over all ranks: ``rel_l2`` is the L2 norm of the difference
over the L2 norm of the reference, of the worst batch and head where all are compared; ``max_rms``
the largest single difference over the reference's root mean square (or an eighth of its largest
value, where that is more).  For lse both are absolute (rms and largest difference in nats), and
infinite where one side is -inf and the other is not; ``largest`` is its largest magnitude.  Scores
are known to a rounding error of their own size, so what is allowed grows with it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

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
CHOOSING_TOKENS = 1024  # of operators that choose: enough blocks to choose from
WINDOW = 32

# Of (rel_l2, max_rms); measured errors stay three or more times below (docs/method.md).
TOLERANCE = {
    "float64": (1e-12, 1e-10),
    "float32": (5e-6, 1e-4),
    "bfloat16": (2.5e-2, 0.25),
    "float16": (4e-3, 4e-2),
}

PEAK = 8  # largest value over rms, of normals
SCORES = 8  # what tolerances are for, in nats

Errors = dict[str, dict[str, float]]
Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Rank:
    """Who checks: the device and the ways to the other ranks (None when there are none)."""

    device: str
    comm: Comm | None = None
    control: Control | None = None

    def gather(self, value: Sums) -> list[Sums]:
        return self.control.gather(value) if self.control else [value]


@dataclass
class TensorSums:
    """Sums from which the errors of one tensor follow, additive over ranks; ``(groups,)`` arrays
    for each batch and head, or of length 1."""

    squared_error: np.typing.NDArray[np.float64]
    squared_reference: np.typing.NDArray[np.float64]
    largest_error: float
    count: int
    largest: float = 0.0  # of the reference

    @classmethod
    def of(cls, found: torch.Tensor, want: torch.Tensor, groups: int = 1) -> TensorSums:
        """Of two tensors whose leading axis can be split into ``groups``."""
        import torch

        found, want = (x.reshape(groups, -1).double() for x in (found, want))
        same = torch.isneginf(found) & torch.isneginf(want)
        error = torch.where(same, 0.0, found - want).abs()
        error = error.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        finite = want.masked_fill(torch.isneginf(want), 0.0)
        return cls(
            error.square().sum(1).cpu().numpy(),
            finite.square().sum(1).cpu().numpy(),
            float(error.max()) if error.numel() else 0.0,
            error.numel(),
            float(finite.abs().max()) if finite.numel() else 0.0,
        )

    def add(self, other: TensorSums) -> TensorSums:
        return TensorSums(
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
            max(self.largest_error, other.largest_error),
            self.count + other.count,
            max(self.largest, other.largest),
        )

    def errors(self, absolute: bool) -> dict[str, float]:
        error, reference = self.squared_error, self.squared_reference
        if absolute or not reference.any():
            rms = float(np.sqrt(error.sum() / max(self.count, 1)))
            return {"rel_l2": rms, "max_rms": self.largest_error, "largest": self.largest}
        # A group without a reference (nothing visible in it) is held against all of them.
        share = np.where(reference > 0, reference, reference.sum())
        scale = max(float(np.sqrt(reference.sum() / self.count)), self.largest / PEAK)
        return {
            "rel_l2": float(np.sqrt((error / share).max())),
            "max_rms": self.largest_error / scale,
        }


Sums = dict[str, TensorSums]


def combine(parts: list[Sums]) -> Errors:
    """The errors of each tensor from the sums of every rank."""
    total: Sums = {}
    for part in parts:
        for name, sums in part.items():
            total[name] = total[name].add(sums) if name in total else sums
    return {name: sums.errors(absolute=name == "lse") for name, sums in total.items()}


def verdict(errors: Errors, dtype: str) -> str | None:
    """Which tensor is wrong and by how much, in one line; None when all are within tolerance."""
    limits = dict(zip(("rel_l2", "max_rms"), TOLERANCE[dtype], strict=True))
    scores = errors.get("lse", {}).get("largest", 0.0)
    for name, found in errors.items():
        for metric, least in limits.items():
            limit = least * max(1.0, scores / SCORES)
            if not found[metric] <= limit:
                return f"{name} differs from float64: {metric} {found[metric]:.3g} > {limit:g}"
    return None


def make_inputs(
    problem: Problem, queries: IntArray, keys: IntArray, recipe: Recipe, device: str
) -> Tensors:
    """q, k, v and (for gradients) dout of some global tokens, ``[B, tokens, heads, D]``.

    Args:
        queries: positions of the tokens of q and dout, counted among the queries.
        keys: of those of k and v.
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


def inputs_of(work: Attention, recipe: Recipe, device: str) -> Tensors:
    """The inputs of the rank of ``work``."""
    queries, keys = (x.positions(work.rank) for x in (work.world.queries, work.world.keys))
    return make_inputs(work.problem, queries, keys, recipe, device)


def run(work: Attention, inputs: Tensors, comm: Comm | None) -> Tensors:
    """One pass: out, lse where there is one, and gradients where they are asked for."""
    out, lse, saved = work.forward(inputs["q"], inputs["k"], inputs["v"], comm)
    found = {"out": out}
    if lse is not None:
        found["lse"] = lse
    if work.problem.backward:
        grads = work.backward(inputs["dout"], saved, comm)
        found.update(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


# --- small --------------------------------------------------------------------------------------


def small_mask(mask: Mask, tokens: int = SMALL_TOKENS) -> Mask:
    """The mask itself when it is small, else its restriction to windows of tokens where slices
    begin and end, spread over the sequence; of the same kind, and the same on every rank."""
    if max(mask.seq_q, mask.seq_k) <= tokens:
        return mask
    if isinstance(mask, DilatedMask):
        return mask.resized(tokens)
    q0, q1, k0, k1, lo, hi = mask.slices.T
    at_queries, at_keys = [q0, q1, k0 - hi, k1 - lo], [k0, k1, q0 + lo, q0 + hi]
    if mask.seq_q == mask.seq_k:
        at_queries = at_keys = [q0, q1, *at_keys]
    queries = _windows(mask.seq_q, np.concatenate(at_queries), tokens)
    keys = _windows(mask.seq_k, np.concatenate(at_keys), tokens)
    # Simplified, so that causal stays causal and takes the path that is measured.
    return mask.restrict(queries, keys).simplify()


def _windows(n: int, corners: IntArray, tokens: int) -> IntArray:
    """``(m, 2)`` starts and lengths of windows of ``n`` tokens, at corners and between."""
    if n <= tokens:
        return np.array([[0, n]])
    corners = np.unique(np.append(corners[(corners >= 0) & (corners <= n)], [0, n]))
    count = tokens // WINDOW
    chosen = corners[np.unique(np.linspace(0, len(corners) - 1, count).astype(int))]
    evenly = np.linspace(0, n, count - len(chosen) + 2).astype(int)[1:-1]
    starts = np.unique(np.clip(np.concatenate([chosen, evenly]) - WINDOW // 2, 0, n - WINDOW))
    ends = np.minimum(starts + WINDOW, np.append(starts[1:], n))
    return np.column_stack([starts, ends - starts])


def small_world(work: Attention) -> World:
    """What :func:`small` computes in place of ``work``: its mask cut down, dealt alike."""
    world = work.world
    tokens = CHOOSING_TOKENS if work.op.info.selects else SMALL_TOKENS
    # A multiple of what a layout deals evenly: some strategies pad nothing.
    tiny = small_mask(work.mask, tokens - tokens % (2 * world.size))
    problem = replace(world.problem, seq_q=tiny.seq_q, seq_k=tiny.seq_k)
    shared = tiny if isinstance(tiny, AttnMask) else None
    layout = layouts.build(world.keys.name, tiny.seq_k, world.size, shared)
    return World.of(problem, tiny, layout, world.ranks_per_node, world.placement)


def small(work: Attention, recipe: Recipe, rank: Rank) -> Errors:
    """Errors of every output and gradient of a small problem."""
    found = run(work, inputs_of(work, recipe, rank.device), rank.comm)
    reference = _reference(work.mask, work.problem, recipe, rank.device)
    sums = {}
    for name, value in found.items():
        layout = work.world.keys if name in ("dk", "dv") else work.world.queries
        positions = layout.positions(work.rank)
        real = np.flatnonzero(positions < layout.seq_len)
        heads_first = value if name == "lse" else value.transpose(1, 2)
        want = reference[name].to(rank.device)
        mine = heads_first.index_select(2, index_of(real, rank.device))
        want = want.index_select(2, index_of(positions[real], rank.device))
        sums[name] = TensorSums.of(mine, want, groups=mine.shape[0] * mine.shape[1])
    return combine(rank.gather(sums))


@functools.lru_cache(maxsize=16)
def _reference(mask: Mask, problem: Problem, recipe: Recipe, device: str) -> Tensors:
    """The float64 results ``[B, heads, S, …]`` for the inputs as rounded to the problem's dtype;
    kept in main memory, so that they take none from what is measured."""
    from cpbench.kernels.reference import backward64, forward64

    scale = problem.softmax_scale
    x = make_inputs(problem, np.arange(mask.seq_q), np.arange(mask.seq_k), recipe, device)
    out, lse = forward64(x["q"], x["k"], x["v"], mask, scale)
    found = {"out": out.transpose(1, 2), "lse": lse}
    if problem.backward:
        grads = backward64(x["dout"], x["q"], x["k"], x["v"], out, lse, mask, scale)
        found.update({n: g.transpose(1, 2) for n, g in zip(("dq", "dk", "dv"), grads, strict=True)})
    return {name: value.cpu() for name, value in found.items()}


# --- timed --------------------------------------------------------------------------------------


def fingerprint(tensors: Tensors) -> Tensors:
    """Sums and absolute sums over tokens and lanes, ``[2, B, heads]`` float64 of each tensor: what
    the timed calls are held against, at a price that does not grow with the check."""
    import torch

    return {
        name: torch.stack([x.double().sum((1, 3)), x.double().abs().sum((1, 3))]).cpu()
        for name, x in tensors.items()
        if x.ndim == 4
    }


def changed(before: Tensors, after: Tensors, dtype: str) -> str | None:
    """Name of the first tensor whose fingerprint is not what it was; None if all are."""
    import torch

    limit = TOLERANCE[dtype][0]
    for name in before.keys() & after.keys():
        scale = before[name][1].clamp(min=1e-30)
        if not torch.all((after[name] - before[name]).abs() <= limit * scale):
            return name
    return None


def index_of(values: object, device: str) -> torch.Tensor:
    import torch

    return torch.as_tensor(values, device=device)
