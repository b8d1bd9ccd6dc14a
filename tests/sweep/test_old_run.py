"""A run directory that an earlier version wrote: read, resumed and reported on.

``tests/data/run_before_wings`` was written by the version before modules moved into folders, and
interrupted after 10 of its 14 cases.  Its bytes must never be made anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from paths import DATA
from run_cpbench import cpbench, record_counts

import cpbench as library
from cpbench.core.problem import Case
from cpbench.results.store import read_run
from cpbench.sweep import sweep_file

OLD = DATA / "run_before_wings"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "before"))


def test_ids_and_records_are_read() -> None:
    stored = json.loads((OLD / "sweep.json").read_text())["cases"]
    assert [Case.from_json(case).id for case in stored] == [case["id"] for case in stored]
    again = sweep_file.load(str(OLD / "before.toml"))
    assert sorted(case.id for case in again.cases) == sorted(case["id"] for case in stored)
    read = read_run(OLD)
    assert not read.warnings
    assert len(read.records) == 10
    statuses = [record.status for record in read.records.values()]
    assert (statuses.count("ok"), statuses.count("unsupported")) == (7, 3)


def test_the_tidy_table() -> None:
    table = library.load(OLD)
    assert len(table) == 10
    timed = table[table["status"] == "ok"]
    assert (timed["time_ms"] > 0).all()
    assert (timed["worst_error"] < 1e-5).all()
    (selector,) = table[table["operator"].str.startswith("moba")].to_dict("records")
    assert 0 < selector["recovered"] <= selector["best_recovered"] <= 1


def test_it_goes_on_where_it_stopped(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "records").iterdir()}
    code, stderr = cpbench("run", run / "before.toml", "--out", run)
    assert code == 0, stderr
    assert "[4/4]" in stderr
    assert len(record_counts(run)) == 14
    assert set(record_counts(run).values()) == {1}  # nothing twice
    for path, content in before.items():
        assert path.read_bytes() == content
    fresh = [record for record in read_run(run).records.values() if record.case.world_size == 2]
    assert [record.status for record in fresh] == ["ok"] * 4
    page = run.parent / "report.html"
    assert cpbench("report", run, "-o", page)[0] == 0
    assert all(name in page.read_text() for name in ("usp:ulysses=2", "moba"))
    assert cpbench("status", run)[0] == 0
