"""Whatever happens to a worker becomes one record with one cause, and the sweep goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_cpbench import OPERATORS, cpbench, faulty, lines, start, survivors, sweep, until

from cpbench.results.record import Record
from cpbench.results.store import read_run

CALM = {"CPBENCH_TEST_CALM": "1"}


def by_fault(out: Path) -> dict[tuple[int, str], Record]:
    """Records by world size and fault."""
    found = {}
    for record in read_run(out).records.values():
        how = str(record.case.operator.kwargs.get("how", record.case.operator.name.split(":")[-1]))
        found[record.case.world_size, how] = record
    return found


ALONE = {
    "raise": ("crash", "rank 0: RuntimeError: this is the root cause"),
    "oom": ("oom", "rank 0: "),
    "segfault": ("crash", "rank 0 was killed by SIGSEGV"),
    "exit": ("crash", "rank 0 ended with exit code 0 in the middle of its work"),
    "missing": ("crash", "rank 0: ModuleNotFoundError: No module named 'cpbench_no_such_module'"),
    "hang": ("timeout", "no result after 5 s: rank 0 check"),
    "wrong": ("wrong", "out differs from float64"),
    "reference": ("ok", None),
}
TOGETHER = {
    "kill": ("crash", "rank 1 was killed by SIGKILL"),
    "late": ("ok", None),
    "raise": ("crash", "rank 1: RuntimeError: this is the root cause"),
    "stop": ("timeout", "no result after 5 s: rank 0 check, rank 1 check (stopped)"),
    "exit": ("crash", "rank 1 ended with exit code 0 in the middle of its work"),
    "cut": ("crash", "rank "),
    "reference": ("ok", None),
}
UNDER_TORCHRUN = {name: TOGETHER[name] for name in ("kill", "raise", "cut", "reference")}


def named(faults: dict[str, tuple[str, str | None]], rank: int) -> list[str]:
    special = {"reference": "reference", "missing": f"{OPERATORS}:missing"}
    return [special.get(how, faulty(how, rank)) for how in faults]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int, str]:
    """One sweep with every fault: its file, run directory, exit code and standard error."""
    folder = tmp_path_factory.mktemp("faults")
    file = sweep(folder / "sweep.toml", {1: named(ALONE, 0), 2: named(TOGETHER, 1)})
    code, stderr = cpbench("run", file, "--out", folder / "run")
    return file, folder / "run", code, stderr


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    file = sweep(folder / "sweep.toml", {2: named(UNDER_TORCHRUN, 1)})
    code, stderr = cpbench("run", file, "--out", folder / "run", "--launcher", "torchrun")
    assert code == 1, stderr
    return folder / "run"


EXPECTED = {
    **{(1, how): told for how, told in ALONE.items()},
    **{(2, how): told for how, told in TOGETHER.items()},
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("size", "how"), list(EXPECTED), ids=lambda x: str(x))
def test_each_fault_becomes_one_record(
    run: tuple[Path, Path, int, str], size: int, how: str
) -> None:
    _, out, code, stderr = run
    assert code == 1, stderr
    check(by_fault(out)[size, how], out, *EXPECTED[size, how])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", list(UNDER_TORCHRUN))
def test_each_fault_becomes_one_record_under_torchrun(torchrun: Path, how: str) -> None:
    check(by_fault(torchrun)[2, how], torchrun, *UNDER_TORCHRUN[how])


def check(record: Record, out: Path, status: str, reason: str | None) -> None:
    assert (record.status, (record.reason or "")[: len(reason or "")]) == (status, reason or "")
    assert lines(out)[record.case.id] == 1
    assert bool(record.times_us) == (status == "ok")
    assert record.environment in read_run(out).environments
    assert "\n" not in (record.reason or "")
    assert record.started > 0
    assert 0 < record.seconds < 60
    if status in ("crash", "oom", "timeout"):
        assert record.log is not None
        assert (out / record.log).is_file()
    if status == "wrong":
        assert record.errors["small"]["out"]["rel_l2"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.timeout(120)
def test_no_process_is_left(run: tuple[Path, Path, int, str], torchrun: Path) -> None:
    assert survivors(run[1]) == []
    assert survivors(torchrun) == []


@pytest.mark.timeout(60)
def test_logs_tell_what_the_reason_leaves_out(run: tuple[Path, Path, int, str]) -> None:
    _, out, _, _ = run
    found = by_fault(out)
    told = {key: (out / str(found[key].log)).read_text() for key in found if found[key].log}
    assert "and more of it on a second line" in told[1, "raise"]
    assert "in _hang" in told[1, "hang"]  # a stack of every thread, asked for at the timeout
    assert "Segmentation fault" in told[1, "segfault"]


@pytest.mark.timeout(60)
def test_bench_ends_what_takes_too_long(tmp_path: Path) -> None:
    code, stderr = cpbench(
        "bench", "--operator", faulty("hang"), "--num-heads-q", "1", "--head-dim", "16",
        "--seq-len", "64", "--timeout", "1", "--device", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    (record,) = read_run(tmp_path / "run").records.values()
    assert (code, record.status) == (1, "timeout"), stderr
    assert (record.reason or "").startswith("no result after 1 s: rank 0 check")


@pytest.mark.timeout(120)
def test_retry_runs_those_again_and_nothing_else(
    run: tuple[Path, Path, int, str], tmp_path: Path
) -> None:
    file, out, _, _ = run
    shutil.copytree(out, tmp_path / "run")
    out = tmp_path / "run"
    before, count = by_fault(out), lines(out)

    code, stderr = cpbench("run", file, "--out", out, env=CALM)
    assert (code, lines(out)) == (1, count), stderr  # all recorded: nothing to do

    code, stderr = cpbench(
        "run", file, "--out", out, "--retry", "oom,timeout,crash", "--where", "world_size=1",
        env=CALM,
    )  # fmt: skip
    assert code == 1, stderr  # "wrong" was not to be tried again
    for key, record in by_fault(out).items():
        again = key[0] == 1 and before[key].status in ("oom", "timeout", "crash")
        assert record.status == ("ok" if again else before[key].status), key
        assert lines(out)[record.case.id] == 1 + again, key
    assert survivors(out) == []


@pytest.fixture
def parents() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a failing test must not leave behind."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def hanging(folder: Path, world_size: int) -> Path:
    """A sweep with a good case, one that hangs for long, and another good one."""
    names = ["reference", faulty("hang"), faulty("well")]
    file = sweep(folder / "sweep.toml", {world_size: names})
    file.write_text(file.read_text().replace("timeout_s = 5.0", "timeout_s = 300.0"))
    return file


@pytest.mark.timeout(90)
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
    parents: list[subprocess.Popen[str]],
    number: signal.Signals,
    launcher: str,
    size: int,
    code: int,
) -> None:
    file, out = hanging(tmp_path, size), tmp_path / "run"
    process = start("run", file, "--out", out, "--launcher", launcher)
    parents.append(process)
    until(lambda: sum('"check"' in line for line in journal(out)) == 2)
    assert len(survivors(out)) >= size  # or this test could not fail
    process.send_signal(number)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert process.returncode == code
    assert "Traceback" not in stderr
    until(lambda: not survivors(out), 5)
    assert len(read_run(out).records) == 1
    if code == 130:
        assert "interrupted: 1 of 3 cases are kept" in stderr.splitlines()[-1]
    if number == signal.SIGINT:
        again, stderr = cpbench("run", file, "--out", out, env=CALM)
        assert again == 0, stderr
        assert sorted(lines(out).values()) == [1, 1, 1]


def journal(out: Path) -> list[str]:
    """What rank 0 has noted."""
    return [line for path in out.glob("jobs/*/rank0.jsonl") for line in path.open()]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_ctrl_c_while_workers_start(
    tmp_path: Path, parents: list[subprocess.Popen[str]], launcher: str
) -> None:
    file, out = hanging(tmp_path, 2), tmp_path / "run"
    process = start("run", file, "--out", out, "--launcher", launcher)
    parents.append(process)
    until(lambda: list(out.glob("jobs/*/rank0.log")) and survivors(out))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # impatience changes nothing
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert process.returncode == 130
    assert [line for line in stderr.splitlines() if line.strip()] == [
        f"cpbench: interrupted: 0 of 3 cases are kept in {out}; the same command goes on from here"
    ]
    assert survivors(out) == []


@pytest.mark.timeout(60)
def test_a_worker_whose_starter_is_gone_ends_itself(tmp_path: Path) -> None:
    """It may be too late to ask the kernel for a signal; only then."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    codes = []
    for parent in (gone.pid, os.getpid()):
        worker = subprocess.run(
            [sys.executable, "-m", "cpbench.worker.main", str(tmp_path / "job.json")],
            env={**os.environ, "CPBENCH_PARENT": str(parent)},
            stderr=subprocess.PIPE,
            text=True,
        )
        codes.append((worker.returncode, "FileNotFoundError" in worker.stderr))
    assert codes == [(70, False), (1, True)]
