"""A gang: the processes of one world size, started and ended together."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from cpbench.launchers.protocol import Command

MARK = "CPBENCH_GANG"
PARENT = "CPBENCH_PARENT"
KILL_S = 10.0  # a process that held much memory is not gone at once
ASK_S = 15.0  # for a command to end its ranks elsewhere


class Gang:
    """Running commands.  Each is its own session, so that Ctrl-C reaches only the parent, and all
    die with the parent, however it ends."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mark = secrets.token_hex(8)
        self._commands = list(commands)
        marked = {**os.environ, MARK: self._mark}
        try:
            for command in commands:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                parent = {} if command.remote else {PARENT: str(os.getpid())}
                with open(command.log, "ab") as log:
                    self._processes.append(
                        subprocess.Popen(
                            command.argv,
                            env={**marked, **parent, **command.env},
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
        compilers leave helpers behind.  All carry the mark of this gang.  Commands whose ranks may
        be elsewhere are asked first, since nobody else reaches those.
        """
        self._ask(signal.SIGTERM)
        self._wait_for_remote(ASK_S)
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

    def pass_on(self, number: signal.Signals, pids: Collection[int]) -> None:
        """To those of some processes that are members, and to commands that pass it on."""
        for pid in set(pids) & set(self.members()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        self._ask(number)

    def _remote(self) -> list[subprocess.Popen[bytes]]:
        both = zip(
            self._processes, self._commands, strict=False
        )  # while starting, some are missing
        return [process for process, command in both if command.remote and process.poll() is None]

    def _ask(self, number: signal.Signals) -> None:
        for process in self._remote():
            process.send_signal(number)

    def _wait_for_remote(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._remote() and time.monotonic() < deadline:
            time.sleep(0.05)

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


def free_port() -> int:
    """A port that nobody on this machine listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)  # loaded before any fork: the child must not allocate


def _die_with_parent() -> None:
    with suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux only
