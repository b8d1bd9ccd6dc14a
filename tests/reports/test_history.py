"""``cpbench history``: series over versions, and the commits at which they step."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import complaints, opened
from git_repository import git
from limits import LIMIT_S
from made_records import launches, record

from cpbench.reports.history.history import read_history, rows
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter


def write_version(
    folder: Path, records: list[Record], started: float, environment: dict[str, Any] | None = None
) -> Path:
    """A run directory of one version, measured at a time."""
    facts = {"kind": "environment", "id": "e1", "host": "h", **(environment or {})}
    with RecordWriter(folder / "records" / "w.jsonl") as writer:
        writer.append(facts)
        for one in records:
            one.started, one.environment = started + one.started, "e1"
            writer.append(one.to_json())
    return folder


def times(
    generator: random.Random, mean: float, count: int = 3, noise: float = 0.03
) -> list[float]:
    return [mean * generator.lognormvariate(0, noise) for _ in range(count)]


@pytest.fixture
def commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Five commits of a repository, which is the working directory."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    found = []
    for day in range(1, 6):
        git(folder, "commit", "--allow-empty", "-qm", str(day), date=f"2026-11-0{day} 12:00:00")
        found.append(git(folder, "rev-parse", "--short=12", "HEAD"))
    monkeypatch.chdir(folder)
    return found


def runs_of(tmp_path: Path, commits: list[str], count: int = 3) -> list[Path]:
    """A run of each commit, measured in another order; the operator ``mine`` is slower from the
    fourth on."""
    generator, folders = random.Random(3), []
    for position, i in enumerate((3, 0, 4, 2, 1)):
        mean = 11.5 if i >= 3 else 10.0
        made = launches("mine", times(generator, mean, count))
        made += launches("other", times(generator, 10.0, count))
        environment = {"commit": "0123456789ab", "files_commit": commits[i]}
        folders.append(write_version(tmp_path / f"run{i}", made, 1e6 * position, environment))
    return folders


def test_a_step_is_found_at_its_commit(tmp_path: Path, commits: list[str]) -> None:
    history = read_history(runs_of(tmp_path, commits), "ms", 0.02)
    assert history.order == "the dates of commits"
    assert history.names == [commit[:7] for commit in commits]
    (step,) = [step for series in history.series for step in series.steps]
    assert history.series[0].case.startswith("mine ")
    assert (step.index, step.previous) == (3, 2)
    assert step.test.low < 1.15 < step.test.high
    assert history.answer == f"1 of 2 cases changed: at {commits[3][:7]} (1 case)."
    first, *_ = rows(history)
    assert (first["at"], first["after"]) == (commits[3][:7], commits[2][:7])


def test_commits_that_were_skipped_are_said(tmp_path: Path, commits: list[str]) -> None:
    folders = [p for p in runs_of(tmp_path, commits, 5) if p.name not in ("run1", "run2")]
    notes = "\n".join(read_history(folders, "ms", 0.02).notes)
    assert f"{commits[3][:7]} is the last of 3 commits since {commits[0][:7]}" in notes


def test_identical_versions_have_no_steps(tmp_path: Path) -> None:
    """Of 60 series over six versions, at most 5 % have a step that is none."""
    generator = random.Random(1)
    folders = []
    for i in range(6):
        made = [one for case in range(60) for one in launches(f"a{case}", times(generator, 10.0))]
        folders.append(write_version(tmp_path / f"v{i}", made, 1e6 * i))
    history = read_history(folders, "ms", 0.02)
    assert history.order == "the time of measurement"
    assert history.names == [f"v{i}" for i in range(6)]
    assert sum(bool(series.steps) for series in history.series) <= 3


def test_one_launch_per_version_takes_five_versions_on_each_side(tmp_path: Path) -> None:
    generator = random.Random(2)
    folders = []
    for i in range(12):
        made = launches("a", times(generator, 13.0 if i >= 6 else 10.0, 1))
        folders.append(write_version(tmp_path / f"v{i:02}", made, i * 1e6))
    (series,) = read_history(folders, "ms", 0.02).series
    assert [step.index for step in series.steps] == [6]
    (series,) = read_history(folders[2:9], "ms", 0.02).series
    assert series.steps == []


def test_a_change_without_enough_launches_is_said(tmp_path: Path) -> None:
    generator = random.Random(5)
    folders = [
        write_version(tmp_path / f"v{i}", launches("a", times(generator, mean, 4)), 1e6 * i)
        for i, mean in enumerate((10.0, 10.0, 16.0))
    ]
    history = read_history(folders, "ms", 0.02)
    assert history.answer == (
        "No step in 1 case over 3 versions; changes of 1 case have too few launches to tell."
    )
    (row,) = rows(history)
    assert (row["at"], row["interval"]) == ("v2", "too few launches")
    assert row["step"].endswith("%?")


def test_failures_memory_and_machines(tmp_path: Path) -> None:
    generator, folders = random.Random(4), []
    for i in range(4):
        made = launches("grows", times(generator, 10.0))
        for one in made:
            one.memory_bytes["peak"] = [10**6 * (2 if i >= 2 else 1)]
        made += (
            [record("breaks", status="crash", reason="killed")]
            if i == 3
            else launches("breaks", times(generator, 10.0))
        )
        packages = {"torch": "2.9" if i < 2 else "2.10"}
        folders.append(write_version(tmp_path / f"v{i}", made, 1e6 * i, {"packages": packages}))
    history = read_history(folders, "peak", 0.02)
    by_case = {series.case.split()[0]: series for series in history.series}
    (step,) = by_case["grows"].steps
    assert (step.index, step.test.ratio) == (2, pytest.approx(2))
    assert "Warning: v2 also has torch 2.10 instead of 2.9." in history.notes
    cells = {row["case"].split()[0]: row["step"] for row in rows(history)}
    assert cells["breaks"] == "crash since v3"


def test_the_command(tmp_path: Path, commits: list[str]) -> None:
    folders = runs_of(tmp_path, commits)

    def history(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cpbench", "history", *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False,
            env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip

    done = history(*folders)
    assert done.returncode == 0, done.stderr
    assert commits[3][:7] in done.stdout
    data = json.loads(history(*folders, "--format", "json").stdout)
    assert len(data) == 10
    assert [row["position"] for row in data if row["step_ratio"]] == [3]
    for words, line in (
        ((folders[0],), "takes run directories of two versions or more"),
        ((*folders, "--where", "operator=none"), "no case has operator=none"),
        ((*folders, "--format", "html"), "needs a file: -o history.html"),
    ):
        done = history(*words)
        assert done.returncode == 2
        assert line in done.stderr
    page = tmp_path / "history.html"
    assert history(*folders, "-o", page).returncode == 0
    with opened(page, width=420) as browser:
        assert not complaints(browser)
        assert len(browser.find_elements("css selector", "#series .js-plotly-plot")) == 2
        widths = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
