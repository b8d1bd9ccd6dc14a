"""Quality of a selection: its attention recall and the error of its output, regardless of time.

For sampled blocks of queries (all of them in short sequences), full attention is computed in
float32 and compared with the selection.  With p the probabilities of full attention, o its output
and o' the output of the operator:

* ``density``: selected pairs over visible pairs of the mask;
* ``mass``: attention recall, the sum of p over the selected pairs, averaged over queries, heads and
  batch;
* ``best_mass``: the oracle's attention recall, the highest of any selection of equally many blocks
  of the same size (or keys) per row; absent where the selection is not one of blocks or keys;
* ``out_error``: L2 norm of o' - o over that of o.

For one softmax over a subset of the keys o - o' = (1 - mass) (o_missed - o'), so the error of a row
is at most 2 (1 - mass) max |v|.

Legend: B batch, S queries, T keys, H query heads, D head dim; X, Y blocks of a span of queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.base import Branch, SelectionResult
from cpbench.selectors.common.pooling import NO_POOL
from cpbench.selectors.common.ranking import block_sums, probabilities, upcast
from cpbench.selectors.common.selection import Blocks, Tokens, dense_mask_rows

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.verify.check import Tensors

SAMPLED_QUERIES = 1024
MIN_SPAN = 64  # adjacent queries


def measure_quality(
    work: Attention, inputs: Tensors, results: Tensors, selection: SelectionResult
) -> dict[str, float]:
    """The figures above, and ``rows``, the number of sampled queries."""
    mask, q, k, v = work.mask, inputs["q"], inputs["k"], inputs["v"]
    assert isinstance(mask, AttnMask)
    branches = [one for one in selection.branches if one.pool_q == one.pool_k == NO_POOL]
    names = ("visible", "selected", "mass", "oracle_mass", "rows", "error", "norm")
    sums = dict.fromkeys(names, 0.0)
    has_oracle = len(branches) == 1 and _has_oracle(branches[0])
    sampled = 0
    for begin, end in sampled_spans(mask, branches):
        sampled += end - begin
        for b in range(len(q)):
            visible_pairs = dense_mask_rows(mask, begin, end, q.device)
            scale = work.problem.softmax_scale
            probs = probabilities(q[b : b + 1, begin:end], k[b : b + 1], visible_pairs, scale)
            selected = _selected_pairs(branches, b, begin, end, probs) & visible_pairs
            heads = probs.shape[1]
            sums["visible"] += float(visible_pairs.sum()) * heads
            sums["selected"] += float(selected.sum())
            sums["rows"] += float(visible_pairs.any(-1).sum()) * heads
            sums["mass"] += float((probs * selected).double().sum())
            if has_oracle:
                sums["oracle_mass"] += _oracle_mass(branches[0], b, begin, probs)
            values = upcast(v[b]).transpose(0, 1).repeat_interleave(work.problem.group, 0)
            out = (probs[0] @ values).transpose(0, 1)
            difference = results["out"][b, begin:end].to(out.dtype) - out
            sums["error"] += float(difference.double().square().sum())
            sums["norm"] += float(out.double().square().sum())
    if not sums["rows"]:
        return {}
    figures = {
        "density": sums["selected"] / sums["visible"],
        "mass": sums["mass"] / sums["rows"],
        "out_error": (sums["error"] / sums["norm"]) ** 0.5 if sums["norm"] else 0.0,
        "rows": float(sampled),
    }
    if has_oracle:
        figures["best_mass"] = sums["oracle_mass"] / sums["rows"]
    return figures


def sampled_spans(mask: AttnMask, branches: list[Branch]) -> list[tuple[int, int]]:
    """Ranges of adjacent queries to sample, in whole blocks, evenly spread and including the first
    and the last."""
    block = math.lcm(*(b.mask.grid.block_q for b in branches if isinstance(b.mask, Blocks)))
    size = -(-MIN_SPAN // block) * block
    count = -(-mask.seq_q // size)
    sample = min(count, max(SAMPLED_QUERIES // size, 4))
    numbers = np.linspace(0, count - 1, sample).round().astype(int)
    return [(i * size, min((i + 1) * size, mask.seq_q)) for i in np.unique(numbers).tolist()]


def _has_oracle(branch: Branch) -> bool:
    """Whether the best selection of the same kind is known."""
    return isinstance(branch.mask, Tokens) or (
        isinstance(branch.mask, Blocks) and branch.mask.columns is None
    )


def _selected_pairs(
    branches: list[Branch], b: int, begin: int, end: int, probs: torch.Tensor
) -> torch.Tensor:
    """``[1, H, n, T]`` booleans: pairs that are selected by any of the branches."""
    import torch

    selected = torch.zeros_like(probs, dtype=torch.bool)
    for branch in branches:
        if isinstance(branch.mask, AttnMask):
            selected |= dense_mask_rows(branch.mask, begin, end, probs.device)
        else:
            selected |= branch.mask.dense_rows(begin, end)[b : b + 1]
    return selected


def _oracle_mass(branch: Branch, b: int, begin: int, probs: torch.Tensor) -> float:
    """The highest mass of any equally many blocks, or keys, per row; summed over rows."""
    import torch

    selected, end = branch.mask, begin + probs.shape[2]
    if isinstance(selected, Tokens):
        # Heads that share their selection share the best one too.
        shared = selected.index.shape[1] == 1
        mass = probs[0].sum(0, True) if shared else probs[0]
        count = (selected.index[b, :, begin:end] >= 0).sum(-1, True)
    else:
        assert isinstance(selected, Blocks)
        grid = selected.grid
        mass = block_sums(probs[0], grid.block_q, grid.block_k)
        rows = slice(begin // grid.block_q, begin // grid.block_q + mass.shape[1])
        count = (selected.kept[b, :, rows] & grid.allowed[rows]).sum(-1, True)
    ranked = mass.double().sort(dim=-1, descending=True).values
    position = torch.arange(ranked.shape[-1], device=ranked.device)
    return float((ranked * (position < count)).sum())
