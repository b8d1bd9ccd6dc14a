"""Claims of processes on the cases of a run directory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from limits import LIMIT_S
from run_cpbench import cpbench, wait_until

from cpbench.results import active
from cpbench.results.active import active_processes, registered_as_active
from cpbench.results.store import read_document, write_document

PAIRS = 60


def claim_in_rounds(folder: Path, cases: set[str], barrier: Any, let_in: Any) -> None:
    """In each round, try to claim cases at the same time as the others; hold them until all have
    tried."""
    for number in range(PAIRS):
        barrier.wait(LIMIT_S)
        try:
            with registered_as_active(folder / str(number), cases):
                let_in[number] += 1
                barrier.wait(LIMIT_S)
        except ValueError:
            barrier.wait(LIMIT_S)


def let_in(folder: Path, *claims: set[str]) -> list[int]:
    """By round, how many of several processes were let in, each with its cases."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(claims))
    counts = [context.Array("i", PAIRS) for _ in claims]
    processes = [
        context.Process(target=claim_in_rounds, args=(folder, cases, barrier, count))
        for cases, count in zip(claims, counts, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_S)
        assert process.exitcode == 0
    return [sum(number) for number in zip(*counts, strict=True)]


def test_exactly_one_of_each_pair_that_starts_together_is_let_in(tmp_path: Path) -> None:
    assert let_in(tmp_path, {"a", "b"}, {"b", "c"}) == [1] * PAIRS


def test_processes_with_cases_of_their_own_are_all_let_in(tmp_path: Path) -> None:
    assert let_in(tmp_path, {"a"}, {"b"}, {"c"}) == [3] * PAIRS
    assert not list(tmp_path.glob("*/running/*"))


HOLD = """
import sys, time
from pathlib import Path
from cpbench.results import active
if sys.argv[2] == "lock":
    with active._locked(Path(sys.argv[1], "running", "lock"), active._owner()):
        print("held", flush=True)
        time.sleep(1000)
with active.registered_as_active(Path(sys.argv[1]), ["a"]):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("what", ["claim", "lock"])
def test_what_a_killed_process_held_does_not_block_the_next(tmp_path: Path, what: str) -> None:
    (tmp_path / "running").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), what], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    if what == "claim":
        with pytest.raises(ValueError, match=f"process {holder.pid} is already running cases of"):
            with registered_as_active(tmp_path, ["a"]):
                pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=LIMIT_S)
    assert len(list((tmp_path / "running").iterdir())) == 1  # it left something
    started = time.monotonic()
    with registered_as_active(tmp_path, ["a"]):
        assert time.monotonic() - started < active.STALE_S / 2  # it was not waited for
        (process,) = active_processes(tmp_path)
        assert process.pid == os.getpid()
    assert not list((tmp_path / "running").iterdir())


def claim_of_another_machine(out: Path, seconds_ago: float) -> Path:
    path = out / "running" / "elsewhere-7-abc.json"
    path.parent.mkdir(exist_ok=True)
    owner = {"host": "elsewhere", "pid": 7, "born": "1", "namespace": "", "cases": ["a"]}
    write_document(path, owner)
    then = path.stat().st_mtime - seconds_ago
    os.utime(path, (then, then))
    return path


def test_a_claim_of_another_machine_holds_while_its_heartbeat_goes_on(tmp_path: Path) -> None:
    path = claim_of_another_machine(tmp_path, seconds_ago=60)
    with pytest.raises(ValueError, match=r"process 7 on elsewhere is already running .*heartbeat"):
        with registered_as_active(tmp_path, ["a"]):
            pass
    with registered_as_active(tmp_path, ["b"]):
        pass
    assert cpbench("cancel", tmp_path) == (
        2, "cpbench: cancel these on their own machines: 7 on elsewhere\n"
    )  # fmt: skip
    assert path.exists()
    claim_of_another_machine(tmp_path, seconds_ago=active.STALE_S + 1)
    with registered_as_active(tmp_path, ["a"]):
        assert not path.exists()
    claim_of_another_machine(tmp_path, seconds_ago=active.STALE_S + 1)
    assert cpbench("cancel", tmp_path)[0] == 0
    assert not path.exists()


def test_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "HEARTBEAT_S", 0.01)
    with registered_as_active(tmp_path, ["a"]):
        (path,) = (tmp_path / "running").glob("*.json")
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
    assert not path.exists()


def test_a_process_in_another_container_is_not_of_this_machine(tmp_path: Path) -> None:
    with registered_as_active(tmp_path, ["a"]):
        (path,) = (tmp_path / "running").glob("*.json")
        own = read_document(path)
        assert (own["host"], own["pid"]) == (socket.gethostname(), os.getpid())
        write_document(path, {**own, "pid": 2**22 + 1, "namespace": "pid:[1]"})
        (process,) = active_processes(tmp_path)
        assert (process.is_local, process.alive) == (False, True)


def test_a_damaged_claim_is_of_an_unknown_process_and_any_case(tmp_path: Path) -> None:
    path = claim_of_another_machine(tmp_path, seconds_ago=0)
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(ValueError, match="an unknown machine is already running"):
        with registered_as_active(tmp_path, ["z"]):
            pass
