"""The contract of launchers: pure functions from a job and a place to commands that start ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench.core.subprocess_call import MODULE


@dataclass(frozen=True)
class Command:
    """A command to run on this machine.

    Attributes:
        argv: program and arguments.
        env: variables to add to the environment.
        log: file for its output.
        remote: whether its ranks may be on other machines, or children of a daemon: then signals
            reach them only through the command, which gets SIGTERM before it is killed.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    log: Path
    remote: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"argv": list(self.argv), "env": self.env, "log": str(self.log)}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the ranks of a gang run, and how they are started there.

    Attributes:
        nodes: number of nodes, among which the ranks are divided, evenly unless the launcher
            supports otherwise.
        hosts: names of the nodes, for launchers that need them.
        address: of the first node, as the others reach it.
        interface: network interface for the ranks' communication; "" for the system's default.
        python: command that starts Python on a node, such as in a container; () for this Python.
        options: additional arguments of the launcher's command (``srun``, ``mpiexec``).
        env: environment variables for the ranks.
    """

    nodes: int = 1
    hosts: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = ""
    python: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def ranks_per_node(self, world_size: int) -> int:
        """Number of ranks per node.

        Raises:
            ValueError: when the ranks do not divide evenly.
        """
        if world_size % self.nodes:
            raise ValueError(f"{world_size} ranks do not divide evenly over {self.nodes} nodes")
        return world_size // self.nodes


THIS_MACHINE = Place()


@dataclass(frozen=True)
class GangSpec:
    """What a launcher is asked to start.

    Attributes:
        job: the job file; logs and rendezvous files are beside it.
        world_size: number of ranks.
        place: where they run.
        environ: the user's environment, whose variables are not overridden.
        module: run by each rank as ``python -P -m``.
    """

    job: Path
    world_size: int
    place: Place = THIS_MACHINE
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    module: str = "cpbench.worker.main"

    @property
    def log(self) -> Path:
        """For the output of a command that starts several ranks."""
        return self.job.parent / "rank0.log"

    @property
    def python(self) -> tuple[str, ...]:
        """The command that starts Python where the ranks run."""
        return self.place.python or (sys.executable,)

    @property
    def program(self) -> tuple[str, ...]:
        """The command of a rank."""
        return (*self.python, *MODULE, self.module, str(self.job))

    @property
    def env(self) -> dict[str, str]:
        """Environment variables of all ranks; values that the user has set take precedence."""
        defaults = {"OMP_NUM_THREADS": "1"}
        interface = self.place.interface
        if interface:
            defaults |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
        elif self.place.nodes == 1:
            # Gloo would resolve the host name, which often fails in containers.
            defaults["GLOO_SOCKET_IFNAME"] = "lo"
        set_by_user = {key: self.environ.get(key, value) for key, value in defaults.items()}
        return {**set_by_user, **self.place.env}


@dataclass(frozen=True)
class Launcher:
    """One way to start ranks.

    Attributes:
        name: value of ``--launcher``.
        commands: function that returns, for a :class:`GangSpec`, the commands to run on this
            machine.
        parse_exit_codes: function ``(output, ranks_by_pid)`` that returns exit codes by rank
            (negative for signals) from the command's output, if one command starts all ranks; None
            if there is a command for each rank.
        multi_node: whether it can start ranks on several nodes.
    """

    name: str
    commands: Callable[..., list[Command]]
    parse_exit_codes: Callable[[str, Mapping[int, int]], dict[int, int]] | None = None
    multi_node: bool = False
