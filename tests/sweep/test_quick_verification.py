"""``cpbench verify --quick``: a few minutes that touch everything that is registered."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cpbench import NOTHING_COMPILED, cpbench

from cpbench.core import registry
from cpbench.results.store import read_run
from cpbench.sweep import sweep_file
from cpbench.sweep.verification import cases as verification
from cpbench.sweep.verification.summary import summary_rows
from cpbench.tools.verification_table import summary_lines


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_it_touches_every_operator_and_strategy(device: str) -> None:
    tables = verification.quick_tables(device, 2)
    cases = [case for table in tables for case in sweep_file.expand_table(table)]
    known = len(registry.operators()) + len(registry.strategies())
    assert known <= len(cases) <= 4 * known
    assert {case.operator.name for case in cases} == set(registry.operators())
    assert {case.strategy.name for case in cases} == set(registry.strategies())
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}
    alone = [c for t in verification.quick_tables(device, 1) for c in sweep_file.expand_table(t)]
    assert {case.world_size for case in alone} == {1}


def test_the_command(tmp_path: Path) -> None:
    words = ("verify", "--quick", "--out", tmp_path / "run", "--device", "cpu")
    code, stderr = cpbench(*words, env=NOTHING_COMPILED)
    assert code == 0, stderr
    records = list(read_run(tmp_path / "run").records.values())
    able = {name for name, info in registry.operators().items()
            if "cpu" in info.devices and not info.requires[1:]}  # fmt: skip
    ok = {record.case.operator.name for record in records if record.status == "ok"}
    kernels = {"gathered", "triton_query_sparse", "triton_band", "triton_block_sparse"}
    assert ok >= able - kernels - {"dilated", "vsa"}
    lines = summary_lines(summary_rows(records))
    assert sum("runs on cuda, not on cpu" in line for line in lines) == 1
    code, stderr = cpbench("verify", "--quick", "--operator", "bands")
    assert (code, stderr) == (2, "cpbench: --quick chooses the cases: leave out the lists\n")
