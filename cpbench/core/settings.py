"""How cases are measured: the ``[measure]`` table of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_THREADS = 1024
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
LEAST_TELEMETRY_S = 0.02
TRANSPORTS = ("torch", "mpi")
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """The ``[measure]`` table.

    Attributes:
        min_iterations, max_iterations: floor and ceiling of the timed iterations.
        max_seconds: no further iteration starts after this long.
        precision: stop when the 95 % interval of the median is within this fraction of it.
        warmup: untimed iterations before (the first one also compiles).
        timeout_s: a case that takes longer in all is ended and recorded as ``timeout``.
        threads: processor threads of each rank (CPU only); 0 shares the cores among the ranks.
        check_small, check_sampled: the two correctness checks.
        quality: of operators that choose what to attend to, what their choice is worth.
        time: measure at all (``cpbench verify`` only checks).
        memory: the pass for peak memory.
        trace: after measuring, watch a pass and write what each rank did when to ``traces/``.
        exposure: for several ranks, time each case also without communication, and communication
            alone (see ``cpbench.measure.exposure``).
        launches: how many processes (gangs, for several ranks) measure each case, one after the
            other: what a process happens to get (memory, clocks) differs between them.
        clock: ``"wall"``, or ``"cpu"``: the processor time of the process, for one rank on a CPU.
            Neighbours on a shared machine disturb it less, and what they do (a busy sibling of the
            core) is known from the pace, see ``Record.pace_us``.
        interleave: measure the cases that differ only in operator, strategy or layout in turn, so
            many times over, so that what drifts meanwhile meets all of them.
        telemetry_s: between samples of power, clocks and temperature of GPUs; 0 for none.
        transport: what moves tensors between ranks: ``"torch"`` (NCCL or Gloo), or ``"mpi"`` where
            MPI has started them.
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
    quality: bool = True
    time: bool = True
    memory: bool = True
    exposure: bool = True
    trace: bool = False
    launches: int = 1
    clock: str = "wall"
    interleave: int = 1
    telemetry_s: float = 0.1
    transport: str = "torch"

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) not in _TYPES[str(item.type)]:  # a boolean is no integer here
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
        if 0 < self.telemetry_s < LEAST_TELEMETRY_S:
            raise ValueError(
                f"measure.telemetry_s = {self.telemetry_s} must be 0 or at least "
                f"{LEAST_TELEMETRY_S}: more often would disturb"
            )
        for name in ("interleave", "launches"):
            if not 1 <= getattr(self, name) <= 1000:
                raise ValueError(f"measure.{name} = {getattr(self, name)} must be from 1 to 1000")
        if self.clock not in CLOCKS:
            raise ValueError(f"measure.clock = {self.clock!r} is none of {', '.join(CLOCKS)}")
        if self.transport not in TRANSPORTS:
            raise ValueError(
                f"measure.transport = {self.transport!r} is none of {', '.join(TRANSPORTS)}"
            )
        if self.threads > MAX_THREADS:
            raise ValueError(f"measure.threads = {self.threads} must be at most {MAX_THREADS}")

    def conditions(self, device: str) -> dict[str, Any]:
        """What a record must say for it to be comparable with others under these settings."""
        return {
            "device": device,
            "threads": self.threads,
            "checked": self.check_small and self.check_sampled,
            "timed": self.time,
            "clock": "events" if device == "cuda" else self.clock,
            **({"transport": self.transport} if self.transport != "torch" else {}),
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> MeasureSettings:
        """Settings from a TOML table.

        Raises:
            ValueError: for an unknown key or a wrong value, in one line.
        """
        known = [item.name for item in fields(cls)]
        for key in table:
            if key not in known:
                raise ValueError(f"[measure] has no key {key!r}; it takes {', '.join(known)}")
        return cls(**table)
