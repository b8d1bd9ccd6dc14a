"""``cpbench run SWEEP --predict``: predictions of a sweep's cases, kept in its run directory."""

from __future__ import annotations

import secrets
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cpbench.core.problem import Case
from cpbench.results.prediction import Prediction
from cpbench.results.store import RecordWriter
from cpbench.simulator.cluster import load
from cpbench.tools.prediction import predict_each


def predict_sweep(cases: Sequence[Case], cluster: str, out: Path) -> list[Prediction]:
    """Predict cases and append the predictions to a run directory, each when it is known.

    Cases that are refused are counted on stderr, by reason.

    Raises:
        ValueError: for a cluster that is not valid, and when no case can be predicted.
        OSError: when the file of the cluster cannot be read.
        StoreError: when the run directory cannot be written to.
    """
    load(cluster)
    writer = f"predict-{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    predictions, refusals = [], Counter[str]()
    with RecordWriter(out / "records" / f"{writer}.jsonl") as file:
        for case, reply in predict_each(cases, cluster):
            if isinstance(reply, ValueError):
                refusals[str(reply)] += 1
                continue
            known = {key: reply[key] for key in ("cluster", "cluster_hash", "phases", "warnings")}
            one = Prediction(case=case, writer=writer, started=time.time(), **known)
            file.append(one.to_json())
            predictions.append(one)
    if not predictions:
        raise ValueError(f"no case can be predicted: {next(iter(refusals), 'there is none')}")
    for reason, count in refusals.items():
        print(f"cpbench: {count} of {len(cases)} not predicted: {reason}", file=sys.stderr)
    return predictions
