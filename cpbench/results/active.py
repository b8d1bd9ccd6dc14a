"""Processes that are working on a run directory, each on cases of its own.

Each has a file ``running/HOST-PID.json`` in it while it runs, so that another shell can list and
end it.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "running"


@dataclass(frozen=True)
class ActiveProcess:
    """A process that works on a run directory.

    Attributes:
        host: name of its machine.
        pid: process id on that machine.
        start_time: when it was started, in clock ticks since boot; tells apart processes that had
            the same id, one after the other.
        cases: ids of the cases that it is to run.
    """

    host: str
    pid: int
    start_time: str
    cases: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"host": self.host, "pid": self.pid, "born": self.start_time, "cases": self.cases}

    @classmethod
    def from_json(cls, table: dict[str, Any]) -> ActiveProcess:
        return cls(table["host"], table["pid"], table["born"], tuple(table["cases"]))

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == platform.node()

    @property
    def alive(self) -> bool | None:
        """Whether it still runs; None for a process of another machine."""
        return _start_time(self.pid) == self.start_time if self.is_local else None

    def terminate(self) -> None:
        """Send SIGTERM, on which it ends its workers and keeps its results, as on Ctrl-C."""
        os.kill(self.pid, signal.SIGTERM)


def active_processes(out: Path) -> list[ActiveProcess]:
    """The processes registered in a run directory; some may have ended without unregistering."""
    processes = []
    for path in sorted((out / FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            processes.append(ActiveProcess.from_json(json.loads(path.read_text())))
    return processes


@contextmanager
def registered_as_active(out: Path, cases: Collection[str]) -> Iterator[None]:
    """Register this process as working on cases (their ids), until the context is left.

    Raises:
        ValueError: when another process is working on some of them.
    """
    for process in active_processes(out):
        if process.alive and process.pid != os.getpid() and set(process.cases) & set(cases):
            raise ValueError(
                f"process {process.pid} is already running cases of {out}; wait for it, or run: "
                f"cpbench cancel {out}"
            )
    own = ActiveProcess(platform.node(), os.getpid(), _start_time(os.getpid()), tuple(cases))
    path = out / FOLDER / f"{own.host}-{own.pid}.json"
    with suppress(OSError):  # a full disk is reported where results are written
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(own.to_json()))
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _start_time(pid: int) -> str:
    """Start time of a process, in clock ticks since boot; "" if there is none, or it has ended."""
    with suppress(OSError, IndexError):
        stat_fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return stat_fields[19] if stat_fields[0] not in "ZX" else ""
    return ""
