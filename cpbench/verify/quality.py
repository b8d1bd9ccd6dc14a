"""Quality of a selection: its attention recall and the error of its output, regardless of time.

For sampled blocks of queries (all of them in short sequences), full attention is computed in
float32 and compared with the selection.  With p the probabilities of full attention, o its output
and o' the output of the operator:

* ``density``: selected pairs over visible pairs of the mask;
* ``mass``: attention recall, the sum of p over the selected pairs, averaged over queries, heads and
  batch;
* ``best_mass``: the oracle's attention recall, the highest of any selection of equally many blocks
  of the same size (or keys) per row; absent where the selection is not one of blocks or keys;
* ``out_error``: L2 norm of o' - o over that of o;
* ``index_recall``: of selectors that search an index: share of the keys that an exact search finds
  which the index finds; ``index_build_us`` and ``index_bytes``: time to build it, and its size.

Where inputs have needles that are asked for (``cpbench.inputs.haystack``), an output shows the
codes with the largest products with it, as many as its query asks for; by chance one of 64:

* ``found``: share of the codes that are shown, mean over queries, questions and heads;
* ``solved``: share of the queries that show all their codes; of a chain the product of that over
  its links, mean over heads.

For one softmax over a subset of the keys o - o' = (1 - mass) (o_missed - o'), so the error of a row
is at most 2 (1 - mass) max |v|.

Legend: B batch, S queries, T keys, H query heads, D head dim; X, Y blocks of a span of queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpbench.inputs import InputRequest, build_generator
from cpbench.inputs.haystack import Haystack
from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.base import Branch, SelectionResult, Selector
from cpbench.selectors.common.pooling import NO_POOL
from cpbench.selectors.common.ranking import block_sums, probabilities, upcast
from cpbench.selectors.selections import Blocks, Lines, Selection, Tokens, dense_mask_rows
from cpbench.verify.fit import chunks

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.core.problem import Problem
    from cpbench.inputs import Recipe
    from cpbench.masks.slices import IntArray
    from cpbench.verify.check import Tensors

SAMPLED_QUERIES = 1024
MIN_SPAN = 64  # adjacent queries


def measure_quality(
    work: Attention, inputs: Tensors, results: Tensors, selection: SelectionResult
) -> dict[str, float]:
    """The figures above, and ``rows``, the number of sampled queries."""
    mask, v, selector = work.mask, inputs["v"], work.op.impl
    assert isinstance(mask, AttnMask)
    assert isinstance(selector, Selector)
    q, k = selector.as_full(inputs["q"], inputs["k"])
    branches = [one for one in selection.branches if _is_of_tokens(one)]
    names = ("visible", "selected", "mass", "oracle_mass", "rows", "error", "norm")
    sums = dict.fromkeys(names, 0.0)
    # Branches that are joined are one selection of keys.
    of_keys = selection.joined and len(branches) == len(selection.branches)
    has_oracle = of_keys or (len(branches) == 1 and _has_oracle(branches[0]))
    shared = not of_keys and has_oracle and _shares_selection(branches[0].mask)
    sampled, spans = 0, sampled_spans(mask, branches)
    for begin, end in spans:
        sampled += end - begin
        visible_pairs = dense_mask_rows(mask, begin, end, q.device)
        for b in range(len(q)):
            mass: torch.Tensor | float = 0.0
            for heads, kv in _head_ranges(work.problem, end - begin):
                own = [_of_heads(branch, b, heads) for branch in branches]
                own_q, own_k = q[b : b + 1, begin:end, heads], k[b : b + 1, :, kv]
                probs = probabilities(own_q, own_k, visible_pairs, work.problem.softmax_scale)
                selected = _selected_pairs(own, begin, end, probs) & visible_pairs
                num_heads = probs.shape[1]
                sums["visible"] += float(visible_pairs.sum()) * num_heads
                sums["selected"] += float(selected.sum())
                sums["rows"] += float(visible_pairs.any(-1).sum()) * num_heads
                sums["mass"] += float((probs * selected).double().sum())
                if has_oracle:
                    of_blocks, count = (
                        (probs[0], selected[0].sum(-1, True))
                        if of_keys
                        else _mass_of_blocks(own[0], begin, probs)
                    )
                    mass = of_blocks + mass
                    if not shared or heads.stop == work.problem.heads_q:
                        sums["oracle_mass"] += _highest_mass(mass, count)
                        mass = 0.0
                values = upcast(v[b, :, kv]).transpose(0, 1)
                values = values.repeat_interleave(num_heads // len(values), 0)
                out = (probs[0] @ values).transpose(0, 1)
                difference = results["out"][b, begin:end, heads].to(out.dtype) - out
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
    return figures | selector.index_figures(inputs["q"], inputs["k"], spans)


def sampled_spans(mask: AttnMask, branches: list[Branch]) -> list[tuple[int, int]]:
    """Ranges of adjacent queries to sample, in whole blocks, evenly spread and including the first
    and the last."""
    block = math.lcm(*(b.mask.grid.block_q for b in branches if isinstance(b.mask, Blocks | Lines)))
    size = -(-MIN_SPAN // block) * block
    count = -(-mask.seq_q // size)
    sample = min(count, max(SAMPLED_QUERIES // size, 4))
    numbers = np.linspace(0, count - 1, sample).round().astype(int)
    return [(i * size, min((i + 1) * size, mask.seq_q)) for i in np.unique(numbers).tolist()]


def _is_of_tokens(branch: Branch) -> bool:
    """Whether a branch attends to the keys themselves."""
    return branch.pool_q == branch.pool_k == NO_POOL and branch.derived is None


def _has_oracle(branch: Branch) -> bool:
    """Whether the best selection of the same kind is known."""
    return isinstance(branch.mask, Blocks | Tokens)


def _shares_selection(selected: AttnMask | Selection) -> bool:
    """Whether all heads have one selection."""
    return isinstance(selected, Tokens) and selected.index.shape[1] == 1


def _head_ranges(problem: Problem, queries: int) -> Iterator[tuple[slice, slice]]:
    """Query heads with their key/value heads: so many as are computed at a time for a span of
    ``queries``, in whole groups, or else single ones."""
    elements, group = problem.seq_k * max(queries, problem.head_dim), problem.group
    at_once = next(chunks(problem.heads_q, elements)).stop // group * group or 1
    for start in range(0, problem.heads_q, at_once):
        stop = min(start + at_once, problem.heads_q)
        yield slice(start, stop), slice(start // group, -(-stop // group))


def _of_heads(branch: Branch, b: int, heads: slice) -> Branch:
    """A branch for some heads of one batch."""
    if isinstance(branch.mask, AttnMask):
        return branch
    return replace(branch, mask=branch.mask.of_heads(b, heads))


def _selected_pairs(
    branches: list[Branch], begin: int, end: int, probs: torch.Tensor
) -> torch.Tensor:
    """``[1, H, n, T]`` booleans: pairs that are selected by any of the branches."""
    import torch

    selected = torch.zeros_like(probs, dtype=torch.bool)
    for branch in branches:
        if isinstance(branch.mask, AttnMask):
            selected |= dense_mask_rows(branch.mask, begin, end, probs.device)
        else:
            selected |= branch.mask.dense_rows(begin, end)
    return selected


def _mass_of_blocks(
    branch: Branch, begin: int, probs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass of every block, or key, of each row, ``[H, rows, blocks]``, and how many of them the
    row selected.  Heads that share their selection share the best one too: they are added up."""
    selected, end = branch.mask, begin + probs.shape[2]
    if isinstance(selected, Tokens):
        mass = probs[0].sum(0, True) if _shares_selection(selected) else probs[0]
        return mass, (selected.index[0, :, begin:end] >= 0).sum(-1, True)
    assert isinstance(selected, Blocks)
    grid = selected.grid
    mass = block_sums(probs[0], grid.block_q, grid.block_k)
    rows = slice(begin // grid.block_q, begin // grid.block_q + mass.shape[1])
    return mass, (selected.kept[0, :, rows] & grid.allowed[rows]).sum(-1, True)


def _highest_mass(mass: torch.Tensor, count: torch.Tensor) -> float:
    """The highest mass of ``count`` blocks, or keys, of each row; summed over rows."""
    import torch

    ranked = mass.double().sort(dim=-1, descending=True).values
    position = torch.arange(ranked.shape[-1], device=ranked.device)
    return float((ranked * (position < count)).sum())


Shown = dict[tuple[int, int, int], npt.NDArray[np.float64]]


def count_shown(out: torch.Tensor, queries: IntArray, problem: Problem, recipe: Recipe) -> Shown:
    """What outputs show of the needles that their queries ask for; {} for inputs of another kind.

    Args:
        out: ``[B, S, H, Dv]``.
        queries: ``[S]`` global indices of its queries.
        recipe: of the inputs.

    Returns:
        By sequence, query head and question: how many of these queries ask it, and the sums over
        them of the share of the codes that are shown and of whether all are.
    """
    haystack = build_generator(recipe.spec)
    if not isinstance(haystack, Haystack):
        return {}
    import torch

    request = InputRequest(
        name="q", seed=recipe.seed, problem=problem, positions=queries,
        batches=range(problem.batch), heads=range(problem.heads_q), device="cpu",
        decoded=recipe.decoded,
    )  # fmt: skip
    shown: Shown = {}
    for (sequence, at, rows, tokens), h in itertools.product(request.parts(), request.heads):
        if not haystack.fits(sequence):
            continue
        g = h // problem.group
        planted, questions = haystack.questions(recipe.seed, problem, sequence, g)
        codes, own = torch.as_tensor(planted.codes), out[at, rows, h]
        for number, question in enumerate(questions):
            asking = torch.as_tensor(np.flatnonzero(np.isin(tokens, question.tokens)))
            products = own[asking.to(out.device)].double().cpu() @ codes.T
            top = products.topk(len(question.answers), dim=1).indices.numpy()
            right = np.isin(top, question.answers)
            shown[sequence.batch, h, number] = np.array(
                [len(asking), right.mean(1).sum(), right.all(1).sum()]
            )
    return shown


def found_figures(ranks: Sequence[Shown]) -> dict[str, float]:
    """``found`` and ``solved`` of what the ranks counted; {} if nothing was asked."""
    total: Shown = {}
    for key, count in (pair for rank in ranks for pair in rank.items()):
        total[key] = total.get(key, np.zeros(3)) + count
    shares = {key: counts[1:] / counts[0] for key, counts in total.items() if counts[0]}
    solved: dict[tuple[int, int], float] = {}
    for (b, h, _), (_, complete) in shares.items():
        solved[b, h] = solved.get((b, h), 1.0) * float(complete)
    if not shares:
        return {}
    found = [float(share) for share, _ in shares.values()]
    return {"found": float(np.mean(found)), "solved": float(np.mean([*solved.values()]))}
