"""What a choice is worth: how much of full attention it recovers, whatever it costs.

Of sampled blocks of queries (all of them in short sequences) full attention is computed, in
float32, and held against what was chosen.  With p the probabilities of full attention, o its output
and o' that of the operator:

* ``density``: pairs chosen over pairs that the mask lets be seen;
* ``mass``: sum of p over what was chosen, on average over queries, heads and batch;
* ``best_mass``: the most that any choice of as many blocks of the same size (or keys) in each row
  would have recovered; absent where a choice is not one of blocks or keys;
* ``out_error``: L2 norm of o' - o over that of o.

For one softmax over part of the keys o - o' = (1 - mass) (o_missed - o'), so a row's error is at
most 2 (1 - mass) max |v|.

Legend: B batch, S queries, T keys, H query heads, D head dim; X, Y blocks of a span of queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.base import Branch, Choice
from cpbench.selectors.common.pooling import NO_POOL
from cpbench.selectors.common.ranking import block_sums, probabilities, working
from cpbench.selectors.common.selection import Blocks, Tokens, visible

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.verify.check import Tensors

ROWS = 1024  # queries that are sampled
LEAST_SPAN = 64  # of neighbouring queries


def measure(work: Attention, inputs: Tensors, found: Tensors, choice: Choice) -> dict[str, float]:
    """The figures above, and ``rows``, the queries that were looked at."""
    mask, q, k, v = work.mask, inputs["q"], inputs["k"], inputs["v"]
    assert isinstance(mask, AttnMask)
    branches = [one for one in choice.branches if one.pool_q == one.pool_k == NO_POOL]
    sums = dict.fromkeys(("visible", "kept", "mass", "best", "rows", "error", "norm"), 0.0)
    bounded = len(branches) == 1 and _bounded(branches[0])
    looked_at = 0
    for begin, end in spans(mask, branches):
        looked_at += end - begin
        for b in range(len(q)):
            seen = visible(mask, begin, end, q.device)
            scale = work.problem.softmax_scale
            probs = probabilities(q[b : b + 1, begin:end], k[b : b + 1], seen, scale)
            kept = _union(branches, b, begin, end, probs) & seen
            heads = probs.shape[1]
            sums["visible"] += float(seen.sum()) * heads
            sums["kept"] += float(kept.sum())
            sums["rows"] += float(seen.any(-1).sum()) * heads
            sums["mass"] += float((probs * kept).double().sum())
            if bounded:
                sums["best"] += _best(branches[0], b, begin, probs)
            values = working(v[b]).transpose(0, 1).repeat_interleave(work.problem.group, 0)
            out = (probs[0] @ values).transpose(0, 1)
            difference = found["out"][b, begin:end].to(out.dtype) - out
            sums["error"] += float(difference.double().square().sum())
            sums["norm"] += float(out.double().square().sum())
    if not sums["rows"]:
        return {}
    result = {
        "density": sums["kept"] / sums["visible"],
        "mass": sums["mass"] / sums["rows"],
        "out_error": (sums["error"] / sums["norm"]) ** 0.5 if sums["norm"] else 0.0,
        "rows": float(looked_at),
    }
    if bounded:
        result["best_mass"] = sums["best"] / sums["rows"]
    return result


def spans(mask: AttnMask, branches: list[Branch]) -> list[tuple[int, int]]:
    """Ranges of neighbouring queries to look at, whole blocks of them, evenly spread and with the
    first and the last."""
    whole = math.lcm(*(b.seen.grid.block_q for b in branches if isinstance(b.seen, Blocks)))
    size = -(-LEAST_SPAN // whole) * whole
    count = -(-mask.seq_q // size)
    chosen = np.linspace(0, count - 1, min(count, max(ROWS // size, 4))).round().astype(int)
    return [(i * size, min((i + 1) * size, mask.seq_q)) for i in np.unique(chosen).tolist()]


def _bounded(branch: Branch) -> bool:
    """Whether the best choice of the same kind is known."""
    return isinstance(branch.seen, Tokens) or (
        isinstance(branch.seen, Blocks) and branch.seen.columns is None
    )


def _union(
    branches: list[Branch], b: int, begin: int, end: int, probs: torch.Tensor
) -> torch.Tensor:
    """``[1, H, n, T]`` booleans: what any branch over single keys lets be seen."""
    import torch

    found = torch.zeros_like(probs, dtype=torch.bool)
    for branch in branches:
        if isinstance(branch.seen, AttnMask):
            found |= visible(branch.seen, begin, end, probs.device)
        else:
            found |= branch.seen.rows(begin, end)[b : b + 1]
    return found


def _best(branch: Branch, b: int, begin: int, probs: torch.Tensor) -> float:
    """The largest mass of as many blocks, or keys, as each row kept."""
    import torch

    seen, end = branch.seen, begin + probs.shape[2]
    if isinstance(seen, Tokens):
        # Heads that share their keys are best served together.
        shared = seen.index.shape[1] == 1
        mass = probs[0].sum(0, True) if shared else probs[0]
        count = (seen.index[b, :, begin:end] >= 0).sum(-1, True)
    else:
        assert isinstance(seen, Blocks)
        cells = seen.grid
        mass = block_sums(probs[0], cells.block_q, cells.block_k)
        rows = slice(begin // cells.block_q, begin // cells.block_q + mass.shape[1])
        count = (seen.kept[b, :, rows] & cells.allowed[rows]).sum(-1, True)
    best = mass.double().sort(dim=-1, descending=True).values
    number = torch.arange(best.shape[-1], device=best.device)
    return float((best * (number < count)).sum())
