"""The public functions sit in PyTorch as ``scaled_dot_product_attention`` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from ranks import run_ranks
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import cpbench
from cpbench import masks
from cpbench.core import registry
from cpbench.layout import build as build_layout
from cpbench.masks.attn_mask import AttnMask

WITH_BACKWARD = ("bands", "reference", "sdpa.cpu_flash", "sdpa.math")
WITH_LSE = ("bands", "reference", "sdpa.cpu_flash")
SELECTORS = sorted(info.name for info in registry.operators().values() if info.selects)
STRATEGIES = sorted(
    info.name
    for info in registry.strategies_for("attention").values()
    if info.traced and info.name not in ("single",)
)
TOKENS = 128
Attend = Callable[..., Any]


@pytest.fixture(params=["plain", "compiled"])
def attention(request: pytest.FixtureRequest) -> Attend:
    """``cpbench.attention``, or the same under ``torch.compile``."""
    if request.param == "plain":
        return cpbench.attention
    torch._dynamo.reset()
    return torch.compile(cpbench.attention, backend="eager")


def inputs_of(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> list[torch.Tensor]:
    *qkv, dout = naive.random_inputs(1, tokens, 4, 4, 32, dtype)
    return [*(x.requires_grad_() for x in qkv), dout]


def mask_for(operator: str, tokens: int = TOKENS) -> Any:
    return masks.build("full" if operator == "vsa" else "causal", tokens)


@pytest.mark.parametrize("operator", [*WITH_BACKWARD, *SELECTORS])
def test_inference_mode(attention: Attend, operator: str) -> None:
    mask = mask_for(operator)
    *qkv, _ = inputs_of()
    expected, _ = attention(*qkv, mask, operator=operator)
    with torch.inference_mode():
        clones = [x.clone() for x in qkv]
        out, _ = attention(*clones, mask, operator=operator)
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), expected)


@pytest.mark.parametrize("operator", [*WITH_BACKWARD, *SELECTORS])
def test_a_graph_is_freed_by_its_backward_pass(attention: Attend, operator: str) -> None:
    *qkv, dout = inputs_of()
    out, _ = attention(*qkv, mask_for(operator), operator=operator)
    first = torch.autograd.grad(out, qkv, dout, retain_graph=True)
    second = torch.autograd.grad(out, qkv, dout)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, qkv, dout)


@pytest.mark.parametrize("operator", [*WITH_LSE, *SELECTORS])
def test_a_second_derivative_is_an_error(attention: Attend, operator: str) -> None:
    *qkv, _ = inputs_of()
    out, _ = attention(*qkv, mask_for(operator), operator=operator)
    (dq,) = torch.autograd.grad(out.square().sum(), qkv[:1], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"differentiate twice|no autograd formula|not implemented"
    ):
        dq.sum().backward()


def test_the_second_derivative_of_an_operator_that_autograd_differentiates(
    attention: Attend,
) -> None:
    q, k, v, _ = inputs_of()
    mask = mask_for("sdpa.math")

    def second(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    found = second(attention(q, k, v, mask, operator="sdpa.math")[0])
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 32**-0.5
    scores = scores.masked_fill(~torch.as_tensor(mask.to_dense()), -torch.inf)
    expected = second(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v))
    for x, y in zip(found, expected, strict=True):
        assert naive.error(x, y) < 1e-5


@pytest.mark.parametrize("operator", WITH_LSE)
@pytest.mark.parametrize("changed", ["q", "k", "v", "out", "lse"])
def test_a_change_in_place_is_an_error(attention: Attend, operator: str, changed: str) -> None:
    q, k, v, dout = inputs_of()
    out, lse = attention(q, k, v, mask_for(operator), operator=operator)
    product = out * dout  # keeps dout, not out
    with torch.no_grad():
        {"q": q, "k": k, "v": v, "out": out, "lse": lse}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        product.sum().backward()


def loss_with_lse(out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor) -> torch.Tensor:
    """A loss through out and the z-loss of queries that see something."""
    return (out.double() * dout).sum() + 0.1 * lse[lse > -torch.inf].double().square().sum()


def by_definition(inputs: list[torch.Tensor], mask: Any) -> tuple[torch.Tensor, ...]:
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in inputs[:3]]
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.as_tensor(mask.to_dense()), -torch.inf)
    out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    return torch.autograd.grad(loss_with_lse(out, scores.logsumexp(-1), inputs[3]), leaves)


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("operator", WITH_LSE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_through_lse(attention: Attend, operator: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype)
    mask = mask_for(operator)
    out, lse = attention(*inputs[:3], mask, operator=operator)
    gradients = torch.autograd.grad(loss_with_lse(out, lse, inputs[3]), inputs[:3])
    for actual, expected in zip(gradients, by_definition(inputs, mask), strict=True):
        assert naive.error(actual, expected) < TOLERANCE[dtype]


def test_gradients_through_lse_alone_and_of_queries_that_see_nothing(
    attention: Attend,
) -> None:
    *qkv, _ = inputs_of(tokens=16)
    mask = AttnMask.from_slices(16, 16, [[4, 16, 0, 16, -16, 0]])
    _, lse = attention(*qkv, mask)
    dq, dk, dv = torch.autograd.grad(lse.exp().log().square().sum(), qkv)  # -inf * inf
    _, lse = attention(*qkv, mask)
    kept = torch.autograd.grad(lse[:, :, 4:].square().sum(), qkv)
    torch.testing.assert_close(dq, kept[0])
    torch.testing.assert_close(dk, kept[1])
    assert not dv.any()


@pytest.mark.parametrize("operator", [name for name in SELECTORS if name not in ("nsa", "vsa")])
def test_gradients_through_lse_that_cannot_be_are_an_error(
    attention: Attend, operator: str
) -> None:
    *qkv, _ = inputs_of()
    out, lse = attention(*qkv, mask_for(operator), operator=operator)
    with pytest.raises(RuntimeError, match=f"through the lse of {operator}"):
        (out.sum() + lse.sum()).backward()


@pytest.mark.parametrize("operator", [*WITH_BACKWARD, *SELECTORS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(attention: Attend, operator: str, dtype: torch.dtype) -> None:
    inputs = inputs_of()
    with torch.autocast("cpu", dtype=dtype):
        out, _ = attention(*inputs[:3], mask_for(operator), operator=operator)
    gradients = torch.autograd.grad(out, inputs[:3], inputs[3].to(dtype))
    cast = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    expected, _ = attention(*cast, mask_for(operator), operator=operator)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert [x.dtype for x in gradients] == [torch.float32] * 3
    expected_gradients = torch.autograd.grad(expected, cast, inputs[3].to(dtype))
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x, y.float())


class Layer(torch.nn.Module):
    """A projection and attention."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 3 * 64, bias=False)
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).unbind(2)
        return x + self.attend(q, k, v).flatten(2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True).transpose(1, 2)


def kept_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of tensors that a call leaves allocated, by torch's profiler, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = profiled.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


def settled_bytes(run: Callable[[], Any]) -> int:
    """Least of three :func:`kept_bytes`: a busy machine's Gloo lets go of what was sent late."""

    def run_and_wait() -> Any:
        result = run()
        time.sleep(0.1)
        return result

    found = []
    for _ in range(3):
        time.sleep(0.1)  # outside: no memory of the round before is freed in this one
        found.append(kept_bytes(run_and_wait)[0])
    return min(found)


def stack_bytes(attend: Callable[..., torch.Tensor], checkpointed: bool) -> tuple[int, Any]:
    """Bytes that eight layers keep for the backward pass, and the gradient of their input."""
    torch.manual_seed(0)
    layers = [Layer(attend) for _ in range(8)]
    x = torch.randn(1, TOKENS, 64, requires_grad=True)

    def run() -> torch.Tensor:
        y = x
        for layer in layers:
            y = checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
        return y.square().sum()

    nbytes, loss = kept_bytes(run)
    loss.backward()
    return nbytes, x.grad


@pytest.mark.parametrize("operator", WITH_BACKWARD)
def test_checkpointing_keeps_as_little_as_with_sdpa(operator: str) -> None:
    mask = mask_for(operator)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cpbench.attention(q, k, v, mask, operator=operator)[0]

    allowed, _ = stack_bytes(sdpa, True)
    nbytes, gradient = stack_bytes(attend, True)
    whole, expected = stack_bytes(attend, False)
    torch.testing.assert_close(gradient, expected)
    assert nbytes <= 1.05 * allowed
    assert whole > 3 * nbytes


@pytest.mark.parametrize("operator", WITH_LSE)
def test_the_graph_keeps_as_little_as_that_of_sdpa(operator: str) -> None:
    mask = mask_for(operator)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cpbench.attention(q, k, v, mask, operator=operator)[0]

    attend(*(x.detach() for x in inputs_of()[:3]))  # plans are kept
    assert stack_bytes(attend, False)[0] <= 1.05 * stack_bytes(sdpa, False)[0]


@pytest.mark.parametrize("operator", [*WITH_BACKWARD, *SELECTORS])
def test_saved_tensors_may_be_offloaded(operator: str) -> None:
    *qkv, dout = inputs_of()
    out, _ = cpbench.attention(*qkv, mask_for(operator), operator=operator)
    expected = torch.autograd.grad(out, qkv, dout)
    with saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        out, _ = cpbench.attention(*qkv, mask_for(operator), operator=operator)
    del _
    for x, y in zip(torch.autograd.grad(out, qkv, dout), expected, strict=True):
        torch.testing.assert_close(x, y)


# Kept for backward over what SDPA keeps for one rank's shards, besides the inputs: exchanged heads,
# or the keys and values received last.
EXCHANGE_HEADS = ("ulysses", "usp", "loongtrain", "hierarchical")
MOST_KEPT = {**dict.fromkeys(EXCHANGE_HEADS, 5.1), "ring_reverse": 3.1}


def _on_shards(rank: int, size: int, strategy: str, operator: str) -> dict[str, Any]:
    mask = masks.build("causal", TOKENS)
    layout = build_layout("zigzag", TOKENS, size, mask)
    *qkv, dout = (layout.shard(x.detach(), rank) for x in inputs_of())
    leaves = [x.requires_grad_() for x in qkv]

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return cpbench.distributed_attention(*tensors, mask, strategy=strategy, operator=operator)

    out, lse = attend(*leaves)
    plain = torch.autograd.grad(out, leaves, dout)
    results: dict[str, Any] = {"plain": [x.numpy() for x in plain]}
    allowed, _ = kept_bytes(lambda: sdpa(*leaves))
    sent = 5 * allowed if strategy in EXCHANGE_HEADS else 0  # until Gloo's thread lets go of it
    nbytes = settled_bytes(lambda: attend(*leaves))
    results["memory"] = nbytes <= MOST_KEPT.get(strategy, 1.05) * allowed + sent
    hidden = settled_bytes(lambda: checkpoint(attend, *leaves, use_reentrant=False))
    state_of_generator = 8 << 10
    results["checkpointed memory"] = hidden <= 1.05 * allowed + sent + state_of_generator
    if operator == "bands":
        out, lse = attend(*leaves)
        loss = loss_with_lse(out, lse, dout)
        results["lse"] = [x.numpy() for x in torch.autograd.grad(loss, leaves)]
        _, lse = attend(*leaves)
        with torch.no_grad():
            lse.mul_(2)
        try:
            lse.sum().backward()
        except RuntimeError as error:
            results["changed"] = "inplace operation" in str(error)
    with torch.inference_mode():
        inferred, _ = attend(*(x.clone() for x in leaves))
    results["inference"] = torch.equal(inferred.clone(), out)
    with saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        out, _ = attend(*leaves)
    offloaded = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    results["offloaded"] = all(map(torch.equal, plain, offloaded))
    torch.autograd.grad(out, leaves, dout)
    try:
        torch.autograd.grad(out, leaves, dout)
    except RuntimeError as error:
        results["freed"] = "second time" in str(error)
    out, _ = checkpoint(attend, *leaves, use_reentrant=False)
    results["checkpointed"] = all(map(torch.equal, plain, torch.autograd.grad(out, leaves, dout)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attend(*leaves)
    results["autocast"] = out.dtype == torch.bfloat16
    return results


def _all_on_shards(rank: int, size: int) -> dict[str, dict[str, Any]]:
    """By strategy: one gang, since each process takes seconds to import torch's compiler."""
    return {strategy: _on_shards(rank, size, strategy, "bands") for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def on_shards() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(2, _all_on_shards)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(on_shards: list[dict[str, dict[str, Any]]], strategy: str) -> None:
    ranks = [results[strategy] for results in on_shards]
    for results in ranks:
        flags = {name: x for name, x in results.items() if name not in ("plain", "lse")}
        assert flags == dict.fromkeys(flags, True)
    mask = masks.build("causal", TOKENS)
    layout = build_layout("zigzag", TOKENS, 2, mask)
    expected = by_definition(inputs_of(), mask)
    for i in range(3):
        gradient = layout.unshard([torch.as_tensor(results["lse"][i]) for results in ranks])
        assert naive.error(gradient, expected[i]) < 1e-6


@pytest.mark.parametrize("operator", ["sdpa.math"])
def test_strategies_over_operators_that_autograd_differentiates(operator: str) -> None:
    for results in run_ranks(2, _on_shards, "ulysses", operator):
        flags = {name: x for name, x in results.items() if "memory" not in name and name != "plain"}
        assert flags == dict.fromkeys(flags, True)


@pytest.mark.parametrize("factor", [1e5, 1.0, 1e-7, 1e-9])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_through_lse_of_any_size(dtype: torch.dtype, factor: float) -> None:
    """Those that the dtype can hold: in float16 small ones of dq and dk are not normal."""
    inputs = inputs_of(dtype)
    mask = mask_for("bands")
    _, lse = cpbench.attention(*inputs[:3], mask)
    found = torch.autograd.grad((lse * factor).sum(), inputs[:2])
    whole = [x.detach().double().requires_grad_() for x in inputs[:2]]
    scores = torch.einsum("bshd,bthd->bhst", *whole) * 32**-0.5
    scores = scores.masked_fill(~torch.as_tensor(mask.to_dense()), -torch.inf)
    expected = torch.autograd.grad((scores.logsumexp(-1) * factor).sum(), whole)
    for actual, wanted in zip(found, expected, strict=True):
        rounded = wanted.to(dtype)
        if bool(rounded.isfinite().all()) and float(rounded.abs().max()) > 1e-5:
            assert naive.error(actual, wanted) < 3 * TOLERANCE[dtype]
        assert not actual.isnan().any()
