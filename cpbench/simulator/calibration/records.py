"""Records of run directories, divided into those to fit to and those to judge predictions by.

Kernels are fitted to single ranks of one machine whose results were checked; records of several
ranks are never fitted to.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench import masks
from cpbench.core.problem import Case
from cpbench.core.registry import implementation, operator_info
from cpbench.masks.attn_mask import AttnMask
from cpbench.measure.peaks import COPY, GATHER, HOST_LATENCY, LAUNCH, SCATTER, TO_DEVICE, TO_HOST
from cpbench.results.record import Record, slowest_us
from cpbench.results.store import Run, read_run
from cpbench.simulator.calibration.kernels import Point
from cpbench.simulator.calibration.mixers import MixerPoint
from cpbench.simulator.cluster import Gpu, HostLink

PEAKS = {"stream_gb_per_s": COPY, "gather_gb_per_s": GATHER, "scatter_gb_per_s": SCATTER,
         "launch_us": LAUNCH}  # fmt: skip

Key = tuple[str, str, int]  # operator, dtype, head_dim

# Flags of times that tell how busy the machine was, unless they are CPU time.
BUSY = {
    "contended": "contended (other processes used the cores)",
    "oversubscribed": "oversubscribed (more threads than cores)",
}


@dataclass(frozen=True)
class Machine:
    """What the constants of a kernel depend on."""

    processor: str
    device: str
    units: int

    @classmethod
    def of(cls, environment: Mapping[str, Any]) -> Machine:
        """The machine of an environment record; threads are the multiprocessors of a CPU."""
        device = environment.get("device", {})
        name = device.get("name") or environment.get("processor") or "unknown"
        units = device.get("multiprocessors") or device.get("threads") or 0
        return cls(str(name), str(device.get("type")), int(units))

    def __str__(self) -> str:
        of_cpu = f", {self.units} thread{'s' if self.units > 1 else ''}"
        return self.processor + (of_cpu if self.device == "cpu" else "")


@dataclass(frozen=True)
class Measurement:
    """The measured seconds of a case, by phase: medians over all launches of the slowest rank."""

    case: Case
    seconds: Mapping[str, float]


@dataclass
class Measurements:
    """What run directories hold for a calibration.

    Attributes:
        machine: that of the single ranks.
        environments: those of the single ranks.
        single, several: of one rank, and of more.
        left_out: reasons why other records are neither, with their numbers.
    """

    machine: Machine
    environments: Sequence[Mapping[str, Any]]
    single: list[Measurement]
    several: list[Measurement] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def why_left_out(self) -> str:
        """``3 unchecked; 2 contended (…)``."""
        return "; ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())

    def mixer_points(self) -> dict[Key, list[MixerPoint]]:
        """As :meth:`points`, of sequence mixers."""
        groups: dict[Key, list[MixerPoint]] = {}
        for case, seconds in ((one.case, one.seconds) for one in self._of_kind("mixer")):
            operator = implementation(operator_info(case.operator.name), case.operator.kwargs)
            flops = operator.flops(case.problem)
            groups.setdefault(_key(case), []).extend(
                MixerPoint(phase, case.problem, flops[phase], s) for phase, s in seconds.items()
            )
        return groups

    def _of_kind(self, kind: str) -> list[Measurement]:
        """The single ranks of one kind of operators.

        Raises:
            ValueError: for an operator with different parameters, in one line.
        """
        found = [x for x in self.single if operator_info(x.case.operator.name).kind == kind]
        specs: dict[Key, set[str]] = {}
        for one in found:
            specs.setdefault(_key(one.case), set()).add(str(one.case.operator))
        for key, names in specs.items():
            if len(names) > 1:
                raise ValueError(
                    f"{key[0]} was measured with different parameters: {', '.join(sorted(names))}; "
                    "calibrate one of them"
                )
        return found

    def points(self) -> dict[Key, list[Point]]:
        """The timed phases of single ranks of attention, by operator, dtype and head_dim.

        Raises:
            ValueError: for an operator with different parameters, in one line.
        """
        groups: dict[Key, list[Point]] = {}
        for case, seconds in ((one.case, one.seconds) for one in self._of_kind("attention")):
            mask = masks.build_heads(case.mask, case.seq_len, case.num_heads_q)
            if not isinstance(mask, AttnMask):
                self.left_out["a mask that differs from head to head"] += 1
                continue
            points = groups.setdefault(_key(case), [])
            points += [Point(phase, mask, case.problem, s) for phase, s in seconds.items()]
        return groups


def _key(case: Case) -> Key:
    return case.operator.name, case.dtype, case.head_dim


def read_measurements(folders: Sequence[Path]) -> Measurements:
    """Read run directories.

    Raises:
        ValueError: for a folder that is not a run directory, without checked times of a single
            rank, or with those of several machines; in one line.
    """
    names = ", ".join(map(str, folders))
    single: dict[Machine, dict[str, Measurement]] = {}
    several: dict[Machine, dict[str, Measurement]] = {}
    environments: dict[str, Mapping[str, Any]] = {}
    left_out: Counter[str] = Counter()
    for run in map(_read, folders):
        for record in run.records.values():
            environment = run.environments.get(record.environment or "", {})
            machine, case = Machine.of(environment), record.case
            if reason := _unusable(record, machine):
                left_out[reason] += 1
                continue
            measured = Measurement(case, _seconds(run.launches.get(case.id) or [record]))
            if case.world_size > 1:
                several.setdefault(machine, {})[case.id] = measured
                continue
            single.setdefault(machine, {})[case.id] = measured
            environments[record.environment or ""] = environment
    if not single:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        raise ValueError(
            f"{names}: no checked times of a single rank{f' ({why})' if why else ''}; cpbench run "
            "calibration measures them"
        )
    if len(single) > 1:
        machines = "; ".join(sorted(map(str, single)))
        raise ValueError(
            f"{names}: single ranks of several machines ({machines}): give those of one"
        )
    ((machine, cases),) = single.items()
    for other, judged in several.items():
        if other != machine:
            left_out[f"on several ranks of another machine ({other})"] += len(judged)
    return Measurements(
        machine, list(environments.values()), list(cases.values()),
        list(several.get(machine, {}).values()), left_out,
    )  # fmt: skip


def _read(folder: Path) -> Run:
    if not (folder / "records").is_dir():
        raise ValueError(f"{folder} is not a run directory: it has no records folder")
    return read_run(folder)


def _unusable(record: Record, machine: Machine) -> str | None:
    """Why neither a fit nor a judgement may use a record, or None."""
    if reasons := record.disqualifications:
        return reasons[0]
    if record.case.world_size == 1 and record.case.strategy.kwargs:
        return f"of {record.case.strategy}"
    if operator_info(record.case.operator.name).selects:
        return "of operators that select by the data"
    if record.conditions.get("clock") == "cpu":
        return None if machine.units == 1 else "of the CPU time of several threads"
    for flag, reason in BUSY.items():
        if flag in record.flags:
            return reason
    return None


def _seconds(launches: Iterable[Record]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for record in launches:
        for phase in record.times_us:
            times.setdefault(phase, []).extend(slowest_us(record.times_us, (phase,)))
    return {phase: statistics.median(samples) * 1e-6 for phase, samples in times.items()}


def measured_gpu(
    measurements: Measurements, gpus_per_node: int, source: str
) -> tuple[Gpu, dict[str, tuple[float, float]]]:
    """Multiprocessors, memory, and rates of side work, each with the range of what was measured.

    Raises:
        ValueError: if these were not measured, in one line.
    """
    values, ranges = {}, {}
    for name, peak in PEAKS.items():
        found = _peaks(measurements, peak)
        if not found:
            raise ValueError(
                f"the records have no measured {peak}: an earlier version of cpbench wrote them; "
                "measure again"
            )
        values[name], ranges[name] = statistics.median(found), (min(found), max(found))
    environment = measurements.environments[0]
    device = environment.get("device", {})
    memory = device.get("memory_bytes") or environment.get("memory_bytes", 0) / gpus_per_node
    gpu = Gpu(
        source=source, sms=measurements.machine.units, memory_gib=round(memory / 2**30, 2),
        **values,
    )  # fmt: skip
    return gpu, ranges


def measured_host(
    measurements: Measurements, gpu: Gpu, source: str
) -> tuple[HostLink | None, dict[str, tuple[float, float]]]:
    """The links to host memory, with the range of what was measured: of a GPU the slower direction;
    on a CPU, where both are main memory, copies of the CPU.  None if they were not measured.

    Whether GPUs share them, single ranks cannot tell.
    """
    if measurements.machine.device == "cpu":
        rate = gpu.stream_gb_per_s / 2
        link = HostLink(source=source, alpha_us=gpu.launch_us, gb_per_s=rate, overlaps=False)
        return link, {"alpha_us": (link.alpha_us,) * 2, "gb_per_s": (rate, rate)}
    found = {peak: _peaks(measurements, peak) for peak in (TO_DEVICE, TO_HOST, HOST_LATENCY)}
    if not all(found.values()):
        return None, {}
    slower = min(found[TO_DEVICE], found[TO_HOST], key=statistics.median)
    latency = found[HOST_LATENCY]
    link = HostLink(
        source=source, alpha_us=statistics.median(latency), gb_per_s=statistics.median(slower)
    )
    of = {"alpha_us": latency, "gb_per_s": slower}
    return link, {name: (min(measured), max(measured)) for name, measured in of.items()}


def _peaks(measurements: Measurements, name: str) -> list[float]:
    """What was measured of a peak, on each machine state."""
    peaks = (environment.get("peaks", {}) for environment in measurements.environments)
    return [table[name] for table in peaks if name in table]
