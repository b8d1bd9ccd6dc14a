"""Records as one tidy pandas table: a row a case, columns with units."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.record import Record, median_interval, slowest_us
from cpbench.spec import Spec, format_value
from cpbench.store import read_run

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "id": "case id",
    "status": "ok, unsupported, oom, wrong, crash or timeout",
    "reason": "why the status is not ok",
    "operator": "operator with its parameters",
    "strategy": "context-parallel strategy with its parameters",
    "layout": "which rank owns which tokens",
    "mask": "mask with its parameters",
    "mask_family": "mask without its seed: what its draws have in common",
    "draw": "the mask's seed, empty where it has none",
    "batch": "sequences",
    "seq_len": "tokens of a sequence",
    "queries": "the last so many tokens alone attend; 0 is all",
    "num_heads_q": "query heads",
    "num_heads_kv": "key/value heads",
    "head_dim": "of queries, keys and values",
    "dtype": "of inputs and outputs",
    "direction": "fwd, bwd or fwd_bwd: what the time covers",
    "world_size": "ranks",
    "ranks_per_node": "ranks that share a node; 0 is as the launcher places them",
    "placement": "axis of the strategy's mesh that lies inside a node, empty for its own choice",
    "seed": "of the inputs (the mask's is draw)",
    "content": "hashes of the files that the case is made from",
    "machine": "host and device",
    "time_ms": "median over iterations of the slowest rank",
    "fwd_ms": "the forward part alone",
    "bwd_ms": "the backward part alone",
    "low_ms": "lower end of the nominal 95 % interval of the median",
    "high_ms": "its upper end",
    "noise": "half-width of the 95 % interval of the median, relative",
    "iterations": "timed iterations",
    "tflops_per_rank": "TFLOP/s of each rank, from the mask's exact area",
    "density": "visible pairs over all pairs",
    "imbalance": "largest over mean visible pairs of a rank",
    "mask_ms": "building the mask, slowest rank",
    "plan_ms": "planning, slowest rank",
    "first_call_ms": "first call, with compilation, slowest rank",
    "peak_mb": "largest over ranks of what is held beside the inputs: plan and peak, 10^6 bytes",
    "predicted_peak_mb": "largest over ranks of what the strategy's own code needs, the operator's "
    "temporaries left out",
    "inputs_mb": "largest over ranks of the inputs",
    "sent_mb": "largest over ranks of the bytes sent",
    "predicted_sent_mb": "the same according to the trace of the plan",
    "across_mb": "largest over ranks of the bytes sent to other nodes",
    "messages": "largest over ranks of the messages sent",
    "largest_message_mb": "largest of any rank",
    "power_w": "median power of a rank's GPU while it was timed, mean over ranks",
    "held_down_by": "what held GPU clocks down meanwhile, of any rank",
    "worst_error": "largest relative L2 error of any tensor against float64",
    "flags": "caveats",
    "started": "seconds since the epoch",
    "seconds": "the whole case, checks included",
    "environment": "id of the environment",
    "writer": "who wrote the record",
    "log": "what the failing rank printed",
}
UNKNOWN = "unknown"  # a machine
TEXTS = (
    "id",
    "status",
    "reason",
    "operator",
    "strategy",
    "layout",
    "mask",
    "mask_family",
    "draw",
    "dtype",
    "direction",
    "placement",
    "content",
    "machine",
    "held_down_by",
    "flags",
    "environment",
    "writer",
    "log",
)


def load(*folders: str | Path) -> pd.DataFrame:
    """Every case of some run directories as a DataFrame with the columns of ``COLUMNS``.

    Raises:
        FileNotFoundError: when a folder is no run directory.
    """
    records: list[Record] = []
    environments: dict[str, dict[str, Any]] = {}
    for folder in folders:
        if not (Path(folder) / "records").is_dir():
            raise FileNotFoundError(f"{folder} is not a run directory: it has no records folder")
        run = read_run(Path(folder))
        records += run.records.values()
        environments |= run.environments
    return frame(records, environments)


def frame(
    records: Iterable[Record], environments: Mapping[str, dict[str, Any]] | None = None
) -> pd.DataFrame:
    """The tidy table of some records."""
    import pandas as pd

    rows = [_row(record, environments or {}) for record in records]
    table = pd.DataFrame(rows, columns=list(COLUMNS), dtype=object)  # a text is a str or None
    numbers = [column for column in COLUMNS if column not in TEXTS]
    table[numbers] = table[numbers].apply(pd.to_numeric)  # what nobody measured is nan, not None
    return table.astype({"iterations": "Int64"})


def _row(record: Record, environments: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    case = record.case
    row: dict[str, Any] = {"id": case.id, "status": record.status, "reason": record.reason}
    for key in ("operator", "strategy", "layout", "mask"):
        row[key] = str(getattr(case, key))
    row["mask_family"], row["draw"] = _family(case.mask)
    for key in (
        "batch",
        "seq_len",
        "queries",
        "num_heads_q",
        "num_heads_kv",
        "head_dim",
        "dtype",
        "direction",
        "world_size",
        "ranks_per_node",
        "seed",
    ):
        row[key] = getattr(case, key)
    row["placement"] = case.placement or None
    watts = [told["power_w"]["median"] for told in record.telemetry if "power_w" in told]
    row["power_w"] = statistics.mean(watts) if watts else None
    reasons = {reason for told in record.telemetry for reason in told.get("held_down_by", ())}
    row["held_down_by"] = ", ".join(sorted(reasons)) or None
    for key in ("started", "seconds", "environment", "writer", "log"):
        row[key] = getattr(record, key)
    environment = environments.get(record.environment or "", {})
    device = environment.get("device", {}).get("name") or environment.get("processor")
    row["machine"] = f"{environment.get('host')}, {device}" if environment else UNKNOWN
    row["content"] = " ".join(digest[:8] for _, digest in case.content) or "none"
    interval = median_interval(record.samples_us)
    row["low_ms"], row["high_ms"] = map(_ms, interval or (None, None))
    row["flags"] = " ".join(record.flags)
    row["worst_error"] = record.worst_error
    row["noise"] = record.noise
    row["iterations"] = len(record.samples_us) or None
    row["tflops_per_rank"] = record.tflops_per_rank
    row["time_ms"] = _ms(record.median_us)
    for phase in record.times_us:
        row[f"{phase}_ms"] = _ms(_median(slowest_us(record.times_us, (phase,))))
    if record.area is not None:
        row["density"] = record.area / (case.queries or case.seq_len) / case.seq_len
    if record.balance and sum(record.balance):
        row["imbalance"] = max(record.balance) * len(record.balance) / sum(record.balance)
    row["mask_ms"], row["plan_ms"] = _ms(record.mask_us), _ms(record.plan_us)
    row["first_call_ms"] = _ms(record.first_call_us)
    held = record.memory_bytes
    if "inputs" in held:
        row["inputs_mb"] = max(held["inputs"]) / 1e6
    if "peak" in held:
        kinds = [held[kind] for kind in ("plan", "saved", "peak") if kind in held]
        row["peak_mb"] = max(map(sum, zip(*kinds, strict=True))) / 1e6
    if "predicted" in held:
        row["predicted_peak_mb"] = max(held["predicted"]) / 1e6
    row["sent_mb"] = _largest(record.bytes_sent, 1e6)
    row["predicted_sent_mb"] = _largest(record.predicted_bytes, 1e6)
    row["across_mb"] = _largest(record.bytes_across, 1e6)
    row["messages"] = _largest(record.messages, 1)
    if record.largest_message:
        row["largest_message_mb"] = max(record.largest_message.values()) / 1e6
    return row


def _family(mask: Spec) -> tuple[str, int | str | None]:
    """A mask's text without its seed, and the seed."""
    rest = tuple((key, value) for key, value in mask.params if key != "seed")
    seed = mask.kwargs.get("seed")
    if seed is not None and not isinstance(seed, int):
        seed = format_value(seed)
    return str(Spec(mask.name, rest)), seed


def _largest(by_phase: Mapping[str, list[int]], unit: float) -> float | None:
    """Of the sums over phases, that of the rank with the most."""
    per_rank = [sum(phases) for phases in zip(*by_phase.values(), strict=True)]
    return max(per_rank) / unit if per_rank else None


def _ms(us: float | None) -> float | None:
    return None if us is None else us / 1e3


def _median(samples: list[float]) -> float | None:
    return statistics.median(samples) if samples else None
