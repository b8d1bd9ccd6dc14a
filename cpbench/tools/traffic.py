"""``cpbench traffic``: the communication, work and memory of every rank of a case, predicted.

The strategy's own code runs on tensors without data (``cpbench.parallel.tracing``), in a few
subprocesses with a share of the ranks each, since this one loads no torch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.core.problem import DECODE, Case
from cpbench.core.spec import format_size
from cpbench.core.subprocess_call import RequestRefused, read_reply, subprocesses
from cpbench.reports.tables.terminal import fit_tables, wrap
from cpbench.tools.link_rates import LinkRates

# Sizes of a case, and its facts in a sentence.
_SIZES = ("phase", "seq_len", "key_lens", "page_size", "world_size", "ranks_per_node", "queries",
          "num_heads_q", "num_heads_kv", "head_dim", "head_dim_v", "batch", "dtype",
          "direction")  # fmt: skip
_METHOD = ("operator", "strategy", "layout")
_NAMED = {
    "mask": "{}", "phase": "{}", "seq_len": "{} tokens", "key_lens": "{} keys",
    "page_size": "pages of {}", "world_size": "world size {}",
    "ranks_per_node": "{} ranks per node", "queries": "last {} queries", "num_heads_q": "{} heads",
    "num_heads_kv": "{} KV heads", "head_dim": "head_dim {}", "head_dim_v": "head_dim {} of values",
    "batch": "batch {}", "dtype": "{}", "direction": "{}",
}  # fmt: skip


def predict_traffic(case: Case) -> dict[str, Any]:
    """The communication volume, work and buffers of a case: what ``cpbench traffic --json`` prints.

    Values named ``…_per_rank`` are lists with one entry per rank: bytes, messages, or the area of
    the computed (query, key) pairs per head.

    Raises:
        RequestRefused: if the strategy cannot run this case; the reason in one line.
    """
    (prediction,) = predict_all([case])
    if isinstance(prediction, str):
        raise RequestRefused(prediction)
    return prediction


def predict_all(cases: Sequence[Case]) -> list[dict[str, Any] | str]:
    """:func:`predict_traffic` of several cases, or why their strategy cannot run them."""
    shares = min(usable_cores(), 1 + sum(case.world_size for case in cases) // 32)
    requests = [
        [
            {
                "case": case.to_json(),
                "ranks": list(range(share, case.world_size, shares)),
                # Ranks whose memory is traced, which is slow.
                "buffers": sorted({0, case.world_size - 1})[share::shares],
            }
            for case in cases
        ]
        for share in range(shares)
    ]
    with subprocesses("cpbench.tools.traffic_ranks", requests) as processes:
        replies = [json.loads(read_reply(process, "tracing")) for process in processes]
    predictions: list[dict[str, Any] | str] = []
    for case, *of_case in zip(cases, *replies, strict=True):
        refused = [reply["refused"] for reply in of_case if "refused" in reply]
        predictions.append(refused[0] if refused else _summarise(case, of_case))
    return predictions


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
            "bytes_to_device_per_rank": [r[phase]["to_device"] for r in ranks],
            "bytes_to_host_per_rank": [r[phase]["to_host"] for r in ranks],
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
    buffers, host_buffers = (
        {rank: n for reply in replies for rank, n in reply[name].items()}
        for name in ("buffers", "host_buffers")
    )
    first = next(iter(phases.values()))["area_per_rank"]
    return {
        "operator": str(case.operator),
        "strategy": str(case.strategy),
        "layout": str(case.layout),
        "mask": str(case.mask),
        "placement": case.placement,
        **{
            key: getattr(case, key)
            for key in (
                "seq_len", "world_size", "batch", "num_heads_q", "num_heads_kv", "head_dim",
                "head_dim_v", "dtype", "direction",
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
        "host_buffers_bytes": {rank: host_buffers[rank] for rank in sorted(host_buffers, key=int)},
        "phases": phases,
    }  # fmt: skip


def table(prediction: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows for a terminal: one per phase and one for all, with the total and maximum over ranks."""
    phases = dict(prediction["phases"])
    if len(phases) > 1:
        phases["all"] = prediction
    to_device = {name: max(phase["bytes_to_device_per_rank"]) for name, phase in phases.items()}
    to_host = {name: max(phase["bytes_to_host_per_rank"]) for name, phase in phases.items()}
    return [
        {
            "phase": name,
            "total MB": _mb(sum(phase["bytes_sent_per_rank"]), 2),
            "max MB per rank": _mb(max(phase["bytes_sent_per_rank"]), 2),
            "MB across nodes": _mb(sum(phase["bytes_across_nodes_per_rank"]), 2),
            "messages": f"{sum(phase['messages_per_rank']):,}",
            "max message MB": _mb(phase["largest_message_bytes"], 2),
            **(_copied(to_device[name], to_host[name]) if any(to_device.values()) else {}),
        }
        for name, phase in phases.items()
    ]


def _mb(nbytes: float, digits: int = 1) -> str:
    """MB with some digits after the point; two that count of what would be all zeros."""
    mb = nbytes / 1e6
    return f"{mb:,.{digits}f}" if mb >= 10.0**-digits or not mb else f"{mb:.2g}"


def _copied(to_device: int, to_host: int) -> dict[str, str]:
    """Cells for copies between host and device."""
    return {"MB to device": f"{to_device / 1e6:,.1f}", "MB to host": f"{to_host / 1e6:,.1f}"}


def link_ms(prediction: Mapping[str, Any], rates: LinkRates) -> float:
    """Milliseconds that the links of the busiest rank need for its bytes, at the measured rates of
    messages of their mean size; without waiting, overlap with other links, or computation.

    Raises:
        ValueError: when a class of link that it uses was not measured.
    """
    slowest = 0.0
    for inside, across, messages in zip(
        *(prediction[f"{name}_per_rank"] for name in (
            "bytes_same_node", "bytes_across_nodes", "messages")),
        strict=True,
    ):  # fmt: skip
        mean = (inside + across) / messages if messages else 0
        seconds = sum(
            nbytes / rates.gb_per_s(link, mean) / 1e9
            for link, nbytes in (("node", inside), ("across", across))
            if nbytes
        )
        slowest = max(slowest, seconds)
    return slowest * 1e3


def comparison(cases: Sequence[Case], rates: LinkRates | None) -> list[dict[str, Any]]:
    """A row for each case, for programs: by problem, the best strategy first, refused ones last.

    Ranked by the time of links, where their rates are given, else by the bytes across nodes, and
    then all bytes, of the busiest rank.

    Raises:
        ValueError: see :func:`link_ms`; or when every case is refused.
    """
    rows = []
    for case, prediction in zip(cases, predict_all(cases), strict=True):
        row: dict[str, Any] = {
            **{name: str(getattr(case, name)) for name in _METHOD},
            "placement": case.placement, "mask": str(case.mask),
            **{name: getattr(case, name) for name in _SIZES}, "refused": None,
        }  # fmt: skip
        if isinstance(prediction, str):
            rows.append(row | {"refused": prediction})
            continue
        row |= {
            "across_bytes": max(prediction["bytes_across_nodes_per_rank"]),
            "sent_bytes": max(prediction["bytes_sent_per_rank"]),
            "messages": max(prediction["messages_per_rank"]),
            "buffers_bytes": max(prediction["buffers_bytes"].values()),
            "host_buffers_bytes": max(prediction["host_buffers_bytes"].values()),
            "to_device_bytes": max(prediction["bytes_to_device_per_rank"]),
            "to_host_bytes": max(prediction["bytes_to_host_per_rank"]),
            "imbalance": prediction["imbalance"],
        }
        if rates is not None:
            row["link_ms"] = link_ms(prediction, rates)
        rows.append(row)
    if all(row["refused"] for row in rows):
        raise ValueError("; ".join(dict.fromkeys(row["refused"] for row in rows)))

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        if row["refused"]:
            return (*_problem(row), True)
        return (*_problem(row), False, row.get("link_ms", 0.0), row["across_bytes"],
                row["sent_bytes"])  # fmt: skip

    return sorted(rows, key=order)


def _problem(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("mask", *_SIZES))


def comparison_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of :func:`comparison` for a terminal: what they have in common, then a block for
    each problem, and the refusals."""
    varying = [name for name in _NAMED if len({row[name] for row in rows}) > 1]
    common = _describe(rows[0], [name for name in _NAMED if name not in varying])
    possible = [row for row in rows if row["refused"] is None]
    layouts = len({row["layout"] for row in possible}) > 1
    operators = len({row["operator"] for row in possible}) > 1
    copies = any(row["to_device_bytes"] + row["to_host_bytes"] for row in possible)
    cells = [
        {
            "strategy": row["strategy"] + (f" {row['placement']} inside" * bool(row["placement"])),
            "operator": row["operator"] if operators else "",
            "layout": row["layout"] if layouts else "",
            "MB across": _mb(row["across_bytes"]),
            "MB sent": _mb(row["sent_bytes"]),
            "messages": f"{row['messages']:,}",
            "peak MB": _mb(row["buffers_bytes"]),
            **(_copied(row["to_device_bytes"], row["to_host_bytes"]) if copies else {}),
            "imbalance": f"{row['imbalance']:.2f}" if row["imbalance"] else "",
            "ms links": f"{row['link_ms']:,.3g}" if "link_ms" in row else "",
        }
        for row in possible
    ]
    common += "" if layouts else f", layout {possible[0]['layout']}"
    lines = wrap(f"{common}; max per rank, peak excluding inputs and kernel workspace:")
    for table in fit_tables(cells):
        lines += ["", *table.head]
        remaining = iter(table.bodies)
        for _, group in itertools.groupby(possible, key=_problem):
            members = list(group)
            lines += wrap(f"{_describe(members[0], varying)}:", "  ") if varying else []
            lines += itertools.chain.from_iterable(itertools.islice(remaining, len(members)))
        lines += ["", *table.legend_lines] if table.legend else []
    refusals = dict.fromkeys(
        f"refused: {row['strategy']} of {row['operator']}, layout {row['layout']}: {row['refused']}"
        for row in rows if row["refused"]
    )  # fmt: skip
    lines += ["", *itertools.chain.from_iterable(map(wrap, refusals))] if refusals else []
    return lines


def _describe(row: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(
        _NAMED[name].format(_size_text(name, row[name]))
        for name in names
        if row[name] not in ("", 0, (), "sequence")
        and not (name == "queries" and row["phase"] == DECODE)  # one of each sequence
    )


def _size_text(name: str, value: Any) -> str:
    if name == "key_lens":
        return "+".join(map(format_size, value))
    return format_size(value) if name in ("seq_len", "queries") else str(value)
