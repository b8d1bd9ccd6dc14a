"""Which rank is to blame, and for which case, from journals and exit codes written by hand: every
order of events that real processes show only now and then."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers import failure_cause, supervisor, torchrun
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, Launcher, Place
from cpbench.results.record import Record
from cpbench.results.store import Journal, RecordWriter, StoreError, read_run

CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"
RESET = "RuntimeError: [gloo/pair.cc:537] Read error [127.0.0.1]:400: Connection reset by peer."
A, B = Case(seq_len=64, world_size=2), Case(seq_len=128, world_size=2)


class Scene:
    """A run directory with a gang of two that has cases A and B to do."""

    def __init__(self, out: Path) -> None:
        self.out = out
        plan = supervisor.Plan(out, "local", "cpu", MeasureSettings(timeout_s=5.0))
        job = plan.job([A, B], "writer")
        self.started: list[str] = []
        self.watch = supervisor._Watch(
            job, 2, plan, starting=lambda case: self.started.append(case.id),
            finished=lambda record: None,
        )  # fmt: skip
        self.journals = [Journal(job.journal_path(rank)) for rank in range(2)]
        self.writer = RecordWriter(job.record_path)

    def rank(self, number: int, *events: str) -> None:
        """Notes such as ``"start A"``."""
        for event in events:
            word, _, case = event.partition(" ")
            details = {"case": {"A": A, "B": B}[case].id} if case else {}
            self.journals[number].note(word, **details)

    def fails(self, number: int, reason: str, status: str = "crash") -> None:
        self.journals[number].note("failed", status=status, reason=reason)

    def record(self, case: Case) -> None:
        self.writer.append(Record(case=case, status="ok", started=time.time()).to_json())

    def statuses(self) -> dict[str, str]:
        """Status by case, of which there is one record at most."""
        found = read_run(self.out).records
        files = (self.out / "records").glob("*.jsonl")
        assert sum(len(path.read_text().splitlines()) for path in files) == len(found)
        return {key: record.status for key, record in found.items()}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_rank_that_dies_once_its_case_is_recorded_costs_no_case(scene: Scene) -> None:
    scene.rank(0, "start A", "check A")
    scene.rank(1, "start A", "check A")
    scene.record(A)
    scene.rank(0, "done A", "start B")
    scene.fails(0, CLOSED)
    told = scene.watch._bury([70, -9])
    assert told.startswith("rank 1 was killed by SIGKILL; see ")
    assert scene.watch.recorded == {A.id}
    assert scene.statuses() == {A.id: "ok"}


def test_a_rank_that_is_ahead_is_blamed_for_the_case_it_is_in(scene: Scene) -> None:
    scene.rank(0, "start A")
    scene.rank(1, "start A", "done A", "start B")
    scene.record(A)
    scene.watch._bury([None, -11])
    assert scene.statuses() == {A.id: "ok", B.id: "crash"}


def test_rank_0_dying_between_record_and_note_is_not_recorded_twice(scene: Scene) -> None:
    scene.rank(0, "start A")
    scene.record(A)
    assert scene.watch._bury([-9, 70])
    assert scene.statuses() == {A.id: "ok"}
    assert scene.watch._current is None


def test_a_record_that_is_read_before_its_start_is_not_started_again(scene: Scene) -> None:
    scene.record(A)
    scene.watch._catch_up()
    scene.rank(0, "start A")
    scene.watch._catch_up()
    assert scene.watch._current is None
    assert scene.started == []


def test_a_death_before_any_case_is_told_and_not_recorded(scene: Scene) -> None:
    scene.journals[0].note("boot", pid=1)
    scene.fails(0, "ValueError: there is no CUDA device 0: torch sees 0")
    assert "no CUDA device" in scene.watch._bury([70, None])
    assert scene.statuses() == {}


class FakeGang:
    """A gang that ends a case in the very moment in which it is killed."""

    def __init__(self, scene: Scene, case: Case | None) -> None:
        self.scene, self.case = scene, case

    def pass_on(self, number: signal.Signals, pids: set[int]) -> None:
        pass

    def kill(self) -> None:
        if self.case is not None:
            self.scene.record(self.case)
            self.scene.rank(0, "done A", "start B")


@pytest.mark.parametrize("ended", [None, A], ids=["it hangs", "it ends just then"])
def test_a_case_is_not_timed_out_for_another(scene: Scene, ended: Case | None) -> None:
    for rank in (0, 1):
        scene.rank(rank, "start A", "check A")
    scene.watch._catch_up()
    scene.watch._time_out(FakeGang(scene, ended), A)  # type: ignore[arg-type]
    assert scene.statuses() == {A.id: "ok" if ended else "timeout"}


def test_a_case_that_a_rank_never_came_to_is_not_blamed(scene: Scene) -> None:
    scene.rank(1, "start A")  # and hangs once all have its results
    scene.rank(0, "start A", "done A", "start B")
    scene.record(A)
    scene.watch._catch_up()
    told = scene.watch._time_out(FakeGang(scene, None), B)  # type: ignore[arg-type]
    assert "rank 0 start, rank 1 start" in told
    assert scene.statuses() == {A.id: "ok"}


def test_time_is_measured_from_the_start_that_was_seen_whatever_the_clock_says(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e6)  # the worker's clock is decades behind
    scene.rank(0, "start A")
    monkeypatch.undo()
    scene.watch._catch_up()
    assert abs(time.monotonic() - scene.watch._progress) < 1
    assert scene.watch._current == A


def test_a_lost_disk_is_not_a_crash(scene: Scene) -> None:
    scene.rank(0, "start A")
    with pytest.raises(StoreError, match="found no room"):
        scene.watch._bury([74, None])
    assert scene.statuses() == {}


def test_a_launcher_that_dies_is_named(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.watch.plan = supervisor.Plan(tmp_path, "torchrun", "cpu", MeasureSettings())
    scene.watch._launcher = torchrun.LAUNCHER
    scene.watch._log(0).write_text("")
    scene.rank(0, "start A")
    scene.watch._bury([-9])
    record = read_run(tmp_path).records[A.id]
    assert (record.status, record.reason) == ("crash", "torchrun was killed by SIGKILL")


Words = tuple[str, str] | None


def judged(
    tmp_path: Path, codes: Sequence[int | None], words: Sequence[Words], oom: bool = False
) -> tuple[int, str, str] | None:
    """Rank, status and reason for exit codes and last words, later ranks speaking earlier."""
    ranks = []
    for number, (code, said) in enumerate(zip(codes, words, strict=True)):
        rank = failure_cause.Rank(number, tmp_path / "none")
        rank.code, rank.words, rank.spoke = code, said, float(-number)
        ranks.append(rank)
    found = failure_cause.cause(ranks, oom)
    return found and (found[0].number, found[1], found[2])


ROOT = ("crash", "ValueError: root")
OOM = ("oom", "torch.OutOfMemoryError: CUDA out of memory.")
LOST, LOST_TOO = ("crash", CLOSED), ("crash", RESET)


@pytest.mark.parametrize(
    ("codes", "words", "expected"),
    [
        ([70, 70], [ROOT, LOST], (0, "crash", "rank 0: ValueError: root")),
        ([70, 70], [LOST, ROOT], (1, "crash", "rank 1: ValueError: root")),
        ([70, 70], [OOM, ROOT], (0, "oom", f"rank 0: {OOM[1]}")),
        ([70, -6], [ROOT, None], (0, "crash", "rank 0: ValueError: root")),
        ([70, -6], [LOST, None], (1, "crash", "rank 1 was killed by SIGABRT")),
        ([-11, -6], [None, None], (0, "crash", "rank 0 was killed by SIGSEGV")),
        ([70, -9], [LOST, None], (1, "crash", "rank 1 was killed by SIGKILL")),
        ([70, 0], [LOST, None], (1, "crash", "rank 1 ended with exit code 0 in the middle")),
        ([70, -34], [LOST, None], (1, "crash", "rank 1 was killed by ")),
        ([70, None], [LOST_TOO, None], (0, "crash", f"rank 0: {RESET}")),
        ([None, None], [None, None], None),
    ],
)
def test_the_root_cause_is_told_from_its_consequences(
    tmp_path: Path,
    codes: list[int | None],
    words: list[Words],
    expected: tuple[int, str, str] | None,
) -> None:
    found = judged(tmp_path, codes, words)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found[:2] == expected[:2]
        assert found[2].startswith(expected[2])


def test_a_kill_by_the_kernel_for_memory_is_oom(tmp_path: Path) -> None:
    words: list[Words] = [LOST, None]
    assert judged(tmp_path, [70, -9], words, oom=True) == (
        1, "oom", "rank 1 was killed by SIGKILL by the kernel, out of memory"
    )  # fmt: skip
    assert judged(tmp_path, [70, -11], words, oom=True) == (
        1, "crash", "rank 1 was killed by SIGSEGV"
    )  # fmt: skip


TORCHRUN = """
============================================================
cpbench.worker.main FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-22_11:03:53
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 8642)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 8642
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_11:03:53
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 70 (pid: 8641)
  error_file: <N/A>
"""


def test_all_of_torchrun_s_report_is_read_since_its_root_cause_may_be_wrong() -> None:
    assert torchrun.failures("worker prints rank : 7\n exitcode : 3\n" + TORCHRUN, {}) == {
        1: -9,
        0: 70,
    }
    assert torchrun.failures("", {}) == {}


@pytest.mark.timeout(60)
def test_a_gang_takes_along_what_hid_in_another_session(tmp_path: Path) -> None:
    """A stopped grandchild in a session of its own, as launchers and compilers start them."""
    script = "setsid sleep 1000 & echo $! > pid; kill -STOP $!; echo > ready; sleep 1000"
    command = Command(("sh", "-c", f"cd {tmp_path}; {script}"), {}, tmp_path / "log")
    gang = Gang([command])
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hidden = int((tmp_path / "pid").read_text())
    assert hidden in gang.members()
    begun = time.monotonic()
    gang.kill()
    assert time.monotonic() - begun < 5
    assert gang.members() == []
    assert gang.codes() == [-signal.SIGKILL]


def test_a_gang_that_cannot_be_started_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Path, world_size: int, place: Place, **more: str) -> list[Command]:
        return [Command((str(tmp_path / "no-such-program"),), {}, tmp_path / "log")]

    monkeypatch.setitem(supervisor.LAUNCHERS, "local", Launcher("local", broken))
    plan = supervisor.Plan(tmp_path, "local", "cpu", MeasureSettings())
    with pytest.raises(supervisor.LaunchError, match=r"cannot start workers: .*no-such-program"):
        supervisor.run([A], plan, starting=lambda case: None, finished=lambda record: None)


@pytest.mark.timeout(60)
def test_workers_that_never_reach_a_case_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, since the first time may be chance; then in one line, instead of for ever."""

    def failing(job: Path, world_size: int, place: Place, **more: str) -> list[Command]:
        return [Command(("sh", "-c", "exit 3"), {}, job.parent / f"rank{r}.log") for r in range(2)]

    monkeypatch.setitem(supervisor.LAUNCHERS, "local", Launcher("local", failing))
    plan = supervisor.Plan(tmp_path, "local", "cpu", MeasureSettings())
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(supervisor.LaunchError, match="outside of any case: rank 0 ended with exit"):
        supervisor.run([A, B], plan, starting=lambda case: None, finished=lambda record: None)
    assert len(list((tmp_path / "jobs").iterdir())) == supervisor.FRUITLESS
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
