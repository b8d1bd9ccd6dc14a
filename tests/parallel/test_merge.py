"""The fused merge of partial results, interpreted, compared with that in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launch_counter import LaunchCounter

from cpbench.parallel.partial_results.merge import merge, merge_eager, merge_fused

NAN, INF = float("nan"), float("inf")


def results(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, spread: float = 5.0
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    B, S, H, _ = shape
    out = torch.randn(shape, generator=random).to(dtype)
    return out, torch.randn(B, H, S, generator=random) * spread


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("bfloat16",) * 2, ("float32", "float16")])
@pytest.mark.parametrize("shape", [(2, 33, 3, 64), (1, 1, 1, 8), (1, 70, 2, 96)])
def test_equals_the_merge_in_torch(shape: tuple[int, ...], dtypes: tuple[str, str]) -> None:
    first, second = (
        results(shape, getattr(torch, dtype), seed) for seed, dtype in enumerate(dtypes)
    )
    expected = merge_eager(first[0].float().clone(), first[1], second[0].float().clone(), second[1])
    out, lse = merge_fused(*first, *second)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)
    assert (out is first[0]) == (dtypes[0] == "float32")


def test_views_are_merged_in_place_and_nothing_else_is_written() -> None:
    whole, lse = results((1, 40, 2, 16), torch.float32, 0)
    before = whole.clone()
    part, part_lse = results((1, 20, 2, 16), torch.bfloat16, 1)
    transposed = part.transpose(1, 3).contiguous().transpose(1, 3)  # other strides, same values
    expected = merge_eager(
        before[:, 5:25].clone(), lse[..., 5:25], part.float(), part_lse
    )  # fmt: skip
    merged, merged_lse = merge_fused(whole[:, 5:25], lse[..., 5:25], transposed, part_lse)
    torch.testing.assert_close(merged, expected[0])
    torch.testing.assert_close(merged_lse, expected[1])
    torch.testing.assert_close(whole[:, 5:25], expected[0])
    assert torch.equal(whole[:, :5], before[:, :5])
    assert torch.equal(whole[:, 25:], before[:, 25:])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("pair", [(-INF, -INF), (-INF, 2.0), (3.0, -INF), (5e3, -5e3), (NAN, 1.0),
                                  (5000.0, 5000.25), (0.0, 0.0)], ids=str)  # fmt: skip
def test_extreme_values(pair: tuple[float, float]) -> None:
    """Rows that see nothing, lse of thousands, NaN."""
    (first, _), (second, _) = (results((1, 3, 1, 8), torch.float32, seed) for seed in range(2))
    lse, more = (torch.full((1, 1, 3), value) for value in pair)
    if pair[0] == -INF:
        first.zero_()
    expected = merge_eager(first.clone(), lse, second.clone(), more)
    out, merged = merge_fused(first.clone(), lse, second.clone(), more)
    torch.testing.assert_close(out, expected[0], rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(merged, expected[1], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_a_ring_step_moves() -> None:
    """Published shape of a rank: 64K tokens of 64 heads of 128, merged from bfloat16.

    The eager merge is what a GPU without Triton does; the fused one reads and writes once.
    """
    shape = (1, 64 * 1024, 64, 128)
    out: Any = torch.empty(shape, device="meta")
    lse: Any = torch.empty((1, 64, 64 * 1024), device="meta")
    partial = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with LaunchCounter() as counter:
        merge(out, lse, partial, torch.empty_like(lse))
    once = 2 * out.numel() * 4 + partial.numel() * 2  # the fused kernel, without the lse
    assert counter.launches == 12
    assert 3.4 < counter.nbytes / once < 3.6
