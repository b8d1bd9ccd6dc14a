"""A gang: the worker processes of one world size, started and ended together."""

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

GANG_VARIABLE = "CPBENCH_GANG"  # in the environment of every process of a gang
PARENT_VARIABLE = "CPBENCH_PARENT"
KILL_TIMEOUT_S = 10.0  # a process that held much memory is not gone at once
TERMINATE_TIMEOUT_S = 15.0  # for a command to end its ranks on other machines


class Gang:
    """The running commands of a launcher.

    Each command runs in a session of its own, so that Ctrl-C reaches only the parent, and is killed
    when the parent ends in any way.
    """

    def __init__(self, commands: Sequence[Command]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._id = secrets.token_hex(8)
        self._commands = list(commands)
        environment = {**os.environ, GANG_VARIABLE: self._id}
        try:
            for command in commands:
                command.log.parent.mkdir(parents=True, exist_ok=True)
                parent = {} if command.remote else {PARENT_VARIABLE: str(os.getpid())}
                with open(command.log, "ab") as log:
                    self._processes.append(
                        subprocess.Popen(
                            command.argv,
                            env={**environment, **parent, **command.env},
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

    def exit_codes(self) -> list[int | None]:
        """Exit code of each command, negative for a signal, None while it runs."""
        return [process.poll() for process in self._processes]

    def kill(self) -> None:
        """Kill every process of the gang, stopped ones too, and wait until they are gone.

        These include processes in other sessions, started by launchers and compilers, which are
        found by ``GANG_VARIABLE``.  Commands whose ranks may be on other machines get SIGTERM
        first, since only they can end those.
        """
        self._signal_remote_commands(signal.SIGTERM)
        self._wait_for_remote_commands(TERMINATE_TIMEOUT_S)
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.kill()
                process.wait(KILL_TIMEOUT_S)

    def forward_signal(self, number: signal.Signals, pids: Collection[int]) -> None:
        """Send a signal to those of ``pids`` that belong to the gang, and to remote commands, which
        forward it to their ranks."""
        for pid in set(pids) & set(self.pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        self._signal_remote_commands(number)

    def _remote_commands(self) -> list[subprocess.Popen[bytes]]:
        """Running commands whose ranks may be on other machines."""
        # While the gang is being started, it has fewer processes than commands.
        started = zip(self._processes, self._commands, strict=False)
        return [
            process for process, command in started if command.remote and process.poll() is None
        ]

    def _signal_remote_commands(self, number: signal.Signals) -> None:
        for process in self._remote_commands():
            process.send_signal(number)

    def _wait_for_remote_commands(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._remote_commands() and time.monotonic() < deadline:
            time.sleep(0.05)

    def pids(self) -> list[int]:
        """Ids of all live processes of this gang on this machine, whoever started them."""
        variable = f"{GANG_VARIABLE}={self._id}".encode()
        pids = []
        for entry in os.scandir("/proc") if Path("/proc/self").exists() else ():
            with suppress(OSError):  # it has ended, or is another user's
                if entry.name.isdigit() and variable in Path(entry.path, "environ").read_bytes():
                    pids.append(int(entry.name))
        return pids

    def wait(self, seconds: float) -> list[int | None]:
        """Wait until all commands have ended, at most for a time; their exit codes."""
        deadline = time.monotonic() + seconds
        while None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.exit_codes()


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)  # loaded before any fork: a forked child must not allocate


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends."""
    with suppress(AttributeError):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux only
