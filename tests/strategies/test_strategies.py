"""Strategies: all of them against float64, and errors that involve several ranks.

Strategies are found through the registry: a new one needs no change here.
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
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.tracing.mismatch import describe_mismatch
from cpbench.parallel.tracing.trace import MODULUS, TraceComm
from cpbench.parallel.world import World

LIMIT = {"float32": 2e-6, "bfloat16": 1.2e-2}
SIZES = {1: 4, 2: 4, 3: 4, 4: 2, 6: 9, 8: 9}  # ranks: one mask of how many


@functools.cache
def _gang(
    size: int, names: frozenset[str]
) -> tuple[list[matrix.Combination], list[list[matrix.Outcome]]]:
    """All combinations of the named strategies, and their outcomes on each rank."""
    cases = [case for case in matrix.combinations(size, SIZES[size]) if _name(case) in names]
    ranks = run_ranks(size, matrix.run, cases, timeout_s=400)
    return cases, [list(outcomes) for outcomes in zip(*ranks, strict=True)]


@pytest.fixture
def names(request: pytest.FixtureRequest) -> frozenset[str]:
    """The strategies of the selected tests: one gang computes all of them."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    selected = {callspec.params.get("name") for callspec in callspecs if callspec is not None}
    return frozenset(selected & set(NAMES) or NAMES)


NAMES = sorted({name.partition(":")[0] for name, *_ in matrix.names()})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64_and_sends_what_was_traced(
    name: str, size: int, names: frozenset[str]
) -> None:
    cases = [
        (case, outcomes)
        for case, outcomes in zip(*_gang(size, names), strict=True)
        if _name(case) == name
    ]
    assert any(not outcomes[0].refused for _, outcomes in cases), (
        f"{name} refused everything on {size} ranks"
    )
    faults = [fault for case in cases for fault in matrix.faults(*case, LIMIT)]
    assert not faults, "\n".join(faults[:20])


def _name(case: matrix.Combination) -> str:
    return case.strategy.partition(":")[0]


def test_the_matrix_covers_every_mask_shape_and_layout(names: frozenset[str]) -> None:
    cases = zip(*_gang(4, names), strict=True)
    computed = [case for case, outcomes in cases if not outcomes[0].refused]
    assert {case.mask for case in computed} == set(matrix.MASKS)
    shapes = {(case.heads_q, case.heads_kv, case.dtype, case.head_dim_v) for case in computed}
    assert shapes == set(matrix.SHAPES)
    for name, info in registry.strategies_for("attention").items():
        if name in names:
            of_name = [case for case in computed if _name(case) == name]
            assert {case.layout for case in of_name} == set(info.layouts)
            assert {case.mask for case in of_name} == set(matrix.MASKS)
            assert {case.placement for case in of_name} == {"", *info.axes[:-1]}


def _autograd(rank: int, size: int) -> dict[str, float]:
    """Errors of the public function, with gradients from autograd."""
    mask = masks.build(f"share_question:{matrix.DOCS}", matrix.TOKENS)
    layout = build_layout("zigzag", matrix.TOKENS, size)
    inputs = naive.random_inputs(2, matrix.TOKENS, 12, 4, 16, torch.float32)
    q, k, v, dout = (layout.shard(x, rank) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = cpbench.distributed_attention(q, k, v, mask, strategy="usp:ulysses=2")
    out.backward(dout)
    results = {"out": out.detach(), "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    expected = naive.attention(*inputs, mask)
    real = torch.as_tensor(layout.positions(rank) < matrix.TOKENS).nonzero().flatten()
    errors = {}
    for name in naive.TENSORS:
        axis = 2 if name == "lse" else 1
        reference = layout.shard(expected[name], rank, dim=axis).index_select(axis, real)
        errors[name] = naive.error(results[name].index_select(axis, real), reference)
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


def _with_different_code(rank: int, size: int) -> str:
    """Rank 1 runs a ring that skips no steps, as another version of the code might."""
    from cpbench.strategies import ring

    if rank == 1:
        plan_rotation = ring.plan_rotation
        ring.plan_rotation = lambda needed, *rest: plan_rotation(needed | True, *rest)  # type: ignore[assignment]
    q, k, v, _ = naive.random_inputs(1, 8, 2, 2, 16, torch.float32)
    mask = masks.build("causal", 16)
    try:
        cpbench.distributed_attention(q, k, v, mask, strategy="ring", layout="contiguous")
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_whose_plans_do_not_match_raise_and_name_the_message() -> None:
    for message in run_ranks(2, _with_different_code):
        assert message == (
            "ranks disagree on the communication schedule: message 1 from rank 1 to rank 0, "
            "1024 bytes of keys: rank 0 does not expect this message"
        )


def test_messages_of_equal_size_in_another_order_are_detected() -> None:
    """Rank 0 sends keys before gradients; rank 1 expects the reverse order."""
    x = torch.empty(3, 5, device="meta")
    comms = [TraceComm(rank, 2, log=True) for rank in (0, 1)]
    for what in ("keys", "gradients"):
        comms[0].exchange([(x, 1)], [], what)
    for what in ("gradients", "keys"):
        comms[1].exchange([], [(x, 0)], what)
    assert sum(comm.checksum for comm in comms) % MODULUS
    assert describe_mismatch([comm.log or [] for comm in comms]) == (
        "message 1 from rank 0 to rank 1, 60 bytes of keys: rank 1 does not expect this message"
    )


def _in_two_groups(rank: int, size: int) -> bool:
    import torch.distributed as dist

    mask = masks.build("causal", 16)
    layout = build_layout("zigzag", 16, size)
    inputs = naive.random_inputs(1, 16, 2, 2, 16, torch.float32)
    q, k, v, _ = (layout.shard(x, rank) for x in inputs)
    first, _ = cpbench.distributed_attention(q, k, v, mask)
    group = dist.new_group([0, 1])
    second, _ = cpbench.distributed_attention(q, k, v, mask, group=group)
    return torch.equal(first, second)


def test_a_second_group_works_beside_the_first() -> None:
    assert run_ranks(2, _in_two_groups) == [True, True]


def _peak_bytes(rank: int, size: int, strategy: str) -> int:
    """Peak bytes of forward and backward with 256 local tokens and a full mask."""
    from cpbench.measure.device.cpu import Cpu
    from cpbench.measure.memory import HeldMemory
    from cpbench.measure.timing import Workload, measure_memory
    from cpbench.parallel.comm import Control

    tokens = 256 * size
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=4, heads_kv=4, head_dim=64, dtype="float32"
    )
    layout = build_layout("contiguous", tokens, size)
    mask = masks.build("full", tokens)
    work = Attention("bands", strategy, World.of(problem, mask, layout), rank, "cpu")
    global_inputs = naive.random_inputs(1, tokens, 4, 4, 64, torch.float32)
    local = [layout.shard(x, rank) for x in global_inputs]
    inputs = dict(zip(("q", "k", "v", "dout"), local, strict=True))
    comm = TorchComm()
    workload = Workload(work, inputs, comm)
    return measure_memory(workload, Cpu(1, "wall"), comm, Control(), HeldMemory())["peak"]


def test_ring_memory_does_not_grow_with_the_ranks_and_allgather_memory_does() -> None:
    kv = 2 * 256 * 4 * 64 * 4
    ring = {size: max(run_ranks(size, _peak_bytes, "ring")) for size in (3, 5)}
    gathered = {size: max(run_ranks(size, _peak_bytes, "ring_allgather")) for size in (3, 5)}
    assert ring[5] - ring[3] < 0.1 * kv
    assert gathered[5] - gathered[3] > 3.5 * kv  # two more shards of keys and of gradients
