"""Traffic of all ranks in a record: what was counted, and what the traces predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpbench.parallel.comm import Traffic
    from cpbench.parallel.tracing.trace import PhaseTrace
    from cpbench.results.record import Record


def store_traffic(
    record: Record,
    counted: Sequence[Mapping[str, Traffic]],
    traced: Sequence[tuple[Mapping[str, PhaseTrace], Mapping[str, PhaseTrace]]],
    offloaded: bool,
) -> None:
    """Store the traffic of all ranks by phase, with a flag where the traces predicted another.

    Args:
        traced: by rank: what was predicted, without phases where the data decide or a library does
            the sending; and what an all-gather of keys would send, where the data decide.
        offloaded: whether there are copies between host and device.
    """
    by_phase = {phase: [rank[phase] for rank in counted] for phase in counted[0]}
    predicted, allgather = (
        {phase: [rank[i][phase] for rank in traced] for phase in traced[0][i]} for i in (0, 1)
    )

    def per_rank(value: Callable[[int, Traffic], int]) -> dict[str, list[int]]:
        return {p: [value(*rank) for rank in enumerate(ranks)] for p, ranks in by_phase.items()}

    record.bytes_sent = per_rank(lambda _, traffic: traffic.bytes_sent)
    nodes = record.ranks_per_node
    record.bytes_across = per_rank(lambda rank, traffic: traffic.bytes_across_nodes(rank, nodes))
    record.messages = per_rank(lambda _, traffic: traffic.messages)
    record.largest_message = {p: max(t.largest_message for t in by_phase[p]) for p in by_phase}
    record.predicted_bytes = {p: [sum(t.bytes_to) for t in predicted[p]] for p in predicted}
    record.allgather_bytes = {p: [sum(t.bytes_to) for t in allgather[p]] for p in allgather}
    if offloaded:
        record.bytes_to_device = per_rank(lambda _, traffic: traffic.to_device)
        record.bytes_to_host = per_rank(lambda _, traffic: traffic.to_host)
        record.predicted_to_device = {p: [t.to_device for t in predicted[p]] for p in predicted}
        record.predicted_to_host = {p: [t.to_host for t in predicted[p]] for p in predicted}
    pairs = (
        (record.predicted_bytes, record.bytes_sent),
        (record.predicted_to_device, record.bytes_to_device),
        (record.predicted_to_host, record.bytes_to_host),
    )
    if predicted and any(expected != actual for expected, actual in pairs):
        record.flags.append("mispredicted")
