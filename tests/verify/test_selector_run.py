"""A run of selectors, from sweep to report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S

from cpbench.reports.frame import load
from cpbench.reports.tables import selection
from cpbench.reports.tables.contest import Contest, Shortage
from cpbench.results.record import Record
from cpbench.results.sealed import seal, unseal
from cpbench.results.store import read_run

WRONG = '''
from cpbench.core.registry import OperatorInfo


class Wrong:
    """gathered, with a small error in late tokens."""
    def __init__(self):
        from cpbench.kernels.gathered.operator import Gathered
        self.inner = Gathered()
        self.unsupported, self.prepare = self.inner.unsupported, self.inner.prepare
        self.backward = self.inner.backward

    def forward(self, qkv, plan):
        out, lse = self.inner.forward(qkv, plan)
        out[:, 1300:] *= 1.01
        return out, lse


OP = OperatorInfo(name="wrong", summary="wrong", source="tests", load=Wrong,
                  masks=("blocks", "rows"))
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "wrong.py").write_text(WRONG)
    (folder / "s.toml").write_text(
        f"""
[sweep]
operator = ["bands", "oracle:block_size=32,keep=0.25", "moba:block_size=64,top_k=3",
            "nsa:window=64,top_k=4", "vsa",
            {{name = "oracle", block_size = 32, kernel = "{folder}/wrong.py:OP"}}]
seq_len = [512, 1536]
inputs = "needles:count=4"
direction = "fwd_bwd"
[measure]
max_seconds = 0.2
min_iterations = 3
max_iterations = 3
"""
    )
    command = [sys.executable, "-m", "cpbench", "run", str(folder / "s.toml"),
               "--out", str(folder / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1, done.stdout + done.stderr  # because of the wrong operator
    (folder / "text").write_text(done.stdout)
    return folder


def test_results_that_are_not_finite_are_wrong_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text(WRONG.replace("*= 1.01", "= float('nan')"))
    (tmp_path / "s.toml").write_text(
        f"[sweep]\noperator = {{name = 'oracle', kernel = '{tmp_path}/nan.py:OP'}}\n"
        "seq_len = 1400\ndirection = 'fwd'\n[measure]\nmax_seconds = 0.1\n"
    )
    command = [sys.executable, "-m", "cpbench", "run", str(tmp_path / "s.toml"),
               "--out", str(tmp_path / "out")]  # fmt: skip
    subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    (record,) = read_run(tmp_path / "out").records.values()
    assert record.status == "wrong"
    assert "out differs from float64" in (record.reason or "")


def _copy(run: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a run directory whose records have been changed in place by ``change``."""
    shutil.copytree(run, target)
    for file in (target / "records").glob("*.jsonl"):
        lines = [unseal(line) for line in file.read_bytes().splitlines()]
        for line in lines:
            if line["kind"] == "case":
                change(line)
        file.write_bytes(b"".join(seal(json.dumps(line)) + b"\n" for line in lines))
    return target


def _lower_recall(record: dict[str, Any]) -> None:
    if record["quality"]:
        record["quality"]["mass"] /= 10


def test_compare_finds_a_lower_attention_recall(run: Path, tmp_path: Path) -> None:
    worse = _copy(run / "out", tmp_path / "worse", _lower_recall)
    command = [sys.executable, "-m", "cpbench", "compare", str(run / "out"), str(worse),
               "--format", "json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    comparison = json.loads(done.stdout)
    rows = comparison["cases"] if isinstance(comparison, dict) else comparison
    verdicts = {row["case"]: (row["verdict"], row["why"]) for row in rows}
    verdict, why = next(v for name, v in verdicts.items() if name.startswith("moba"))
    assert verdict == "FAILS"
    assert re.fullmatch(r"attention recall [\d.]+%, was [\d.]+%", why)


def _records(out: Path) -> dict[tuple[str, int], Record]:
    records = read_run(out).records.values()
    return {(str(record.case.operator), record.case.seq_len): record for record in records}


def test_records_of_selectors_have_quality_step_times_and_selected_area(run: Path) -> None:
    records = _records(run / "out")
    oracle = records["oracle:block_size=32,keep=0.25", 1536]
    assert oracle.status == "ok"
    assert "approximate" in oracle.flags
    assert set(oracle.parts_us) == {"select", "plan", "kernel"}
    assert all(len(ranks) == 1 and 1 <= len(ranks[0]) <= 3 for ranks in oracle.parts_us.values())
    assert set(oracle.errors) == {"small", "sampled"}
    dense = records["bands", 1536]
    assert dense.parts_us == dense.quality == {}
    assert oracle.area is not None
    assert dense.area is not None
    # Density is of sampled rows, area of all.
    assert oracle.quality["density"] == pytest.approx(oracle.area / dense.area, rel=0.2)
    assert oracle.flops["fwd"] == pytest.approx(dense.flops["fwd"] * oracle.area / dense.area)
    assert records["nsa:top_k=4,window=64", 1536].quality["mass"] > 0.3
    refused = records["vsa", 512]
    assert refused.status == "unsupported"
    assert "takes full masks" in (refused.reason or "")


def test_a_wrong_kernel_under_a_selector_is_found_at_size(run: Path) -> None:
    records = _records(run / "out")
    name = next(name for name, tokens in records if "wrong.py" in name)
    assert records[name, 512].status == "ok"
    assert records[name, 1536].status == "wrong"
    assert records[name, 1536].times_us == {}


def _set_times(record: dict[str, Any]) -> None:
    """100 us per phase for the exact method, 250 us for selectors."""
    us = 100.0 if record["case"]["operator"]["name"] == "bands" else 250.0
    record["times_us"] = {phase: [[us] * 7] for phase in record["times_us"]}
    record["turns"] = [1] * 7


def test_reports_list_selectors_apart_from_exact_methods(run: Path, tmp_path: Path) -> None:
    text = (run / "text").read_text()
    fastest = text[text.index("## Fastest method") : text.index("## Sparse selection")]
    assert "bands" in fastest
    assert "oracle" not in fastest
    out = _copy(run / "out", tmp_path / "out", _set_times)
    table = load(out)
    rows = selection.recall_rows(table, ["tokens"])
    assert {row["method"].partition(":")[0] for row in rows} == {"oracle", "moba", "nsa"}
    by_name = {(row["method"], row["tokens"]): row for row in rows}
    row = by_name["oracle:block_size=32,keep=0.25", "1536"]
    assert row["% of oracle"] == "100.0"
    assert row["exact"] == "bands"
    assert row["vs exact"] == "0.40x"
    record = _records(out)["oracle:block_size=32,keep=0.25", 1536]
    (paid,) = (
        row
        for row in selection.break_even_rows(table, ["tokens"])
        if row["method"].startswith("oracle")
    )
    assert paid["faster from"] == "not up to 1536"
    data = json.loads(
        subprocess.run(
            [sys.executable, "-m", "cpbench", "report", str(out), "--format", "json"],
            capture_output=True, text=True, timeout=LIMIT_S, check=True,
        ).stdout
    )  # fmt: skip
    row = next(row for row in data if row["id"] == record.case.id)
    assert row["recovered"] == pytest.approx(record.quality["mass"])
    assert row["inputs"] == "needles:count=4"


@pytest.mark.parametrize(
    ("faster", "expected"),
    [
        ({1024: False, 2048: True, 4096: True}, "2k"),
        ({1024: True, 2048: False, 4096: True}, "4k"),
        ({1024: True, 2048: True}, "at most 1k"),
        ({1024: True, 2048: False}, "not up to 2k"),
        ({1024: True, 2048: Shortage("launch", 1, 5)}, "inconclusive"),
    ],
)
def test_the_length_from_which_a_selector_is_faster(
    faster: dict[int, bool | Shortage], expected: str
) -> None:
    contests = [(tokens, Contest((won,))) for tokens, won in faster.items()]
    assert selection.break_even_length(contests) == expected
