"""Every failure of a worker becomes one record with its root cause, and the sweep continues."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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
    "hang": ("timeout", "no result after 20 s: rank 0 check"),
    "wrong": ("wrong", "out differs from float64"),
    "reference": ("ok", None),
}
TWO_RANKS = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "late": ("ok", None),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "stop": ("timeout", "no result after 20 s: rank 0 check, rank 1 check (stopped)"),
    "exit": ("crash", "rank 1 ended with exit code 0 before its job was complete"),
    "cut": ("crash", "rank "),
    "reference": ("ok", None),
}
UNDER_TORCHRUN = {name: TWO_RANKS[name] for name in ("kill", "raise", "cut", "reference")}


def operator_specs(faults: dict[str, tuple[str, str | None]], rank: int) -> list[str]:
    special = {"reference": "reference", "missing": f"{FAULTY_OPERATORS}:missing"}
    return [special.get(how, faulty_operator(how, rank)) for how in faults]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int, str]:
    """A sweep with every fault: its file, run directory, exit code and standard error."""
    folder = tmp_path_factory.mktemp("faults")
    file = write_sweep(
        folder / "sweep.toml", {1: operator_specs(SINGLE_RANK, 0), 2: operator_specs(TWO_RANKS, 1)}
    )
    code, stderr = cpbench("run", file, "--out", folder / "run")
    return file, folder / "run", code, stderr


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    file = write_sweep(folder / "sweep.toml", {2: operator_specs(UNDER_TORCHRUN, 1)})
    code, stderr = cpbench("run", file, "--out", folder / "run", "--launcher", "torchrun")
    assert code == 1, stderr
    return folder / "run"


EXPECTED = {
    **{(1, how): expected for how, expected in SINGLE_RANK.items()},
    **{(2, how): expected for how, expected in TWO_RANKS.items()},
}


@pytest.mark.parametrize(("size", "how"), list(EXPECTED), ids=lambda x: str(x))
def test_each_fault_becomes_one_record(
    run: tuple[Path, Path, int, str], size: int, how: str
) -> None:
    _, out, code, stderr = run
    assert code == 1, stderr
    check(by_fault(out)[size, how], out, *EXPECTED[size, how])


@pytest.mark.parametrize("how", list(UNDER_TORCHRUN))
def test_each_fault_becomes_one_record_under_torchrun(torchrun: Path, how: str) -> None:
    check(by_fault(torchrun)[2, how], torchrun, *UNDER_TORCHRUN[how])


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


def test_no_process_is_left(run: tuple[Path, Path, int, str], torchrun: Path) -> None:
    assert leftover_processes(run[1]) == []
    assert leftover_processes(torchrun) == []


def test_logs_have_the_details_of_a_failure(run: tuple[Path, Path, int, str]) -> None:
    _, out, _, _ = run
    records = by_fault(out)
    logs = {key: (out / record.log).read_text() for key, record in records.items() if record.log}
    assert "and more of it on a second line" in logs[1, "raise"]
    assert "in _hang" in logs[1, "hang"]  # stacks of all threads, dumped at the timeout
    assert "Segmentation fault" in logs[1, "segfault"]


def test_bench_timeout(tmp_path: Path) -> None:
    code, stderr = cpbench(
        "bench", "--operator", faulty_operator("hang"), "--num-heads-q", "1", "--head-dim", "16",
        "--seq-len", "64", "--timeout", "1", "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    (record,) = read_run(tmp_path / "run").records.values()
    assert (code, record.status) == (1, "timeout"), stderr
    assert (record.reason or "").startswith("no result after 1 s: rank 0 check")


def test_retry_runs_only_the_given_statuses_again(
    run: tuple[Path, Path, int, str], tmp_path: Path
) -> None:
    file, out, _, _ = run
    shutil.copytree(out, tmp_path / "run")
    out = tmp_path / "run"
    before, count = by_fault(out), record_counts(out)

    code, stderr = cpbench("run", file, "--out", out, env=NO_FAULTS)
    assert (code, record_counts(out)) == (1, count), stderr  # all are recorded: nothing to do

    code, stderr = cpbench(
        "run", file, "--out", out, "--retry", "oom,timeout,crash", "--where", "world_size=1",
        env=NO_FAULTS,
    )  # fmt: skip
    assert code == 1, stderr  # "wrong" was not retried
    for key, record in by_fault(out).items():
        retried = key[0] == 1 and before[key].status in ("oom", "timeout", "crash")
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
