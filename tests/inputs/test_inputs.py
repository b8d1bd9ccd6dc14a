"""Seeded inputs: standard normal, and a pure function of the global token index."""

from __future__ import annotations

import numpy as np
import torch

from cpbench.inputs import TENSORS
from cpbench.inputs.normal import normal


def _make(tensor: str = "q", seed: int = 0, tokens: object = None, **overrides: object):
    shape = {
        "batches": range(2),
        "heads": range(4),
        "head_dim": 64,
        "dtype": torch.float32,
        "device": "cpu",
    }
    positions = np.arange(1024) if tokens is None else np.asarray(tokens)
    return normal(tensor, seed, positions, **{**shape, **overrides})


def test_moments_are_those_of_a_standard_normal() -> None:
    x = _make(tokens=np.arange(4096)).double()
    assert abs(x.mean()) < 3e-3
    assert abs(x.std() - 1) < 3e-3
    assert abs((x**4).mean() - 3) < 3e-2
    assert 4 < x.abs().max() < 5


def test_neighbours_are_uncorrelated() -> None:
    x = _make(tokens=np.arange(4096), batches=[0])[0].double()
    for shifted in (x.roll(1, 0), x.roll(1, 1), x.roll(1, 2), x.roll(32, 2)):
        assert abs((x * shifted).mean()) < 4e-3
    rows = torch.corrcoef(x[:256].flatten(1)).fill_diagonal_(0)
    assert rows.abs().max() < 6 / 256**0.5


def test_any_subset_of_tokens_and_heads_has_the_same_values() -> None:
    whole = _make(seed=3)
    rows = _make(seed=3, tokens=[700, 3, 1023], heads=[2, 0])
    assert torch.equal(rows, whole[:, [700, 3, 1023]][:, :, [2, 0]])


def test_tensors_seeds_and_batches_differ() -> None:
    tensors = [_make(name, seed) for name in TENSORS for seed in (0, 1)]
    batches = [batch for x in tensors for batch in x]
    for i, a in enumerate(batches):
        for b in batches[:i]:
            assert abs((a * b).mean()) < 0.02


def test_odd_head_dims_and_half_precision_round_the_same_values() -> None:
    exact, rounded = _make(head_dim=7), _make(head_dim=7, dtype=torch.bfloat16)
    assert exact.shape[-1] == 7
    assert torch.equal(exact.bfloat16(), rounded)


def test_large_positions_do_not_overflow() -> None:
    start = 2**40
    x = _make(tokens=[start, start + 1, start + 2])
    assert torch.isfinite(x).all()
    assert not torch.equal(x[:, 0], x[:, 1])
