"""``cpbench traffic``: the communication, work and memory of every rank of a case, predicted.

The strategy's own code runs on tensors without data (``cpbench.parallel.trace``), in a few
subprocesses with a share of the ranks each, since this one loads no torch.
"""

from __future__ import annotations

import json
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.core.problem import Case
from cpbench.core.subprocess_call import read_reply, subprocesses


def predict_traffic(case: Case) -> dict[str, Any]:
    """The communication volume, work and buffers of a case: what ``cpbench traffic --json`` prints.

    Values named ``…_per_rank`` are lists with one entry per rank: bytes, messages, or the area of
    the computed (query, key) pairs per head.

    Raises:
        RequestRefused: if the strategy cannot run this case; the reason in one line.
    """
    size = case.world_size
    shares = min(usable_cores(), 1 + size // 32)
    sampled = sorted({0, size - 1})  # ranks whose memory is traced, which is slow
    requests = [
        {
            "case": case.to_json(),
            "ranks": list(range(share, size, shares)),
            "buffers": sampled[share::shares],
        }
        for share in range(shares)
    ]
    with subprocesses("cpbench.parallel.trace_ranks", requests) as processes:
        replies = [json.loads(read_reply(process, "tracing")) for process in processes]
    return _summarise(case, replies)


def _summarise(case: Case, replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the traces of all ranks, in subprocess replies of some ranks each."""
    rows = {int(rank): row for reply in replies for rank, row in reply["ranks"].items()}
    ranks = [rows[rank] for rank in range(case.world_size)]
    phases = {
        phase: {
            "bytes_sent_per_rank": [
                r[phase]["same_node"] + r[phase]["across_nodes"] for r in ranks
            ],
            "bytes_same_node_per_rank": [r[phase]["same_node"] for r in ranks],
            "bytes_across_nodes_per_rank": [r[phase]["across_nodes"] for r in ranks],
            "messages_per_rank": [r[phase]["messages"] for r in ranks],
            "largest_message_bytes": max(r[phase]["largest"] for r in ranks),
            "area_per_rank": [r[phase]["pairs"] / case.num_heads_q for r in ranks],
        }
        for phase in ranks[0]
    }
    per_rank = [
        key for key in next(iter(phases.values())) if key.endswith("per_rank") and "area" not in key
    ]
    summed = {
        key: [sum(values) for values in zip(*(p[key] for p in phases.values()), strict=True)]
        for key in per_rank
    }
    buffers = {rank: n for reply in replies for rank, n in reply["buffers"].items()}
    first = next(iter(phases.values()))["area_per_rank"]
    return {
        "strategy": str(case.strategy),
        "layout": str(case.layout),
        "mask": str(case.mask),
        "placement": case.placement,
        **{
            key: getattr(case, key)
            for key in (
                "seq_len", "world_size", "batch", "num_heads_q", "num_heads_kv", "head_dim",
                "dtype", "direction",
            )
        },
        "gpus_per_node": case.ranks_per_node,
        "local_tokens": replies[0]["local_tokens"],
        "area": replies[0]["area"],
        **summed,
        "bytes_by_link": {
            "same_node": sum(summed["bytes_same_node_per_rank"]),
            "across_nodes": sum(summed["bytes_across_nodes_per_rank"]),
        },
        "largest_message_bytes": max(p["largest_message_bytes"] for p in phases.values()),
        "area_per_rank": first,
        "imbalance": max(first) * len(first) / sum(first) if sum(first) else None,
        "buffers_bytes": {rank: buffers[rank] for rank in sorted(buffers, key=int)},
        "phases": phases,
    }  # fmt: skip


def table(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for a terminal: one per phase and one for all, with the total and maximum over ranks."""
    phases = dict(prediction["phases"])
    if len(phases) > 1:
        phases["all"] = prediction
    return [
        {
            "phase": name,
            "total MB": f"{sum(phase['bytes_sent_per_rank']) / 1e6:,.2f}",
            "max MB per rank": f"{max(phase['bytes_sent_per_rank']) / 1e6:,.2f}",
            "MB across nodes": f"{sum(phase['bytes_across_nodes_per_rank']) / 1e6:,.2f}",
            "messages": f"{sum(phase['messages_per_rank']):,}",
            "max message MB": f"{phase['largest_message_bytes'] / 1e6:,.2f}",
        }
        for name, phase in phases.items()
    ]
