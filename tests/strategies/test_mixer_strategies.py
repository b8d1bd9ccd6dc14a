"""Mixers on several ranks against the recurrence in float64.

Ranks are threads here; ``tests/api/test_distributed_mix.py`` has those of Gloo.
"""

from __future__ import annotations

from dataclasses import replace

import naive_mixers
import pytest
import torch
from mixers_on_ranks import (
    CHUNK,
    MIXERS,
    SCALE,
    SCANS,
    SIZES,
    TOKENS,
    Distributed,
    errors,
    keeps_chunks_whole,
    starts_for,
    world_of,
)
from naive_mixers import NAMES

import cpbench
from cpbench import masks


@pytest.mark.parametrize("name", ["causal", "documents"])
@pytest.mark.parametrize("mixer", NAMES)
def test_every_way_is_exact_in_float64(mixer: str, name: str) -> None:
    starts = starts_for(mixer, name)
    for size in SIZES:
        others = ("zigzag_document", "dispatch") if name == "documents" and size == 3 else ()
        for layout in ("contiguous", "zigzag", *others):
            if mixer == "ttt" and not keeps_chunks_whole(size, layout, starts):
                continue
            for text in (*SCANS, "ulysses:pad=true"):
                found = errors(mixer, text, size, layout, starts)
                assert max(found.values()) < 2e-13, (size, layout, text, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS)
def test_lower_precision(mixer: str, dtype: torch.dtype) -> None:
    """In bfloat16 the error is that of rounding out twice: from state 0, and what that lacks."""
    starts, tolerance = starts_for(mixer, "documents"), {torch.float32: 1e-5}.get(dtype, 1e-2)
    for text, layout in ((SCANS[0], "zigzag"), (SCANS[2], "zigzag"), (SCANS[3], "contiguous")):
        for size in (3, 4):
            if mixer == "ttt" and not keeps_chunks_whole(size, layout, starts):
                continue
            found = errors(mixer, text, size, layout, starts, dtype)
            gates = found.pop("dg", 0.0)  # those of 20 nats a token lose digits in sums
            assert gates < 10 * tolerance, (size, layout, text, gates)
            assert max(found.values()) < tolerance, (size, layout, text, found)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag_document", "dispatch"])
@pytest.mark.parametrize("tokens", [5, 53])
def test_padding_and_ranks_without_tokens(layout: str, tokens: int) -> None:
    starts = (0, 2)
    x = naive_mixers.make_inputs("gated_deltanet", 1, tokens, 4, 6, 5)
    dout, dstate = torch.ones(1, tokens, 4, 5).double(), torch.ones(1, 4, 6, 5).double()
    gradients, out, state = naive_mixers.gradients(
        x, "gated_deltanet", SCALE, dout, dstate, starts, CHUNK
    )
    wanted = {"out": out, "state": state} | {f"d{n}": y for n, y in gradients.items()}
    for text in (*SCANS[:2], SCANS[3], "ulysses"):
        world = world_of(4, layout, starts, tokens)
        found = Distributed(x, "gated_deltanet", text, world, dout, dstate)
        for name, y in wanted.items():
            torch.testing.assert_close(found.results[name], y, msg=lambda m: f"{text} {name}: {m}")  # noqa: B023


def test_linear_without_a_mask() -> None:
    x = naive_mixers.make_inputs("linear", 1, TOKENS, 4, 6, 5)
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    out, state = cpbench.mix(**leaves, mixer="linear", mask="full", scale=SCALE)
    dout, dstate = torch.ones_like(out), torch.ones_like(state)
    gradients = torch.autograd.grad((out, state), tuple(leaves.values()), (dout, dstate))
    wanted = {"out": out, "state": state}
    wanted |= {f"d{name}": y for name, y in zip(leaves, gradients, strict=True)}
    full = replace(world_of(4, "zigzag", mixer="linear"), mask=masks.build("full", TOKENS))
    found = Distributed(x, "linear", "ulysses", full, dout, dstate)
    for name, y in wanted.items():
        torch.testing.assert_close(found.results[name], y.detach())
