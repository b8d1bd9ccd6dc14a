"""A gang: the processes of one world size, started and ended together."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "CPBENCH_GANG"
PARENT = "CPBENCH_PARENT"
KILL_S = 10.0  # a process that held much memory is not gone at once


@dataclass(frozen=True)
class Command:
    """What a launcher wants run: words, what to add to the environment, where output goes."""

    argv: tuple[str, ...]
    env: dict[str, str]
    log: Path

    def to_json(self) -> dict[str, object]:
        return {"argv": list(self.argv), "env": self.env, "log": str(self.log)}


class Gang:
    """Running commands.  Each is its own session, so that Ctrl-C reaches only the parent, and all
    die with the parent, however it ends."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mark = secrets.token_hex(8)
        marked = {**os.environ, MARK: self._mark, PARENT: str(os.getpid())}
        try:
            for command in commands:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                with open(command.log, "ab") as log:
                    self._processes.append(
                        subprocess.Popen(
                            command.argv,
                            env={**marked, **command.env},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=_die_with_parent,
                        )
                    )
        except BaseException:
            self.kill()
            raise

    def codes(self) -> list[int | None]:
        """Exit code of each process, negative for a signal, None while it runs."""
        return [process.poll() for process in self._processes]

    def kill(self) -> None:
        """End every process at once, stopped ones too, and wait until they are gone.

        Not only those started here: launchers put workers into sessions of their own, and
        compilers leave helpers behind.  All carry the mark of this gang.
        """
        deadline = time.monotonic() + KILL_S
        while (pids := self.members()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.kill()
                process.wait(KILL_S)

    def members(self) -> list[int]:
        """Every process of this gang that is alive, whoever started it."""
        mark = f"{MARK}={self._mark}".encode()
        found = []
        for entry in os.scandir("/proc") if Path("/proc/self").exists() else ():
            with suppress(OSError):  # gone meanwhile, or another user's
                if entry.name.isdigit() and mark in Path(entry.path, "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes once all have ended, or after some time."""
        deadline = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.codes()


_LIBC = ctypes.CDLL(None)  # loaded before any fork: the child must not allocate


def _die_with_parent() -> None:
    with suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux only
