"""Every strategy over every operator that runs here, in every direction: right, or refused before
anything runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from run_cpbench import NOTHING_COMPILED, cpbench

from cpbench.core import registry
from cpbench.results.store import read_run

INFOS = {
    name: info
    for name, info in registry.strategies_for("attention").items()
    if info.traced and name != "single"
}
VARIANTS = [f"{name}:{text}" for name, info in INFOS.items() for text in info.variants]
OPERATORS = ("bands", "reference", "sdpa.cpu_flash", "sdpa.math", "flex")
# Variants go the same way through an operator but for its masks and the pieces they send.
SWEEP = f"""
[sweep]
operator = {json.dumps(OPERATORS)}
strategy = {json.dumps(list(INFOS))}
mask = "causal_document:doc_lens=[40,100,52]"
seq_len = 192
num_heads_q = 4
num_heads_kv = 2
head_dim = 16
direction = ["fwd", "bwd", "fwd_bwd"]
world_size = 2
[[include]]
mask = "causal"
direction = "fwd_bwd"
[[include]]
strategy = {json.dumps(VARIANTS)}
direction = "fwd_bwd"
[measure]
time = false
memory = false
"""


def test_right_or_refused(tmp_path: Path) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    cpbench("run", file, "--out", out, "--device", "cpu", env=NOTHING_COMPILED)
    records = list(read_run(out).records.values())
    assert len(records) == len(OPERATORS) * (4 * len(INFOS) + len(VARIANTS))
    bad = [f"{r.case.label}: {r.status}: {r.reason}" for r in records
           if r.status not in ("ok", "unsupported")]  # fmt: skip
    assert bad == []
    counts = Counter((r.case.operator.name, r.status) for r in records)
    for operator in ("bands", "reference", "sdpa.cpu_flash"):
        assert counts[operator, "ok"] > counts[operator, "unsupported"]
    for record in records:
        assert record.status == "ok" or len((record.reason or "").splitlines()) == 1
