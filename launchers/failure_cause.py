"""Why a gang died: what its ranks said and how they ended, down to one cause in one line."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from cpbench.results.store import EXIT_STORE, Tail

# What ranks say when it was another that failed: the root cause is elsewhere if anywhere.
_CONSEQUENCE = re.compile(
    r"connection (was |is )?(closed|reset|refused|aborted)|broken pipe|ncclRemoteError"
    r"|remote process (has )?exited|socket (is closed|has timed out)|recvValue failed|pair closure",
    re.IGNORECASE,
)


class Rank:
    """What is known of one rank from its journal.

    Attributes:
        number: the rank.
        pid: of its process, once it runs.
        case: id of the case it is in, since when (seconds since the epoch); None between cases.
        phase: its last note.
        words: its last words, if it had any: status and reason.
        ended: whether it has come to the end of its job.
        code: its exit code, negative for a signal; None where that is not known.
    """

    def __init__(self, number: int, journal: Path) -> None:
        self.number, self._tail = number, Tail(journal)
        self.pid: int | None = None
        self.case: str | None = None
        self.since = self.spoke = 0.0
        self.phase = "silent"
        self.words: tuple[str, str] | None = None
        self.ended = False
        self.code: int | None = None

    def catch_up(self) -> list[str]:
        """Take in what the rank has noted since the last time; the cases that it has started."""
        started = []
        for note in self._tail.read():
            self.phase = str(note.get("event"))
            if self.phase == "boot":
                self.pid = int(note["pid"])
            elif self.phase == "start":
                self.case, self.since = str(note["case"]), float(note["time"])
                started.append(self.case)
            elif self.phase in ("done", "paused"):
                self.case = None
            elif self.phase == "failed":
                self.words, self.spoke = (note["status"], note["reason"]), float(note["time"])
            elif self.phase == "end":
                self.ended = True
        return started

    @property
    def lost_its_disk(self) -> bool:
        return self.code == EXIT_STORE or bool(self.words and self.words[0] == "store")

    @property
    def where(self) -> str:
        """What it is at, for people."""
        return f"rank {self.number} {self.phase}{' (stopped)' if self._is_stopped() else ''}"

    def _is_stopped(self) -> bool:
        with suppress(OSError):
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] in "Tt"
        return False


def cause(ranks: Sequence[Rank], oom_killed: bool) -> tuple[Rank, str, str] | None:
    """The rank that failed first, the status and the reason; None where nothing is known.

    A broken connection makes Gloo abort or raise in the ranks that are left, so those come last;
    torch.distributed being what it is, clocks alone cannot tell.
    """
    found: list[tuple[int, float, Rank, str, str]] = []
    for rank in ranks:
        who = f"rank {rank.number}"
        if rank.words is not None:
            status, reason = rank.words
            order = 5 if _CONSEQUENCE.search(reason) else 1 if status == "oom" else 2
            found.append((order, rank.spoke, rank, status, f"{who}: {reason}"))
        elif rank.code is not None and rank.code < 0:
            name = _signal(-rank.code)
            killed = oom_killed and name == "SIGKILL"
            reason = f"{who} was killed by {name}"
            if killed:
                reason += " by the kernel, out of memory"
            order = 4 if name == "SIGABRT" else 0
            found.append((order, rank.since, rank, "oom" if killed else "crash", reason))
        elif rank.code is not None and not rank.ended:
            reason = f"{who} ended with exit code {rank.code} in the middle of its work"
            found.append((3, rank.since, rank, "crash", reason))
    if not found:
        return None
    _, _, rank, status, reason = min(found, key=lambda item: item[:2])
    return rank, status, reason


def tell_codes(
    ranks: Sequence[Rank],
    codes: Sequence[int | None],
    failures: Callable[[str, Mapping[int, int]], dict[int, int]] | None,
    log: Path,
) -> None:
    """Give each rank its exit code, as far as it is known.

    Args:
        codes: of the launcher's processes.
        failures: see ``cpbench.launchers.protocol.Launcher``.
        log: what the launcher has printed.
    """
    if failures is None:
        for rank, code in zip(ranks, codes, strict=True):
            rank.code = code
        return
    pids = {rank.pid: rank.number for rank in ranks if rank.pid is not None}
    found = {}
    if codes[0] and log.exists():
        found = failures(log.read_text(errors="replace"), pids)
    for rank in ranks:
        rank.code = found.get(rank.number) if codes[0] else 0


def oom_kills() -> int:
    """How often the kernel of this machine has killed a process for memory."""
    with suppress(OSError):
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def describe_end(code: int | None) -> str:
    """An exit code in words."""
    return f"was killed by {_signal(-code)}" if code and code < 0 else f"ended with code {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
