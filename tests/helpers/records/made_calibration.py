"""Measurements that follow from known constants: records of single ranks, and links."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from made_records import record

from cpbench import masks
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter
from cpbench.simulator.calibration.kernels import Point
from cpbench.simulator.cluster import Cluster, from_table
from cpbench.simulator.costs import kernel_seconds

PHASE = {"tile": [128, 64], "tflops": 20, "tile_us": 6, "empty_us": 2, "tail": 0.5, "call_us": 30,
         "full_rate": 0.9}  # fmt: skip
TABLE: dict[str, Any] = {
    "name": "known", "gpus_per_node": 2,
    "calibrated": {"source": "-", "ranks": 4, "tokens": 8192, "median_error": 0,
                   "percentile_90_error": 0},
    "gpu": {"source": "-", "sms": 16, "memory_gib": 8, "stream_gb_per_s": 200,
            "gather_gb_per_s": 100, "scatter_gb_per_s": 25, "launch_us": 3},
    "kernels": [{"source": "-", "operators": ["bands"], "dtype": "bfloat16", "head_dim": 64,
                 "grid": "slices", "fwd": PHASE,
                 "bwd": {**PHASE, "tile": [64, 128], "tflops": 15, "tile_us": 9}}],
    "links": {"host": {"source": "-", "alpha_us": 9, "gb_per_s": 50},
              "node": {"source": "-", "alpha_us": 12, "gb_per_s": 40},
              "across": {"source": "-", "alpha_us": 30, "gb_per_s": 8, "per_node": 1}},
    "collectives": {"source": "-", "alpha_us": 25, "all_gather": [30, 6],
                    "reduce_scatter": [28, 5], "all_reduce": [26, 4]},
}  # fmt: skip
KNOWN = from_table(TABLE)
ENVIRONMENT = {
    "host": "made", "processor": "a processor", "memory_bytes": 16 << 30,
    "device": {"type": "cuda", "name": "a GPU", "multiprocessors": 16, "memory_bytes": 8 << 30},
    "peaks": {"float32": 1.0, "copy_gb_s": 200.0, "gather_gb_s": 100.0, "scatter_gb_s": 25.0,
              "launch_us": 3.0, "to_device_gb_s": 55.0, "to_host_gb_s": 50.0, "host_copy_us": 9.0},
}  # fmt: skip
HEADS = ((16, 4), (4, 1), (1, 1))
DENSE = ("full", "causal")
DOCUMENTS = tuple(
    f"{kind}_document:doc_lens=[{lengths}]"
    for kind in ("full", "causal")
    for lengths in ("1000,500,548", "1900,20,28,60,40", "512,512,512,512")
)


def single_rank_records(
    patterns: tuple[str, ...] = (*DENSE, *DOCUMENTS), cluster: Cluster = KNOWN, **fields: Any
) -> list[Record]:
    """Records of single ranks that take as long as the kernel of a cluster says.

    Args:
        fields: of all cases and records.
    """
    records = []
    for pattern, heads, tokens in itertools.product(patterns, HEADS, (512, 1024, 2048, 4096)):
        if "document" in pattern and tokens != 2048:
            continue
        one = record(
            "bands", mask=pattern, seq_len=tokens, num_heads_q=heads[0], num_heads_kv=heads[1],
            head_dim=64, dtype="bfloat16", **{"environment": "made", **fields},
        )  # fmt: skip
        mask = masks.build(one.case.mask, tokens)
        for phase in ("fwd", "bwd"):
            kernel = Point(phase, mask, one.case.problem, 0.0).kernel(cluster.kernels[0].tiling)
            microseconds = kernel_seconds(kernel, cluster.kernels[0], cluster.gpu) * 1e6
            one.times_us[phase] = [[microseconds] * 3]
        records.append(one)
    return records


def write_records(
    folder: Path, records: list[Record], environments: dict[str, dict[str, Any]] | None = None
) -> Path:
    """A run directory with these records."""
    with RecordWriter(folder / "records" / "w.jsonl") as writer:
        for name, environment in (environments or {"made": ENVIRONMENT}).items():
            writer.append({"kind": "environment", "id": name, **environment})
        for one in records:
            writer.append(one.to_json())
    return folder


def links_table(cluster: Cluster = KNOWN) -> dict[str, Any]:
    """What ``cpbench links --json`` would print for the links of a cluster, two nodes of two."""
    node, across, collectives = cluster.links["node"], cluster.links["across"], cluster.collectives
    assert collectives is not None
    rates = {
        ("node", "ring"): (node.alpha_us, node.gb_per_s),
        ("node", "all_to_all"): (node.alpha_us, node.gb_per_s),
        ("across", "ring"): (across.alpha_us, across.gb_per_s),
        ("all", "cross"): (across.alpha_us, across.gb_per_s / 2),  # one link for two ranks
    }
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        inside, outside = getattr(collectives, name)
        rates["node", name] = collectives.alpha_us, inside
        rates["all", name] = collectives.alpha_us, outside
    rows = []
    for (link, operation), (alpha_us, gb_per_s) in rates.items():
        for nbytes in (8, 1 << 15, 1 << 20, 1 << 26):
            us = alpha_us + nbytes / gb_per_s / 1e3
            rows.append({"link": link, "operation": operation, "bytes": nbytes, "ranks": 2,
                         "us": us, "busbw": nbytes / us / 1e3})  # fmt: skip
    return {"ranks": 4, "ranks_per_node": 2, "device": {"type": "cuda"}, "complete": True,
            "rows": rows}  # fmt: skip


def write_links(path: Path, **changes: Any) -> Path:
    """A file of :func:`links_table`, with other values of some keys."""
    path.write_text(json.dumps(links_table() | changes), encoding="utf-8")
    return path


def two_ranks(mask: str = "causal", **fields: Any) -> Record:
    """A record of a ring of two ranks, that took a second for each phase."""
    one = single_rank_records((mask,), strategy="ring", layout="zigzag", world_size=2, **fields)[0]
    return dataclasses.replace(one, times_us={phase: [[1e6]] * 2 for phase in ("fwd", "bwd")})
