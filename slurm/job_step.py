"""The program of a Slurm job: ``python -m cpbench.slurm.job_step OUT/slurm/NAME.json``.

It runs on the first node, checks the nodes, then runs the cases without a record under the same
supervisor as on one machine, so Slurm may restart it at any time.  Before the time limit, Slurm
sends SIGUSR1: the current case is stopped, and the exit code says that cases remain.
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.user_files import count_from, counted_from
from cpbench.launchers.gang import free_port
from cpbench.launchers.protocol import Place
from cpbench.launchers.supervisor import LaunchError, TimeUp
from cpbench.results.sealed import DamagedError
from cpbench.results.store import JsonLinesWriter, StoreError, read_document
from cpbench.slurm import client, node_check
from cpbench.slurm.job_states import EXIT_NODES, EXIT_STORE, EXIT_TIME
from cpbench.slurm.site_profile import Profile, from_table, parse_time_limit
from cpbench.sweep import runs
from cpbench.sweep.remaining import remaining_cases
from cpbench.sweep.request import Request
from cpbench.worker.rendezvous import own_address

EXIT_LAUNCH = 70
LOG_PREFIX = "cpbench: "
CLEAN_UP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class JobSpec:
    """Contents of a job file.

    Attributes:
        out: run directory.
        name: of the sweep.
        chunks: the cases of each task of an array, or of the job.
        settings: how the cases are measured.
        profile: site profile as a table.
        retry: statuses whose cases are run again, unless they were recorded after ``since``.
        since: sequence number of a record.
        remeasure: whether cases are run again that were measured with other settings.
        files_from: folder from which relative paths in cases count.
    """

    out: Path
    name: str
    chunks: list[list[Case]]
    settings: MeasureSettings
    profile: dict[str, Any]
    retry: tuple[str, ...]
    since: float
    remeasure: bool = False
    files_from: Path = field(default_factory=counted_from)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out), "name": self.name, "profile": self.profile,
            "chunks": [[case.to_json() for case in chunk] for chunk in self.chunks],
            "settings": vars(self.settings), "retry": list(self.retry), "since": self.since,
            "remeasure": self.remeasure, "files_from": str(self.files_from.absolute()),
        }  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> JobSpec:
        table = read_document(path)
        return cls(
            Path(table["out"]), table["name"],
            [[Case.from_json(case) for case in chunk] for chunk in table["chunks"]],
            MeasureSettings(**table["settings"]), table["profile"], tuple(table["retry"]),
            table["since"], table.get("remeasure", False), Path(table.get("files_from", "")),
        )  # fmt: skip


class AllocatedNodes:
    """The nodes of this job.

    Args:
        hosts: names of all nodes.
        bad: names of the nodes not to use.
    """

    def __init__(self, profile: Profile, hosts: Sequence[str], bad: Sequence[str]) -> None:
        self._profile, self._bad = profile, list(bad)
        self.good = [host for host in hosts if host not in bad]

    def place(self, world_size: int) -> Place:
        """Where the ranks of a world size run, on good nodes.

        Raises:
            LaunchError: when there are too few good nodes.
        """
        profile, count = self._profile, self._profile.node_count(world_size)
        if len(self.good) < count:
            raise LaunchError(
                f"{world_size} ranks need {count} nodes; only {len(self.good)} passed the check"
            )
        by_srun = profile.launcher != "mpi"
        torchrun = profile.ranks == "torchrun"
        ranks_per_node = -(-world_size // count)
        return Place(
            nodes=count,
            hosts=() if by_srun else tuple(self.good[:count]),
            address=f"{own_address(profile.interface)}:{free_port()}" if torchrun else "",
            interface=profile.interface,
            python=python_command(profile),
            options=(
                srun_options(profile, ranks_per_node, self._bad, agents=torchrun) if by_srun else ()
            ),
            env=dict(profile.environment),
        )


def srun_options(
    profile: Profile, ranks_per_node: int, bad: Sequence[str], agents: bool
) -> tuple[str, ...]:
    """Options of srun: binding, GPUs, container and excluded nodes.

    Args:
        bad: names of the nodes to exclude.
        agents: whether there is one task per node, which starts the ranks of the node.
    """
    cores = profile.cores_per_rank * (ranks_per_node if agents else 1)
    options = [f"--cpus-per-task={cores}"]
    if profile.gpus_per_node:
        gpus = min(ranks_per_node, profile.gpus_per_node)
        options.append(f"--gres=gpu:{gpus}" if profile.gpu_gres else f"--gpus-per-node={gpus}")
    if bad:
        options.append(f"--exclude={','.join(bad)}")
    gpu_bind = "" if agents else profile.gpu_bind  # an agent needs the GPUs of all its ranks
    for name, value in (("cpu-bind", profile.cpu_bind), ("gpu-bind", gpu_bind)):
        if value:
            options.append(f"--{name}={value}")
    container = profile.container
    if container.kind == "pyxis":
        options.append(f"--container-image={container.image}")
        if container.mounts:
            options.append(f"--container-mounts={','.join(container.mounts)}")
        options += container.options
    return (*options, *profile.srun)


def python_command(profile: Profile) -> tuple[str, ...]:
    """The command that starts Python for a rank, inside the container if there is one."""
    container = profile.container
    if not container.kind:
        return profile.python
    python = profile.python or ("python3",)
    if container.kind == "pyxis":
        return python
    gpu_option = ("--nv",) if profile.rank_device == "cuda" else ()
    binds = [option for mount in container.mounts for option in ("--bind", mount)]
    return ("apptainer", "exec", *gpu_option, *binds, *container.options, container.image, *python)


def _check_nodes(spec: JobSpec, profile: Profile, hosts: Sequence[str]) -> list[str]:
    """The bad nodes, which are also written to the run directory for later jobs to avoid."""
    ranks_per_node = min(
        profile.max_ranks_per_node, max(case.world_size for chunk in spec.chunks for case in chunk)
    )
    options = srun_options(profile, ranks_per_node, (), agents=True)
    python = python_command(profile) or (sys.executable,)
    bad_nodes = node_check.find_bad_nodes(
        hosts, options, python, spec.out, profile.rank_device, ranks_per_node
    )
    if bad_nodes:
        with JsonLinesWriter(spec.out / "slurm" / "bad_nodes.jsonl", sync=False) as lines:
            for node, reason in bad_nodes.items():
                _log(f"node {node} is excluded: {reason}")
                lines.append(
                    {"node": node, "why": reason, "job": os.environ.get("SLURM_JOB_ID", "")}
                )
    return list(bad_nodes)


def _log(text: str) -> None:
    """Print to the job's log; a full disk is ignored."""
    with suppress(OSError):
        print(f"{LOG_PREFIX}{text}", file=sys.stderr, flush=True)


def _stop_on_sigusr1(limit_s: int) -> None:
    """Make SIGUSR1 end the run; a case that has run for half of the limit by then is a timeout."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        raise TimeUp(limit_s / 2, f"the time limit of its job, {limit_s} s")

    signal.signal(signal.SIGUSR1, stop)


def main(argv: list[str]) -> int:
    """Run the job file named in ``argv``; exit codes: see ``cpbench.slurm.job_states``."""
    try:
        spec = JobSpec.load(Path(argv[0]))
    except DamagedError as error:
        _log(str(error))
        return EXIT_LAUNCH
    count_from(spec.files_from)
    profile = from_table(spec.profile)
    _stop_on_sigusr1(parse_time_limit(profile.time))
    task = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    try:
        hosts = client.expand_nodelist(os.environ["SLURM_JOB_NODELIST"])
        bad = _check_nodes(spec, profile, hosts) if profile.preflight else []
        nodes = AllocatedNodes(profile, hosts, bad)
        request = Request(
            name=spec.name, cases=spec.chunks[task], out=spec.out, launcher=profile.launcher,
            device=profile.rank_device, settings=spec.settings, retry=frozenset(spec.retry),
            remeasure=spec.remeasure, since=spec.since, place=nodes.place,
        )  # fmt: skip
        required = max(profile.node_count(case.world_size) for case in request.cases)
        if len(nodes.good) < required or hosts[0] in bad:
            _log(f"good nodes: {len(nodes.good)} of {len(hosts)}")
            return EXIT_NODES
        runs.run_cases(request, remaining_cases(request), quiet=False)
    except TimeUp as time_up:
        _log(f"stopped before {time_up}; cases remain")
        return EXIT_TIME
    except StoreError as error:
        _log(str(error))
        return EXIT_STORE
    except OSError as error:  # the log may be the first file to hit a full disk
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return EXIT_STORE
    except LaunchError as error:
        _log(str(error))
        return EXIT_LAUNCH
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    finally:
        _clean_up()
    return 0


def _clean_up() -> None:
    """Remove this job's scratch folder from every node."""
    scratch = os.environ.get("CPBENCH_SCRATCH", "")
    if Path(scratch).name.startswith("cpbench-"):
        command = ("srun", "--ntasks-per-node=1", "--overlap", "--input=none", "rm", "-rf", scratch)
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=CLEAN_UP_TIMEOUT_S)


def profile_table(profile: Profile) -> dict[str, Any]:
    """A profile as a table, which :func:`from_table` reads back."""
    table = {**vars(profile), "container": vars(profile.container)}
    return json.loads(json.dumps(table))  # type: ignore[no-any-return]


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # unflushed output on a full disk must not change the exit code
