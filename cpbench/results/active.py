"""Who is at work on a run directory: processes, each on cases of its own, which another shell can
end.  Each has a file ``running/HOST-PID.json`` there while it is."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = "running"


@dataclass(frozen=True)
class Presence:
    """A process: its host, its number there, when that was given (clock ticks since boot), and ids
    of the cases that it is to do."""

    host: str
    pid: int
    born: str
    cases: tuple[str, ...] = ()

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


def at_work(out: Path) -> list[Presence]:
    """Who is noted as being at work on a run directory; some may be gone."""
    found = []
    for path in sorted((out / FOLDER).glob("*.json")):
        with suppress(OSError, ValueError, TypeError, KeyError):
            table = json.loads(path.read_text())
            found.append(Presence(**{**table, "cases": tuple(table["cases"])}))
    return found


@contextmanager
def here(out: Path, cases: Collection[str]) -> Iterator[None]:
    """Note that this process is at work on some cases.

    Raises:
        ValueError: when another one is at work on some of them.
    """
    for other in at_work(out):
        if other.alive and other.pid != os.getpid() and set(other.cases) & set(cases):
            raise ValueError(
                f"process {other.pid} is at work on {out}; wait for it, or: cpbench cancel {out}"
            )
    me = Presence(platform.node(), os.getpid(), _born(os.getpid()), tuple(cases))
    path = out / FOLDER / f"{me.host}-{me.pid}.json"
    with suppress(OSError):  # a full disk is found, and told, where results are written
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(me)))
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()


def _born(pid: int) -> str:
    """When a process started; "" when there is none, or it has ended."""
    with suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[19] if words[0] not in "ZX" else ""
    return ""
