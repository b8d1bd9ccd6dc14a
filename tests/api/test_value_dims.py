"""The public functions where values have another head_dim than queries and keys."""

from __future__ import annotations

import naive
import pytest
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.core.operator import Unsupported
from cpbench.layout import build as build_layout

TOKENS, DIM = 75, 24
MASK = "sliding_window_causal:window=30"
OPERATORS = ("bands", "reference", "triton_band")
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def inputs_of(value_dim: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    *qkv, dout = naive.random_inputs(2, TOKENS, 4, 2, DIM, dtype, value_dim=value_dim)
    return [*(x.requires_grad_() for x in qkv), dout]


def truth(
    inputs: list[torch.Tensor], out_of: bool = True, lse_of: bool = True
) -> list[torch.Tensor]:
    """Gradients of sum(out * dout) and sum(sin(lse)) in float64, by autograd."""
    q, k, v, dout = (x.detach().double() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k_all, v_all = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k_all) * DIM**-0.5
    visible = torch.as_tensor(masks.build(MASK, TOKENS).to_dense())
    lse = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    probs = (scores - lse[..., None]).exp() * visible
    out = torch.einsum("bhst,bthd->bshd", probs, v_all)
    loss = (out * dout).sum() * out_of + lse.sin().sum() * lse_of
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("value_dim", [1, 16, 40])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_through_out_and_lse(operator: str, dtype: torch.dtype, value_dim: int) -> None:
    inputs = inputs_of(value_dim, dtype)
    *qkv, dout = inputs
    out, lse = cpbench.attention(*qkv, masks.build(MASK, TOKENS), operator=operator)
    assert out.shape == dout.shape
    grads = torch.autograd.grad((out * dout).sum() + lse.sin().sum(), qkv)
    for actual, expected, x in zip(grads, truth(inputs), qkv, strict=True):
        assert actual.shape == x.shape
        assert naive.error(actual, expected) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("loss_of", ["out", "lse", "both"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_compiled_graph(backend: str, loss_of: str) -> None:
    """Fake tensors have the shapes of real ones, also where one of the results is not used."""
    torch._dynamo.reset()
    mask = masks.build(MASK, TOKENS)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
        out, lse = cpbench.attention(q, k, v, mask)
        assert lse is not None
        through_out, through_lse = (out * dout).sum(), lse.sin().sum()
        return {"out": through_out, "lse": through_lse, "both": through_out + through_lse}[loss_of]

    inputs = inputs_of(16)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    grads = torch.autograd.grad(compiled(*inputs), inputs[:3], allow_unused=True)
    expected = truth(inputs, loss_of != "lse", loss_of != "out")
    for actual, wanted in zip(grads, expected, strict=True):
        actual = torch.zeros_like(wanted) if actual is None else actual
        assert naive.error(actual, wanted) < 4e-6


def test_a_nan_reaches_what_depends_on_it() -> None:
    inputs = inputs_of(16)
    q, k, v, dout = inputs
    with torch.no_grad():
        v[0, 7, 1, 3] = torch.nan
    out, _ = cpbench.attention(q, k, v, masks.build(MASK, TOKENS))
    found = out.isnan()
    assert found[0, 7:38, 2:, 3].all()
    assert int(found.sum()) == 31 * 2
    dq, _, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert dq.shape == q.shape
    assert dv.shape == v.shape


def _distributed(rank: int, size: int, strategy: str) -> dict[str, float] | str:
    layout_name = registry.strategy_info(strategy).layouts[0]
    mask = masks.build("causal", TOKENS)
    layout = build_layout(layout_name, TOKENS, size)
    inputs = naive.random_inputs(2, TOKENS, 4, 2, DIM, torch.float32, value_dim=16)
    *qkv, dout = (layout.shard(x, rank) for x in inputs)
    for x in qkv:
        x.requires_grad_()
    try:
        out, lse = cpbench.distributed_attention(*qkv, mask, strategy=strategy, layout=layout_name)
    except Unsupported as refusal:
        return str(refusal)
    grads = torch.autograd.grad(out, qkv, dout, retain_graph=True)
    more = torch.autograd.grad(lse.sin()[torch.isfinite(lse)].sum(), qkv, allow_unused=True)
    expected = naive.attention(*inputs, mask)
    real = torch.as_tensor(layout.positions(rank) < TOKENS).nonzero().flatten()
    results = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    errors = {}
    for name, value in results.items():
        reference = layout.shard(expected[name], rank).index_select(1, real)
        errors[name] = naive.error(value.index_select(1, real), reference)
    leaf = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    _, whole_lse = cpbench.attention(*leaf, mask, operator="reference")
    wanted = torch.autograd.grad(whole_lse.sin().sum(), leaf)
    for name, value, reference in zip(("lse_dq", "lse_dk"), more, wanted, strict=False):
        reference = layout.shard(reference, rank).index_select(1, real)
        errors[name] = naive.error(value.index_select(1, real), reference)
    return errors


@pytest.mark.parametrize(
    "strategy",
    [
        i.name
        for i in registry.strategies_for("attention").values()
        if i.traced and i.name != "single"
    ],
)
def test_distributed(strategy: str) -> None:
    for errors in run_ranks(2, _distributed, strategy):
        assert isinstance(errors, dict), errors
        assert all(error < 4e-6 for error in errors.values()), errors


def test_refusals_are_one_line() -> None:
    q, k, v, _ = inputs_of(16)
    mask = masks.build("causal", TOKENS)
    for operator in ("sdpa.cpu_flash", "moba"):
        with pytest.raises(Unsupported) as refusal:
            cpbench.attention(q, k, v, mask, operator=operator)
        assert str(refusal.value) == (
            f"{operator} takes values of the head_dim of queries and keys, not 16 beside 24"
        )


def test_library_strategies_and_adapters_refuse() -> None:
    for info in registry.strategies_for("attention").values():
        assert info.value_dims == info.is_own, info.name
    adapters = registry.operators().values()
    unproven = [info for info in adapters if info.unproven and info.kind == "attention"]
    assert unproven
    assert not any(info.value_dims for info in unproven)
