"""``cpbench calibrate``: a cluster file from measurements, and how far off it is.

In stages: kernels are fitted to single ranks, links and collectives to ``cpbench links``, side work
has the peaks of the machine.  Records of several ranks are only predicted, never fitted to.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpbench.reports.labels import pluralize
from cpbench.results.store import write_atomically
from cpbench.simulator.calibration.cluster_file import to_toml
from cpbench.simulator.calibration.kernels import KernelFit, fit_kernel
from cpbench.simulator.calibration.links import LinksFit, Measured, fit_links, read_measured
from cpbench.simulator.calibration.mixers import MixerFit, fit_mixer
from cpbench.simulator.calibration.records import (
    BUSY,
    Measurement,
    Measurements,
    measured_gpu,
    measured_host,
    read_measurements,
)
from cpbench.simulator.cluster import Calibrated, Cluster
from cpbench.tools.prediction import predict_each

PERCENTILE = 0.9
KERNEL_CONSTANTS = ("tflops", "tile_us", "empty_us", "tail", "call_us", "full_rate")
MIXER_CONSTANTS = ("tflops", "token_us", "call_us")
ERRORS = {  # of what was not fitted to
    "single_rank": "single ranks, each predicted by constants fitted to others",
    "all_to_all": "all-to-alls of cpbench links, predicted from the rings",
    "several_ranks": "several ranks, none of them fitted to",
}


@dataclass(frozen=True)
class Constant:
    """A constant of a cluster file, for people.

    Attributes:
        table: of the file, such as ``kernels.0.fwd``; of: the same in words.
        name: its key; of a rate of collectives with ``.node`` or ``.across``.
        interval: of 95 %, or the range of what was measured; None where it is not identified.
    """

    table: str
    of: str
    name: str
    value: float
    interval: tuple[float, float] | None

    @property
    def note(self) -> str:
        """The interval in words."""
        if self.interval is None:
            return "not identified"
        low, high = self.interval
        return f"{low:.3g} to {high:.3g}"


@dataclass(frozen=True)
class Judged:
    """One phase of a case of several ranks, measured and predicted, in seconds."""

    case: str
    method: str
    phase: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass
class Calibration:
    """The result: a cluster, its constants, and errors of what was not fitted."""

    cluster: Cluster
    constants: list[Constant]
    unidentified: list[str]
    kernel_errors: list[float]
    all_to_all_errors: list[float]
    judged: list[Judged]
    notes: list[str]

    @property
    def text(self) -> str:
        """The cluster file."""
        notes: dict[str, str] = {}
        for one in self.constants:
            key, _, place = one.name.partition(".")
            before = f"{notes[path]}; " if (path := f"{one.table}.{key}") in notes else ""
            notes[path] = f"{before}{place and place + ' '}{one.note}"
        return to_toml(self.cluster, notes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        return {
            "cluster": self.cluster.name,
            "constants": [
                {"constant": f"{x.table}.{x.name}", "of": x.of, "value": x.value,
                 "low": x.interval and x.interval[0], "high": x.interval and x.interval[1]}
                for x in self.constants
            ],
            "not_identified": self.unidentified,
            "errors": {
                name: {"count": len(values), "median": statistics.median(values),
                       "percentile_90": percentile(values)}
                for name, values in self.errors().items()
            },
            "predicted": [dataclasses.asdict(one) for one in self.judged],
            "notes": self.notes,
        }  # fmt: skip

    def errors(self) -> dict[str, list[float]]:
        """Absolute relative errors of what was not fitted, by kind; kinds without any are not
        among them."""
        kinds = {
            "single_rank": self.kernel_errors,
            "all_to_all": self.all_to_all_errors,
            "several_ranks": [abs(one.error) for one in self.judged],
        }
        return {name: values for name, values in kinds.items() if values}


def calibrate(folders: Sequence[Path], links: Path | None, output: Path) -> Calibration:
    """Fit a cluster, and write its file.

    Args:
        folders: run directories.
        links: file of ``cpbench links --json``; None for a cluster of one rank.
        output: file to write, which ends in .toml.

    Raises:
        ValueError: for what cannot be fitted to, in one line.
        OSError: when a file cannot be read or written.
    """
    measured = read_measured(links) if links else None
    measurements = read_measurements(folders)
    if measured and measured.device != measurements.machine.device:
        raise ValueError(
            f"--links {links} was measured on {measured.device}, the records on "
            f"{measurements.machine.device}: measure both on one device"
        )
    try:
        fitted = _fit(measurements, folders, measured, output.stem)
    except ValueError as error:
        if not measurements.left_out:
            raise
        busy = set(measurements.left_out) & set(BUSY.values())
        advice = ': measure on an idle machine, or in CPU time (clock = "cpu")' if busy else ""
        raise ValueError(f"{error}; left out are {measurements.why_left_out}{advice}") from None
    judge(fitted, measurements.several)
    if measurements.left_out:
        fitted.notes.append(f"records left out: {measurements.why_left_out}")
    write_atomically(output, fitted.text)
    return fitted


def _fit(
    measurements: Measurements, folders: Sequence[Path], measured: Measured | None, name: str
) -> Calibration:
    """The fit, with the errors of single ranks."""
    machine, of_runs = measurements.machine, ", ".join(map(str, folders))
    per_node = measured.ranks_per_node if measured else 1
    peaks = f"peaks of {of_runs} ({machine})"
    gpu, ranges = measured_gpu(measurements, per_node, peaks)
    host, host_ranges = measured_host(measurements, gpu, peaks)
    kernels: list[KernelFit] = []
    for (operator, _, _), points in measurements.points().items():
        source = f"{len(points)} times of single ranks in {of_runs} ({machine})"
        kernels.append(fit_kernel(points, operator, gpu, source))
    mixers = [
        fit_mixer(points, operator, f"{len(points)} times of single ranks in {of_runs} ({machine})")
        for (operator, _, _), points in measurements.mixer_points().items()
    ]
    links = fit_links(measured, f"cpbench links: {measured.path}") if measured else None
    fits: list[KernelFit | MixerFit] = [*kernels, *mixers]
    errors = [error for fit in fits for error in fit.errors]
    cluster = Cluster(
        name=name, gpus_per_node=per_node, gpu=gpu,
        kernels=tuple(kernel.costs for kernel in kernels),
        mixers=tuple(mixer.costs for mixer in mixers),
        calibrated=Calibrated(
            source=f"{len(errors)} times of {ERRORS['single_rank']}",
            ranks=measured.ranks if measured else 1,
            tokens=max(one.case.seq_len for one in measurements.single),
            median_error=statistics.median(errors), percentile_90_error=percentile(errors),
        ),
        links={**(links.links if links else {}), **({"host": host} if host else {})},
        collectives=links.collectives if links else None,
    )  # fmt: skip
    constants = [
        Constant("gpu", "side work", key, getattr(gpu, key), low_high)
        for key, low_high in ranges.items()
    ]
    constants += [
        Constant("links.host", "links.host", key, getattr(host, key), low_high)
        for key, low_high in host_ranges.items()
    ]
    constants += _kernel_constants("kernels", kernels, KERNEL_CONSTANTS)
    constants += _kernel_constants("mixers", mixers, MIXER_CONSTANTS)
    constants += _link_constants(links) if links else []
    unidentified = [f"{one.of} {one.name}" for one in constants if one.interval is None]
    unidentified += ["links.host gb_per_s"] if host is None else []
    unidentified += [
        f"{_describe(kernel)} grid" for kernel in kernels if "grid" in kernel.unidentified
    ]
    return Calibration(
        cluster, constants, unidentified, errors, links.all_to_all if links else [], [], []
    )


def _describe(kernel: KernelFit | MixerFit) -> str:
    costs = kernel.costs
    return f"{costs.operators[0]} {costs.dtype} {costs.head_dim}"


def _kernel_constants(
    table: str, kernels: Sequence[KernelFit | MixerFit], names: Sequence[str]
) -> list[Constant]:
    constants = []
    for index, kernel in enumerate(kernels):
        for phase, fit in kernel.fits.items():
            costs = kernel.costs.fwd if phase == "fwd" else kernel.costs.bwd
            for name in names:
                known = f"{phase}.{name}" not in kernel.unidentified
                constants.append(
                    Constant(
                        f"{table}.{index}.{phase}", f"{_describe(kernel)} {phase}", name,
                        getattr(costs, name), fit.intervals[name] if known else None,
                    )
                )  # fmt: skip
    return constants


def _link_constants(links: LinksFit) -> list[Constant]:
    constants = []
    for table, fit in links.fits.items():
        for name, value in fit.constants.items():
            interval = None if name in fit.unidentified else fit.intervals[name]
            constants.append(Constant(table, table, name, value, interval))
    return constants


def judge(fitted: Calibration, several: Sequence[Measurement]) -> None:
    """Predict cases of several ranks with a fit, and replace its errors by theirs, if there are
    any that it can predict."""
    refused, cases = Counter[str](), {one.case: one.seconds for one in several}
    with tempfile.TemporaryDirectory(prefix="cpbench-calibrate-") as folder:
        file = Path(folder) / f"{fitted.cluster.name}.toml"
        file.write_text(fitted.text, encoding="utf-8")
        for case, reply in predict_each(
            list(cases) if fitted.cluster.collectives else [], str(file)
        ):
            if isinstance(reply, ValueError):
                refused[str(reply)] += 1
                continue
            method = f"{case.strategy}/{case.layout} x{case.world_size}"
            fitted.judged += [
                Judged(case.label, method, phase, seconds, reply["phases"][phase]["seconds"])
                for phase, seconds in cases[case].items()
            ]
    fitted.notes += [f"{pluralize(n, 'case')} not predicted: {why}" for why, n in refused.items()]
    if several and fitted.cluster.collectives is None:
        fitted.notes.append("records of several ranks are not predicted without --links")
    if not fitted.judged:
        return
    errors, known = [abs(one.error) for one in fitted.judged], fitted.cluster.calibrated
    calibrated = dataclasses.replace(
        known,
        source=f"{pluralize(len(errors), 'time')} of several ranks, none of them fitted to",
        ranks=max(known.ranks, *(one.case.world_size for one in several)),
        tokens=max(known.tokens, *(one.case.seq_len // one.case.world_size for one in several)),
        median_error=statistics.median(errors),
        percentile_90_error=percentile(errors),
    )
    fitted.cluster = dataclasses.replace(fitted.cluster, calibrated=calibrated)


def percentile(errors: Sequence[float]) -> float:
    """The 90th percentile of errors."""
    return float(np.quantile(errors, PERCENTILE))
