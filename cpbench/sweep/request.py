"""The run that a user requested: its cases, where and how to measure them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cpbench.core.environment import collect_environment, machine_memory_bytes
from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import profilers, supervisor
from cpbench.launchers.protocol import Command, GangSpec, Place
from cpbench.results import worlds
from cpbench.results.store import StoreError, check_writable, read_run, write_document


@dataclass(frozen=True, kw_only=True)
class Request:
    """The run that a user requested.

    Attributes:
        name: of the sweep.
        cases: all cases of the sweep.
        out: run directory.
        launcher, device, settings: as for ``cpbench.launchers.supervisor.Plan``.
        retry: statuses whose cases are run again.
        remeasure: whether cases are run again that were measured with other settings.
        strict: whether oom counts as a failure.
        since: sequence number of a record; cases with a newer one are not run again for ``retry``.
        place: launch configuration of the ranks of a world size.
        capacity: bytes of memory per rank, if a site profile gives it.
        profiler: ``"nsys"`` or ``"ncu"``, to run the ranks of a single case under; "" for none.
            Such a run has a directory of its own, since profiling changes the times.
        command: words of the command line, without the name of the program; recorded.

    Raises:
        ValueError: when the run directory holds results of another device, number of threads,
            transport or clock, or when CPU time is requested where it is meaningless.
    """

    name: str
    cases: Sequence[Case]
    out: Path
    launcher: str
    device: str
    settings: MeasureSettings
    retry: frozenset[str] = field(default_factory=frozenset)
    remeasure: bool = False
    strict: bool = False
    since: float = math.inf
    place: Callable[[int], Place] = lambda world_size: Place()
    capacity: int | None = None
    profiler: str = ""
    command: Sequence[str] = ()

    def memory_per_rank(self, case: Case) -> tuple[int | None, str]:
        """Bytes of memory per rank (None if unknown), and where the number comes from."""
        if self.capacity is not None:
            return self.capacity, "gpu_memory of the profile"
        if self.device == "cpu" and self.launcher in ("local", "torchrun"):
            local_ranks = -(-case.world_size // self.place(case.world_size).nodes)
            return machine_memory_bytes() // local_ranks, "memory of this machine per rank"
        return None, ""

    def __post_init__(self) -> None:
        conditions = self.settings.conditions(self.device)
        multi_rank = any(case.world_size > 1 for case in self.cases)
        if self.settings.clock == "cpu" and (self.device != "cpu" or multi_rank):
            raise ValueError(
                'measure.clock = "cpu" is for one rank on a CPU: ranks that wait use no CPU time'
            )
        if self.profiler:
            if len(self.cases) != 1:
                raise ValueError(
                    f"--profiler {self.profiler} is for one case, not {len(self.cases)}: "
                    "select one with --where"
                )
            self._profiler_wrapper()  # raises if the profiler cannot be used
        for record in read_run(self.out).records.values():
            for key in ("device", "threads", "transport", "clock"):
                requested = conditions.get(key, "torch")
                recorded = record.conditions.get(key, "torch" if key == "transport" else requested)
                if recorded != requested:
                    raise ValueError(
                        f"{self.out} holds results of {key} {recorded}, not {requested}: "
                        "choose another --out"
                    )

    @functools.cached_property
    def present_world(self) -> worlds.World | None:
        """The world that ranks will have; None where they may be on other machines."""
        place = self.place(max((case.world_size for case in self.cases), default=1))
        if self.launcher not in ("local", "torchrun") or place.nodes > 1:
            return None
        environment = collect_environment({**os.environ, **GangSpec(self.out, 1, place).env})
        return worlds.world_of(environment, self.settings.conditions(self.device))

    @property
    def plan(self) -> supervisor.Plan:
        plan = supervisor.Plan(self.out, self.launcher, self.device, self.settings, self.place)
        if self.profiler:
            plan = replace(
                plan,
                wrap_command=self._profiler_wrapper(),
                exit_timeout_s=profilers.REPORT_TIMEOUT_S,
            )
        return plan

    def _profiler_wrapper(self) -> Callable[[Command], Command]:
        return profilers.profiler_wrapper(self.profiler, self.device, self.cases[0].world_size)


def write_sweep_json(request: Request) -> None:
    """Write ``sweep.json``, the sweep that was requested.

    Raises:
        StoreError: when the run directory cannot be written.
    """
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_document(request.out / "sweep.json", _sweep_table(request), indent=1)
    except OSError as error:
        raise StoreError(f"cannot write results to {request.out}: {error.strerror}") from error
    check_writable(request.out)


def _sweep_table(request: Request) -> dict[str, Any]:
    """The contents of ``sweep.json``."""
    return {
        "name": request.name,
        "command": list(request.command),
        "launcher": request.launcher,
        "device": request.device,
        "settings": asdict(request.settings),
        "cases": [{"id": case.id, **case.to_json()} for case in request.cases],
    }
