"""Every failure of a worker becomes one record with its root cause, and the sweep continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from limits import LIMIT_S
from run_cpbench import (
    FAULTY_OPERATORS,
    cpbench,
    faulty_operator,
    leftover_processes,
    record_counts,
    start_cpbench,
    wait_until,
    write_sweep,
)

from cpbench.results.record import Record
from cpbench.results.store import read_run

NO_FAULTS = {"CPBENCH_TEST_CALM": "1"}


def by_fault(out: Path) -> dict[tuple[int, str], Record]:
    """Records by world size and fault."""
    records = {}
    for record in read_run(out).records.values():
        how = str(record.case.operator.kwargs.get("how", record.case.operator.name.split(":")[-1]))
        records[record.case.world_size, how] = record
    return records


SINGLE_RANK = {
    "raise": ("crash", "rank 0: RuntimeError: this is the root cause"),
    "oom": ("oom", "rank 0: "),
    "segfault": ("crash", "rank 0 was killed by SIGSEGV"),
    "exit": ("crash", "rank 0 ended with exit code 0 before its job was complete"),
    "missing": ("crash", "rank 0: LoadError: missing: cannot be made: ModuleNotFoundError: "),
    "hang": ("timeout", "no result after 30 s: rank 0 check"),
    "wrong": ("wrong", "out differs from float64"),
    "reference": ("ok", None),
}
TWO_RANKS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "late": ("ok", None),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "stop": ("timeout", "no result after 30 s: rank 0 check, rank 1 check (stopped)"),
    "exit": ("crash", "rank 1 ended with exit code 0 before its job was complete"),
    "cut": ("crash", "rank "),
    "reference": ("ok", None),
}
UNDER_TORCHRUN = {name: TWO_RANKS[name] for name in ("kill", "raise", "cut", "reference")}


def operator_specs(faults: dict[str, tuple[str, str | None]], rank: int) -> list[str]:
    special = {"reference": "reference", "missing": f"{FAULTY_OPERATORS}:missing"}
    return [special.get(how, faulty_operator(how, rank)) for how in faults]


class Sweep(NamedTuple):
    """A sweep with faults on one rank, and what became of each."""

    size: int
    launcher: str
    faults: dict[str, tuple[str, str | None]]


SWEEPS = {
    "one": Sweep(1, "local", SINGLE_RANK),
    "two": Sweep(2, "local", TWO_RANKS),
    "torchrun": Sweep(2, "torchrun", UNDER_TORCHRUN),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the sweeps, each with its file and run directory; they run side by side, since
    they wait for time limits."""
    folders, started = {}, []
    for name, (size, launcher, faults) in SWEEPS.items():
        folders[name] = folder = tmp_path_factory.mktemp(name)
        file = write_sweep(folder / "sweep.toml", {size: operator_specs(faults, size - 1)})
        file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 30.0"))
        options = ("--out", folder / "run", "--launcher", launcher)
        started.append(start_cpbench("run", file, *options))
    for process in started:
        _, stderr = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1, stderr
    return folders


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name, sweep in SWEEPS.items() for how in sweep.faults]
)
def test_each_fault_becomes_one_record(runs: dict[str, Path], name: str, how: str) -> None:
    out, sweep = runs[name] / "run", SWEEPS[name]
    check(by_fault(out)[sweep.size, how], out, *sweep.faults[how])


def check(record: Record, out: Path, status: str, reason: str | None) -> None:
    assert (record.status, (record.reason or "")[: len(reason or "")]) == (status, reason or "")
    assert record_counts(out)[record.case.id] == 1
    assert bool(record.times_us) == (status == "ok")
    assert record.environment in read_run(out).environments
    assert "\n" not in (record.reason or "")
    assert record.started > 0
    assert record.seconds > 0
    if status in ("crash", "oom", "timeout"):
        assert record.log is not None
        assert (out / record.log).is_file()
    if status == "wrong":
        assert record.errors["small"]["out"]["rel_l2"] == pytest.approx(0.01, rel=0.01)


def test_no_process_is_left(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        assert leftover_processes(folder / "run") == []


def test_logs_have_the_details_of_a_failure(runs: dict[str, Path]) -> None:
    out = runs["one"] / "run"
    records = by_fault(out)
    logs = {key: (out / record.log).read_text() for key, record in records.items() if record.log}
    assert "and more of it on a second line" in logs[1, "raise"]
    assert "in _hang" in logs[1, "hang"]  # stacks of all threads, dumped at the timeout
    assert "Segmentation fault" in logs[1, "segfault"]


def test_bench_timeout(tmp_path: Path) -> None:
    code, stderr = cpbench(
        "bench", "--operator", faulty_operator("hang"), "--num-heads-q", "1", "--head-dim", "16",
        "--seq-len", "64", "--timeout", "6", "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    (record,) = read_run(tmp_path / "run").records.values()
    assert (code, record.status) == (1, "timeout"), stderr
    assert (record.reason or "").startswith("no result after 6 s: rank 0 check")


def test_retry_runs_only_the_given_statuses_again(runs: dict[str, Path], tmp_path: Path) -> None:
    file, out = runs["one"] / "sweep.toml", tmp_path / "run"
    shutil.copytree(runs["one"] / "run", out)
    before, count = by_fault(out), record_counts(out)

    code, stderr = cpbench("run", file, "--out", out, env=NO_FAULTS)
    assert (code, record_counts(out)) == (1, count), stderr  # all are recorded: nothing to do

    code, stderr = cpbench("run", file, "--out", out, "--retry", "oom,crash", env=NO_FAULTS)
    assert code == 1, stderr  # what is wrong, and what took too long, were not
    for key, record in by_fault(out).items():
        retried = before[key].status in ("oom", "crash")
        assert record.status == ("ok" if retried else before[key].status), key
        assert record_counts(out)[record.case.id] == 1 + retried, key
    assert leftover_processes(out) == []


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end after a test, even if it fails."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def write_hanging_sweep(folder: Path, world_size: int) -> Path:
    """A sweep with a good case, one that hangs, and another good one."""
    names = ["reference", faulty_operator("hang"), faulty_operator("well")]
    file = write_sweep(folder / "sweep.toml", {world_size: names})
    file.write_text(file.read_text().replace("timeout_s = 20.0", "timeout_s = 300.0"))
    return file


@pytest.mark.parametrize(
    ("number", "launcher", "size", "code"),
    [
        pytest.param(signal.SIGINT, "local", 1, 130, id="SIGINT local"),
        pytest.param(signal.SIGTERM, "local", 2, 130, id="SIGTERM local"),
        pytest.param(signal.SIGKILL, "local", 1, -9, id="SIGKILL local"),
        pytest.param(signal.SIGKILL, "torchrun", 1, -9, id="SIGKILL torchrun"),
    ],
)
def test_a_signal_to_the_parent(
    tmp_path: Path,
    processes: list[subprocess.Popen[str]],
    number: signal.Signals,
    launcher: str,
    size: int,
    code: int,
) -> None:
    file, out = write_hanging_sweep(tmp_path, size), tmp_path / "run"
    process = start_cpbench("run", file, "--out", out, "--launcher", launcher)
    processes.append(process)
    wait_until(lambda: sum('"check"' in line for line in journal_lines(out)) == 2)
    assert len(leftover_processes(out)) >= size  # else this test could not fail
    process.send_signal(number)
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code
    assert "Traceback" not in stderr
    wait_until(lambda: not leftover_processes(out))
    assert len(read_run(out).records) == 1
    if code == 130:
        assert "interrupted: 1 of 3 cases are recorded" in stderr.splitlines()[-1]
    if number == signal.SIGINT:
        code, stderr = cpbench("run", file, "--out", out, env=NO_FAULTS)
        assert code == 0, stderr
        assert sorted(record_counts(out).values()) == [1, 1, 1]


def journal_lines(out: Path) -> list[str]:
    """Lines of the journals of rank 0."""
    return [line for path in out.glob("jobs/*/rank0.jsonl") for line in path.open()]


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_ctrl_c_while_workers_start(
    tmp_path: Path, processes: list[subprocess.Popen[str]], launcher: str
) -> None:
    file, out = write_hanging_sweep(tmp_path, 2), tmp_path / "run"
    process = start_cpbench("run", file, "--out", out, "--launcher", launcher)
    processes.append(process)
    wait_until(lambda: list(out.glob("jobs/*/rank0.log")) and leftover_processes(out))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # a second one changes nothing
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert [line for line in stderr.splitlines() if line.strip()] == [
        f"cpbench: interrupted: 0 of 3 cases are recorded in {out}; repeat the command to resume"
    ]
    wait_until(lambda: leftover_processes(out) == [])  # one may just have been started


def test_a_worker_whose_parent_has_ended_exits(tmp_path: Path) -> None:
    """When the parent ended before the worker asked the kernel for a signal; only then."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    codes = []
    for parent in (ended.pid, os.getpid()):
        worker = subprocess.run(
            [sys.executable, "-m", "cpbench.worker.main", str(tmp_path / "job.json")],
            env={**os.environ, "CPBENCH_PARENT": str(parent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        codes.append((worker.returncode, "FileNotFoundError" in worker.stderr))
    assert codes == [(70, False), (1, True)]
