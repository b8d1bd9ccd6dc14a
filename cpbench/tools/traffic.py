"""``cpbench traffic``: what every rank of a case would send, compute and hold, without running it.

The strategy's own code runs on tensors without data (``cpbench.parallel.trace``), a share of the
ranks in each of a few processes, since this one loads no torch.
"""

from __future__ import annotations

import json
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.core.problem import Case
from cpbench.core.subprocess_call import answer, asked


def forecast(case: Case) -> dict[str, Any]:
    """What ``cpbench traffic --json`` prints; bytes and pairs are lists by rank.

    Raises:
        Refused: when the strategy cannot do this case; with the reason, in one line.
    """
    size = case.world_size
    shares = min(usable_cores(), 1 + size // 32)
    sampled = sorted({0, size - 1})  # whose memory is traced: that takes longer than all bytes
    requests = [
        {
            "case": case.to_json(),
            "ranks": list(range(share, size, shares)),
            "buffers": sampled[share::shares],
        }
        for share in range(shares)
    ]
    with asked("cpbench.parallel.trace_ranks", requests) as processes:
        return _told(case, [json.loads(answer(process, "tracing")) for process in processes])


def _told(case: Case, answers: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {int(rank): row for answer in answers for rank, row in answer["ranks"].items()}
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
    buffers = {rank: n for answer in answers for rank, n in answer["buffers"].items()}
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
        "local_tokens": answers[0]["local_tokens"],
        "area": answers[0]["area"],
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


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For people: a row for each phase, then one for all of them; sums over ranks, and the rank
    with the most."""
    phases = dict(found["phases"])
    if len(phases) > 1:
        phases["all"] = found
    return [
        {
            "phase": name,
            "MB sent": f"{sum(phase['bytes_sent_per_rank']) / 1e6:,.2f}",
            "most of a rank": f"{max(phase['bytes_sent_per_rank']) / 1e6:,.2f}",
            "MB across nodes": f"{sum(phase['bytes_across_nodes_per_rank']) / 1e6:,.2f}",
            "messages": f"{sum(phase['messages_per_rank']):,}",
            "largest MB": f"{phase['largest_message_bytes'] / 1e6:,.2f}",
        }
        for name, phase in phases.items()
    ]
