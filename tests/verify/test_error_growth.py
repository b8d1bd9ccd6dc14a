"""Errors do not grow with the number of ranks, unless gradients are sent in bfloat16."""

from __future__ import annotations

import pytest

from tests.microbench.error_growth import errors


@pytest.mark.parametrize("strategy", ["ring", "burst", "tile", "distflash", "ring_allgather"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_errors_on_32_ranks_are_those_on_two(strategy: str, dtype: str) -> None:
    on_2, on_32 = (errors(strategy, size, 256, dtype) for size in (2, 32))
    for name, error in on_32.items():
        assert error < 1.6 * on_2[name], f"{name}: {on_2[name]:.1e} on 2 ranks, {error:.1e} on 32"


def test_gradients_sent_in_bfloat16_lose_precision_at_every_hop() -> None:
    rounded = {size: errors("ring:grad_dtype=bfloat16", size, 256, "bfloat16") for size in (2, 32)}
    exact = errors("ring", 32, 256, "bfloat16")
    assert rounded[32]["dk"] > 1.5 * rounded[2]["dk"]
    assert rounded[32]["dk"] > 1.5 * exact["dk"]
    assert rounded[32]["dk"] < 2.5e-2  # the limit of bfloat16 results
    assert rounded[32]["dq"] == pytest.approx(exact["dq"], rel=0.1)  # dQ is not sent
