"""The tidy table: records as a pandas DataFrame, one row per case, units in column names."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import DTYPE_BYTES, Case
from cpbench.core.spec import Spec, format_size, format_value
from cpbench.reports.columns import (
    BOOLEAN_COLUMNS,
    COLUMNS,
    ERROR_TENSORS,
    INTEGER_COLUMNS,
    TEXT_COLUMNS,
    UNKNOWN_MACHINE,
)
from cpbench.reports.predicted.columns import prediction_columns, prediction_row
from cpbench.results.record import ATTENTION, Record, median_interval, slowest_us
from cpbench.results.store import Run, read_run
from cpbench.sweep.sweep_file import CHOICES, INT_KEYS, SPEC_KEYS

if TYPE_CHECKING:
    import pandas as pd

_CASE_KEYS = (*INT_KEYS, *CHOICES)  # copied from the case as they are


def load(*folders: str | Path) -> pd.DataFrame:
    """Load all cases of one or several run directories as a DataFrame, see ``COLUMNS``.

    Units are in the column names; ``cpbench report --columns`` explains each column.  A case found
    in several directories has one row for each, distinguished by ``run``.

    Warns of damaged lines, which are left out, and of launches that are not pooled.

    Raises:
        FileNotFoundError: when a folder is not a run directory.
    """
    import warnings

    import pandas as pd

    tables = []
    for folder in folders:
        if not (Path(folder) / "records").is_dir():
            raise FileNotFoundError(f"{folder} is not a run directory: it has no records folder")
        run = read_run(Path(folder))
        if run.warnings:
            more = f" (and {len(run.warnings) - 1} more)" if len(run.warnings) > 1 else ""
            warnings.warn(f"{folder}: {run.warnings[0]}{more}", stacklevel=2)
        tables.append(tidy_table(run, str(folder)))
    return pd.concat(tables, ignore_index=True) if tables else tidy_table(Run(), "")


def tidy_table(run: Run, name: str) -> pd.DataFrame:
    """Tidy table of a run; ``name`` fills the column ``run``."""
    import pandas as pd

    machines = {key: _Machine(facts) for key, facts in run.environments.items()}
    unknown = _Machine({})
    rows = [
        _record_row(
            record, run.launches.get(key, ()), machines.get(record.environment or "", unknown)
        )
        | prediction_columns(run.predictions.get(key))
        for key, record in run.records.items()
    ]
    rows += [
        _case_columns(prediction.case) | prediction_row(prediction)
        for key, prediction in run.predictions.items()
        if key not in run.records
    ]
    columns = {c: [row.get(c) for row in rows] for c in COLUMNS if c != "run"}
    typed: dict[str, Any] = {"run": pd.Series([name] * len(rows), dtype=object)}
    for column, values in columns.items():
        if column in TEXT_COLUMNS:
            typed[column] = pd.Series(values, dtype=object)  # str or None
        elif column in INTEGER_COLUMNS:
            typed[column] = pd.array(values, dtype="Int64")
        elif column in BOOLEAN_COLUMNS:
            typed[column] = pd.Series(values, dtype=bool)
        else:  # nan where not measured
            typed[column] = pd.to_numeric(pd.Series(values, dtype=object))
    return pd.DataFrame(typed)


class _Machine:
    """Name, memory and peak rates of the machine, from an environment record."""

    def __init__(self, environment: Mapping[str, Any]) -> None:
        device = environment.get("device", {})
        name = device.get("name") or environment.get("processor")
        self.name = f"{environment.get('host')}, {name}" if environment else UNKNOWN_MACHINE
        self._device_bytes = device.get("memory_bytes")
        self._host_bytes = environment.get("memory_bytes")
        hosts = [rank.get("host") for rank in environment.get("ranks", ())]
        self._ranks_per_host = max((hosts.count(host) for host in set(hosts)), default=1)
        self._peaks: Mapping[str, float] = environment.get("peaks", {})

    def limit_mb(self, device: str) -> float | None:
        """Memory per rank: that of its GPU, or its share of the host's."""
        if device == "cuda":
            return self._device_bytes / 1e6 if self._device_bytes else None
        return self._host_bytes / self._ranks_per_host / 1e6 if self._host_bytes else None

    def peak(self, name: str) -> float | None:
        return self._peaks.get(name)


def _record_row(record: Record, launches: Sequence[Record], machine: _Machine) -> dict[str, Any]:
    case = record.case
    row = _case_columns(case) | {"status": record.status, "reason": record.reason}
    row["computes"] = record.computes
    for key in ("started", "seconds", "environment", "writer", "log"):
        row[key] = getattr(record, key)
    row["machine"], row["clock"] = machine.name, record.conditions.get("clock")
    row["flags"] = " ".join(sorted({flag for launch in launches for flag in launch.flags}
                                   or record.flags))  # fmt: skip
    row["notes"] = "; ".join(sorted({note for launch in launches for note in launch.notes}
                                    or record.notes)) or None  # fmt: skip
    reasons = [reason for one in launches or (record,) for reason in one.disqualifications]
    row["competes"], row["disqualified"] = not reasons, " ".join(dict.fromkeys(reasons)) or None
    row["limit_mb"] = machine.limit_mb(record.conditions.get("device", "cpu"))
    row["gemm_tflops"], row["copy_gb_s"] = machine.peak(case.dtype), machine.peak("copy_gb_s")
    row |= _time_columns(record, launches)
    row |= _error_columns(record)
    row |= _memory_columns(record)
    row |= _traffic_columns(record)
    row |= _exposure_columns(launches)
    row |= _telemetry_columns(record.telemetry)
    row |= _selection_columns(record, launches) | _decoding_columns(record, row)
    row |= _mixer_columns(record, launches)
    row["mask_ms"], row["plan_ms"] = _us_to_ms(record.mask_us), _us_to_ms(record.plan_us)
    row["first_call_ms"] = _us_to_ms(record.first_call_us)
    row["rope_ms"] = _us_to_ms(record.rope_us)
    if record.area is not None:
        pairs = (case.queries or case.seq_len) * case.seq_len
        row["density"] = record.area / (sum(case.lengths) if case.page_size else pairs)
    if record.flops:
        row["intensity"] = sum(record.flops.values()) / _minimal_bytes(case, record.flops)
    if record.balance and sum(record.balance):
        row["imbalance"] = max(record.balance) * len(record.balance) / sum(record.balance)
    return row


def _case_columns(case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {key: getattr(case, key) for key in _CASE_KEYS}
    row["id"] = case.id
    for key in SPEC_KEYS:
        row[key] = str(getattr(case, key))
    row["mask_family"], row["draw"] = _split_mask_seed(case.mask)
    row["placement"], row["computes"] = case.placement or None, ATTENTION
    row["key_lens"] = "+".join(map(format_size, case.key_lens))
    data_files = case.data_content
    row["content"] = _short_hashes(data_files) or "none"
    row["code"] = _short_hashes(file for file in case.content if file not in data_files) or None
    return row


def _time_columns(record: Record, launches: Sequence[Record]) -> dict[str, Any]:
    """Medians, intervals and rates, of all phases together and of each."""
    timed = list(launches) or ([record] if record.times_us else [])
    if not timed:
        return {}
    row: dict[str, Any] = {"launches": len(timed)}
    row["iterations"] = sum(launch.iterations for launch in timed)
    row["evidence"] = json.dumps(
        {launch.writer: [float(f"{us / 1e3:.6g}") for us in launch.turn_medians_us]
         for launch in timed}
    )  # fmt: skip
    phases = tuple(record.times_us)
    slowest = [
        {phase: slowest_us(launch.times_us, (phase,)) for phase in phases} for launch in timed
    ]
    estimates: dict[str, tuple[float, float | None, float | None]] = {}
    for prefix, subset in (("", phases), *((f"{phase}_", (phase,)) for phase in phases)):
        if prefix and len(phases) == 1:
            median, low, high = estimates[""]
        else:
            median, low, high = combine_launches(
                [sum_phases([samples[phase] for phase in subset]) for samples in slowest]
            )
        estimates[prefix] = median, low, high
        row[f"{prefix}ms" if prefix else "time_ms"] = _us_to_ms(median)
        row[f"{prefix}low_ms"], row[f"{prefix}high_ms"] = _us_to_ms(low), _us_to_ms(high)
        flops = sum(record.flops.get(phase, 0) for phase in subset)
        if median and flops:
            row[f"{prefix}tflops_per_rank"] = flops / record.case.world_size / median / 1e6
    median, low, high = estimates[""]
    if low is not None and high is not None and median:
        row["noise"] = (high - low) / 2 / median
    return row


def sum_phases(phases: Sequence[Sequence[float]]) -> Sequence[float]:
    """Sum over phases, per iteration."""
    if len(phases) == 1:
        return phases[0]
    return list(map(sum, zip(*phases, strict=True)))


def combine_launches(
    launches: Sequence[Sequence[float]],
) -> tuple[float, float | None, float | None]:
    """Median and confidence interval from the samples of each launch.

    One launch: the interval of its median.  Launches differ by more than these intervals, so six or
    more give the interval of the median of their medians; fewer give the range from the lowest
    lower end to the highest upper end.
    """
    medians = [statistics.median(samples) for samples in launches]
    if len(launches) == 1:
        return medians[0], *(median_interval(launches[0]) or (None, None))
    interval = median_interval(medians)
    if interval is None:
        intervals = [median_interval(samples) for samples in launches]
        known = [ends for ends in intervals if ends is not None]
        if len(known) == len(intervals):
            interval = min(low for low, _ in known), max(high for _, high in known)
    return statistics.median(medians), *(interval or (None, None))


def _error_columns(record: Record) -> dict[str, float]:
    """Largest error of each tensor over all checks (null in JSON is infinite), and of all."""
    largest: dict[str, float] = {}
    for tensors in record.errors.values():
        for tensor, error in tensors.items():
            value = math.inf if error["rel_l2"] is None else error["rel_l2"]
            largest[tensor] = max(largest.get(tensor, 0.0), value)
    row = {f"error_{tensor}": largest[tensor] for tensor in ERROR_TENSORS if tensor in largest}
    if largest:
        row["worst_error"] = max(largest.values())
    return row


def _memory_columns(record: Record) -> dict[str, float]:
    row, by_kind = {}, record.memory_bytes
    if "inputs" in by_kind:
        row["inputs_mb"] = max(by_kind["inputs"]) / 1e6
    if record.peak_bytes is not None:
        row["peak_mb"] = record.peak_bytes / 1e6
    if "predicted" in by_kind:
        row["predicted_peak_mb"] = max(by_kind["predicted"]) / 1e6
    for kind, column in (("host", "host_peak_mb"), ("predicted_host", "predicted_host_peak_mb")):
        if kind in by_kind:
            row[column] = max(by_kind[kind]) / 1e6
    return row


def _traffic_columns(record: Record) -> dict[str, float | None]:
    sent, across = _per_rank(record.bytes_sent), _per_rank(record.bytes_across)
    row = {
        "sent_mb": _max_over_ranks(sent, 1e6),
        "across_mb": _max_over_ranks(across, 1e6),
        "allgather_mb": _max_over_ranks(_per_rank(record.allgather_bytes), 1e6),
        "predicted_sent_mb": _max_over_ranks(_per_rank(record.predicted_bytes), 1e6),
        "to_device_mb": _max_over_ranks(_per_rank(record.bytes_to_device), 1e6),
        "to_host_mb": _max_over_ranks(_per_rank(record.bytes_to_host), 1e6),
        "predicted_to_device_mb": _max_over_ranks(_per_rank(record.predicted_to_device), 1e6),
        "predicted_to_host_mb": _max_over_ranks(_per_rank(record.predicted_to_host), 1e6),
        "messages": _max_over_ranks(_per_rank(record.messages), 1),
    }
    if len(sent) == len(across):
        inside = [total - other for total, other in zip(sent, across, strict=True)]
        row["inside_mb"] = _max_over_ranks(inside, 1e6)
    if record.largest_message:
        row["largest_message_mb"] = max(record.largest_message.values()) / 1e6
    return row


def _exposure_columns(launches: Sequence[Record]) -> dict[str, float | None]:
    """Exposed and hidden communication: medians over launches."""
    exposures = [launch.exposure for launch in launches if launch.exposure is not None]
    if not exposures:
        return {}
    row: dict[str, float | None] = {
        f"{name}_ms": _us_to_ms(statistics.median(getattr(e, f"{name}_us") for e in exposures))
        for name in ("compute", "transfer", "exposed")
    }
    row["exposed"] = statistics.median(e.exposed for e in exposures)
    spreads = [e.spread for e in exposures if e.spread is not None]
    row["exposed_spread"] = statistics.median(spreads) if spreads else None
    hidden = [e.hidden for e in exposures if e.hidden is not None]
    row["hidden"] = statistics.median(hidden) if hidden else None
    return row


def _telemetry_columns(ranks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    watts = [rank["power_w"]["median"] for rank in ranks if "power_w" in rank]
    reasons = {reason for rank in ranks for reason in rank.get("held_down_by", ())}
    return {
        "power_w": statistics.mean(watts) if watts else None,
        "held_down_by": ", ".join(sorted(reasons)) or None,
    }


def _selection_columns(record: Record, launches: Sequence[Record]) -> dict[str, float | None]:
    """Attention recall of a selector, and the times of its parts: medians over launches."""
    quality = record.quality
    row: dict[str, float | None] = {
        "kept": quality.get("density"), "recovered": quality.get("mass"),
        "best_recovered": quality.get("best_mass"), "out_error": quality.get("out_error"),
        "found": quality.get("found"), "solved": quality.get("solved"),
        "index_recall": quality.get("index_recall"),
        "index_build_ms": _us_to_ms(quality.get("index_build_us")),
        "index_mb": quality["index_bytes"] / 1e6 if "index_bytes" in quality else None,
    }  # fmt: skip
    parts = {"select": "select_ms", "plan": "arrange_ms", "kernel": "kernel_ms"}
    return row | _part_columns(record, launches, parts)


def _mixer_columns(record: Record, launches: Sequence[Record]) -> dict[str, float | None]:
    """Bytes of keys and values, those of the state of a mixer beside them, and the time to
    summarise runs: medians over launches."""
    problem = record.case.problem
    row: dict[str, float | None] = {"kv_mb": problem.kv_bytes(problem.seq_k) / 1e6}
    if record.computes != ATTENTION:
        elements = problem.batch * problem.heads_q * problem.head_dim * problem.value_dim
        row["state_mb"] = elements * DTYPE_BYTES[problem.gate_dtype] / 1e6
    return row | _part_columns(record, launches, {"summarise": "summarise_ms"})


def _part_columns(
    record: Record, launches: Sequence[Record], columns: Mapping[str, str]
) -> dict[str, float | None]:
    """The times of parts of a call, by the column of each: medians over launches."""
    row: dict[str, float | None] = {}
    for part, column in columns.items():
        timed = [launch for launch in launches or (record,) if part in launch.parts_us]
        medians = [statistics.median(slowest_us(launch.parts_us, (part,))) for launch in timed]
        row[column] = _us_to_ms(statistics.median(medians)) if medians else None
    return row


def _decoding_columns(record: Record, row: Mapping[str, Any]) -> dict[str, float | None]:
    """Of decoding: time by token, and how fast visible keys and values are read."""
    case = record.case
    if not case.page_size or not row.get("time_ms") or record.area is None:
        return {}
    us = row["time_ms"] * 1e3
    rate = case.problem.kv_bytes(round(record.area)) / case.world_size / us / 1e3
    copy = row["copy_gb_s"]
    return {
        "token_us": us / case.batch, "kv_gb_s": rate, "stream_share": rate / copy if copy else None
    }  # fmt: skip


def _minimal_bytes(case: Case, phases: Iterable[str]) -> int:
    """Memory traffic in bytes if each tensor is moved once: q, k, v and out forward; these and
    dout, dq, dk and dv backward.  The lse is left out."""
    problem = case.problem
    forward = problem.q_bytes(problem.seq_q) + problem.out_bytes(problem.seq_q)
    forward += problem.kv_bytes(sum(case.lengths) if case.page_size else problem.seq_k)
    return sum({"fwd": forward, "bwd": 2 * forward}[phase] for phase in phases)


def _short_hashes(content: Iterable[tuple[str, str]]) -> str:
    return " ".join(digest[:8] for _, digest in content)


def _split_mask_seed(mask: Spec) -> tuple[str, int | str | None]:
    """Text of a mask without its seed, and the seed."""
    seedless = tuple((key, value) for key, value in mask.params if key != "seed")
    seed = mask.kwargs.get("seed")
    if seed is not None and not isinstance(seed, int):
        seed = format_value(seed)
    return str(Spec(mask.name, seedless)), seed


def _per_rank(by_phase: Mapping[str, list[int]]) -> list[int]:
    """Sum over phases, per rank."""
    return [sum(phases) for phases in zip(*by_phase.values(), strict=True)]


def _max_over_ranks(values: Sequence[int], unit: float) -> float | None:
    return max(values) / unit if values else None


def _us_to_ms(us: float | None) -> float | None:
    return None if us is None else us / 1e3
