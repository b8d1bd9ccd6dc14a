"""Errors do not grow with the ranks, unless gradients travel in bfloat16."""

from __future__ import annotations

import pytest

from tests.microbench.error_growth import errors


@pytest.mark.parametrize("strategy", ["ring", "burst", "tile", "distflash", "ring_allgather"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_on_32_ranks_are_those_on_two(strategy: str, dtype: str) -> None:
    few, many = (errors(strategy, size, 256, dtype) for size in (2, 32))
    for name, error in many.items():
        assert error < 1.6 * few[name], f"{name}: {few[name]:.1e} on 2 ranks, {error:.1e} on 32"


def test_gradients_that_travel_in_bfloat16_lose_at_every_hop() -> None:
    rounded = {size: errors("ring:grad_dtype=bfloat16", size, 256, "bfloat16") for size in (2, 32)}
    whole = errors("ring", 32, 256, "bfloat16")
    assert rounded[32]["dk"] > 1.8 * rounded[2]["dk"]
    assert rounded[32]["dk"] > 1.8 * whole["dk"]
    assert rounded[32]["dk"] < 2.5e-2  # still what bfloat16 results may be off
    assert rounded[32]["dq"] == pytest.approx(whole["dq"], rel=0.1)  # dQ stays at home
