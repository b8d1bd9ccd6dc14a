"""No number without a green check: against float64, at a small size and at the measured one.

*Small*: the operator under its strategy on some 320 tokens of the very mask that is measured
(windows of tokens around the corners of its slices), every output and gradient compared in full.
*Sampled*: at the measured size, some 64 query rows and key columns of one key/value head are
recomputed in float64, which catches what only appears at size (index overflow, stale buffers).

Errors are relative to the reference, over all ranks: ``rel_l2`` is the L2 norm of the difference
over the L2 norm of the reference; ``max_rms`` the largest single difference over the reference's
root mean square.  For lse both are absolute (rms and largest difference in nats), and infinite
where one side is -inf and the other is not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cpbench import layout as layouts
from cpbench.inputs import normal
from cpbench.mask import AttnMask, IntArray
from cpbench.problem import Problem

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.comm import Comm, Control

SMALL_TOKENS = 320
SAMPLED_LINES = 64
WINDOW = 32

# Of (rel_l2, max_rms); measured errors stay three or more times below (docs/method.md).
TOLERANCE = {
    "float64": (1e-12, 1e-10),
    "float32": (5e-6, 1e-4),
    "bfloat16": (2.5e-2, 0.25),
    "float16": (4e-3, 4e-2),
}

Errors = dict[str, dict[str, float]]


@dataclass
class _Sums:
    """Running sums from which the errors of one tensor follow, additive over ranks."""

    squared_error: float = 0.0
    squared_reference: float = 0.0
    largest_error: float = 0.0
    count: int = 0

    @classmethod
    def of(cls, found: torch.Tensor, reference: torch.Tensor) -> _Sums:
        import torch

        found, reference = found.double(), reference.double()
        same = torch.isneginf(found) & torch.isneginf(reference)
        error = (
            torch.where(same, 0.0, found - reference)
            .abs()
            .nan_to_num_(nan=torch.inf, posinf=torch.inf)
        )
        finite = reference[~torch.isneginf(reference)]
        return cls(
            float(error.square().sum()),
            float(finite.square().sum()),
            float(error.max()) if error.numel() else 0.0,
            error.numel(),
        )

    def add(self, other: _Sums) -> _Sums:
        return _Sums(
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
            max(self.largest_error, other.largest_error),
            self.count + other.count,
        )

    def errors(self, absolute: bool) -> dict[str, float]:
        if absolute or self.squared_reference == 0.0:
            norm = rms = 1.0
            norm = math.sqrt(max(self.count, 1))
        else:
            norm = math.sqrt(self.squared_reference)
            rms = norm / math.sqrt(self.count)
        return {"rel_l2": math.sqrt(self.squared_error) / norm, "max_rms": self.largest_error / rms}


def combine(parts: list[dict[str, _Sums]]) -> Errors:
    """The errors of each tensor from the sums of every rank."""
    total: dict[str, _Sums] = {}
    for part in parts:
        for name, sums in part.items():
            total[name] = total[name].add(sums) if name in total else sums
    return {name: sums.errors(absolute=name == "lse") for name, sums in total.items()}


def verdict(errors: Errors, dtype: str) -> str | None:
    """Which tensor is wrong and by how much, in one line; None when all are within tolerance."""
    limits = dict(zip(("rel_l2", "max_rms"), TOLERANCE[dtype], strict=True))
    for name, found in errors.items():
        for metric, limit in limits.items():
            if not found[metric] <= limit:
                return f"{name} differs from float64: {metric} {found[metric]:.3g} > {limit:g}"
    return None


def make_inputs(
    problem: Problem, positions: IntArray, seed: int, device: str, dtype: str | None = None
) -> dict[str, torch.Tensor]:
    """q, k, v and dout of some global tokens, ``[B, tokens, heads, D]``."""
    import torch

    def make(name: str, heads: int) -> torch.Tensor:
        return normal(
            name,
            seed,
            positions,
            batch=problem.batch,
            heads=range(heads),
            head_dim=problem.head_dim,
            device=device,
            dtype=getattr(torch, dtype or problem.dtype),
        )

    names = ("q", "k", "v", "dout") if problem.backward else ("q", "k", "v")
    return {n: make(n, problem.heads_kv if n in "kv" else problem.heads_q) for n in names}


# --- small --------------------------------------------------------------------------------------


def small_mask(mask: AttnMask, tokens: int = SMALL_TOKENS) -> AttnMask:
    """The mask itself when it is small, else its restriction to windows of tokens where slices
    begin and end, spread over the sequence; the same on every rank."""
    if mask.seq_q != mask.seq_k or mask.seq_q <= tokens:
        return mask
    n = mask.seq_q
    corners = np.unique(
        np.concatenate(
            [
                mask.slices[:, :4].reshape(-1),
                mask.slices[:, 0] + mask.slices[:, 4],
                mask.slices[:, 0] + mask.slices[:, 5],
                np.array([0, n]),
            ]
        )
    )
    corners = corners[(corners >= 0) & (corners <= n)]
    count = tokens // WINDOW
    chosen = corners[np.unique(np.linspace(0, len(corners) - 1, count).astype(int))]
    evenly = np.linspace(0, n, count - len(chosen) + 2).astype(int)[1:-1]
    starts = np.unique(np.clip(np.concatenate([chosen, evenly]) - WINDOW // 2, 0, n - WINDOW))
    ends = np.minimum(starts + WINDOW, np.append(starts[1:], n))
    ranges = np.column_stack([starts, ends - starts])
    return mask.restrict(ranges, ranges)


def small(
    make: Any,
    mask: AttnMask,
    problem: Problem,
    world_size: int,
    layout: str,
    seed: int,
    device: str,
    comm: Comm | None,
    control: Control | None,
    rank: int,
) -> Errors:
    """Errors of every output and gradient at a small size.

    Args:
        make: ``(mask, layout, problem) -> Attention`` for the small problem.
    """
    tiny = small_mask(mask)
    problem = replace(problem, seq_q=tiny.seq_q, seq_k=tiny.seq_k)
    dealt = layouts.build(layout, tiny.seq_q, world_size)
    work: Attention = make(tiny, dealt, problem)
    positions = dealt.positions(rank)
    real = positions < tiny.seq_q
    found = run(work, make_inputs(problem, positions, seed, device), comm)
    reference = _reference(_Key(tiny), problem, seed, device)
    sums = {}
    for name, value in found.items():
        axis = 2 if name == "lse" else 1
        mine = value.index_select(axis, _index(np.flatnonzero(real), device))
        want = reference[name].index_select(axis, _index(positions[real], device))
        sums[name] = _Sums.of(mine, want)
    return combine(control.gather(sums) if control else [sums])


def run(
    work: Attention, inputs: dict[str, torch.Tensor], comm: Comm | None
) -> dict[str, torch.Tensor]:
    """One pass: out, lse where there is one, and gradients where they are asked for."""
    out, lse, saved = work.forward(inputs["q"], inputs["k"], inputs["v"], comm)
    found = {"out": out}
    if lse is not None:
        found["lse"] = lse
    if work.problem.backward:
        grads = work.backward(inputs["dout"], saved, comm)
        found.update(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


class _Key:
    """A mask as a cache key, by content."""

    def __init__(self, mask: AttnMask) -> None:
        self.mask = mask

    def __hash__(self) -> int:
        return hash(self.mask.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.mask.digest == self.mask.digest


@functools.lru_cache(maxsize=32)
def _reference(key: _Key, problem: Problem, seed: int, device: str) -> dict[str, torch.Tensor]:
    """The float64 results for the inputs as rounded to the problem's dtype."""
    from cpbench.kernels.reference import backward64, forward64

    mask, scale = key.mask, problem.softmax_scale
    x = make_inputs(problem, np.arange(mask.seq_q), seed, device)
    out, lse = forward64(x["q"], x["k"], x["v"], mask, scale)
    found = {"out": out, "lse": lse}
    if problem.backward:
        grads = backward64(x["dout"], x["q"], x["k"], x["v"], out, lse, mask, scale)
        found.update(zip(("dq", "dk", "dv"), grads, strict=True))
    return found


# --- sampled ------------------------------------------------------------------------------------


def sampled(
    work: Attention,
    inputs: dict[str, torch.Tensor],
    seed: int,
    device: str,
    comm: Comm | None,
    control: Control | None,
) -> Errors:
    """Errors of sampled rows and columns of one key/value head at the measured size.

    Every rank recomputes lines of its own tokens from regenerated global inputs.  Columns need
    the lse and delta of every query: those are the operator's own, gathered, and are themselves
    checked by the sampled rows.
    """
    import torch

    problem, mask, layout = work.problem, work.mask, work.layout
    found = run(work, inputs, comm)
    chance = np.random.default_rng([seed, work.rank])
    shared = np.random.default_rng(seed)
    batch, head_kv = int(shared.integers(problem.batch)), int(shared.integers(problem.heads_kv))
    heads = range(head_kv * problem.group, (head_kv + 1) * problem.group)
    positions = layout.positions(work.rank)
    real = np.flatnonzero(positions < mask.seq_q)
    count = min(len(real), max(8, SAMPLED_LINES // layout.world_size))
    local = np.sort(chance.choice(real, size=count, replace=False))
    lines = positions[local]

    def everything(name: str) -> torch.Tensor:
        """``[heads, S, D]`` float64 of the sampled heads, all tokens, one batch."""
        wanted = [head_kv] if name in ("k", "v") else list(heads)
        whole = normal(
            name,
            seed,
            np.arange(mask.seq_k),
            batch=problem.batch,
            heads=wanted,
            head_dim=problem.head_dim,
            device=device,
            dtype=getattr(torch, problem.dtype),
        )
        return whole[batch].transpose(0, 1).double()

    index = _index(local, device)

    def mine(name: str, wanted: Any) -> torch.Tensor:
        """``[heads, lines, …]`` of what was found, at the sampled lines and heads."""
        if name == "lse":
            return found[name][batch][list(wanted)].index_select(1, index)
        return found[name][batch].index_select(0, index)[:, list(wanted)].transpose(0, 1)

    q, k, v = everything("q"), everything("k"), everything("v")
    scale = problem.softmax_scale
    sums = {}
    out_rows, lse_rows, dq_rows = [], [], []
    dout = everything("dout") if problem.backward else None
    for line in lines:
        keys = _visible(mask, int(line), device)
        scores = torch.einsum("hd,gtd->ht", q[:, line], k[:, keys]) * scale
        lse = torch.logsumexp(scores, -1) if len(keys) else scores.new_full((len(q),), -torch.inf)
        probs = torch.exp(scores - lse[:, None])
        row = torch.einsum("ht,gtd->hd", probs, v[:, keys])
        out_rows.append(row)
        lse_rows.append(lse)
        if dout is not None:
            dprobs = torch.einsum("hd,gtd->ht", dout[:, line], v[:, keys])
            dscores = probs * (dprobs - (dout[:, line] * row).sum(-1, keepdim=True)) * scale
            dq_rows.append(torch.einsum("ht,gtd->hd", dscores, k[:, keys]))
    sums["out"] = _Sums.of(mine("out", heads), torch.stack(out_rows, 1))
    if "lse" in found:
        sums["lse"] = _Sums.of(mine("lse", heads), torch.stack(lse_rows, 1))
    if dout is not None:
        sums["dq"] = _Sums.of(mine("dq", heads), torch.stack(dq_rows, 1))
        if "lse" in found:
            lse_all, delta_all = _everyones_lse(work, found, inputs, batch, list(heads), control)
            transposed = mask.transpose()
            dk_cols, dv_cols = [], []
            for line in lines:
                rows = _visible(transposed, int(line), device)
                scores = torch.einsum("htd,gd->ht", q[:, rows], k[:, line]) * scale
                probs = torch.exp(scores - lse_all[:, rows])
                dv_cols.append(torch.einsum("ht,htd->d", probs, dout[:, rows]))
                dprobs = torch.einsum("htd,gd->ht", dout[:, rows], v[:, line])
                dscores = probs * (dprobs - delta_all[:, rows]) * scale
                dk_cols.append(torch.einsum("ht,htd->d", dscores, q[:, rows]))
            sums["dk"] = _Sums.of(mine("dk", [head_kv])[0], torch.stack(dk_cols))
            sums["dv"] = _Sums.of(mine("dv", [head_kv])[0], torch.stack(dv_cols))
    return combine(control.gather(sums) if control else [sums])


def _everyones_lse(
    work: Attention,
    found: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    batch: int,
    heads: list[int],
    control: Control | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse and delta of all queries for some heads, ``[heads, S]`` float64, in global order."""
    import torch

    lse = found["lse"][batch][heads].double().cpu().numpy()
    product = inputs["dout"][batch].double() * found["out"][batch].double()
    delta = product.sum(-1).transpose(0, 1)[heads].cpu().numpy()
    parts = control.gather((lse, delta)) if control else [(lse, delta)]
    whole = np.empty((2, len(heads), work.layout.padded_len))
    for rank, part in enumerate(parts):
        whole[:, :, work.layout.positions(rank)] = part
    both = torch.as_tensor(whole, device=found["lse"].device)
    return both[0], both[1]


def _visible(mask: AttnMask, line: int, device: str) -> torch.Tensor:
    """Indices of the keys that one query sees."""
    _q0, _q1, k0, k1, lo, hi = mask.slices[
        (mask.slices[:, 0] <= line) & (line < mask.slices[:, 1])
    ].T
    start, end = np.maximum(k0, line + lo), np.minimum(k1, line + hi + 1)
    parts = [np.arange(a, b) for a, b in zip(start, end, strict=True)]
    return _index(np.concatenate(parts) if parts else np.zeros(0, np.int64), device)


def _index(values: Any, device: str) -> torch.Tensor:
    import torch

    return torch.as_tensor(values, device=device)
