"""What a launcher is: a pure function from a job and a place to the commands that start ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """What a launcher wants run on this machine.

    Attributes:
        argv: words.
        env: added to the environment.
        log: where its output goes.
        remote: whether its ranks may be on other machines, or children of a daemon: then a signal
            must reach them through the command, which is asked to end before it is killed.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    log: Path
    remote: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"argv": list(self.argv), "env": self.env, "log": str(self.log)}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the ranks of a gang run, and what starts them there.

    Attributes:
        nodes: how many share the ranks, evenly unless the launcher can do otherwise.
        hosts: their names, for launchers that must be told.
        address: of the first node, as the others reach it.
        interface: network interface that ranks talk through; "" for the system's choice.
        python: words that start Python on a node, such as those of a container; none for this one.
        options: more words for the launcher's own command (``srun``, ``mpiexec``).
        env: variables for the ranks.
    """

    nodes: int = 1
    hosts: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = ""
    python: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def per_node(self, world_size: int) -> int:
        """Ranks of each node.

        Raises:
            ValueError: when they do not divide.
        """
        if world_size % self.nodes:
            raise ValueError(
                f"{world_size} ranks do not divide over {self.nodes} nodes; give a number that does"
            )
        return world_size // self.nodes


@dataclass(frozen=True)
class Launcher:
    """One way to start ranks; each module of this folder that has a ``LAUNCHER`` is one.

    Attributes:
        name: for ``--launcher``.
        commands: ``(job, world_size, place, environ, module)`` to what is run here: a job file to
            work through, ranks, where, what the user has set in the environment (not overridden),
            and the module that each rank runs.
        failures: ``(output, ranks)`` to exit codes by rank (negative for signals), from what the
            command has printed and the ranks by process id, where one command starts all ranks;
            None where there is a command for each.
        nodes: whether it reaches more than one.
    """

    name: str
    commands: Callable[..., list[Command]]
    failures: Callable[[str, Mapping[int, int]], dict[int, int]] | None = None
    nodes: bool = False


def shared_variables(place: Place, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that every rank needs, unless the user has set them otherwise."""
    wanted = {"OMP_NUM_THREADS": "1"}
    if place.interface:
        wanted |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), place.interface)
    elif place.nodes == 1:
        # Host names of containers often do not resolve, and Gloo would ask.
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    return {**{key: environ.get(key, value) for key, value in wanted.items()}, **place.env}


def python_of(place: Place) -> tuple[str, ...]:
    """The words that start Python where the ranks run."""
    return place.python or (sys.executable,)
