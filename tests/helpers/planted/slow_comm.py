"""Simulated time: a transport and an operator of known duration, and attention over them.

Nothing sleeps and nothing depends on the speed of the machine: durations are added to a clock of
the process.  Transfers themselves are real, over the communicator that is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.measure.device.cpu import Cpu
from cpbench.parallel.comm import Comm, Handle
from cpbench.parallel.layout import build
from cpbench.parallel.world import World

TOKENS = 96


class SimulatedClock:
    """A clock that only moves when something takes time on it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def advance_to(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)


class SimulatedHandle:
    """A handle whose transfer arrives at a simulated time."""

    def __init__(self, handle: Handle, clock: SimulatedClock, arrival_s: float) -> None:
        self._handle, self._clock, self._arrival_s = handle, clock, arrival_s

    def wait(self) -> None:
        self._handle.wait()
        self._clock.advance_to(self._arrival_s)


class SimulatedComm:
    """A communicator whose exchanges take ``latency_s`` each from the time they are posted;
    collectives take no simulated time.  It is no ``TorchComm``, so no thread waits on it."""

    def __init__(self, comm: Comm, clock: SimulatedClock, latency_s: float) -> None:
        self._comm, self._clock, self._latency_s = comm, clock, latency_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def sub(self, ranks: Sequence[int]) -> SimulatedComm:
        return SimulatedComm(self._comm.sub(ranks), self._clock, self._latency_s)

    def lane(self, name: str) -> SimulatedComm:
        return SimulatedComm(self._comm.lane(name), self._clock, self._latency_s)

    def exchange(self, sends: Sequence[Any], recvs: Sequence[Any], what: str = "") -> Handle:
        handle = self._comm.exchange(sends, recvs, what)
        if not sends and not recvs:
            return handle
        return SimulatedHandle(handle, self._clock, self._clock.now_s + self._latency_s)


class SimulatedDevice(Cpu):
    """A CPU that times work on the simulated clock."""

    def __init__(self, clock: SimulatedClock) -> None:
        super().__init__(1)
        self._clock = clock

    def time_us(self, work: Callable[[], Any], meet: Callable[[], None] | None = None) -> float:
        start = self._clock.now_s
        work()
        return (self._clock.now_s - start) * 1e6


def attention(strategy: str, comm: Comm, direction: str = "fwd_bwd") -> Attention:
    problem = Problem(
        batch=1, seq_q=TOKENS, seq_k=TOKENS, heads_q=2, heads_kv=2, head_dim=8, dtype="float32",
        direction=direction,
    )  # fmt: skip
    mask = masks.build("causal", TOKENS)
    world = World.of(problem, mask, build("zigzag", TOKENS, comm.size, mask))
    return Attention("reference", strategy, world, comm.rank, "cpu")


def run_before_calls(work: Attention, action: Callable[[], Any]) -> None:
    """Run ``action`` before every forward and backward call of the operator of ``work``."""
    for name in ("forward", "backward"):
        method = getattr(work.op.impl, name)

        def call(*args: Any, method: Any = method) -> Any:
            action()
            return method(*args)

        setattr(work.op.impl, name, call)
