"""Processes that are working on a run directory, each on cases of its own.

Each has a file in ``running/``, its claim on the cases, while it runs, so that no other one starts
them and another shell can list and end it.  A claim is made under a lock, a file that only one
process at a time can create, also on network file systems.

A claim of this machine holds while its process lives.  That of another machine, or of another
container, holds while its heartbeat goes on: the process touches the file, and the times of two
files tell how long ago, by the clock of the file server.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.results.sealed import seal
from cpbench.results.store import StoreError, read_document, write_document

FOLDER = "running"
LOCK = "lock"
HEARTBEAT_S = 15.0
STALE_S = 120.0  # without a heartbeat; network file systems show times up to a minute late
LOCK_POLL_S = 0.01


@dataclass(frozen=True)
class ActiveProcess:
    """A process that works on a run directory.

    Attributes:
        path: of its claim.
        host: name of its machine.
        pid: process id on that machine.
        start_time: when it was started, in clock ticks since boot; tells apart processes that had
            the same id, one after the other.
        namespace: of process ids, one per container; "" if unknown.
        cases: ids of the cases that it is to run; None, if its claim is damaged: may be any.
    """

    path: Path
    host: str
    pid: int
    start_time: str
    namespace: str
    cases: frozenset[str] | None

    @classmethod
    def read(cls, path: Path) -> ActiveProcess:
        """The process of a claim.

        Raises:
            FileNotFoundError: when it has ended meanwhile.
        """
        try:
            table = read_document(path)
            return cls(
                path, str(table["host"]), int(table["pid"]), str(table["born"]),
                str(table.get("namespace", _namespace())), frozenset(map(str, table["cases"])),
            )  # fmt: skip
        except FileNotFoundError:
            raise
        except (OSError, KeyError, TypeError, ValueError):  # damaged, or being written
            return cls(path, "an unknown machine", 0, "", "", None)

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine, in this container."""
        return (self.host, self.namespace) == (platform.node(), _namespace())

    @property
    def alive(self) -> bool:
        """Whether it still runs; on another machine, whether its heartbeat goes on."""
        if self.is_local:
            return bool(self.start_time) and _start_time(self.pid) == self.start_time
        return self.silent_s <= STALE_S

    @property
    def silent_s(self) -> float:
        """Seconds since its last heartbeat; infinite when its claim is gone."""
        try:
            return _server_time(self.path.parent) - self.path.stat().st_mtime
        except OSError:
            return float("inf")

    def terminate(self) -> None:
        """Send SIGTERM, on which it ends its workers and keeps its results, as on Ctrl-C."""
        os.kill(self.pid, signal.SIGTERM)


def active_processes(out: Path) -> list[ActiveProcess]:
    """The processes registered in a run directory; some may have ended without unregistering."""
    processes = []
    for path in sorted((out / FOLDER).glob("*.json")):
        with suppress(FileNotFoundError):
            processes.append(ActiveProcess.read(path))
    return processes


@contextmanager
def registered_as_active(out: Path, cases: Collection[str]) -> Iterator[None]:
    """Register this process as working on cases (their ids), until the context is left.

    Raises:
        ValueError: when another process is working on some of them.
        StoreError: when the run directory cannot be written.
    """
    try:
        (out / FOLDER).mkdir(parents=True, exist_ok=True)
        claim = _claim(out, cases)
    except OSError as error:
        raise StoreError(f"cannot write results to {out}: {error.strerror}") from error
    ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(claim, ended), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        with suppress(OSError):
            claim.unlink()


def _claim(out: Path, cases: Collection[str]) -> Path:
    """Write the claim of this process on cases, and remove those of processes that have ended."""
    path = out / FOLDER / f"{platform.node()}-{os.getpid()}-{secrets.token_hex(3)}.json"
    with _locked(out / FOLDER / LOCK, _owner()):
        for process in active_processes(out):
            if not process.alive:
                process.path.unlink(missing_ok=True)
            elif process.cases is None or not process.cases.isdisjoint(cases):
                raise ValueError(_refusal(process, out))
        write_document(path, {**_owner(), "cases": list(cases)})
    return path


def _owner() -> dict[str, Any]:
    """This process, as in claims."""
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "born": _start_time(pid),
            "namespace": _namespace(), "cases": []}  # fmt: skip


def _refusal(process: ActiveProcess, out: Path) -> str:
    if process.is_local:
        return (
            f"process {process.pid} is already running cases of {out}; wait for it, or run: "
            f"cpbench cancel {out}"
        )
    return (
        f"process {process.pid} on {process.host} is already running cases of {out} (heartbeat "
        f"{process.silent_s:.0f} s ago); wait for it, or run there: cpbench cancel {out}. Without "
        f"a heartbeat, its claim {process.path} ends after {STALE_S:.0f} s"
    )


def _beat(claim: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with suppress(OSError):
            os.utime(claim)  # by the clock of the file server


@contextmanager
def _locked(lock: Path, owner: dict[str, Any]) -> Iterator[None]:
    """Hold a lock, which is a file, until the context is left.

    Raises:
        OSError: when it cannot be written.
        ValueError: when another process holds it all the time.
    """
    deadline = time.monotonic() + 2 * STALE_S
    while not _create(lock, owner):
        with suppress(FileNotFoundError):
            identity = _identity(lock)
            if not ActiveProcess.read(lock).alive:
                _break_lock(lock, identity)
        if time.monotonic() > deadline:
            raise ValueError(f"another process holds {lock}; if none is running, remove it")
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _create(path: Path, table: dict[str, Any]) -> bool:
    """Create a file; False if there is one."""
    try:
        with open(path, "xb") as file:
            file.write(seal(json.dumps(table)))
    except FileExistsError:
        return False
    return True


def _break_lock(lock: Path, identity: str) -> None:
    """Remove the lock of a process that has ended, unless it is another's by now: only one process
    at a time looks and removes."""
    breaker = lock.with_name(f"{lock.name}-{identity}")
    with suppress(FileExistsError):
        breaker.touch(exist_ok=False)
        try:
            if _identity(lock) == identity:
                lock.unlink()
        finally:
            breaker.unlink()


def _identity(path: Path) -> str:
    """Tells apart files that have the same name, one after the other."""
    status = path.stat()
    return f"{status.st_ino}-{status.st_mtime_ns}"


def _server_time(folder: Path) -> float:
    """The current time, by the clock that stamps the files of a folder."""
    probe = folder / f".now.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a folder that may only be read
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _namespace() -> str:
    """The namespace of the ids of this machine's processes; "" where it cannot be known."""
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _start_time(pid: int) -> str:
    """Start time of a process, in clock ticks since boot; "" if there is none, or it has ended."""
    with suppress(OSError, IndexError):
        stat_fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        return stat_fields[19] if stat_fields[0] not in "ZX" else ""
    return ""
