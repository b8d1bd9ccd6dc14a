"""Every strategy over every operator that runs here, in every direction: right, or refused before
anything runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from run_cpbench import cpbench

from cpbench.core import registry
from cpbench.results.store import read_run

STRATEGIES = [
    spec
    for name, info in registry.strategies_for("attention").items()
    if info.traced and name != "single"
    for spec in (name, *(f"{name}:{variant}" for variant in info.variants))
]
OPERATORS = ("bands", "reference", "sdpa.cpu_flash", "sdpa.math", "flex")
SWEEP = """
[sweep]
operator = {operators}
strategy = {strategies}
mask = ["causal", "causal_document:doc_lens=[40,100,52]"]
seq_len = 192
num_heads_q = 4
num_heads_kv = 2
head_dim = 16
direction = ["fwd", "bwd", "fwd_bwd"]
world_size = 2
[measure]
time = false
memory = false
"""


@pytest.mark.parametrize("half", [0, 1])
def test_right_or_refused(tmp_path: Path, half: int) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    strategies = STRATEGIES[half::2]
    file.write_text(
        SWEEP.format(operators=json.dumps(OPERATORS), strategies=json.dumps(strategies))
    )
    cpbench("run", file, "--out", out, "--device", "cpu")
    records = list(read_run(out).records.values())
    assert len(records) == len(OPERATORS) * len(strategies) * 2 * 3
    bad = [f"{r.case.label}: {r.status}: {r.reason}" for r in records
           if r.status not in ("ok", "unsupported")]  # fmt: skip
    assert bad == []
    counts = Counter((r.case.operator.name, r.status) for r in records)
    for operator in ("bands", "reference", "sdpa.cpu_flash"):
        assert counts[operator, "ok"] > counts[operator, "unsupported"]
    for record in records:
        assert record.status == "ok" or len((record.reason or "").splitlines()) == 1
