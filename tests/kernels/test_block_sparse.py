"""`triton_block_sparse` with blocks selected on the device, compared with dense float64.

Masks per head that are planned on the host are in ``test_head_masks``.
"""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpbench import masks
from cpbench.core.operator import QKV, BackwardInputs
from cpbench.core.problem import Problem
from cpbench.kernels.triton.block_sparse import TritonBlockSparse, kept_of_indices, plan_blocks
from cpbench.masks.attn_mask import AttnMask

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations that bring values from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in SYNCHRONISING, f"{func} synchronises"
        return func(*args, **(kwargs or {}))


def problem_of(seq_q: int, seq_k: int, **changes: Any) -> Problem:
    shape = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim": 32, "dtype": "float32"}
    return Problem(seq_q=seq_q, seq_k=seq_k, **{**shape, **changes})


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


def reference(tensors: list[torch.Tensor], visible: np.ndarray) -> dict[str, torch.Tensor]:
    """The results of each batch and query head by itself, in float64."""
    q, k, v, dout = tensors
    group = q.shape[2] // k.shape[2]
    results = {name: torch.zeros(x.shape, dtype=torch.float64)
               for name, x in (("out", q), ("dq", q), ("dk", k), ("dv", v))}  # fmt: skip
    results["lse"] = torch.zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h // group
            rows = [
                (i, i + 1, int(j), int(j) + 1, -(10**6), 10**6)
                for i, j in zip(*np.nonzero(visible[b, h]), strict=True)
            ]
            mask = AttnMask.from_slices(*visible.shape[2:], rows)
            batch = slice(b, b + 1), slice(None)
            head = naive.attention(
                q[(*batch, slice(h, h + 1))], k[(*batch, slice(g, g + 1))],
                v[(*batch, slice(g, g + 1))], dout[(*batch, slice(h, h + 1))], mask,
            )  # fmt: skip
            results["out"][b, :, h] = head["out"][0, :, 0]
            results["dq"][b, :, h] = head["dq"][0, :, 0]
            results["lse"][b, h] = head["lse"][0, 0]
            results["dk"][b, :, g] += head["dk"][0, :, 0]
            results["dv"][b, :, g] += head["dv"][0, :, 0]
    return results


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
