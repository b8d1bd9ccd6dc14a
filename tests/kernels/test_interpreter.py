"""Triton's interpreter, as the kernels of this package run in it."""

from __future__ import annotations

import pytest
import torch

import cpbench
from cpbench import masks

triton = pytest.importorskip("triton")


def replacements(monkeypatch: pytest.MonkeyPatch, tokens: int) -> int:
    """How often a part of the language is replaced for one forward pass."""
    from triton.runtime import interpreter

    q = torch.randn(1, tokens, 1, 16, generator=torch.Generator().manual_seed(0))
    count = 0

    def counted(*args: object) -> None:
        nonlocal count
        count += 1
        replace(*args)

    replace = interpreter._patch_builtin
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", counted)
        out, _ = cpbench.attention(q, q, q, masks.build("causal", tokens), "triton_band")
    expected, _ = cpbench.attention(q, q, q, masks.build("causal", tokens), "reference")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    return count


def test_the_language_is_replaced_in_each_launch_and_not_in_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton.language as tl

    load = tl.load
    assert 0 < replacements(monkeypatch, 260) < 40
    assert tl.load is load  # and put back
