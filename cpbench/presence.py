"""Who is at work on a run directory: one process at a time, which another shell can end."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "running.json"


@dataclass(frozen=True)
class Presence:
    """A process: its host, its number there, and when that was given (clock ticks since boot)."""

    host: str
    pid: int
    born: str

    @property
    def local(self) -> bool:
        return self.host == platform.node()

    @property
    def alive(self) -> bool | None:
        """None where that cannot be told from here."""
        return _born(self.pid) == self.born if self.local else None

    def end(self) -> None:
        """Ask it to end, as Ctrl-C does."""
        os.kill(self.pid, signal.SIGTERM)


def of(out: Path) -> Presence | None:
    """Who is noted as being at work on a run directory; it may be gone."""
    with suppress(OSError, ValueError, TypeError):
        return Presence(**json.loads((out / FILE).read_text()))
    return None


@contextmanager
def here(out: Path) -> Iterator[None]:
    """Note that this process is at work.

    Raises:
        ValueError: when another one is.
    """
    other = of(out)
    if other is not None and other.alive and other.pid != os.getpid():
        raise ValueError(
            f"process {other.pid} is at work on {out}; wait for it, or: cpbench cancel {out}"
        )
    me = Presence(platform.node(), os.getpid(), _born(os.getpid()))
    with suppress(OSError):  # a full disk is found, and told, where results are written
        (out / FILE).write_text(json.dumps(asdict(me)))
    try:
        yield
    finally:
        with suppress(OSError):
            (out / FILE).unlink()


def _born(pid: int) -> str:
    """When a process started; "" when there is none, or it has ended."""
    with suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[19] if words[0] not in "ZX" else ""
    return ""
