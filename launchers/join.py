"""``cpbench join``: what a machine does that has been lent to a run on several.

It watches the run directory, starts this node's torchrun agent for each gang that gathers, and ends
it with the gang, or when the run has gone silent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from cpbench.launchers import torchrun
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, Place, shared_variables
from cpbench.results import active
from cpbench.worker.rendezvous import own_address

POLL_S = 0.5
SILENCE_S = 30.0  # without a sign of life from another machine
SIGN_S = 3.0  # between signs
OVER = "over"  # a file in the folder of a gang that has ended


class Sign:
    """A sign of life for other machines, or of one: a number in a file that goes up.

    Not the file's time: clocks differ, and network file systems keep times back for long, but show
    what is in a file to whoever opens it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count, self._given = path, 0, 0.0
        self._seen, self._changed = "", time.monotonic()

    def give(self) -> None:
        """Show that this process lives, at times."""
        if time.monotonic() - self._given > SIGN_S:
            self._given, self._count = time.monotonic(), self._count + 1
            with suppress(OSError):
                self._path.write_text(str(self._count))

    @property
    def silent(self) -> bool:
        """Whether nothing has come for long."""
        with suppress(OSError):
            told = self._path.read_text()
            if told not in ("", self._seen):
                self._seen, self._changed = told, time.monotonic()
        return time.monotonic() - self._changed > SILENCE_S


class Peers:
    """The other machines of a gang, as the run itself sees them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._signs = folder, dict[str, Sign]()
        self._own = Sign(folder / "alive")

    def lost(self) -> str | None:
        """Give a sign; the name of a machine that gives none any more, or None."""
        self._own.give()
        for path in self._folder.glob("node-*.alive"):
            if self._signs.setdefault(path.stem, Sign(path)).silent:
                return path.stem.removeprefix("node-")
        return None


def gather(job: Path, world_size: int, place: Place, module: str) -> None:
    """Tell other machines of a gang (for the run itself to call)."""
    table = {
        "world_size": world_size, "nodes": place.nodes, "address": place.address, "module": module,
    }  # fmt: skip
    hidden = job.with_name(f".{torchrun.GATHERING}")
    hidden.write_text(json.dumps(table))
    hidden.replace(job.with_name(torchrun.GATHERING))


def follow(out: Path, interface: str, patience_s: float) -> int:
    """Serve the gangs of a run until it ends; 0, or 1 when nothing ever came.

    Raises:
        KeyboardInterrupt: once this node's agent is gone.
    """
    served: set[str] = set()
    signs: dict[str, Sign] = {}
    idle = time.monotonic()
    while time.monotonic() - idle < patience_s:
        for gathering in sorted((out / "jobs").glob(f"*/{torchrun.GATHERING}")):
            folder = gathering.parent
            sign = signs.setdefault(folder.name, Sign(folder / "alive"))
            if folder.name in served or not _gathers(folder) or sign.silent:
                continue
            served.add(folder.name)
            _serve(folder, interface, sign)
            idle = time.monotonic()
        if served and all(who.alive is False for who in active.at_work(out)):
            return 0
        time.sleep(POLL_S)
    print(f"cpbench: nothing to do in {out} for {patience_s:g} s", file=sys.stderr)
    return 0 if served else 1


def _gathers(folder: Path) -> bool:
    """Whether a gang still waits for machines: once ranks run, one that came would start them all
    anew."""
    return not (folder / OVER).exists() and not any(folder.glob("rank*.jsonl"))


def _serve(folder: Path, interface: str, run: Sign) -> None:
    """This node's part of one gang, from start to end."""
    table = json.loads((folder / torchrun.GATHERING).read_text())
    place = Place(nodes=table["nodes"], address=table["address"], interface=interface)
    job, size = folder.resolve() / "job.json", table["world_size"]
    argv = torchrun.agent(
        job, size, place, table["address"], table["module"], own_address(interface), host=False
    )
    name = f"node-{os.uname().nodename}-{os.getpid()}"
    own = Sign(folder / f"{name}.alive")
    print(f"{folder.name}: {size // place.nodes} of {size} ranks", file=sys.stderr, flush=True)
    log = folder / f"{name}.log"
    gang = Gang([Command(argv, shared_variables(place, os.environ), log)])
    try:
        while gang.codes() == [None] and not (folder / OVER).exists():
            own.give()
            if run.silent:
                print(f"{folder.name}: the run has gone silent; left", file=sys.stderr)
                break
            time.sleep(POLL_S)
        gang.wait(POLL_S)
    finally:
        gang.kill()
