"""``cpbench predict``: the time of cases on a cluster, predicted.

Strategies are recorded in subprocesses (``cpbench.simulator.prediction``), since this one loads no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.core.problem import Case
from cpbench.core.subprocess_call import RequestRefused, read_reply, subprocesses
from cpbench.simulator.cluster import load


def first_operator(cluster: str) -> str:
    """The operator of the first kernel of a cluster.

    Raises:
        ValueError, OSError: see :func:`cpbench.simulator.cluster.load`.
    """
    return load(cluster).kernels[0].operators[0]


def predict_all(cases: Sequence[Case], cluster: str) -> list[dict[str, Any]]:
    """The predictions of cases, the fastest first.

    Raises:
        ValueError: if a case is refused, in one line.
        OSError: when the file of the cluster cannot be read.
    """
    constants = load(cluster)
    for case in cases:
        constants.kernel(case.operator.name, case.dtype, case.head_dim)
    predictions = []
    at_once = usable_cores()
    for start in range(0, len(cases), at_once):
        batch = cases[start : start + at_once]
        requests = [{"case": case.to_json(), "cluster": cluster} for case in batch]
        with subprocesses("cpbench.simulator.prediction", requests) as processes:
            for case, process in zip(batch, processes, strict=True):
                try:
                    reply = json.loads(read_reply(process, "recording"))
                except RequestRefused as refusal:
                    raise ValueError(f"{case.label}: {refusal}") from None
                predictions.append({"case": case.label, **reply})
    return sorted(predictions, key=seconds)


def seconds(prediction: dict[str, Any]) -> float:
    """The predicted time of all phases."""
    return float(sum(phase["seconds"] for phase in prediction["phases"].values()))


def lines(predictions: Sequence[dict[str, Any]]) -> list[str]:
    """What applies to all rows: warnings first, then the cluster."""
    warnings = dict.fromkeys(line for one in predictions for line in one["warnings"])
    first = predictions[0]
    return [*warnings, f"{first['operator']} on {first['cluster']} ({first['cluster_hash']}):"]


def table(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a terminal: a phase of a case each, in milliseconds of its slowest rank."""
    return [
        {
            "case": one["case"],
            "phase": name,
            "ms": f"{phase['seconds'] * 1e3:,.3g}",
            "interval": f"{phase['low'] * 1e3:,.3g} to {phase['high'] * 1e3:,.3g}",
            "TFLOP/s": f"{phase['tflops_per_gpu'] or 0:,.0f}",
            **{
                f"{part} ms": f"{length * 1e3:,.3g}"
                for part, length in phase["breakdown"].items()
            },
            "max/mean": f"{phase['imbalance'] or 1:.2f}",
            "slowest rank": phase["slowest_rank"],
        }
        for one in predictions
        for name, phase in one["phases"].items()
    ]  # fmt: skip
