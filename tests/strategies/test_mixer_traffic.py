"""What mixers send on several ranks: by formulas, and as issued on NCCL."""

from __future__ import annotations

from typing import Any

import pytest
from mixers_on_ranks import SCANS, made, operator_of, world_of
from simulated_nccl import find_faults, record

from cpbench.core.registry import strategy_info
from cpbench.core.spec import Spec
from cpbench.parallel.strategy import declared_refusal
from cpbench.parallel.tracing.trace import MODULUS, RankTrace, empty_inputs, trace_rank
from cpbench.parallel.tracing.traced_operator import TracedOperator
from cpbench.parallel.world import World

GDN = {"heads_q": 32, "heads_kv": 32, "head_dim": 128, "head_dim_v": 0, "dtype": "bfloat16"}


def traces(text: str, world: World, mixer: str = "gated_deltanet") -> list[RankTrace]:
    """Of all ranks, whose checksums match; the state is not asked for."""
    assert declared_refusal(strategy_info(Spec.parse(text).name), world) is None
    chosen, op = made(text), operator_of(mixer)
    ranks = [trace_rank(chosen, op, world, rank) for rank in range(world.size)]
    assert sum(trace.checksum for trace in ranks) % MODULUS == 0
    return ranks


def sent(ranks: list[RankTrace], phase: str) -> list[int]:
    return [sum(trace.phases[phase].bytes_to) for trace in ranks]


@pytest.mark.parametrize(("size", "gathered", "doubled"), [(8, 28, 10), (64, 252, 22)])
def test_a_gated_deltanet_of_32_heads(size: int, gathered: int, doubled: int) -> None:
    """MiB of the rank that sends most, forward."""
    world = world_of(size, tokens=64 * size, **GDN)
    for text, mebibytes in (
        ("scan", gathered), ("scan:by=ring", 2), ("scan:by=ring,blocks=8", 2),
        ("scan:by=doubling", doubled),
    ):  # fmt: skip
        assert max(sent(traces(text, world), "fwd")) == mebibytes << 20


TRANSITIONS = {"linear": 0, "ssd": 1, "gla": 6, "kda": 36, "gated_deltanet": 36}


@pytest.mark.parametrize("mixer", TRANSITIONS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_closed_formulas(mixer: str, size: int) -> None:
    """4 heads of 6 x 5 in float32: a state, and a transition by the kind of mixer."""
    state, transition = 4 * 4 * 6 * 5, 4 * 4 * TRANSITIONS[mixer]
    both, last = state + transition, size - 1
    world = world_of(size, dtype="float32", mixer=mixer)
    ranks = traces("scan", world, mixer)
    assert sent(ranks, "fwd") == [last * both] * size
    assert sent(ranks, "bwd") == [last * state] * size
    for text in ("scan:by=ring", "scan:by=ring,blocks=5"):
        ranks = traces(text, world, mixer)
        assert sent(ranks, "fwd") == [state] * last + [0]
        assert sent(ranks, "bwd") == [0] + [state] * last
    ranks = traces("scan:by=doubling", world, mixer)
    distances = [1 << i for i in range(last.bit_length())]
    expected = [
        sum(both if rank >= d else state for d in distances if rank + d <= last)
        for rank in range(size)
    ]
    assert sent(ranks, "fwd") == sent(ranks, "bwd")[::-1] == expected
    rounds = len(distances)
    assert max(expected) <= (rounds - 1) * both + state

    zigzag = world_of(size, "zigzag", dtype="float32", mixer=mixer)
    ranks = traces("scan", zigzag, mixer)
    assert sent(ranks, "fwd") == [2 * last * both] * size
    assert sent(ranks, "bwd") == [2 * last * state] * size
    ranks = traces("scan:by=ring", zigzag, mixer)
    assert sent(ranks, "fwd") == [state] + [2 * state] * (last - 1) + [state]


def test_documents_stop_what_nobody_needs() -> None:
    """On 4 ranks of 24 tokens: documents from 0, 24 (a rank's first token) and 60 (inside)."""
    world = world_of(4, starts=(0, 24, 60), dtype="float32")
    state, transition = 4 * 4 * 6 * 5, 4 * 4 * 6 * 6
    for text in ("scan", "scan:by=ring", "scan:by=doubling"):
        ranks = traces(text, world)
        # Rank 1 is read by rank 2, and rank 2, in which a document begins, by rank 3.
        assert sent(ranks, "fwd") == [0, state, state, 0]
        assert sent(ranks, "bwd") == [0, 0, state, state]
    # One more rank in the middle of a document: its transition is sent forward and back.
    world = world_of(4, starts=(0, 24), dtype="float32")
    ranks = traces("scan", world)
    assert sent(ranks, "fwd") == [0, 2 * state, state + 2 * transition, 0]
    assert sent(ranks, "bwd") == [0, 0, state, 2 * state]


def test_ulysses_sends_gates_too() -> None:
    world, n = world_of(4, "striped", dtype="bfloat16"), 3
    ranks = traces("ulysses", world)
    element = 24 * 4  # of a number per token and head
    inputs, out = element * (2 * (6 + 6 + 5) + 4 * (1 + 1)), element * 2 * 5
    assert sent(ranks, "fwd") == sent(ranks, "bwd") == [(inputs + out) * n // 4] * 4


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_what_is_issued_on_nccl_ends_and_leaves_buffers_alone(layout: str, size: int) -> None:
    for starts in ((0,), (0, 13, 50, 90)):
        world = world_of(size, layout, starts)
        for text in (*SCANS, "ulysses:pad=true"):
            chosen, op = made(text), TracedOperator(operator_of("gated_deltanet"))
            x, dout = empty_inputs(world, "mixer")

            def passes(comm: Any, recorder: Any) -> None:
                plan = chosen.prepare(op, world, comm.rank)  # noqa: B023
                comm.connect(trace_rank(chosen, op, world, comm.rank, need_lse=True).parts)  # noqa: B023
                _, state, saved = chosen.forward(x, plan, op, comm, True)  # noqa: B023
                recorder.end_pass()
                chosen.backward(dout, saved, plan, op, comm, state)  # noqa: B023
                recorder.end_pass()

            assert not find_faults(record(size, passes)), (text, starts)
