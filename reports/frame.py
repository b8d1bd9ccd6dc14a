"""Records as one tidy pandas table: a row a case, columns with units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.problem import Case
from cpbench.core.spec import Spec, format_value
from cpbench.reports.columns import COLUMNS, ERRORS, TEXTS, UNKNOWN, WHOLE
from cpbench.results.record import Record, median_interval, slowest_us
from cpbench.results.store import Run, read_run
from cpbench.sweep.sweep_file import CHOICES, INT_KEYS, SPEC_KEYS

if TYPE_CHECKING:
    import pandas as pd

_SAME = (*INT_KEYS, *CHOICES)  # in a case as in the table


def load(*folders: str | Path) -> pd.DataFrame:
    """Every case of some run directories as a DataFrame with the columns of ``COLUMNS``.

    Units are in the columns' names; ``cpbench report --columns`` explains each.  A case that is in
    several directories has a row for each, told apart by ``run``.

    Raises:
        FileNotFoundError: when a folder is no run directory.
    """
    import pandas as pd

    tables = []
    for folder in folders:
        if not (Path(folder) / "records").is_dir():
            raise FileNotFoundError(f"{folder} is not a run directory: it has no records folder")
        tables.append(frame(read_run(Path(folder)), str(folder)))
    return pd.concat(tables, ignore_index=True) if tables else frame(Run(), "")


def frame(run: Run, name: str) -> pd.DataFrame:
    """The tidy table of a run that is called ``name``."""
    import pandas as pd

    machines = {key: _Machine(told) for key, told in run.environments.items()}
    nowhere = _Machine({})
    rows = [
        _row(record, run.launches.get(key, ()), machines.get(record.environment or "", nowhere))
        for key, record in run.records.items()
    ]
    found = {c: [row.get(c) for row in rows] for c in COLUMNS if c != "run"}
    table = pd.DataFrame({"run": pd.Series([name] * len(rows), dtype=object)})
    for column, values in found.items():
        if column in TEXTS:
            table[column] = pd.Series(values, dtype=object)  # a text is a str or None
        elif column in WHOLE:
            table[column] = pd.array(values, dtype="Int64")
        else:  # what nobody measured is nan, not None
            table[column] = pd.to_numeric(pd.Series(values, dtype=object))
    return table


class _Machine:
    """What an environment says of all records that were made in it."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        device = told.get("device", {})
        name = device.get("name") or told.get("processor")
        self.name = f"{told.get('host')}, {name}" if told else UNKNOWN
        self._limit = device.get("memory_bytes")
        self._shared = told.get("memory_bytes")
        hosts = [rank.get("host") for rank in told.get("ranks", ())]
        self._sharers = max((hosts.count(host) for host in set(hosts)), default=1)
        self._peaks: Mapping[str, float] = told.get("peaks", {})

    def limit_mb(self, device: str) -> float | None:
        """Memory for each rank: its GPU's, or its share of the machine's."""
        if device == "cuda":
            return self._limit / 1e6 if self._limit else None
        return self._shared / self._sharers / 1e6 if self._shared else None

    def peak(self, name: str) -> float | None:
        return self._peaks.get(name)


def _row(record: Record, launches: Sequence[Record], machine: _Machine) -> dict[str, Any]:
    case = record.case
    row: dict[str, Any] = {key: getattr(case, key) for key in _SAME}
    row |= {"id": case.id, "status": record.status, "reason": record.reason}
    for key in SPEC_KEYS:
        row[key] = str(getattr(case, key))
    row["mask_family"], row["draw"] = _family(case.mask)
    row["placement"] = case.placement or None
    data = case.data_content
    row["content"] = _digests(data) or "none"
    row["code"] = _digests(pair for pair in case.content if pair not in data) or None
    for key in ("started", "seconds", "environment", "writer", "log"):
        row[key] = getattr(record, key)
    row["machine"], row["clock"] = machine.name, record.conditions.get("clock")
    row["flags"] = " ".join(sorted({flag for one in launches for flag in one.flags}
                                   or record.flags))  # fmt: skip
    row["limit_mb"] = machine.limit_mb(record.conditions.get("device", "cpu"))
    row["gemm_tflops"], row["copy_gb_s"] = machine.peak(case.dtype), machine.peak("copy_gb_s")
    row |= _times(record, launches)
    row |= _errors(record)
    row |= _memory(record)
    row |= _traffic(record)
    row |= _exposure(launches)
    row |= _telemetry(record.telemetry)
    row |= _choice(record, launches)
    row["mask_ms"], row["plan_ms"] = _ms(record.mask_us), _ms(record.plan_us)
    row["first_call_ms"] = _ms(record.first_call_us)
    if record.area is not None:
        row["density"] = record.area / (case.queries or case.seq_len) / case.seq_len
    if record.flops:
        row["intensity"] = sum(record.flops.values()) / _least_moved(case, record.flops)
    if record.balance and sum(record.balance):
        row["imbalance"] = max(record.balance) * len(record.balance) / sum(record.balance)
    return row


def _times(record: Record, launches: Sequence[Record]) -> dict[str, Any]:
    """Medians and intervals, in all and by phase."""
    made = list(launches) or ([record] if record.times_us else [])
    if not made:
        return {}
    row: dict[str, Any] = {"launches": len(made)}
    row["iterations"] = sum(one.iterations for one in made)
    phases = tuple(record.times_us)
    slowest = [{phase: slowest_us(one.times_us, (phase,)) for phase in phases} for one in made]
    ends: dict[str, tuple[float, float | None, float | None]] = {}
    for name, wanted in (("", phases), *((f"{phase}_", (phase,)) for phase in phases)):
        if name and len(phases) == 1:
            middle, low, high = ends[""]
        else:
            middle, low, high = combined([added([one[p] for p in wanted]) for one in slowest])
        ends[name] = middle, low, high
        row[f"{name}ms" if name else "time_ms"] = _ms(middle)
        row[f"{name}low_ms"], row[f"{name}high_ms"] = _ms(low), _ms(high)
        flops = sum(record.flops.get(phase, 0) for phase in wanted)
        if middle and flops:
            row[f"{name}tflops_per_rank"] = flops / record.case.world_size / middle / 1e6
    middle, low, high = ends[""]
    if low is not None and high is not None and middle:
        row["noise"] = (high - low) / 2 / middle
    return row


def added(phases: Sequence[Sequence[float]]) -> Sequence[float]:
    """Sums over phases by iteration."""
    if len(phases) == 1:
        return phases[0]
    return list(map(sum, zip(*phases, strict=True)))


def combined(launches: Sequence[Sequence[float]]) -> tuple[float, float | None, float | None]:
    """Median and interval from the samples of each launch.

    One launch has the interval of its own median.  Several differ by more than that says: six or
    more have the interval of the median of their medians, fewer reach from the least lower end to
    the largest upper one.
    """
    middles = [statistics.median(samples) for samples in launches]
    if len(launches) == 1:
        return middles[0], *(median_interval(launches[0]) or (None, None))
    interval = median_interval(middles)
    if interval is None:
        each = [median_interval(samples) for samples in launches]
        known = [ends for ends in each if ends is not None]
        if len(known) == len(each):
            interval = min(low for low, _ in known), max(high for _, high in known)
    return statistics.median(middles), *(interval or (None, None))


def _errors(record: Record) -> dict[str, float]:
    """The largest of each tensor in any check (null in JSON is infinite), and of all."""
    found: dict[str, float] = {}
    for tensors in record.errors.values():
        for tensor, error in tensors.items():
            value = math.inf if error["rel_l2"] is None else error["rel_l2"]
            found[tensor] = max(found.get(tensor, 0.0), value)
    row = {f"error_{tensor}": found[tensor] for tensor in ERRORS if tensor in found}
    if found:
        row["worst_error"] = max(found.values())
    return row


def _memory(record: Record) -> dict[str, float]:
    row, held = {}, record.memory_bytes
    if "inputs" in held:
        row["inputs_mb"] = max(held["inputs"]) / 1e6
    if record.peak_bytes is not None:
        row["peak_mb"] = record.peak_bytes / 1e6
    if "predicted" in held:
        row["predicted_peak_mb"] = max(held["predicted"]) / 1e6
    return row


def _traffic(record: Record) -> dict[str, float | None]:
    sent, across = _per_rank(record.bytes_sent), _per_rank(record.bytes_across)
    row = {
        "sent_mb": _largest(sent, 1e6),
        "across_mb": _largest(across, 1e6),
        "predicted_sent_mb": _largest(_per_rank(record.predicted_bytes), 1e6),
        "messages": _largest(_per_rank(record.messages), 1),
    }
    if len(sent) == len(across):
        row["inside_mb"] = _largest([a - b for a, b in zip(sent, across, strict=True)], 1e6)
    if record.largest_message:
        row["largest_message_mb"] = max(record.largest_message.values()) / 1e6
    return row


def _exposure(launches: Sequence[Record]) -> dict[str, float | None]:
    """Medians over launches."""
    known = [one.exposure for one in launches if one.exposure is not None]
    if not known:
        return {}
    row: dict[str, float | None] = {
        f"{name}_ms": _ms(statistics.median(getattr(one, f"{name}_us") for one in known))
        for name in ("compute", "transfer", "exposed")
    }
    row["exposed"] = statistics.median(one.exposed for one in known)
    spreads = [one.spread for one in known if one.spread is not None]
    row["exposed_spread"] = statistics.median(spreads) if spreads else None
    hidden = [one.hidden for one in known if one.hidden is not None]
    row["hidden"] = statistics.median(hidden) if hidden else None
    return row


def _telemetry(ranks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    watts = [told["power_w"]["median"] for told in ranks if "power_w" in told]
    reasons = {reason for told in ranks for reason in told.get("held_down_by", ())}
    return {
        "power_w": statistics.mean(watts) if watts else None,
        "held_down_by": ", ".join(sorted(reasons)) or None,
    }


def _choice(record: Record, launches: Sequence[Record]) -> dict[str, float | None]:
    """What an operator chose is worth, and where its time goes: medians over launches."""
    told = record.quality
    row: dict[str, float | None] = {
        "kept": told.get("density"), "recovered": told.get("mass"),
        "best_recovered": told.get("best_mass"), "out_error": told.get("out_error"),
    }  # fmt: skip
    made = [one for one in launches or (record,) if one.parts_us]
    for part, column in (("select", "select_ms"), ("plan", "arrange_ms"), ("kernel", "kernel_ms")):
        known = [statistics.median(slowest_us(one.parts_us, (part,))) for one in made]
        row[column] = _ms(statistics.median(known)) if known else None
    return row


def _least_moved(case: Case, phases: Iterable[str]) -> int:
    """Bytes of what each phase reads and writes, each once: q, k, v and out; then also dout, dq,
    dk and dv.  The lse is left out."""
    problem = case.problem
    q, kv = problem.q_bytes(problem.seq_q), problem.kv_bytes(problem.seq_k)
    return sum({"fwd": 2 * q + kv, "bwd": 4 * q + 2 * kv}[phase] for phase in phases)


def _digests(content: Iterable[tuple[str, str]]) -> str:
    return " ".join(digest[:8] for _, digest in content)


def _family(mask: Spec) -> tuple[str, int | str | None]:
    """A mask's text without its seed, and the seed."""
    rest = tuple((key, value) for key, value in mask.params if key != "seed")
    seed = mask.kwargs.get("seed")
    if seed is not None and not isinstance(seed, int):
        seed = format_value(seed)
    return str(Spec(mask.name, rest)), seed


def _per_rank(by_phase: Mapping[str, list[int]]) -> list[int]:
    """Sums over phases."""
    return [sum(phases) for phases in zip(*by_phase.values(), strict=True)]


def _largest(ranks: Sequence[int], unit: float) -> float | None:
    return max(ranks) / unit if ranks else None


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1e3
