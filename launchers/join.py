"""``cpbench join``: let this machine join a multi-node run.

It watches the run directory, starts this node's torchrun agent for each gang that waits for nodes,
and ends it with the gang, or when the heartbeat of the run stops.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from cpbench.launchers import torchrun
from cpbench.launchers.gang import Gang
from cpbench.launchers.protocol import Command, GangSpec, Place
from cpbench.results import active
from cpbench.results.store import read_document, write_document
from cpbench.worker.rendezvous import own_address

POLL_S = 0.5
HEARTBEAT_TIMEOUT_S = 30.0
HEARTBEAT_INTERVAL_S = 3.0
GANG_ENDED_FILE = "over"  # in the folder of a gang that has ended


class Heartbeat:
    """A heartbeat between machines: a counter in a shared file, written by one of them.

    It does not use the file's modification time: clocks differ between machines, and network file
    systems cache times, but not the contents of a file that is opened anew.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._count, self._last_beat = path, 0, 0.0
        self._last_text, self._last_change = "", time.monotonic()

    def beat(self) -> None:
        """Increment the counter, at most every ``HEARTBEAT_INTERVAL_S``."""
        if time.monotonic() - self._last_beat > HEARTBEAT_INTERVAL_S:
            self._last_beat, self._count = time.monotonic(), self._count + 1
            with suppress(OSError):
                self._path.write_text(str(self._count), "utf-8")

    @property
    def timed_out(self) -> bool:
        """Whether the counter has not changed for ``HEARTBEAT_TIMEOUT_S``."""
        with suppress(OSError):
            text = self._path.read_text("utf-8")
            if text not in ("", self._last_text):
                self._last_text, self._last_change = text, time.monotonic()
        return time.monotonic() - self._last_change > HEARTBEAT_TIMEOUT_S


class Peers:
    """Heartbeats of the machines that have joined a gang, for the run that started it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._heartbeats = folder, dict[str, Heartbeat]()
        self._own = Heartbeat(folder / "alive")

    def lost_machine(self) -> str | None:
        """Send a heartbeat; the name of a machine whose heartbeat has timed out, or None."""
        self._own.beat()
        for path in self._folder.glob("node-*.alive"):
            if self._heartbeats.setdefault(path.stem, Heartbeat(path)).timed_out:
                return path.stem.removeprefix("node-")
        return None


def announce_gang(spec: GangSpec) -> None:
    """Write the file that tells machines how to join a gang; called by the run."""
    table = {
        "world_size": spec.world_size, "nodes": spec.place.nodes,
        "address": spec.place.address, "module": spec.module,
    }  # fmt: skip
    write_document(spec.job.with_name(torchrun.RENDEZVOUS_FILE), table)


def join_run(out: Path, interface: str, idle_timeout_s: float) -> int:
    """Join the gangs of a run until it ends; the exit code, 1 if there was no gang to join.

    Args:
        interface: network interface of this machine; "" for the system's default.
        idle_timeout_s: leave after this time without a gang to join.

    Raises:
        KeyboardInterrupt: once this node's agent has ended.
        DamagedError: when the file that tells how to join is damaged.
    """
    joined: set[str] = set()
    heartbeats: dict[str, Heartbeat] = {}
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < idle_timeout_s:
        for rendezvous_file in sorted((out / "jobs").glob(f"*/{torchrun.RENDEZVOUS_FILE}")):
            folder = rendezvous_file.parent
            heartbeat = heartbeats.setdefault(folder.name, Heartbeat(folder / "alive"))
            if folder.name in joined or not _waits_for_nodes(folder) or heartbeat.timed_out:
                continue
            joined.add(folder.name)
            _join_gang(folder, interface, heartbeat)
            idle_since = time.monotonic()
        if joined and not any(process.alive for process in active.active_processes(out)):
            return 0
        time.sleep(POLL_S)
    print(f"cpbench: nothing to join in {out} for {idle_timeout_s:g} s", file=sys.stderr)
    return 0 if joined else 1


def _waits_for_nodes(folder: Path) -> bool:
    """Whether a gang still waits for nodes: joining later would restart all its ranks."""
    return not (folder / GANG_ENDED_FILE).exists() and not any(folder.glob("rank*.jsonl"))


def _join_gang(folder: Path, interface: str, run_heartbeat: Heartbeat) -> None:
    """Run this node's agent of one gang until the gang ends."""
    table = read_document(folder / torchrun.RENDEZVOUS_FILE)
    place = Place(nodes=table["nodes"], address=table["address"], interface=interface)
    world_size = table["world_size"]
    spec = GangSpec(folder.resolve() / "job.json", world_size, place, module=table["module"])
    argv = torchrun.agent_command(spec, place.address, own_address(interface), host=False)
    name = f"node-{os.uname().nodename}-{os.getpid()}"
    heartbeat = Heartbeat(folder / f"{name}.alive")
    local_ranks = world_size // place.nodes
    print(f"{folder.name}: {local_ranks} of {world_size} ranks", file=sys.stderr, flush=True)
    log = folder / f"{name}.log"
    gang = Gang([Command(argv, spec.env, log)])
    try:
        while gang.exit_codes() == [None] and not (folder / GANG_ENDED_FILE).exists():
            heartbeat.beat()
            if run_heartbeat.timed_out:
                print(f"{folder.name}: no heartbeat of the run; left", file=sys.stderr)
                break
            time.sleep(POLL_S)
        gang.wait(POLL_S)
    finally:
        gang.kill()
