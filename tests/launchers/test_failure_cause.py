"""Root cause of failures from synthetic journals and exit codes, in orders of events that real
processes produce only rarely."""

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
from cpbench.launchers.protocol import Command, GangSpec, Launcher
from cpbench.results.record import Record
from cpbench.results.store import Journal, RecordWriter, StoreError, read_run

CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:9"
RESET = "RuntimeError: [gloo/pair.cc:537] Read error [127.0.0.1]:400: Connection reset by peer."
A, B = Case(seq_len=64, world_size=2), Case(seq_len=128, world_size=2)


class FakeRun:
    """A run directory with a gang of two ranks and cases A and B, whose files the test writes."""

    def __init__(self, out: Path) -> None:
        self.out = out
        plan = supervisor.Plan(out, "local", "cpu", MeasureSettings(timeout_s=5.0))
        job = plan.job([A, B], "writer")
        self.started: list[str] = []
        self.supervisor = supervisor._GangSupervisor(
            job, 2, plan, case_started=lambda case: self.started.append(case.id),
            case_finished=lambda record: None,
        )  # fmt: skip
        self.journals = [Journal(job.journal_path(rank)) for rank in range(2)]
        self.writer = RecordWriter(job.record_path)

    def events(self, rank: int, *events: str) -> None:
        """Write events such as ``"start A"`` to the journal of a rank."""
        for event in events:
            name, _, case = event.partition(" ")
            details = {"case": {"A": A, "B": B}[case].id} if case else {}
            self.journals[rank].note(name, **details)

    def fail(self, rank: int, reason: str, status: str = "crash") -> None:
        """Write a failure to the journal of a rank."""
        self.journals[rank].note("failed", status=status, reason=reason)

    def record(self, case: Case) -> None:
        """Write the record of a case, as rank 0 does."""
        self.writer.append(Record(case=case, status="ok", started=time.time()).to_json())

    def statuses(self) -> dict[str, str]:
        """Status by case; checks that no case has two records."""
        records = read_run(self.out).records
        files = (self.out / "records").glob("*.jsonl")
        assert sum(len(path.read_text().splitlines()) for path in files) == len(records)
        return {key: record.status for key, record in records.items()}


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


def test_a_rank_that_dies_after_its_case_is_recorded_fails_no_case(fake_run: FakeRun) -> None:
    fake_run.events(0, "start A", "check A")
    fake_run.events(1, "start A", "check A")
    fake_run.record(A)
    fake_run.events(0, "done A", "start B")
    fake_run.fail(0, CLOSED)
    reason = fake_run.supervisor._record_root_cause([70, -9])
    assert reason.startswith("rank 1 was killed by SIGKILL; see ")
    assert fake_run.supervisor.recorded == {A.id}
    assert fake_run.statuses() == {A.id: "ok"}


def test_a_failure_is_recorded_for_the_current_case_of_the_rank(
    fake_run: FakeRun,
) -> None:
    fake_run.events(0, "start A")
    fake_run.events(1, "start A", "done A", "start B")
    fake_run.record(A)
    fake_run.supervisor._record_root_cause([None, -11])
    assert fake_run.statuses() == {A.id: "ok", B.id: "crash"}


def test_rank_0_dying_between_record_and_event_is_not_recorded_twice(
    fake_run: FakeRun,
) -> None:
    fake_run.events(0, "start A")
    fake_run.record(A)
    assert fake_run.supervisor._record_root_cause([-9, 70])
    assert fake_run.statuses() == {A.id: "ok"}
    assert fake_run.supervisor._current_case is None


def test_a_record_that_is_read_before_its_start_is_not_started_again(fake_run: FakeRun) -> None:
    fake_run.record(A)
    fake_run.supervisor._read_progress()
    fake_run.events(0, "start A")
    fake_run.supervisor._read_progress()
    assert fake_run.supervisor._current_case is None
    assert fake_run.started == []


def test_a_failure_before_any_case_is_reported_and_not_recorded(fake_run: FakeRun) -> None:
    fake_run.journals[0].note("boot", pid=1)
    fake_run.fail(0, "ValueError: there is no CUDA device 0: torch sees 0")
    assert "no CUDA device" in fake_run.supervisor._record_root_cause([70, None])
    assert fake_run.statuses() == {}


class FakeGang:
    """A gang that finishes a case just when it is killed."""

    def __init__(self, fake_run: FakeRun, case: Case | None) -> None:
        self.fake_run, self.case = fake_run, case

    def forward_signal(self, number: signal.Signals, pids: set[int]) -> None:
        pass

    def kill(self) -> None:
        if self.case is not None:
            self.fake_run.record(self.case)
            self.fake_run.events(0, "done A", "start B")


@pytest.mark.parametrize("ended", [None, A], ids=["hangs", "finishes meanwhile"])
def test_a_timeout_is_recorded_for_its_own_case_only(fake_run: FakeRun, ended: Case | None) -> None:
    for rank in (0, 1):
        fake_run.events(rank, "start A", "check A")
    fake_run.supervisor._read_progress()
    fake_run.supervisor._record_timeout(FakeGang(fake_run, ended), A)  # type: ignore[arg-type]
    assert fake_run.statuses() == {A.id: "ok" if ended else "timeout"}


def test_a_case_that_a_rank_has_not_started_is_not_recorded_as_a_timeout(fake_run: FakeRun) -> None:
    fake_run.events(1, "start A")  # and hangs after the case is recorded
    fake_run.events(0, "start A", "done A", "start B")
    fake_run.record(A)
    fake_run.supervisor._read_progress()
    reason = fake_run.supervisor._record_timeout(FakeGang(fake_run, None), B)  # type: ignore[arg-type]
    assert "rank 0 start, rank 1 start" in reason
    assert fake_run.statuses() == {A.id: "ok"}


def test_timeouts_do_not_depend_on_the_clock_of_the_worker(
    fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e6)  # the worker's clock is decades slow
    fake_run.events(0, "start A")
    monkeypatch.undo()
    fake_run.supervisor._read_progress()
    assert abs(time.monotonic() - fake_run.supervisor._last_progress) < 1
    assert fake_run.supervisor._current_case == A


def test_a_rank_that_cannot_write_is_not_a_crash(fake_run: FakeRun) -> None:
    fake_run.events(0, "start A")
    with pytest.raises(StoreError, match="a rank could not write"):
        fake_run.supervisor._record_root_cause([74, None])
    assert fake_run.statuses() == {}


def test_a_launcher_that_dies_is_the_reason(tmp_path: Path) -> None:
    fake_run = FakeRun(tmp_path)
    fake_run.supervisor.plan = supervisor.Plan(tmp_path, "torchrun", "cpu", MeasureSettings())
    fake_run.supervisor._launcher = torchrun.LAUNCHER
    fake_run.supervisor._log_path(0).write_text("")
    fake_run.events(0, "start A")
    fake_run.supervisor._record_root_cause([-9])
    record = read_run(tmp_path).records[A.id]
    assert (record.status, record.reason) == ("crash", "torchrun was killed by SIGKILL")


Failure = tuple[str, str] | None


def root_cause(
    tmp_path: Path, codes: Sequence[int | None], failures: Sequence[Failure], oom: bool = False
) -> tuple[int, str, str] | None:
    """Rank, status and reason for exit codes and reported failures, the last rank's first."""
    ranks = []
    for number, (code, failure) in enumerate(zip(codes, failures, strict=True)):
        rank = failure_cause.RankState(number, tmp_path / "none")
        rank.exit_code, rank.failure, rank.failed_at = code, failure, float(-number)
        ranks.append(rank)
    cause = failure_cause.root_cause(ranks, oom)
    return cause and (cause[0].rank, cause[1], cause[2])


ROOT = ("crash", "ValueError: root")
OOM = ("oom", "torch.OutOfMemoryError: CUDA out of memory.")
PEER_CLOSED, PEER_RESET = ("crash", CLOSED), ("crash", RESET)


@pytest.mark.parametrize(
    ("codes", "failures", "expected"),
    [
        ([70, 70], [ROOT, PEER_CLOSED], (0, "crash", "rank 0: ValueError: root")),
        ([70, 70], [PEER_CLOSED, ROOT], (1, "crash", "rank 1: ValueError: root")),
        ([70, 70], [OOM, ROOT], (0, "oom", f"rank 0: {OOM[1]}")),
        ([70, -6], [ROOT, None], (0, "crash", "rank 0: ValueError: root")),
        ([70, -6], [PEER_CLOSED, None], (1, "crash", "rank 1 was killed by SIGABRT")),
        ([-11, -6], [None, None], (0, "crash", "rank 0 was killed by SIGSEGV")),
        ([70, -9], [PEER_CLOSED, None], (1, "crash", "rank 1 was killed by SIGKILL")),
        (
            [70, 0],
            [PEER_CLOSED, None],
            (1, "crash", "rank 1 ended with exit code 0 before"),
        ),
        ([70, -34], [PEER_CLOSED, None], (1, "crash", "rank 1 was killed by ")),
        ([70, None], [PEER_RESET, None], (0, "crash", f"rank 0: {RESET}")),
        ([None, None], [None, None], None),
    ],
)
def test_the_root_cause_is_distinguished_from_its_consequences(
    tmp_path: Path,
    codes: list[int | None],
    failures: list[Failure],
    expected: tuple[int, str, str] | None,
) -> None:
    cause = root_cause(tmp_path, codes, failures)
    if expected is None:
        assert cause is None
    else:
        assert cause is not None
        assert cause[:2] == expected[:2]
        assert cause[2].startswith(expected[2])


def test_a_kill_by_the_oom_killer_is_oom(tmp_path: Path) -> None:
    failures: list[Failure] = [PEER_CLOSED, None]
    assert root_cause(tmp_path, [70, -9], failures, oom=True) == (
        1, "oom", "rank 1 was killed by SIGKILL by the kernel, out of memory"
    )  # fmt: skip
    assert root_cause(tmp_path, [70, -11], failures, oom=True) == (
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


def test_all_failures_of_a_torchrun_report_are_parsed() -> None:
    assert torchrun.parse_exit_codes("worker prints rank : 7\n exitcode : 3\n" + TORCHRUN, {}) == {
        1: -9,
        0: 70,
    }
    assert torchrun.parse_exit_codes("", {}) == {}


def test_killing_a_gang_kills_processes_in_other_sessions(tmp_path: Path) -> None:
    """A stopped grandchild in its own session, as launchers and compilers start them."""
    script = "setsid sleep 1000 & echo $! > pid; kill -STOP $!; echo > ready; sleep 1000"
    command = Command(("sh", "-c", f"cd {tmp_path}; {script}"), {}, tmp_path / "log")
    gang = Gang([command])
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    grandchild = int((tmp_path / "pid").read_text())
    assert grandchild in gang.pids()
    gang.kill()
    assert gang.pids() == []
    assert gang.exit_codes() == [-signal.SIGKILL]


def test_a_gang_that_cannot_be_started_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(spec: GangSpec) -> list[Command]:
        return [Command((str(tmp_path / "no-such-program"),), {}, tmp_path / "log")]

    monkeypatch.setitem(supervisor.LAUNCHERS, "local", Launcher("local", broken))
    plan = supervisor.Plan(tmp_path, "local", "cpu", MeasureSettings())
    with pytest.raises(supervisor.LaunchError, match=r"cannot start workers: .*no-such-program"):
        supervisor.run([A], plan, case_started=lambda case: None, case_finished=lambda record: None)


def test_workers_that_never_start_a_case_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two gangs, with one line."""

    def failing(spec: GangSpec) -> list[Command]:
        return [
            Command(("sh", "-c", "echo no libmpi; exit 3"), {}, spec.job.parent / f"rank{r}.log")
            for r in range(2)
        ]

    monkeypatch.setitem(supervisor.LAUNCHERS, "local", Launcher("local", failing))
    plan = supervisor.Plan(tmp_path, "local", "cpu", MeasureSettings())
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(
        supervisor.LaunchError, match=r"outside of any case: rank 0 ended with exit.*\(no libmpi\)"
    ):
        supervisor.run(
            [A, B], plan, case_started=lambda case: None, case_finished=lambda record: None
        )
    assert len(list((tmp_path / "jobs").iterdir())) == supervisor.MAX_FRUITLESS_GANGS
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
