"""One sweep under every launcher that works on one machine, with the same cases and checks; ranks,
agents, launchers and supervisors that are killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_paths import (
    CASE_IDS,
    MPICH,
    OPEN_MPI,
    SWEEP,
    SWEEP_OF_TWO,
    needs_mpi,
    needs_mpich,
)
from limits import LIMIT_S
from run_cpbench import (
    cpbench,
    faulty_operator,
    leftover_processes,
    record_counts,
    start_cpbench,
    wait_until,
    waits_at_gate,
    write_sweep,
)

from cpbench.launchers import join
from cpbench.results.store import read_run

LAUNCHERS = [
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
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end after a test, even if it fails."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("options", "env"), LAUNCHERS)
def test_every_launcher_runs_the_same_cases(
    tmp_path: Path, processes: list[subprocess.Popen[str]], options: list[str], env: dict[str, str]
) -> None:
    """Two ranks, where the launcher alone matters; four on two nodes, and over MPI's messages."""
    file, out = tmp_path / "s.toml", tmp_path / "run"
    of_four = bool({"--nodes", "--transport"} & set(options))
    file.write_text(SWEEP if of_four else SWEEP_OF_TWO)
    if "--nodes" in options:
        options = [*options, "--interface", "lo"]
        processes.append(start_cpbench("join", out, "--interface", "lo", "--patience", "60"))
    code, stderr = cpbench("run", file, "--out", out, *options, env=env)
    assert code == 0, stderr
    run = read_run(out)
    assert len(run.records) == len(CASE_IDS)
    assert sorted(run.records) == CASE_IDS or not of_four
    for record in run.records.values():
        assert record.status == "ok"
        assert set(record.errors) == {"small"}
        assert record.bytes_sent == record.predicted_bytes
        size = record.case.world_size
        ranks = run.environments[str(record.environment)]["ranks"]
        assert len(ranks) == size
        assert record.ranks_per_node == (size // 2 if "--nodes" in options else size)
    if processes:
        _, stderr = processes[0].communicate(timeout=LIMIT_S)
        assert processes[0].returncode == 0, stderr
    assert leftover_processes(out) == []


FAULTS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "hang": ("timeout", "no result after 30 s: rank 0 "),
    "segfault": ("crash", "rank 1 was killed by SIGSEGV"),
    "cut": ("crash", ""),  # the connection to mpiexec too, which may then report the failure
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str]]:
    """The run directory, exit code and standard error of a sweep with faults under each MPI; they
    run side by side, since they wait for a time limit."""
    started = {}
    for name, env in (("openmpi", {}), ("mpich", {"CPBENCH_MPIEXEC": str(MPICH)})):
        folder = tmp_path_factory.mktemp(name)
        names = [*(faulty_operator(how, 1) for how in FAULTS), "reference"]
        file, out = write_sweep(folder / "s.toml", {2: names}), folder / "run"
        file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 30.0"))
        started[name] = out, start_cpbench("run", file, "--out", out, "--launcher", "mpi", env=env)
    ended = {}
    for name, (out, process) in started.items():
        _, stderr = process.communicate(timeout=LIMIT_S)
        ended[name] = out, process.returncode, stderr
    return ended


@pytest.mark.parametrize(
    "name", [pytest.param("openmpi", marks=needs_mpi), pytest.param("mpich", marks=needs_mpich)]
)
def test_a_rank_that_fails_under_mpi_is_one_record(
    failing: dict[str, tuple[Path, int, str]], name: str
) -> None:
    out, code, stderr = failing[name]
    assert code == 1, stderr
    for record in read_run(out).records.values():
        status, reason = FAULTS.get(str(record.case.operator.kwargs.get("how", "")), ("ok", ""))
        assert (record.status, (record.reason or "")[: len(reason)]) == (status, reason)
        assert record.seconds > 0
    assert set(record_counts(out).values()) == {1}
    assert leftover_processes(out) == []


def write_gated_sweep(folder: Path) -> Path:
    """A sweep whose second case waits for a file ``open`` in the run directory."""
    file = write_sweep(folder / "s.toml", {2: ["reference", faulty_operator("gate"), "bands"]})
    file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 300.0"))
    return file


TWO_AGENTS = ("--launcher", "torchrun", "--nodes", "2", "--interface", "lo")


def test_an_agent_that_is_killed_on_another_node(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    """Its case is a crash; once another machine has joined, the sweep continues."""
    file, out = write_gated_sweep(tmp_path), tmp_path / "run"
    joined = start_cpbench("join", out, "--interface", "lo", "--patience", "60")
    process = start_cpbench("run", file, "--out", out, *TWO_AGENTS)
    processes += [joined, process]
    wait_until(lambda: waits_at_gate(out), 90)
    joined.kill()
    joined.wait()
    processes.append(start_cpbench("join", out, "--interface", "lo", "--patience", "60"))
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, stderr
    records = read_run(out).records.values()
    assert sorted(record.status for record in records) == ["crash", "ok", "ok"]
    assert set(record_counts(out).values()) == {1}
    assert processes[-1].wait(30) == 0
    assert leftover_processes(out) == []


def test_joined_nodes_leave_a_run_that_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_gated_sweep(tmp_path), tmp_path / "run"
    joined = start_cpbench("join", out, "--interface", "lo", "--patience", "5")
    process = start_cpbench("run", file, "--out", out, *TWO_AGENTS)
    processes += [joined, process]
    wait_until(lambda: waits_at_gate(out), 90)
    process.kill()
    process.wait()
    # torchrun on the other node loses its peer; else the heartbeat times out.
    assert joined.wait(join.HEARTBEAT_TIMEOUT_S + 30) == 0
    assert leftover_processes(out) == []
    (out / "open").touch()
    code, stderr = cpbench("run", file, "--out", out)
    assert code == 0, stderr
    assert "1 of 3 cases are recorded" in stderr
    assert set(record_counts(out).values()) == {1}


@needs_mpi
def test_ctrl_c_and_cancel_under_mpi(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    file, out = write_gated_sweep(tmp_path), tmp_path / "run"
    arguments = ("run", file, "--out", out, "--launcher", "mpi")
    for method in ("signal", "cancel"):
        process = start_cpbench(*arguments)
        processes.append(process)
        wait_until(lambda: waits_at_gate(out) and leftover_processes(out))
        if method == "signal":
            process.send_signal(signal.SIGINT)
        else:
            code, stderr = cpbench("run", file, "--out", out)  # a second one at the same time
            assert code == 2
            assert f"process {process.pid} is already running cases of {out}" in stderr
            code, stderr = cpbench("cancel", out)
            assert code == 0, stderr
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, stderr
        assert "interrupted: 1 of 3 cases are recorded" in stderr
        assert leftover_processes(out) == []
        for file_at_gate in out.glob("jobs/*/at-gate"):
            file_at_gate.unlink()
    code, stderr = cpbench("cancel", out)
    assert code == 0


@pytest.mark.parametrize("launcher", ["torchrun", "mpi"])
def test_a_launcher_that_is_killed(
    tmp_path: Path, processes: list[subprocess.Popen[str]], launcher: str
) -> None:
    if launcher == "mpi" and OPEN_MPI is None:
        pytest.skip("needs Open MPI")
    file, out = write_gated_sweep(tmp_path), tmp_path / "run"
    process = start_cpbench("run", file, "--out", out, "--launcher", launcher)
    processes.append(process)
    wait_until(lambda: waits_at_gate(out))
    (launcher_pid,) = children(process.pid)
    os.kill(launcher_pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1, stderr
    records = read_run(out).records.values()
    assert sorted(record.status for record in records) == ["crash", "ok", "ok"]
    (crash,) = (record for record in records if record.status == "crash")
    assert crash.reason
    assert leftover_processes(out) == []


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    text = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


def test_status_of_a_local_run(tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    file, out = write_gated_sweep(tmp_path), tmp_path / "run"
    process = start_cpbench("run", file, "--out", out)
    processes.append(process)
    wait_until(lambda: waits_at_gate(out))
    command = [sys.executable, "-m", "cpbench", "status", str(out)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1 of 3 cases are recorded" in output
    assert f"process {process.pid} on " in output
    assert "is running" in output
    assert "(check): " in output
    process.kill()
    process.wait()
    wait_until(lambda: not leftover_processes(out))
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "has ended unexpectedly" in output
    resumed = shlex.join(["cpbench", "run", str(file), "--out", str(out)])
    assert f"not running; to resume, in the folder where it was started, run: {resumed}\n" in output
