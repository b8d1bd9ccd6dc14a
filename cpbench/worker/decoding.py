"""The check of decoding: every output and lse at the measured size, against float64.

It knows sequences and not masks: the keys of a sequence are taken out of their pages, in order, and
the query sees what the last row of its pattern shows.  Keys of other ranks are made again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from cpbench.masks.paged.batch import PagedBatch
from cpbench.verify.check import RankContext, Tensors
from cpbench.verify.errors import Errors, ErrorSums, TensorErrorSums, combined_errors

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention
    from cpbench.core.problem import Case
    from cpbench.inputs import Recipe
    from cpbench.masks.slices import IntArray

CHUNK_KEYS = 1 << 14  # that are in float64 at a time


def check_in_full(
    work: Attention,
    case: Case,
    inputs: Tensors,
    results: Tensors,
    recipe: Recipe,
    context: RankContext,
) -> Errors:
    """Errors of all outputs of a case of phase ``decode``; collective.

    Args:
        inputs: of this rank, made by ``recipe``.
        results: what ``check.run_pass`` returned for them.

    Raises:
        DoesNotFit: see :meth:`RankContext.compute`.
    """
    compare = functools.partial(_compare, work, case, inputs, results, recipe)
    return combined_errors(context.gather(context.compute(compare)))


def _compare(
    work: Attention, case: Case, inputs: Tensors, results: Tensors, recipe: Recipe
) -> ErrorSums:
    """Error sums of the sequences whose queries are on this rank."""
    import torch

    batch, problem = PagedBatch.of_case(case), work.problem
    queries = work.world.queries.positions(work.rank)
    sums: ErrorSums = {}

    def rows(name: str, slots: IntArray) -> torch.Tensor:
        """``[n, heads, D]`` rows of k or v."""
        if work.world.size == 1:
            index = torch.as_tensor(slots, device=inputs[name].device)
            return inputs[name][0].index_select(0, index)
        heads = range(problem.heads_kv)
        return recipe.make(name, problem, slots, batches=[0], heads=heads, device=work.home)[0]

    for local, b in enumerate(queries):
        if b >= len(batch.key_lens):
            continue  # padding
        visible = batch.visible(case.mask, int(b)).to_dense()[0]
        slots = batch.slots_of(int(b))[visible]
        out, lse = _attend(inputs["q"][0, local], rows, slots, problem.softmax_scale)
        pairs = {"out": (results["out"][0, local], out)}
        if "lse" in results:
            pairs["lse"] = (results["lse"][0, :, local, None], lse[:, None])
        for name, (value, expected) in pairs.items():
            own = TensorErrorSums.between(value, expected, len(value))
            sums[name] = sums[name].add(own) if name in sums else own
    return sums


def _attend(
    q: torch.Tensor, rows: Callable[[str, IntArray], torch.Tensor], slots: IntArray, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out ``[H, Dv]`` and lse ``[H]`` of one query in float64, chunk by chunk."""
    import torch

    parts = []
    for start in range(0, max(len(slots), 1), CHUNK_KEYS):
        own = slots[start : start + CHUNK_KEYS]
        k, v = (rows(name, own).double() for name in "kv")
        k, v = (x.repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("hd,nhd->hn", q.double(), k) * scale
        lse = scores.logsumexp(-1)
        weights = (scores - lse.nan_to_num(neginf=0.0)[:, None]).exp()
        parts.append((torch.einsum("hn,nhd->hd", weights, v), lse))
    lse = torch.stack([part for _, part in parts]).logsumexp(0)
    shares = [(part - lse.nan_to_num(neginf=0.0)).exp()[:, None] for _, part in parts]
    out = torch.stack([x * share for (x, _), share in zip(parts, shares, strict=True)]).sum(0)
    return out, lse
