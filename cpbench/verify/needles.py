"""Whether outputs show the values of needles that are asked for (``cpbench.inputs.haystack``).

An output shows the codes with the largest products with it, as many as its query asks for:

* ``found``: share of the codes that are shown, mean over queries, questions and heads;
* ``solved``: share of the queries that show all their codes; of a chain the product of that over
  its links, mean over heads.

By chance one of 64 codes is found.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cpbench.inputs import InputRequest, build_generator
from cpbench.inputs.haystack import Haystack

if TYPE_CHECKING:
    import torch

    from cpbench.core.problem import Problem
    from cpbench.inputs import Recipe
    from cpbench.masks.slices import IntArray


def measure_found(
    out: torch.Tensor, tokens: IntArray, problem: Problem, recipe: Recipe
) -> dict[str, float]:
    """The figures above; none for inputs of another kind.

    Args:
        out: ``[B, S, H, Dv]``.
        tokens: ``[S]`` positions of its queries in the sequence.
        recipe: of the inputs.
    """
    haystack = build_generator(recipe.spec)
    if not isinstance(haystack, Haystack):
        return {}
    import torch

    request = InputRequest(
        name="q", seed=recipe.seed, problem=problem, positions=tokens, batches=(), heads=(),
        device="cpu",
    )  # fmt: skip
    row_of = np.full(problem.seq_k, -1)
    row_of[tokens[tokens < problem.seq_k]] = np.flatnonzero(tokens < problem.seq_k)
    found, solved = [], []
    for b, h in np.ndindex(problem.batch, problem.heads_q):
        planted, questions = haystack.questions(request, b, h // problem.group)
        codes, complete = torch.as_tensor(planted.codes), 1.0
        for question in questions:
            rows = row_of[question.tokens]
            if not (rows >= 0).all():  # asked by none of these queries
                continue
            shown = out[b, torch.as_tensor(rows, device=out.device), h].double().cpu() @ codes.T
            top = shown.topk(len(question.answers), dim=1).indices.numpy()
            right = np.isin(top, question.answers)
            found.append(float(right.mean()))
            complete *= float(right.all(1).mean())
        solved.append(complete)
    return {"found": float(np.mean(found)), "solved": float(np.mean(solved))} if found else {}
