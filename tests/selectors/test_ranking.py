"""The largest elements of rows, and rows of masks as booleans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cpbench.masks.attn_mask import AttnMask
from cpbench.selectors.common.ranking import largest
from cpbench.selectors.selections import dense_mask_rows


@pytest.mark.parametrize("hidden", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("n", "k"), [(300, 1), (300, 7), (257, 16), (200, 20), (30, 30), (9, 0)])
def test_the_largest_elements_of_rows(n: int, k: int, tied: bool, hidden: float) -> None:
    """They equal a whole sort, where many elements tie and where rows have fewer than k."""
    random = torch.Generator().manual_seed(n + k)
    scores = torch.randn(2, 5, n, generator=random).mul_(2)
    scores = scores.round_().relu_() if tied else scores
    scores[torch.rand(scores.shape, generator=random) < hidden] = -torch.inf
    values, positions = largest(scores, k)
    assert torch.equal(
        values.sort(-1, descending=True).values, scores.sort(-1, descending=True).values[..., :k]
    )
    for row, row_values, row_positions in zip(
        scores.view(10, n), values.view(10, k), positions.view(10, k), strict=True
    ):
        finite = row_positions[row_values > -torch.inf]
        assert len(finite.unique()) == len(finite)
        assert torch.equal(row[finite], row_values[row_values > -torch.inf])


@pytest.mark.parametrize("missing", [3, 300])
def test_elements_that_are_nan_are_the_largest(missing: int) -> None:
    scores = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    scores[:, :missing] = torch.nan
    values, positions = largest(scores, 4)
    assert torch.equal(values.isnan().sum(-1), torch.full((4,), min(missing, 4)))
    assert torch.equal(scores.gather(1, positions).nan_to_num(9.0), values.nan_to_num(9.0))


def test_rows_of_a_mask_as_booleans() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        seq_q, seq_k = random.integers(1, 40, 2)
        cuts = np.unique([0, *random.integers(0, seq_q, 3), seq_q])
        slices = []
        for q0, q1 in itertools.pairwise(cuts):
            k0 = random.integers(0, seq_k)
            lo = random.integers(-45, 45)
            k1, hi = random.integers(k0 + 1, seq_k + 1), lo + random.integers(0, 60)
            slices.append((q0, q1, k0, k1, lo, hi))
        mask = AttnMask.from_slices(int(seq_q), int(seq_k), np.array(slices))
        begin = int(random.integers(0, seq_q))
        end = int(random.integers(begin + 1, seq_q + 1))
        rows = dense_mask_rows(mask, begin, end, "cpu").numpy()
        assert np.array_equal(rows, mask.to_dense()[begin:end]), slices
