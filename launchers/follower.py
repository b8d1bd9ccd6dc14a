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

from cpbench import presence
from cpbench.bootstrap import own_address
from cpbench.launchers import torchrun
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, Place, shared_variables

POLL_S = 0.5
SILENCE_S = 60.0  # without a sign of life from the run: network file systems show one late
OVER, ALIVE = "over", "alive"


def gather(job: Path, world_size: int, place: Place, module: str) -> None:
    """Tell other machines of a gang (for the run itself to call)."""
    table = {
        "world_size": world_size, "nodes": place.nodes, "address": place.address, "module": module,
    }  # fmt: skip
    (job.parent / ALIVE).touch()
    hidden = job.with_name(f".{torchrun.GATHERING}")
    hidden.write_text(json.dumps(table))
    hidden.replace(job.with_name(torchrun.GATHERING))


def follow(out: Path, interface: str, patience_s: float) -> int:
    """Serve the gangs of a run until it ends; 0, or 1 when nothing ever came.

    Raises:
        KeyboardInterrupt: once this node's agent is gone.
    """
    served: set[str] = set()
    seen: dict[str, tuple[float, float]] = {}
    idle = time.monotonic()
    while time.monotonic() - idle < patience_s:
        for gathering in sorted((out / "jobs").glob(f"*/{torchrun.GATHERING}")):
            folder = gathering.parent
            if folder.name in served or (folder / OVER).exists() or _stale(folder, seen):
                continue
            served.add(folder.name)
            _serve(folder, interface, seen)
            idle = time.monotonic()
        if served and not any((out / presence.FOLDER).glob("*.json")):
            return 0
        time.sleep(POLL_S)
    print(f"cpbench: nothing to do in {out} for {patience_s:g} s", file=sys.stderr)
    return 0 if served else 1


def _stale(folder: Path, seen: dict[str, tuple[float, float]]) -> bool:
    """Whether a gang has given no sign of life for long, told by changes: clocks differ."""
    stamp = 0.0
    with suppress(OSError):
        stamp = (folder / ALIVE).stat().st_mtime
    before = seen.get(folder.name)
    if before is None or before[0] != stamp:
        seen[folder.name] = (stamp, time.monotonic())
        return False
    return time.monotonic() - before[1] > SILENCE_S


def _serve(folder: Path, interface: str, seen: dict[str, tuple[float, float]]) -> None:
    """This node's part of one gang, from start to end."""
    table = json.loads((folder / torchrun.GATHERING).read_text())
    place = Place(nodes=table["nodes"], address=table["address"], interface=interface)
    job, size = folder.resolve() / "job.json", table["world_size"]
    argv = torchrun.agent(
        job, size, place, table["address"], table["module"], own_address(interface)
    )
    log = folder / f"node-{os.uname().nodename}-{os.getpid()}.log"
    print(f"{folder.name}: {size // place.nodes} of {size} ranks", file=sys.stderr, flush=True)
    gang = Gang([Command(argv, shared_variables(place, os.environ), log)])
    try:
        while gang.codes() == [None] and not (folder / OVER).exists():
            if _stale(folder, seen):
                print(f"{folder.name}: the run has gone silent; left", file=sys.stderr)
                break
            time.sleep(POLL_S)
        gang.wait(POLL_S)
    finally:
        gang.kill()
