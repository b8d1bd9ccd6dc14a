"""Communication that is exposed, against a transport and an operator whose slowness is known."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ranks import run_ranks
from slow_comm import TOKENS, SlowComm, attention

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.spec import Spec
from cpbench.inputs import Recipe
from cpbench.measure.device import Cpu
from cpbench.measure.exposure import ROUNDS, SilentComm, measure_exposure
from cpbench.parallel.comm import Control
from cpbench.results.record import Exposure, Record
from cpbench.verify.check import inputs_of


def exposed(
    rank: int, size: int, strategy: str, link_s: float, compute_s: float
) -> dict[str, dict[str, list[float]]]:
    """On one rank, with a link and an operator that take so long for every exchange and call."""
    comm = SlowComm()
    SlowComm.seconds = link_s
    work = attention(strategy, comm)
    for name in ("forward", "backward"):
        method = getattr(work.op.impl, name)

        def slowly(*given: Any, method: Any = method) -> Any:
            time.sleep(compute_s)
            return method(*given)

        setattr(work.op.impl, name, slowly)
    inputs = inputs_of(work, Recipe(), "cpu")
    return measure_exposure(work, inputs, Cpu(1), comm, Control(), MeasureSettings())


def exposure_of(ranks: list[dict[str, dict[str, list[float]]]]) -> Exposure:
    case = Case(operator=Spec.parse("reference"), mask=Spec.parse("causal"), seq_len=TOKENS)
    ways = ("whole", "compute", "transfer")
    record = Record(case=case, status="ok", exposure_us={
        way: {phase: [rank[way][phase] for rank in ranks] for phase in ("fwd", "bwd")}
        for way in ways
    })  # fmt: skip
    found = record.exposure
    assert found is not None
    return found


@pytest.mark.parametrize("strategy", ["ring", "dispatch"])
def test_what_computing_does_not_cover_is_exposed(strategy: str) -> None:
    """Forward: keys come while the own ones are computed.  Backward: the same, and then gradients
    go home, under nothing."""
    found = exposure_of(run_ranks(2, exposed, strategy, 0.15, 0.05))
    assert found.compute_us == pytest.approx(4 * 50e3, rel=0.25)
    assert found.transfer_us == pytest.approx(3 * 150e3, rel=0.2)
    assert found.exposed_us == pytest.approx(2 * 100e3 + 150e3, rel=0.25)
    assert found.hidden == pytest.approx(100 / 450, abs=0.15)


@pytest.mark.parametrize(
    ("strategy", "uncovered_us"), [("dispatch:stages=1", 50e3), ("ring_reverse", 0)]
)
def test_what_computing_covers_is_hidden(strategy: str, uncovered_us: float) -> None:
    """Gradients that go home come last in the one, and under the own block in the other."""
    found = exposure_of(run_ranks(2, exposed, strategy, 0.05, 0.15))
    assert found.exposed_us == pytest.approx(uncovered_us, abs=30e3)


def test_there_are_rounds_of_each() -> None:
    for rank in run_ranks(2, exposed, "ring", 0.0, 0.0):
        assert set(rank) == {"whole", "compute", "transfer"}
        for phases in rank.values():
            assert {phase: len(times) for phase, times in phases.items()} == {
                "fwd": ROUNDS, "bwd": ROUNDS,
            }  # fmt: skip
    assert Record(case=Case(operator=Spec.parse("bands"), mask=Spec.parse("full"), seq_len=8),
                  status="ok").exposure is None  # fmt: skip


def silent(rank: int, size: int, strategy: str) -> float:
    """A pass without communication, and how many bytes it sent."""
    comm = SilentComm(rank, size)
    work = attention(strategy, comm)
    x = {name: value.contiguous() for name, value in inputs_of(work, Recipe(), "cpu").items()}
    _, _, saved = work.forward(x["q"], x["k"], x["v"], comm)
    work.backward(x["dout"], saved, comm)
    assert work.trace is not None
    pairs = sum(phase.pairs for phase in work.trace.phases.values())
    assert work.op.pairs == pairs  # it has computed all that it should
    return comm.traffic.bytes_sent


@pytest.mark.parametrize(
    "strategy", ["ring", "ring_allgather", "ulysses", "usp", "tile", "burst", "dispatch", "tree"]
)
def test_every_strategy_runs_without_communication(strategy: str) -> None:
    assert [silent(rank, 2, strategy) for rank in range(2)] == [0, 0]
