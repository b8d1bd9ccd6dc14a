"""NaN and infinities reach exactly what depends on them, in every operator that runs on CPUs."""

from __future__ import annotations

import math

import naive
import numpy as np
import pytest
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.layout import build as build_layout
from cpbench.masks.attn_mask import AttnMask

DENSE = ("bands", "reference", "sdpa.cpu_flash", "sdpa.math")
SELECTORS = sorted(info.name for info in registry.operators().values() if info.selects)


def mask_of(name: str, tokens: int) -> AttnMask:
    """Of ``padded``, the last tokens belong to no document."""
    if name != "padded":
        return masks.build(name, tokens)
    slices = [[0, 6, 0, 6, -6, 0], [6, 15, 6, 15, -9, 0]]
    return AttnMask.from_slices(tokens, tokens, slices)


def row_by_row(inputs: list[torch.Tensor], mask: AttnMask) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv in float64: every query with the keys that it sees, and no others."""
    *qkv, dout = (x.double() for x in inputs)
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    group = q.shape[2] // k.shape[2]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    total = q.new_zeros(())
    for i, row in enumerate(mask.to_dense()):
        seen = np.flatnonzero(row)
        if not len(seen):
            continue
        for h in range(q.shape[2]):
            k_seen, v_seen = (x[:, seen, h // group] for x in (k, v))
            scores = torch.einsum("bd,btd->bt", q[:, i, h], k_seen) * q.shape[-1] ** -0.5
            out_row = torch.einsum("bt,btd->bd", scores.softmax(-1), v_seen)
            out.data[:, i, h], lse[:, i, h] = out_row.detach(), scores.detach().logsumexp(-1)
            total = total + (out_row * dout[:, i, h]).sum()
    return [out.detach(), lse.transpose(1, 2), *torch.autograd.grad(total, (q, k, v))]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(actual.double(), expected, **tolerance, equal_nan=True)


WHERE = {
    "q": lambda x, n: x[0].__setitem__((0, n // 2, 1, 3), math.nan),
    "k": lambda x, n: x[1].__setitem__((0, 3, 0, 1), math.nan),
    "v": lambda x, n: x[2].__setitem__((0, 3, 0, 1), math.nan),
    "q_inf": lambda x, n: x[0].__setitem__((0, n // 2, 1, 3), math.inf),
    "k_inf": lambda x, n: x[1].__setitem__((0, 2, 0, 1), math.inf),
    "v_inf": lambda x, n: x[2].__setitem__((0, 2, 0, 1), math.inf),
    "dout": lambda x, n: x[3].__setitem__((0, n // 2, 1, 3), math.nan),
    "all_of_q": lambda x, n: x[0].fill_(math.nan),
    "tail": lambda x, n: [tensor[:, 15:].fill_(math.nan) for tensor in x],
}


@pytest.mark.parametrize("operator", DENSE)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("mask_name", "tokens"), [("causal", 10), ("padded", 24), ("full", 40)])
def test_dense_operators(operator: str, where: str, mask_name: str, tokens: int) -> None:
    if operator == "sdpa.math" and where == "dout":
        pytest.skip("autograd differentiates it, as it does torch's own")
    mask = mask_of(mask_name, tokens)
    inputs = naive.random_inputs(1, tokens, 4, 2, 16, torch.float32)
    WHERE[where](inputs, tokens)
    *qkv, dout = inputs
    leaves = [x.requires_grad_() for x in qkv]
    out, lse = cpbench.attention(*leaves, mask, operator=operator)
    results = [out, lse, *torch.autograd.grad(out, leaves, dout)]
    for actual, expected in zip(results, row_by_row(inputs, mask), strict=True):
        if actual is not None:
            torch.testing.assert_close(
                actual.double(), expected, atol=1e-5, rtol=1e-4, equal_nan=True
            )


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("where", ["q", "v"])
def test_selectors(selector: str, where: str) -> None:
    """A NaN reaches the query that has it, or those that see it, and no query before."""
    tokens, position = 256, 130
    mask = masks.build("full" if selector == "vsa" else "causal", tokens)
    inputs = naive.random_inputs(1, tokens, 2, 2, 32, torch.float32)
    inputs["qkv".index(where)][0, position, 1] = math.nan
    *qkv, dout = inputs
    leaves = [x.requires_grad_() for x in qkv]
    out, _ = cpbench.attention(*leaves, mask, operator=selector)
    hidden = out.isnan().any(-1)
    assert not hidden[..., 0].any()
    if where == "q":
        assert out[0, position, 1].isnan().all()
        if selector != "vsa":  # which pools queries
            assert hidden.sum() == 1
    elif selector != "vsa":
        assert hidden[0, position:, 1].any()
        assert not hidden[0, :position].any()
    (dq,) = torch.autograd.grad(out, leaves[:1], dout)
    assert torch.equal(dq.isnan().any(-1), hidden)


def test_a_landmark_has_no_value() -> None:
    """A NaN in its value, or in the dout of a query that does not see a landmark, is not there."""
    tokens, landmark = 256, 127
    inputs = naive.random_inputs(1, tokens, 2, 2, 32, torch.float32)
    inputs[2][0, landmark] = math.nan
    inputs[3][0, 200] = math.nan
    *qkv, dout = inputs
    leaves = [x.requires_grad_() for x in qkv]
    spec = "landmark:block_size=64,keep=1.0"
    out, _ = cpbench.attention(*leaves, masks.build("causal", tokens), operator=spec)
    assert not out.isnan().any()
    _, _, dv = torch.autograd.grad(out, leaves, dout)
    assert dv[0, 0].isnan().all()
    assert not dv[0, 63::64].isnan().any()


def _on_shards(rank: int, size: int, strategy: str) -> list[torch.Tensor]:
    tokens = 24
    mask = mask_of("padded", tokens)
    inputs = naive.random_inputs(1, tokens, 4, 2, 16, torch.float32)
    WHERE["tail"](inputs, tokens)
    inputs[2][0, 3, 0, 1] = math.nan
    layout = build_layout("zigzag", tokens, size, mask)
    *qkv, dout = (layout.shard(x, rank) for x in inputs)
    leaves = [x.requires_grad_() for x in qkv]
    out, lse = cpbench.distributed_attention(*leaves, mask, strategy=strategy)
    gradients = torch.autograd.grad(out, leaves, dout)
    return [x.detach().numpy() for x in (out, lse.transpose(1, 2), *gradients)]


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "tree", "ring_allgather", "loongtrain"])
def test_strategies(strategy: str) -> None:
    tokens = 24
    mask = mask_of("padded", tokens)
    inputs = naive.random_inputs(1, tokens, 4, 2, 16, torch.float32)
    WHERE["tail"](inputs, tokens)
    inputs[2][0, 3, 0, 1] = math.nan
    out, lse, *gradients = row_by_row(inputs, mask)
    layout = build_layout("zigzag", tokens, 2, mask)
    ranks = run_ranks(2, _on_shards, strategy)
    for i, expected in enumerate((out, lse.transpose(1, 2), *gradients)):
        actual = layout.unshard([torch.as_tensor(results[i]) for results in ranks])
        assert_close(actual, expected)
