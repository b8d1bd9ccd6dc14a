"""One sweep under every launcher of this machine: the same cases, the same checks; and what becomes
of ranks, agents and parents that die under each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_paths import CASE_IDS, MPICH, OPEN_MPI, SWEEP, needs_mpi, needs_mpich
from run_cpbench import cpbench, faulty, lines, start, survivors, sweep, until

from cpbench.launchers import join
from cpbench.results.store import read_run

pytestmark = pytest.mark.timeout(300)
WAYS = [
    pytest.param([], {}, id="local"),
    pytest.param(["--launcher", "torchrun"], {}, id="torchrun"),
    pytest.param(["--launcher", "torchrun", "--nodes", "2"], {}, id="two-agents"),
    pytest.param(["--launcher", "mpi"], {}, id="openmpi", marks=needs_mpi),
    pytest.param(
        ["--launcher", "mpi", "--transport", "mpi"], {}, id="openmpi-transport", marks=needs_mpi
    ),
    pytest.param(
        ["--launcher", "mpi"], {"CPBENCH_MPIEXEC": str(MPICH)}, id="mpich", marks=needs_mpich
    ),
    pytest.param(
        ["--launcher", "mpi", "--transport", "mpi"], {"CPBENCH_MPIEXEC": str(MPICH)},
        id="mpich-transport", marks=needs_mpich,
    ),
]  # fmt: skip


@pytest.fixture
def helpers() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a failing test must not leave behind."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("words", "env"), WAYS)
def test_every_launcher_runs_the_same_cases(
    tmp_path: Path, helpers: list[subprocess.Popen[str]], words: list[str], env: dict[str, str]
) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    file.write_text(SWEEP)
    if "--nodes" in words:
        words = [*words, "--interface", "lo"]
        helpers.append(start("join", out, "--interface", "lo", "--patience", "60"))
    code, said = cpbench("run", file, "--out", out, *words, env=env)
    assert code == 0, said
    found = read_run(out)
    assert sorted(found.records) == CASE_IDS
    for record in found.records.values():
        assert record.status == "ok"
        assert set(record.errors) == {"small"}
        assert record.bytes_sent == record.predicted_bytes
        size = record.case.world_size
        ranks = found.environments[str(record.environment)]["ranks"]
        assert len(ranks) == size
        assert record.ranks_per_node == (size // 2 if "--nodes" in words else size)
    if helpers:
        _, said = helpers[0].communicate(timeout=30)
        assert helpers[0].returncode == 0, said
    assert survivors(out) == []


FAULTS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "hang": ("timeout", "no result after 5 s: rank 0 "),
    "segfault": ("crash", "rank 1 was killed by SIGSEGV"),
    "cut": ("crash", ""),  # from mpiexec too, so that it may be the one to complain
}


@pytest.mark.parametrize(("words", "env"), [way for way in WAYS if way.id in ("openmpi", "mpich")])
def test_a_rank_that_fails_under_mpi_is_one_record(
    tmp_path: Path, words: list[str], env: dict[str, str]
) -> None:
    file, out = tmp_path / "s.toml", tmp_path / "run"
    sweep(file, {2: [*(faulty(how, 1) for how in FAULTS), "reference"]})
    code, said = cpbench("run", file, "--out", out, *words, env=env)
    assert code == 1, said
    for record in read_run(out).records.values():
        status, reason = FAULTS.get(str(record.case.operator.kwargs.get("how", "")), ("ok", ""))
        assert (record.status, (record.reason or "")[: len(reason)]) == (status, reason)
        assert record.seconds < 60
    assert set(lines(out).values()) == {1}
    assert survivors(out) == []


def at_the_gate(out: Path) -> bool:
    """Whether the first case is recorded and the next one waits."""
    notes = "".join(path.read_text() for path in out.glob("jobs/*/rank0.jsonl"))
    return len(read_run(out).records) == 1 and notes.count('"check"') > notes.count('"done"')


def gated(folder: Path) -> Path:
    file = sweep(folder / "s.toml", {2: ["reference", faulty("gate"), "bands"]})
    file.write_text(file.read_text().replace("timeout_s = 5.0", "timeout_s = 300.0"))
    return file


TWO_AGENTS = ("--launcher", "torchrun", "--nodes", "2", "--interface", "lo")


def test_an_agent_that_is_killed_on_another_node(
    tmp_path: Path, helpers: list[subprocess.Popen[str]]
) -> None:
    """Its case is a crash; when another machine has joined, the sweep goes on."""
    file, out = gated(tmp_path), tmp_path / "run"
    joined = start("join", out, "--interface", "lo", "--patience", "60")
    process = start("run", file, "--out", out, *TWO_AGENTS)
    helpers += [joined, process]
    until(lambda: at_the_gate(out), 90)
    joined.kill()
    joined.wait()
    helpers.append(start("join", out, "--interface", "lo", "--patience", "60"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    found = read_run(out).records.values()
    assert sorted(record.status for record in found) == ["crash", "ok", "ok"]
    assert set(lines(out).values()) == {1}
    assert helpers[-1].wait(30) == 0
    assert survivors(out) == []


def test_a_run_that_is_killed_frees_the_nodes_that_joined(
    tmp_path: Path, helpers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = gated(tmp_path), tmp_path / "run"
    joined = start("join", out, "--interface", "lo", "--patience", "5")
    process = start("run", file, "--out", out, *TWO_AGENTS)
    helpers += [joined, process]
    until(lambda: at_the_gate(out), 90)
    process.kill()
    process.wait()
    # torchrun on the other node sees its peer go; if not, silence ends it.
    assert joined.wait(join.SILENCE_S + 30) == 0
    assert survivors(out) == []
    (out / "open").touch()
    code, said = cpbench("run", file, "--out", out)
    assert code == 0, said
    assert "1 of 3 cases are recorded" in said
    assert set(lines(out).values()) == {1}


@needs_mpi
def test_ctrl_c_and_cancel_under_mpi(tmp_path: Path, helpers: list[subprocess.Popen[str]]) -> None:
    file, out = gated(tmp_path), tmp_path / "run"
    words = ("run", file, "--out", out, "--launcher", "mpi")
    for way in ("signal", "cancel"):
        process = start(*words)
        helpers.append(process)
        until(lambda: at_the_gate(out) and survivors(out), 60)
        if way == "signal":
            process.send_signal(signal.SIGINT)
        else:
            code, said = cpbench("run", file, "--out", out)  # a second one at the same time
            assert code == 2
            assert f"process {process.pid} is at work on {out}" in said
            code, said = cpbench("cancel", out)
            assert code == 0, said
        begun = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert time.monotonic() - begun < 20
        assert process.returncode == 130, said
        assert "interrupted: 1 of 3 cases are kept" in said
        assert survivors(out) == []
        for journal in out.glob("jobs/*/rank0.jsonl"):
            journal.unlink()
    code, said = cpbench("cancel", out)
    assert code == 0


@pytest.mark.parametrize("launcher", ["torchrun", "mpi"])
def test_a_launcher_that_is_killed(
    tmp_path: Path, helpers: list[subprocess.Popen[str]], launcher: str
) -> None:
    if launcher == "mpi" and OPEN_MPI is None:
        pytest.skip("needs Open MPI")
    file, out = gated(tmp_path), tmp_path / "run"
    process = start("run", file, "--out", out, "--launcher", launcher)
    helpers.append(process)
    until(lambda: at_the_gate(out), 60)
    (starter,) = children(process.pid)
    os.kill(starter, signal.SIGKILL)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1, said
    found = read_run(out).records.values()
    assert sorted(record.status for record in found) == ["crash", "ok", "ok"]
    (crash,) = (record for record in found if record.status == "crash")
    assert crash.reason
    assert survivors(out) == []


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


def test_status_of_a_run_here(tmp_path: Path, helpers: list[subprocess.Popen[str]]) -> None:
    file, out = gated(tmp_path), tmp_path / "run"
    process = start("run", file, "--out", out)
    helpers.append(process)
    until(lambda: at_the_gate(out), 60)
    command = [sys.executable, "-m", "cpbench", "status", str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1 of 3 cases are recorded" in told
    assert f"process {process.pid} on " in told
    assert "is at work" in told
    assert "(check): " in told
    process.kill()
    process.wait()
    until(lambda: not survivors(out), 10)
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "was at work and is gone" in told
    assert "nothing is at work; the command that began this goes on from here" in told
