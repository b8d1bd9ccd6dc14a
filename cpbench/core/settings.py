"""Measurement settings: the ``[measure]`` table of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

MAX_THREADS = 1024
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
MIN_TELEMETRY_S = 0.02
TRANSPORTS = ("torch", "mpi")
CLOCKS = ("wall", "cpu")
# Settings that decide how precise a time is; launches that differ in them are not pooled.
PRECISION_SETTINGS = ("precision", "min_iterations", "max_iterations", "max_seconds", "warmup")
# Settings that decide what is measured beside the time, and how the methods of a problem alternate.
SCOPE_SETTINGS = ("interleave", "memory", "exposure", "thorough", "quality")


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """The ``[measure]`` table.

    Attributes:
        min_iterations, max_iterations: bounds on the number of timed iterations.
        max_seconds: start no further iteration after this time.
        precision: stop when the 95 % confidence interval of the median is within this fraction of
            the median.
        warmup: untimed iterations before the timed ones (the first one also compiles).
        timeout_s: a case that takes longer in all is ended and recorded as ``timeout``.
        threads: CPU threads per rank (CPU only); 0 divides the cores among the ranks.
        check_small, check_sampled: the two correctness checks.
        thorough: check every row and column at the measured size, for up to half of ``timeout_s``,
            instead of for about as long as three passes take.
        quality: measure the quality of the selection, for selectors.
        time: measure at all (``cpbench verify`` only checks).
        memory: measure peak memory, in a pass of its own.
        trace: after measuring, trace one pass and write the timeline of each rank to ``traces/``.
        exposure: for several ranks, time each case also without communication, and communication
            alone (see ``cpbench.measure.exposure``).
        launches: number of processes (gangs, for several ranks) that measure each case, one after
            the other: timings vary between processes (memory placement, clocks).
        clock: ``"wall"``, or ``"cpu"``: CPU time of the process, for one rank on a CPU.  It is less
            sensitive to other processes on a shared machine; the rest of their effect (a busy
            sibling of the core) is measured as the pace, see ``Record.pace_us``.
        interleave: number of turns in which the cases that differ only in the method are measured
            alternately, so that drift affects all of them alike; 1 is one after the other.  0 is
            automatic: as many turns as it takes to call one of the methods the fastest, which share
            the iterations of a case, where that adds little to the cost (see
            ``cpbench.sweep.estimate.Estimator.turns``).
        telemetry_s: interval of the samples of power, clocks and temperature of GPUs; 0 for none.
        transport: how tensors move between ranks: ``"torch"`` (NCCL or Gloo), or ``"mpi"`` where
            MPI has started the ranks.
    """

    min_iterations: int = 7
    max_iterations: int = 50
    max_seconds: float = 10.0
    precision: float = 0.03
    warmup: int = 2
    timeout_s: float = 600.0
    threads: int = 1
    check_small: bool = True
    check_sampled: bool = True
    thorough: bool = False
    quality: bool = True
    time: bool = True
    memory: bool = True
    exposure: bool = True
    trace: bool = False
    launches: int = 1
    clock: str = "wall"
    interleave: int = 0
    telemetry_s: float = 0.1
    transport: str = "torch"

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) not in _TYPES[str(item.type)]:  # bool is a subclass of int
                raise ValueError(f"measure.{item.name} = {value!r} is not of type {item.type}")
            if item.name == "timeout_s" and not 0 < value < math.inf:
                raise ValueError(f"measure.timeout_s = {value!r} must be positive, and finite")
            if (
                item.type in ("int", "float") and not 0 <= value < math.inf
            ):  # nan fails every comparison
                raise ValueError(f"measure.{item.name} = {value!r} must be 0 or more, and finite")
        if not 1 <= self.min_iterations <= self.max_iterations:
            raise ValueError(
                f"measure: 1 <= min_iterations ({self.min_iterations}) <= max_iterations "
                f"({self.max_iterations}) must hold"
            )
        if 0 < self.telemetry_s < MIN_TELEMETRY_S:
            raise ValueError(
                f"measure.telemetry_s = {self.telemetry_s} must be 0 or at least "
                f"{MIN_TELEMETRY_S}: sampling more often disturbs the measurement"
            )
        for name, least in (("interleave", 0), ("launches", 1)):
            value = getattr(self, name)
            if not least <= value <= 1000:
                raise ValueError(f"measure.{name} = {value} must be from {least} to 1000")
        if self.clock not in CLOCKS:
            raise ValueError(f"measure.clock = {self.clock!r} is none of {', '.join(CLOCKS)}")
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"measure.transport = {self.transport!r} is none of {', '.join(TRANSPORTS)}"
            )
        if self.threads > MAX_THREADS:
            raise ValueError(f"measure.threads = {self.threads} must be at most {MAX_THREADS}")

    def conditions(self, device: str) -> dict[str, Any]:
        """Conditions of a measurement: those that records must share to be comparable, and the
        settings that may differ between the runs of a directory."""
        return {
            "device": device,
            "threads": self.threads,
            "checked": self.check_small and self.check_sampled,
            "timed": self.time,
            "clock": "events" if device == "cuda" else self.clock,
            **({"transport": self.transport} if self.transport != "torch" else {}),
            **{name: getattr(self, name) for name in (*PRECISION_SETTINGS, *SCOPE_SETTINGS)},
        }

    def of_turn(self, turns: int, earlier: int) -> MeasureSettings:
        """The settings of one of several turns.

        Automatic turns share the iterations and the seconds of a case, with one call each to warm
        up.

        Args:
            turns: of the case.
            earlier: iterations of the turns before, which count for the precision.
        """
        share = 1 if self.interleave else turns
        return replace(
            self,
            warmup=self.warmup if share == 1 else min(self.warmup, 1),
            min_iterations=earlier + -(-self.min_iterations // share),
            max_iterations=earlier + -(-self.max_iterations // share),
            max_seconds=self.max_seconds / share,
        )

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> MeasureSettings:
        """Settings from a TOML table.

        Raises:
            ValueError: for an unknown key or a wrong value, in one line.
        """
        names = [item.name for item in fields(cls)]
        for key in table:
            if key not in names:
                raise ValueError(f"[measure] has no key {key!r}; it takes {', '.join(names)}")
        return cls(**table)
