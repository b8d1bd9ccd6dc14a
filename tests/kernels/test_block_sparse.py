"""`triton_block_sparse` with blocks selected on the device, compared with dense float64.

Masks per head that are planned on the host are in ``test_head_masks``.
"""

from __future__ import annotations

import naive
import numpy as np
import pytest
import torch
from selected_pairs import NoSynchronisation, problem_of, reference

from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.kernels.triton.block_sparse import TritonBlockSparse, kept_of_indices, plan_blocks
from cpbench.masks.attn_mask import AttnMask


def random_blocks(problem: Problem, block: int, share: float, seed: int = 0) -> torch.Tensor:
    """Random kept blocks, ``[B, H, X, Y]``."""
    shape = (-(-problem.seq_q // block), -(-problem.seq_k // block))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(problem.batch, problem.heads_q, *shape, generator=generator) < share


def dense(kept: torch.Tensor, problem: Problem, block: int, within: AttnMask | None) -> np.ndarray:
    """The visible pairs, ``[B, H, S, T]``."""
    pairs = kept.repeat_interleave(block, 2).repeat_interleave(block, 3)
    pairs = pairs[:, :, : problem.seq_q, : problem.seq_k].numpy()
    return pairs & within.to_dense() if within is not None else pairs


@pytest.mark.parametrize("extents", [(100, 100), (70, 130)], ids=str)
@pytest.mark.parametrize("inside", ["", "causal", "sliding_window:window=20"])
def test_selected_blocks_equal_float64_without_synchronisation(
    extents: tuple[int, int], inside: str
) -> None:
    problem = problem_of(*extents)
    longest = max(extents)
    within = masks.build(inside, longest).crop(0, extents[0], 0, extents[1]) if inside else None
    op = TritonBlockSparse(block_q=32, block_k=16)
    kept = random_blocks(problem, 32, 0.5)
    op.plan_blocks(kept, problem, 32, within)  # caches the tiles of the static mask
    with NoSynchronisation():
        plan = op.plan_blocks(kept, problem, 32, within)
    inputs = naive.random_inputs(2, longest, 4, 2, 32, torch.float32)
    tensors = [x[:, :n].contiguous() for x, n in zip(inputs, (*extents, extents[1], extents[0]), strict=True)]  # noqa: E501  # fmt: skip
    q, k, v, dout = tensors
    out, lse = op.forward(QKV(q, k, v), plan)
    dq, dk, dv = op.backward(BackwardInputs(dout, q, k, v, out, lse), plan)
    expected = reference(tensors, dense(kept, problem, 32, within))
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    for name in naive.TENSORS:
        error = naive.error(results[name], expected[name])
        assert error < 2e-6, f"{name} has an error of {error:.2g}"


def test_tiles_larger_than_blocks_are_reduced() -> None:
    problem = problem_of(64, 64, direction="fwd")
    op = TritonBlockSparse(block_q=64, block_k=64)
    plan = op.plan_blocks(random_blocks(problem, 16, 0.5), problem, 16)
    assert (plan.forward.config.rows, plan.forward.config.cols) == (16, 16)
    assert plan.dq is None


def test_indices_are_converted_to_booleans_and_checked() -> None:
    indices = torch.tensor([[[[2, 0, -1], [1, 1, -1], [-1, -1, -1]]]])
    kept = kept_of_indices(indices, 3)
    assert kept.tolist() == [[[[True, False, True], [False, True, False], [False] * 3]]]
    with pytest.raises(ValueError, match="indices are between -1 and 3; with 3 blocks"):
        kept_of_indices(torch.tensor([[[[3, -1]]]]), 3)
    with pytest.raises(ValueError, match=r"must be \[B, H, X, n\] integers"):
        kept_of_indices(torch.zeros(1, 1, 1, 1), 3)


@pytest.mark.parametrize(
    ("shape", "block", "words"),
    [
        ((2, 4, 4, 3), 32, r"kept must be \[2, 4, 4, 4\] booleans, not \[2, 4, 4, 3\] of bool"),
        ((2, 4, 4, 4), 24, "block_size = 24 must be a power of two from 16 on"),
    ],
)
def test_invalid_blocks_are_refused(shape: tuple[int, ...], block: int, words: str) -> None:
    problem = problem_of(100, 100)
    with pytest.raises(ValueError, match=words):
        TritonBlockSparse().plan_blocks(torch.ones(shape, dtype=torch.bool), problem, block)
    if block == 24:
        kept = torch.ones(2, 4, 4, 4, dtype=torch.bool)
        with pytest.raises(ValueError, match="within is a mask of 99 x 99 tokens"):
            plan_blocks(kept, problem, 32, {}, masks.build("causal", 99))
