"""Prepared computations on one rank, from a cache."""

from __future__ import annotations

import functools

import torch

from cpbench.api.inputs import make_problem
from cpbench.api.prepared import Attention
from cpbench.api.public_operator import PublicOperator
from cpbench.core.problem import Problem
from cpbench.core.spec import Spec
from cpbench.masks.head_masks import Mask, per_head
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World


def prepare_on_one_rank(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    operator: Spec | str,
    scale: float | None,
    backward: bool,
) -> Attention:
    """The prepared computation for tensors like these, from a cache."""
    problem = make_problem(q, k, v, mask, scale, backward)
    if (mask.seq_q, mask.seq_k) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"q {list(q.shape)} and k {list(k.shape)} do not fit a mask of {mask.seq_q} queries "
            f"and {mask.seq_k} keys; shapes are [B, S, H, D]"
        )
    head_masks = per_head(mask)
    if head_masks is not None and head_masks.heads != q.shape[2]:
        raise ValueError(f"masks of {head_masks.heads} heads do not fit {q.shape[2]} query heads")
    return _cached_on_one_rank(Spec.parse(operator), mask, problem, str(q.device))


@functools.lru_cache(maxsize=16)
def _cached_on_one_rank(operator: Spec, mask: Mask, problem: Problem, device: str) -> Attention:
    world = World(
        problem,
        mask,
        layouts.build("contiguous", mask.seq_q, 1),
        layouts.build("contiguous", mask.seq_k, 1),
        ranks_per_node=1,
    )
    return Attention(operator, "single", world, 0, device, PublicOperator)
