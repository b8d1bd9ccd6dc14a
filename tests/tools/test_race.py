"""``cpbench race``: two versions in turn, until every case is decided."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from git_repository import git
from limits import LIMIT_S
from made_records import launches, run_of

from cpbench.reports.compare.gate import FAIL, PASS, evaluate_gate
from cpbench.reports.compare.statistics import ALPHA
from cpbench.results.store import read_run
from cpbench.tools.race import side
from cpbench.tools.race.race import looks

OPERATOR = """
import time

from cpbench.core.registry import OperatorInfo
from cpbench.kernels.bands.operator import OPERATORS, Bands

SLOWER_BY = 0.0


class Slowed(Bands):
    def forward(self, *given):
        begun = time.process_time()
        result = super().forward(*given)
        until = time.process_time() + SLOWER_BY * 0.004
        while time.process_time() < until:
            pass
        return result


INFO = OPERATORS[0]
OP = OperatorInfo(name="slowed", summary="bands", source="bands", load=Slowed, masks=INFO.masks,
                  dtypes=INFO.dtypes)
"""
SWEEP = """
[sweep]
operator = ["./op.py:OP", "bands"]
seq_len = 256
num_heads_q = 1
head_dim = 16
direction = "fwd"
[measure]
clock = "cpu"
interleave = 1
max_iterations = 15
max_seconds = 0.3
memory = false
"""


RACE = (sys.executable, "-m", "cpbench", "race")
ENVIRON = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def race(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RACE, *words], cwd=folder, env=ENVIRON, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with an operator and a sweep in a folder, the operator slower since."""
    folder = tmp_path / "repository"
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "op.py").write_text(OPERATOR)
    (folder / "bench" / "s.toml").write_text(SWEEP.replace('"bands"', '"reference"'))
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    (folder / "bench" / "op.py").write_text(OPERATOR.replace("BY = 0.0", "BY = 1.0"))
    (folder / "bench" / "s.toml").write_text(SWEEP)
    return folder


def test_the_working_tree_against_a_commit(repository: Path) -> None:
    """The slowed operator is found, by as many launches as that takes; the other runs no longer
    than that.  The sweep is that of the working tree on both sides."""
    words = ("--against", "HEAD", "bench/s.toml", "--max-slowdown", "60%", "--max-launches", "7")
    done = race(repository, *words, "--out", "../race")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("FAIL ./op.py:OP causal")
    assert "gate failed: 2 cases: 1 failed, " in done.stdout
    out = repository.parent / "race"
    for name in ("base", "new"):
        run = read_run(out / name)
        assert {record.case.operator.name for record in run.records.values()} == {
            "./op.py:OP", "bands"
        }  # fmt: skip
        assert all(5 <= len(launches) <= 7 for launches in run.launches.values())
        assert not run.other_launches
    status = subprocess.run(
        ["git", "-C", str(repository), "status", "--porcelain"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert set(status.stdout.split()) == {"M", "bench/op.py", "bench/s.toml"}

    again = race(repository, *words, "--out", "../race")  # nothing is run twice
    assert (again.returncode, again.stdout) == (1, done.stdout)
    assert "warning" not in done.stderr

    (repository / "bench" / "op.py").write_text(OPERATOR.replace("BY = 0.0", "BY = 0.1"))
    other = race(repository, *words, "--out", "../race")
    assert other.returncode == 2
    assert "holds launches of another version: give another --out" in other.stderr


def test_one_version_against_itself_is_said(repository: Path) -> None:
    """After the first launch of each, and not at the end."""
    git(repository, "commit", "-qam", "second")
    words = ("--against", "HEAD", "bench/s.toml", "--max-launches", "5", "--out", "../race")
    with subprocess.Popen(
        [*RACE, *words], cwd=repository, env=ENVIRON, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, process_group=0,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = ""
        while (line := process.stderr.readline()) and "warning: both versions are" not in said:
            said += line
        os.killpg(process.pid, signal.SIGKILL)
    assert "warning: both versions are the same code" in said


def test_what_cannot_race_is_one_line(repository: Path, tmp_path: Path) -> None:
    environment = str(Path(sys.executable).parents[1])
    (tmp_path / "empty").mkdir()
    for words, line in (
        (("bench/s.toml",), "give OLD_ENV NEW_ENV SWEEP, or --against REVISION SWEEP"),
        ((environment, environment, "s", "--against", "HEAD"), "give OLD_ENV NEW_ENV SWEEP"),
        (("--against", "nowhere", "bench/s.toml"), "--against nowhere: there is no such commit"),
        ((str(tmp_path / "empty"), environment, "bench/s.toml"), "is no virtual environment"),
        ((environment, environment, "no.toml"), "base: cannot read no.toml"),
        ((environment, environment, "bench/s.toml", "--where", "mask=full"), "no case has mask=f"),
    ):
        done = race(repository, *words)
        assert done.returncode == 2, done.stdout
        assert line in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_revision_of_a_package_comes_first_in_the_search_path(repository: Path) -> None:
    (repository / "mine.py").write_text("VERSION = 1\n")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "second")
    (repository / "mine.py").write_text("VERSION = 2\n")
    sides = side.of_revision("HEAD", str(repository / "bench" / "s.toml"), repository / "race")
    versions = []
    for one in sides:
        command = [one.python, "-P", "-c", "import mine; print(mine.VERSION)"]
        done = subprocess.run(
            command, cwd=one.cwd, env={**os.environ, **one.env}, capture_output=True, check=True
        )
        versions.append(int(done.stdout))
    assert versions == [1, 2]


def test_looks() -> None:
    assert looks(5) == [5]
    assert looks(6) == [5, 6]
    assert looks(20) == [5, 7, 10, 14, 20]


def first_decision(base: list[float], new: list[float]) -> str:
    """The decision at the first look that makes one."""
    for count in looks(20):
        runs = []
        for times in (base[:count], new[:count]):
            made = launches("a", times)
            run = run_of(made[-1])
            run.launches = {made[-1].case.id: made}
            runs.append(run)
        share = ALPHA / len(looks(20))
        (decision,) = evaluate_gate(*runs, 0.05, 0.02, share).decisions.values()
        if decision.outcome in (PASS, FAIL):
            return decision.outcome
    return "undecided"


@pytest.mark.parametrize(("slowdown", "wrong"), [(1.0, FAIL), (1.05, FAIL), (1.051, PASS)])
def test_looking_often_decides_no_more_wrongly(slowdown: float, wrong: str) -> None:
    """Of 150 versions at most 5 % fail that are no slower than allowed, or pass that are."""
    generator, errors = random.Random(1), 0
    for _ in range(150):
        base, new = (
            [mean * generator.lognormvariate(0, 0.03) for _ in range(20)]
            for mean in (10.0, 10 * slowdown)
        )
        errors += first_decision(base, new) == wrong
    assert errors <= 7
