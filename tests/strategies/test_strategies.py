"""Strategies: every one against float64, and what goes wrong in company.

A new strategy is found through the registry: this file need not be edited for it.
"""

from __future__ import annotations

import functools

import matrix
import naive
import pytest
import torch
from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.parallel.comm import TorchComm
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.trace import MODULUS, TraceComm, mismatch
from cpbench.parallel.world import World

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
SIZES = {1: True, 2: False, 3: True, 4: False, 6: True, 8: True}  # ranks: only some of the masks


@functools.cache
def _gang(
    size: int, names: frozenset[str]
) -> tuple[list[matrix.Combination], list[list[matrix.Outcome]]]:
    """Every combination of some strategies, and its outcome on each rank."""
    wanted = [one for one in matrix.combinations(size, SIZES[size]) if _name(one) in names]
    ranks = run_ranks(size, matrix.run, wanted, timeout_s=400)
    return wanted, [list(outcomes) for outcomes in zip(*ranks, strict=True)]


@pytest.fixture
def names(request: pytest.FixtureRequest) -> frozenset[str]:
    """The strategies of the tests that were selected: one gang computes for all of them."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    found = {one.params.get("name") for one in chosen if one is not None} & set(NAMES)
    return frozenset(found or NAMES)


NAMES = sorted({name.partition(":")[0] for name, *_ in matrix.names()})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64_and_sends_what_was_traced(
    name: str, size: int, names: frozenset[str]
) -> None:
    wanted, outcomes = _gang(size, names)
    mine = [(one, o) for one, o in zip(wanted, outcomes, strict=True) if _name(one) == name]
    assert any(not o[0].refused for _, o in mine), f"{name} refused everything on {size} ranks"
    found = [fault for one, o in mine for fault in matrix.faults(one, o, LIMIT)]
    assert not found, "\n".join(found[:20])


def _name(one: matrix.Combination) -> str:
    return one.strategy.partition(":")[0]


def test_the_matrix_meets_every_mask_shape_and_layout(names: frozenset[str]) -> None:
    wanted, outcomes = _gang(4, names)
    computed = [one for one, o in zip(wanted, outcomes, strict=True) if not o[0].refused]
    assert {one.mask for one in computed} == set(matrix.MASKS)
    assert {(one.heads_q, one.heads_kv, one.dtype) for one in computed} == set(matrix.SHAPES)
    for name, info in registry.strategies().items():
        if name in names:
            assert {one.layout for one in computed if _name(one) == name} == set(info.layouts)
            placed = {one.placement for one in computed if _name(one) == name}
            assert placed == {"", *info.axes[:-1]}


def _autograd(rank: int, size: int) -> dict[str, float]:
    """Errors of the public function, gradients through autograd."""
    mask = masks.build(f"share_question:{matrix.DOCS}", matrix.TOKENS)
    dealt = build_layout("zigzag", matrix.TOKENS, size)
    whole = naive.random_inputs(2, matrix.TOKENS, 12, 4, 16, torch.float32)
    q, k, v, dout = (dealt.shard(x, rank) for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.distributed_attention(q, k, v, mask, strategy="usp:ulysses=2")
    out.backward(dout)
    found = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    want = naive.attention(*whole, mask)
    real = torch.as_tensor(dealt.positions(rank) < matrix.TOKENS).nonzero().flatten()
    errors = {}
    for name in naive.TENSORS:
        axis = 2 if name == "lse" else 1
        mine = dealt.shard(want[name], rank, dim=axis).index_select(axis, real)
        errors[name] = naive.error(found[name].index_select(axis, real), mine)
    return errors


def test_the_public_function_is_differentiable() -> None:
    for errors in run_ranks(4, _autograd):
        assert all(error < LIMIT["float32"] for error in errors.values()), errors


def _merging_without_lse(rank: int, size: int) -> str:
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("full", 16)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring", operator="sdpa.math")
    except Unsupported as refusal:
        return str(refusal)
    return ""


def test_a_strategy_that_merges_refuses_an_operator_without_lse() -> None:
    for reason in run_ranks(2, _merging_without_lse):
        assert reason == "ring merges partial results and sdpa.math returns no log-sum-exp"


def _disagreeing(rank: int, size: int) -> str:
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("sliding_window", 16, window=3 + rank)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring")
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_that_disagree_raise_instead_of_hanging() -> None:
    for message in run_ranks(2, _disagreeing):
        assert message.startswith("ranks disagree on the problem")


def _with_other_code(rank: int, size: int) -> str:
    """Rank 1 runs a ring that skips nothing, as another version of the code might."""
    from cpbench.strategies import ring

    if rank == 1:
        plain = ring.steps
        ring.steps = lambda needed, *rest: plain(needed | True, *rest)  # type: ignore[assignment]
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("causal", 16)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring", layout="contiguous")
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_whose_plans_do_not_fit_raise_and_name_the_message() -> None:
    for message in run_ranks(2, _with_other_code):
        assert message == (
            "ranks disagree on who sends what: message 1 from rank 1 to rank 0, 1024 bytes of "
            "keys: rank 0 does not expect it so"
        )


def test_messages_of_one_size_that_swap_places_are_found() -> None:
    """Rank 0 sends keys before gradients; rank 1 expects them the other way round."""
    x = torch.empty(3, 5, device="meta")
    comms = [TraceComm(rank, 2, log=True) for rank in (0, 1)]
    for what in ("keys", "gradients"):
        comms[0].exchange([(x, 1)], [], what)
    for what in ("gradients", "keys"):
        comms[1].exchange([], [(x, 0)], what)
    assert sum(comm.balance for comm in comms) % MODULUS
    assert mismatch([comm.log or [] for comm in comms]) == (
        "message 1 from rank 0 to rank 1, 60 bytes of keys: rank 1 does not expect it so"
    )


def _twice(rank: int, size: int) -> bool:
    import torch.distributed as dist

    mask = masks.build("causal", 16)
    dealt = build_layout("zigzag", 16, size)
    whole = naive.random_inputs(1, 16, 2, 2, 16, torch.float32)
    q, k, v, _ = (dealt.shard(x, rank) for x in whole)
    first, _ = cpbench.distributed_attention(q, k, v, mask)
    alone = dist.new_group([0, 1])
    second, _ = cpbench.distributed_attention(q, k, v, mask, group=alone)
    return torch.equal(first, second)


def test_a_second_group_works_beside_the_first() -> None:
    assert run_ranks(2, _twice) == [True, True]


def _peak_bytes(rank: int, size: int, strategy: str) -> int:
    """Peak of forward and backward on 256 local tokens of a full mask."""
    from cpbench.measure.device import Cpu
    from cpbench.measure.timing import Workload, measure_memory
    from cpbench.parallel.comm import Control

    tokens = 256 * size
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=4, head_dim=64, dtype="float32"
    )
    dealt = build_layout("contiguous", tokens, size)
    mask = masks.build("full", tokens)
    work = Attention("bands", strategy, World.of(problem, mask, dealt), rank, "cpu")
    whole = naive.random_inputs(1, tokens, 4, 4, 64, torch.float32)
    local = [dealt.shard(x, rank) for x in whole]
    inputs = dict(zip(("q", "k", "v", "dout"), local, strict=True))
    comm = TorchComm()
    return measure_memory(Workload(work, inputs, comm), Cpu(1, "wall"), comm, Control())["peak"]


def test_ring_memory_does_not_grow_with_the_ranks_and_allgather_memory_does() -> None:
    kv = 2 * 256 * 4 * 64 * 4
    ring = {size: max(run_ranks(size, _peak_bytes, "ring")) for size in (3, 5)}
    gathered = {size: max(run_ranks(size, _peak_bytes, "ring_allgather")) for size in (3, 5)}
    assert ring[5] - ring[3] < 0.1 * kv
    assert gathered[5] - gathered[3] > 3.5 * kv  # two more shards of keys and of gradients
