"""What a job runs on its first node: ``python -m cpbench.slurm.job_step OUT/slurm/NAME.json``.

It checks the nodes, then works through the cases that have no record yet, with the same supervisor
that serves one machine.  So it does not matter how often Slurm starts it again.  Before the time
limit Slurm sends USR1: the case under way is given up, and the exit code says that some are left.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers.gang import free_port
from cpbench.launchers.protocol import Place
from cpbench.launchers.supervisor import LaunchError, TimeUp
from cpbench.results.store import Lines, StoreError
from cpbench.slurm import client, node_check
from cpbench.slurm.job_states import EXIT_NODES, EXIT_STORE, EXIT_TIME
from cpbench.slurm.site_profile import Profile, from_table, seconds
from cpbench.sweep import runs
from cpbench.worker.rendezvous import own_address

EXIT_LAUNCH = 70
CLEAN_UP_S = 20.0


@dataclass(frozen=True)
class Spec:
    """What a job is told.

    Attributes:
        out: run directory.
        name: of the sweep.
        chunks: the cases of each task of an array, or of the one job.
        settings, profile: see there.
        retry, since: statuses whose records of before that time (seconds since the epoch) do not
            count.
    """

    out: Path
    name: str
    chunks: list[list[Case]]
    settings: MeasureSettings
    profile: dict[str, Any]
    retry: tuple[str, ...]
    since: float

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "name": self.name, "profile": self.profile,
            "chunks": [[case.to_json() for case in chunk] for chunk in self.chunks],
            "settings": vars(self.settings), "retry": list(self.retry), "since": self.since,
        }  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> Spec:
        table = json.loads(path.read_text())
        return cls(
            Path(table["out"]), table["name"],
            [[Case.from_json(case) for case in chunk] for chunk in table["chunks"]],
            MeasureSettings(**table["settings"]), table["profile"], tuple(table["retry"]),
            table["since"],
        )  # fmt: skip


class Nodes:
    """The nodes of this job, and the place of a gang on the good ones."""

    def __init__(self, profile: Profile, hosts: Sequence[str], bad: Sequence[str]) -> None:
        self._profile, self._bad = profile, list(bad)
        self.good = [host for host in hosts if host not in bad]

    def place(self, world_size: int) -> Place:
        profile, count = self._profile, self._profile.nodes_of(world_size)
        if len(self.good) < count:
            raise LaunchError(f"{world_size} ranks need {count} nodes; good are {len(self.good)}")
        by_srun = profile.launcher != "mpi"
        several = profile.ranks == "torchrun"
        per_node = -(-world_size // count)
        return Place(
            nodes=count,
            hosts=() if by_srun else tuple(self.good[:count]),
            address=f"{own_address(profile.interface)}:{free_port()}" if several else "",
            interface=profile.interface,
            python=python_words(profile),
            options=srun_options(profile, per_node, self._bad, several) if by_srun else (),
            env=dict(profile.environment),
        )


def srun_options(
    profile: Profile, per_node: int, bad: Sequence[str], agents: bool
) -> tuple[str, ...]:
    """What is added to srun: binding, GPUs, container, and the nodes to leave out.

    Args:
        per_node: ranks of a node.
        agents: whether one task of a node starts all of them.
    """
    cores = profile.cpus_per_rank * (per_node if agents else 1)
    words = [f"--cpus-per-task={cores}"]
    if profile.gpus_per_node:
        gpus = min(per_node, profile.gpus_per_node)
        words.append(f"--gres=gpu:{gpus}" if profile.gpu_gres else f"--gpus-per-node={gpus}")
    if bad:
        words.append(f"--exclude={','.join(bad)}")
    for name, value in (("cpu-bind", profile.cpu_bind), ("gpu-bind", profile.gpu_bind)):
        if value:
            words.append(f"--{name}={value}")
    container = profile.container
    if container.kind == "pyxis":
        words.append(f"--container-image={container.image}")
        if container.mounts:
            words.append(f"--container-mounts={','.join(container.mounts)}")
        words += container.options
    return (*words, *profile.srun)


def python_words(profile: Profile) -> tuple[str, ...]:
    """What starts Python for a rank."""
    container = profile.container
    if not container.kind:
        return profile.python
    python = profile.python or ("python3",)
    if container.kind == "pyxis":
        return python
    gpus = ("--nv",) if profile.on == "cuda" else ()
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ("apptainer", "exec", *gpus, *binds, *container.options, container.image, *python)


def _check_nodes(spec: Spec, profile: Profile, hosts: Sequence[str]) -> list[str]:
    """The nodes that fail, noted beside the run for later jobs to avoid."""
    per_node = min(
        profile.per_node, max(case.world_size for chunk in spec.chunks for case in chunk)
    )
    options = srun_options(profile, per_node, (), agents=True)
    words = python_words(profile) or (sys.executable,)
    found = node_check.of_nodes(hosts, options, words, spec.out, profile.on, per_node)
    if found:
        with Lines(spec.out / "slurm" / "bad_nodes.jsonl", sync=False) as lines:
            for node, why in found.items():
                _say(f"node {node} is left out: {why}")
                lines.append({"node": node, "why": why, "job": os.environ.get("SLURM_JOB_ID", "")})
    return list(found)


def _say(text: str) -> None:
    """To the job's log, if there is room."""
    with suppress(OSError):
        print(f"cpbench: {text}", file=sys.stderr, flush=True)


def _time_up(limit_s: int) -> None:
    """Make USR1 the end of the run; a case that has taken half of the job by then does not fit."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise TimeUp(limit_s / 2, f"the time limit of its job, {limit_s} s")

    signal.signal(signal.SIGUSR1, stop)


def main(argv: list[str]) -> int:
    """Work through the file named in ``argv``; see ``cpbench.slurm.job_states`` for exit codes."""
    spec = Spec.load(Path(argv[0]))
    profile = from_table(spec.profile)
    _time_up(seconds(profile.time))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    try:
        hosts = client.hosts(os.environ["SLURM_JOB_NODELIST"])
        bad = _check_nodes(spec, profile, hosts) if profile.preflight else []
        nodes = Nodes(profile, hosts, bad)
        request = runs.Request(
            name=spec.name, cases=spec.chunks[task], out=spec.out, launcher=profile.launcher,
            device=profile.on, settings=spec.settings, retry=frozenset(spec.retry),
            since=spec.since, place=nodes.place,
        )  # fmt: skip
        largest = max(profile.nodes_of(case.world_size) for case in request.cases)
        if len(nodes.good) < largest or hosts[0] in bad:
            _say(f"good nodes: {len(nodes.good)} of {len(hosts)}")
            return EXIT_NODES
        runs.work(request, runs.remaining(request), quiet=False)
    except TimeUp as stop:
        _say(f"stopped before {stop}; the rest is left")
        return EXIT_TIME
    except StoreError as error:
        _say(str(error))
        return EXIT_STORE
    except OSError as error:  # the log may be the first to find its disk full
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return EXIT_STORE
    except LaunchError as error:
        _say(str(error))
        return EXIT_LAUNCH
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    finally:
        _clean_up()
    return 0


def _clean_up() -> None:
    """Remove this job's folder from every node."""
    scratch = os.environ.get("CPBENCH_SCRATCH", "")
    if Path(scratch).name.startswith("cpbench-"):
        words = ("srun", "--ntasks-per-node=1", "--overlap", "--input=none", "rm", "-rf", scratch)
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(words, capture_output=True, timeout=CLEAN_UP_S)


def profile_table(profile: Profile) -> dict[str, Any]:
    """As TOML would give it; :func:`from_table` reads it back."""
    found = {**vars(profile), "container": vars(profile.container)}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # what a full disk has not taken must not change the code
