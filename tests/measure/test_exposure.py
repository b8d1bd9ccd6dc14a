"""Exposed communication, with a transport and an operator of known simulated duration."""

from __future__ import annotations

import functools

import pytest
from ranks import run_ranks
from slow_comm import (
    TOKENS,
    SimulatedClock,
    SimulatedComm,
    SimulatedDevice,
    attention,
    run_before_calls,
)

from cpbench.core.operator import QKV
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.measure.exposure import ROUNDS, NullComm, Times, measure_exposure
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.results.record import Exposure, Record
from cpbench.verify.check import rank_inputs


def measured(
    rank: int, size: int, strategy: str, latency_s: float, compute_s: float, max_seconds: float
) -> dict[str, Times]:
    """Exposure times of one rank, with these durations per exchange and per operator call."""
    clock = SimulatedClock()
    comm = SimulatedComm(TorchComm(), clock, latency_s)
    work = attention(strategy, comm)
    run_before_calls(work, functools.partial(clock.advance, compute_s))
    inputs = rank_inputs(work, Recipe(), "cpu")
    settings = MeasureSettings(max_seconds=max_seconds)
    return measure_exposure(work, inputs, SimulatedDevice(clock), comm, Control(), settings)


def exposure_of(strategy: str, latency_s: float, compute_s: float) -> Exposure:
    ranks = run_ranks(2, measured, strategy, latency_s, compute_s, 600.0)
    case = Case(operator=Spec.parse("reference"), mask=Spec.parse("causal"), seq_len=TOKENS)
    variants = ("whole", "compute", "transfer")
    record = Record(case=case, status="ok", exposure_us={
        variant: {phase: [rank[variant][phase] for rank in ranks] for phase in ("fwd", "bwd")}
        for variant in variants
    })  # fmt: skip
    exposure = record.exposure
    assert exposure is not None
    return exposure


@pytest.mark.parametrize("strategy", ["ring", "dispatch"])
def test_transfers_longer_than_compute_are_exposed(strategy: str) -> None:
    """Forward: keys arrive while a rank computes with its own.  Backward: the same, and then the
    transfer of gradients overlaps with nothing."""
    exposure = exposure_of(strategy, 0.15, 0.05)
    assert exposure.compute_us == pytest.approx(4 * 50e3)
    assert exposure.transfer_us == pytest.approx(3 * 150e3)
    assert exposure.exposed_us == pytest.approx(2 * 100e3 + 150e3)
    assert exposure.hidden == pytest.approx(100 / 450)


@pytest.mark.parametrize(
    ("strategy", "exposed_us"), [("dispatch:stages=1", 50e3), ("ring_reverse", 0)]
)
def test_transfers_shorter_than_compute_are_hidden(strategy: str, exposed_us: float) -> None:
    """The transfer of gradients comes last in one, and overlaps with the own block in the other."""
    exposure = exposure_of(strategy, 0.05, 0.15)
    assert exposure.exposed_us == pytest.approx(exposed_us)


@pytest.mark.parametrize(("max_seconds", "rounds"), [(600.0, ROUNDS), (1e-9, 1)])
def test_every_variant_has_all_rounds_or_the_first(max_seconds: float, rounds: int) -> None:
    for rank in run_ranks(2, measured, "ring", 0.0, 0.0, max_seconds):
        assert set(rank) == {"whole", "compute", "transfer"}
        for phases in rank.values():
            assert {phase: len(times) for phase, times in phases.items()} == {
                "fwd": rounds, "bwd": rounds,
            }  # fmt: skip
    assert Record(case=Case(operator=Spec.parse("bands"), mask=Spec.parse("full"), seq_len=8),
                  status="ok").exposure is None  # fmt: skip


def bytes_sent(rank: int, size: int, strategy: str) -> float:
    """Run a pass without communication; returns the bytes that it sent."""
    comm = NullComm(rank, size)
    work = attention(strategy, comm)
    x = {name: value.contiguous() for name, value in rank_inputs(work, Recipe(), "cpu").items()}
    _, _, saved = work.forward(QKV(x["q"], x["k"], x["v"]), comm)
    work.backward(x["dout"], saved, comm)
    assert work.trace is not None
    pairs = sum(phase.pairs for phase in work.trace.phases.values())
    assert work.op.pairs == pairs  # it has computed every visible pair
    return comm.traffic.bytes_sent


@pytest.mark.parametrize(
    "strategy", ["ring", "ring_allgather", "ulysses", "usp", "tile", "burst", "dispatch", "tree"]
)
def test_every_strategy_runs_without_communication(strategy: str) -> None:
    assert [bytes_sent(rank, 2, strategy) for rank in range(2)] == [0, 0]
