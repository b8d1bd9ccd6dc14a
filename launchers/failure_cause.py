"""Root cause of the failure of a gang, from the journals and exit codes of its ranks."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpbench.results.store import EXIT_STORE, Tail

# Errors of ranks whose peer has failed: consequences, not the root cause.
_CONSEQUENCE = re.compile(
    r"connection (was |is )?(closed|reset|refused|aborted)|broken pipe|ncclRemoteError"
    r"|remote process (has )?exited|socket (is closed|has timed out)|recvValue failed|pair closure",
    re.IGNORECASE,
)


class RankState:
    """State of one rank, from its journal and its exit code.

    Attributes:
        rank: the rank.
        pid: id of its process, once that runs.
        case: id of the current case; None between cases.
        case_started: when that case was started, seconds since the epoch.
        phase: the last event of its journal.
        failure: status and reason, if it has reported a failure.
        failed_at: when it did, seconds since the epoch.
        finished: whether it has completed its job.
        exit_code: negative for a signal; None if unknown.
    """

    def __init__(self, rank: int, journal: Path) -> None:
        self.rank, self._tail = rank, Tail(journal)
        self.pid: int | None = None
        self.case: str | None = None
        self.case_started = self.failed_at = 0.0
        self.phase = "silent"
        self.failure: tuple[str, str] | None = None
        self.finished = False
        self.exit_code: int | None = None

    def read_journal(self) -> list[str]:
        """Process the events since the last call; ids of the cases that were started."""
        started: list[str] = []
        for event in self._tail.read():
            with suppress(KeyError, TypeError, ValueError):  # damaged, of an earlier version
                self._process(event, started)
        return started

    def _process(self, event: dict[str, Any], started: list[str]) -> None:
        self.phase = str(event.get("event"))
        if self.phase == "boot":
            self.pid = int(event["pid"])
        elif self.phase == "start":
            self.case, self.case_started = str(event["case"]), float(event["time"])
            started.append(self.case)
        elif self.phase in ("done", "paused"):
            self.case = None
        elif self.phase == "failed":
            self.failure = (event["status"], event["reason"])
            self.failed_at = float(event["time"])
        elif self.phase == "end":
            self.finished = True

    @property
    def could_not_write(self) -> bool:
        """Whether it failed because results could not be written."""
        return self.exit_code == EXIT_STORE or bool(self.failure and self.failure[0] == "store")

    @property
    def description(self) -> str:
        """The rank and its phase, for people."""
        return f"rank {self.rank} {self.phase}{' (stopped)' if self._is_stopped() else ''}"

    def _is_stopped(self) -> bool:
        """Whether its process is stopped by a signal (SIGSTOP) or a debugger."""
        with suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_text("utf-8")
            return stat.rpartition(")")[2].split()[0] in "Tt"
        return False


def root_cause(ranks: Sequence[RankState], oom_killed: bool) -> tuple[RankState, str, str] | None:
    """The rank that failed first, the status and the reason; None if no failure is known.

    When one rank fails, broken connections make Gloo abort or raise in the others, so such failures
    are ranked last.  Timestamps alone do not tell: peers may report before the rank that failed.

    Args:
        oom_killed: whether the kernel has killed a process of this machine for lack of memory.
    """
    failures: list[tuple[int, float, RankState, str, str]] = []  # sorted by order, then by time
    for rank in ranks:
        name = f"rank {rank.rank}"
        if rank.failure is not None:
            status, reason = rank.failure
            order = 5 if _CONSEQUENCE.search(reason) else 1 if status == "oom" else 2
            failures.append((order, rank.failed_at, rank, status, f"{name}: {reason}"))
        elif rank.exit_code is not None and rank.exit_code < 0:
            signal_name = _signal_name(-rank.exit_code)
            oom = oom_killed and signal_name == "SIGKILL"
            reason = f"{name} was killed by {signal_name}"
            if oom:
                reason += " by the kernel, out of memory"
            order = 4 if signal_name == "SIGABRT" else 0
            failures.append((order, rank.case_started, rank, "oom" if oom else "crash", reason))
        elif rank.exit_code is not None and not rank.finished:
            reason = f"{name} ended with exit code {rank.exit_code} before its job was complete"
            failures.append((3, rank.case_started, rank, "crash", reason))
    if not failures:
        return None
    _, _, rank, status, reason = min(failures, key=lambda failure: failure[:2])
    return rank, status, reason


def assign_exit_codes(
    ranks: Sequence[RankState],
    codes: Sequence[int | None],
    parse_exit_codes: Callable[[str, Mapping[int, int]], dict[int, int]] | None,
    log: Path,
) -> None:
    """Set the exit code of each rank, as far as it is known.

    Args:
        codes: exit codes of the launcher's processes.
        parse_exit_codes: see ``cpbench.launchers.protocol.Launcher``.
        log: output of the launcher.
    """
    if parse_exit_codes is None:
        for rank, code in zip(ranks, codes, strict=True):
            rank.exit_code = code
        return
    ranks_by_pid = {rank.pid: rank.rank for rank in ranks if rank.pid is not None}
    rank_codes = {}
    if codes[0] and log.exists():
        rank_codes = parse_exit_codes(log.read_text("utf-8", errors="replace"), ranks_by_pid)
    for rank in ranks:
        rank.exit_code = rank_codes.get(rank.rank) if codes[0] else 0


def oom_kill_count() -> int:
    """Number of processes that the kernel of this machine has killed for lack of memory."""
    with suppress(OSError):
        match = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text("utf-8"), re.MULTILINE)
        return int(match[1]) if match else 0
    return 0


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code and code < 0:
        return f"was killed by {_signal_name(-code)}"
    return f"ended with exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
