"""``cpbench predict``: the time of cases on a cluster, predicted.

Strategies are recorded in subprocesses (``cpbench.simulator.prediction``), since this one loads no
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpbench.core.environment import usable_cores
from cpbench.core.problem import Case
from cpbench.core.subprocess_call import RequestRefused, read_reply, subprocesses
from cpbench.reports.tables.terminal import wrap
from cpbench.results.store import write_atomically
from cpbench.simulator.cluster import load


def first_operator(cluster: str) -> str:
    """The operator of the first kernel, or mixer, of a cluster.

    Raises:
        ValueError, OSError: see :func:`cpbench.simulator.cluster.load`.
    """
    return load(cluster).first_operator


def predict_all(
    cases: Sequence[Case], cluster: str, trace: Path | None = None
) -> list[dict[str, Any]]:
    """The predictions of cases, the fastest first; last those that are refused, with the reason.

    Args:
        trace: a file for the timeline of the only case.

    Raises:
        ValueError: if every case is refused, in one line.
        OSError: when the file of the cluster cannot be read.
    """
    constants = load(cluster)
    if trace and len(cases) > 1:
        raise ValueError(f"--trace takes one case, not {len(cases)}")
    predictions, refused = [], []
    calibrated = []
    for case in cases:
        try:
            constants.kernel(case.operator.name, case.dtype, case.head_dim)
            calibrated.append(case)
        except ValueError as error:
            refused.append({"case": case.label, "refused": str(error)})
    for case, reply in predict_each(calibrated, cluster, trace=bool(trace)):
        if isinstance(reply, ValueError):
            refused.append({"case": case.label, "refused": str(reply)})
            continue
        if trace:
            write_atomically(trace, json.dumps(reply.pop("trace"), separators=(",", ":")))
        predictions.append({"case": case.label, **reply})
    if not predictions:
        first = {one["refused"]: one for one in reversed(refused)}.values()
        raise ValueError("; ".join(f"{one['case']}: {one['refused']}" for one in reversed(first)))
    return [*sorted(predictions, key=seconds), *refused]


def predict_each(
    cases: Sequence[Case], cluster: str, trace: bool = False
) -> Iterator[tuple[Case, dict[str, Any] | ValueError]]:
    """Each case with its prediction, or with the refusal, in order."""
    at_once = usable_cores()
    for start in range(0, len(cases), at_once):
        batch = cases[start : start + at_once]
        requests = [{"case": case.to_json(), "cluster": cluster, "trace": trace} for case in batch]
        with subprocesses("cpbench.simulator.prediction", requests) as processes:
            for case, process in zip(batch, processes, strict=True):
                try:
                    yield case, json.loads(read_reply(process, "recording"))
                except RequestRefused as refusal:
                    yield case, refusal


def seconds(prediction: dict[str, Any]) -> float:
    """The predicted time of all phases."""
    return float(sum(phase["seconds"] for phase in prediction["phases"].values()))


def refusal_lines(refused: Sequence[dict[str, Any]]) -> list[str]:
    """The cases that were refused, each with the reason."""
    return [
        line for one in refused for line in wrap(f"refused: {one['case']}: {one['refused']}", "  ")
    ]


def lines(predictions: Sequence[dict[str, Any]]) -> list[str]:
    """What applies to all rows: warnings first, then the cluster and what cases have in common."""
    warnings = dict.fromkeys(line for one in predictions for line in one["warnings"])
    first = predictions[0]
    common, _ = _split_labels(predictions)
    on = f"{first['cluster']} ({first['cluster_hash']})"
    common = common.removeprefix(first["operator"]).strip()
    return [*warnings, *wrap(f"{first['operator']} on {on}{', ' * bool(common)}{common}:")]


def _split_labels(predictions: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """The words that the labels of all cases have in common, and the others of each."""
    labels = [one["case"].split() for one in predictions]
    if len({len(words) for words in labels}) > 1:
        return "", [" ".join(words) for words in labels]
    same = [len(set(words)) == 1 for words in zip(*labels, strict=True)]
    common = [word for word, is_same in zip(labels[0], same, strict=True) if is_same]
    others = [
        [word for word, is_same in zip(words, same, strict=True) if not is_same] for words in labels
    ]
    return " ".join(common), [" ".join(words) for words in others]


def table(predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a terminal: a phase of a case each, in milliseconds of its slowest rank."""
    _, names = _split_labels(predictions)
    return [
        {
            **({"case": case} if len(predictions) > 1 else {}),
            "phase": name,
            "ms": f"{phase['seconds'] * 1e3:,.3g}",
            "interval": f"{phase['low'] * 1e3:,.3g} to {phase['high'] * 1e3:,.3g}",
            "TFLOP/s": f"{phase['tflops_per_gpu'] or 0:,.0f}",
            **{
                f"{part} ms": f"{length * 1e3:,.3g}"
                for part, length in phase["breakdown"].items()
            },
            "max/mean": f"{phase['imbalance'] or 1:.2f}",
        }
        for case, one in zip(names, predictions, strict=True)
        for name, phase in one["phases"].items()
    ]  # fmt: skip


def memory_lines(predictions: Sequence[dict[str, Any]]) -> list[str]:
    """Whether each case fits into the memory of a GPU, and what the rank needs that needs most."""
    _, names = _split_labels(predictions)
    return [
        line
        for name, one in zip(names, predictions, strict=True)
        for line in wrap(f"{name}: " * (len(predictions) > 1) + memory_text(one["memory"]), "  ")
    ]


def memory_text(need: dict[str, Any]) -> str:
    """``fits: 10.2 to 14.1 of 80.0 GiB (2.0 inputs, 6.1 buffers, 1.1 workspace)``."""
    gib = {name: value / (1 << 30) for name, value in need.items() if name.endswith("_bytes")}
    parts = ", ".join(
        f"{gib[f'{part}_bytes']:,.1f} {part}" for part in ("inputs", "buffers", "workspace")
    )
    host = f", beside {gib['host_bytes']:,.1f} GiB of host memory" if need["host_bytes"] else ""
    return (
        f"{need['verdict']}: {gib['low_bytes']:,.1f} to {gib['high_bytes']:,.1f} of "
        f"{gib['gpu_bytes']:,.1f} GiB ({parts}){host}"
    )
