"""Commands for runs on Slurm, on several machines or in another shell: status, cancel, join."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpbench.cli.options import AsJson, Interface, UserError, user_input
from cpbench.reports.tables.terminal import print_rows

if TYPE_CHECKING:
    from cpbench.cli.options import DeviceName, ProfilerName, Transport
    from cpbench.core.settings import MeasureSettings
    from cpbench.launchers.protocol import Place
    from cpbench.results.active import ActiveProcess
    from cpbench.slurm.site_profile import Profile
    from cpbench.sweep.request import Request

commands = typer.Typer()
RunFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Run directory.")]


def slurm_profile(
    launcher: str, path: Path | None, wait: bool, resubmit: int, profiler: str
) -> Profile | None:
    """Load the profile of the Slurm site; None for other launchers.

    Raises:
        ValueError: for options that exclude each other, or an invalid profile.
    """
    from cpbench.slurm import site_profile

    if launcher != "slurm":
        for name, value in (("--profile", path), ("--wait", wait), ("--resubmit", resubmit)):
            if value:
                raise ValueError(f"{name} is for --launcher slurm")
        return None
    if profiler:
        raise ValueError(f"--profiler {profiler} does not work with --launcher slurm")
    if resubmit and not wait:
        raise ValueError("--resubmit needs --wait; without it, repeat the command to resume")
    if path is None:
        raise ValueError("--launcher slurm needs --profile SITE.toml; see docs/launchers.md")
    return site_profile.load(path)


def output_folder(out: Path, profiler: ProfilerName | None) -> Path:
    """The run directory, or a new one below it for a profiled case."""
    if profiler is None:
        return out
    return out / "profiles" / f"{profiler.value}-{time.strftime('%Y%m%dT%H%M%S')}"


def profile_device(profile: Profile, requested: DeviceName | None) -> str:
    """The device of the ranks of a Slurm site.

    Raises:
        ValueError: if another one was requested.
    """
    if requested is not None and requested.value != profile.rank_device:
        raise ValueError(
            f"--device {requested.value}: the profile has ranks on {profile.rank_device}"
        )
    return profile.rank_device


def override_settings(
    settings: MeasureSettings, launcher: str, transport: Transport | None, interleave: int | None,
    launches: int | None, thorough: bool, trace: bool, profiler: ProfilerName | None,
    profile: Profile | None,
) -> MeasureSettings:  # fmt: skip
    """The settings of a sweep with the overrides of the command line.

    Raises:
        ValueError: for transport mpi if the ranks are not started by MPI.
    """
    if transport is not None:
        settings = replace(settings, transport=transport.value)
    if interleave is not None:
        settings = replace(settings, interleave=interleave)
    if launches is not None:
        settings = replace(settings, launches=launches)
    if thorough:
        settings = replace(settings, thorough=True)
    if trace or profiler is not None:
        settings = replace(settings, trace=True)
    if profiler is not None:  # only the profiled pass is needed
        settings = replace(settings, exposure=False, memory=False, launches=1)
    mpi = launcher == "mpi" or (profile is not None and profile.ranks in ("mpi", "mpiexec"))
    if settings.transport == "mpi" and not mpi:
        raise ValueError(
            "transport mpi needs ranks started by MPI: --launcher mpi, or a Slurm profile "
            'with ranks = "mpi" or "mpiexec"'
        )
    return settings


def launch_place(
    launcher: str, nodes: int, hosts: str, interface: str, world_sizes: Collection[int]
) -> Callable[[int], Place]:
    """A function from world size to the nodes that its ranks run on (not for batch jobs).

    Raises:
        ValueError: if ranks do not divide by nodes, the launcher works on one node only or outside
            of its allocation, or there is no such network interface.
    """
    from cpbench.launchers import mpi
    from cpbench.launchers.gang import free_port
    from cpbench.launchers.protocol import Place
    from cpbench.worker.rendezvous import own_address, require_interface

    require_interface(interface)
    host_names = tuple(filter(None, (name.strip() for name in hosts.split(","))))
    if launcher == "slurm":
        if nodes > 1 or host_names:
            raise ValueError(
                "--nodes and --hosts do not apply to --launcher slurm; set them in its profile"
            )
    elif launcher == "mpi":
        mpi.find_mpiexec()
        if host_names and nodes not in (1, len(host_names)):
            raise ValueError(f"--nodes {nodes}, but --hosts names {len(host_names)}")
        nodes = len(host_names) or nodes
        if nodes > 1 and not host_names:
            raise ValueError("--launcher mpi on several nodes needs --hosts")
    elif host_names:
        raise ValueError(
            "--hosts is for --launcher mpi; with torchrun, run cpbench join on other nodes"
        )
    elif launcher == "srun":
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("--launcher srun runs inside an allocation of Slurm: use salloc")
    elif nodes > 1 and launcher != "torchrun":
        raise ValueError(
            f"--launcher {launcher} is for one machine; torchrun, mpi or Slurm for more"
        )

    def place_of(world_size: int) -> Place:
        multi_node = launcher == "torchrun" and nodes > 1
        address = f"{own_address(interface)}:{free_port()}" if multi_node else "127.0.0.1"
        return Place(nodes=nodes, hosts=host_names, address=address, interface=interface)

    if launcher != "mpi":
        for world_size in sorted(set(world_sizes)):
            place_of(world_size).ranks_per_node(world_size)
    return place_of


def print_job_scripts(request: Request, profile: Profile, as_json: bool) -> int:
    """Print the batch scripts that would be submitted, and the expected hours."""
    from cpbench.slurm import batch_script, submission
    from cpbench.slurm.site_profile import parse_time_limit
    from cpbench.sweep import runs
    from cpbench.sweep.remaining import remaining_cases

    todo, out = remaining_cases(request), request.out.resolve()
    estimates = runs.estimator(request)
    turns = estimates.turns(todo)
    cost = {case.id: estimates.seconds(case, turns.get(case.id, 1)) for case in todo}
    jobs: list[dict[str, Any]] = []
    unit = "gpu_hours" if request.device == "cuda" else "rank_hours"
    limit = submission.max_tasks(profile)
    plan = (request.name, todo, request.settings, profile, out, "STAMP", limit)
    for job in submission.plan_jobs(*plan):
        wall = max(sum(cost[case.id] for case in chunk) for chunk in job.chunks) / 3600
        hours = sum(cost[case.id] * case.world_size for case in job.cases) / 3600
        text = batch_script.render_script(job.batch, profile, out, tuple(submission.bad_nodes(out)))
        jobs.append(
            {
                "job": job.batch.name, "ranks": job.batch.ranks, "nodes": job.batch.nodes,
                "tasks": job.batch.tasks or 1, "cases": len(job.cases), "hours": wall,
                "limit_hours": parse_time_limit(profile.time) / 3600, unit: hours, "script": text,
            }
        )  # fmt: skip
    last = submission.report_job(request.name, out, "STAMP")
    scripts = {row["job"]: row["script"] for row in jobs}
    if jobs:
        scripts[last.name] = batch_script.render_script(last, profile, out)
    if as_json:
        table = {"sweep": request.name, "out": str(out), "jobs": jobs, "scripts": scripts}
        print(json.dumps(table, indent=1))
        return 0
    for name, text in scripts.items():
        print(f"# ==> {out}/slurm/{name}.sbatch\n{text}")
    rows = [{k: v for k, v in row.items() if k != "script"} for row in jobs]
    hour_keys = ("hours", "limit_hours", unit)
    print_rows([{**row, **{key: f"{row[key]:.2f}" for key in hour_keys}} for row in rows], False)
    total = sum(row[unit] for row in rows)
    print(f"\n{len(todo)} of {len(request.cases)} cases, about {total:.2f} {unit}; "
          f"{estimates.describe_sources(todo)}")  # fmt: skip
    if note := submission.describe_split(list(scripts), profile):
        print(note)
    if any(row["hours"] > row["limit_hours"] for row in rows):
        print("jobs that exceed their time limit are stopped; repeat the command to resume them")
    return 0


def submit(
    request: Request, profile: Profile, wait: bool, resubmit: int, as_json: bool
) -> int | None:
    """Submit the cases that are neither recorded nor in a live job, and optionally wait for them.

    Returns:
        The exit code, or None if the jobs have ended and their report is to be printed.
    """
    from cpbench.results.store import StoreError
    from cpbench.slurm import client, submission
    from cpbench.slurm.wait import JobWaiter
    from cpbench.sweep import runs
    from cpbench.sweep.remaining import remaining_cases

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    out, count, quoted_out = request.out, len(request.cases), shlex.quote(str(request.out))
    try:
        todo = remaining_cases(request)
        with submission.submission_lock(out):
            submitted_ids = submission.cases_in_live_jobs(out, submission.JobTracker(out).query())
            new = [case for case in todo if case.id not in submitted_ids]
            feasible = runs.feasible_cases(request, new)
            jobs = submission.submit(request, feasible, profile) if feasible else []
        for job in jobs:
            size = f"ranks: {job.ranks}, nodes: {job.nodes}, cases: {len(job.cases)}"
            log(f"job {job.job}: {job.name}; {size}")
        if note := submission.describe_split([job.name for job in jobs], profile):
            log(note)
        recorded = f"{count - len(todo)} of {count} cases are recorded in {out}"
        log(f"{recorded}, {len(todo) - len(new)} are already in jobs")
        if not wait:
            log(f"progress: cpbench status {quoted_out}; to cancel: cpbench cancel {quoted_out}")
            if as_json:
                print(json.dumps({"jobs": [job.job for job in jobs], "out": str(out)}))
            return 0
        JobWaiter(request, profile, resubmit, quiet=as_json).wait()
    except client.SlurmError as error:
        raise UserError(str(error)) from None
    except StoreError as error:
        log(f"cpbench: {error}")
        return 1
    except KeyboardInterrupt:
        log(f"cpbench: the jobs continue; cpbench status {quoted_out}, cpbench cancel {quoted_out}")
        return 130
    left = len(remaining_cases(request))
    if left:
        log(f"cpbench: {left} of {count} cases have no result; see cpbench status {quoted_out}, "
            "and repeat the command to resume")  # fmt: skip
    return None


def check_no_live_jobs(request: Request) -> None:
    """Raise ``ValueError`` if live Slurm jobs are to run some of the same cases."""
    from cpbench.slurm import client, submission
    from cpbench.sweep.remaining import remaining_cases

    if not submission.submitted_jobs(request.out):
        return
    try:
        live_ids = submission.cases_in_live_jobs(
            request.out, submission.JobTracker(request.out).query()
        )
    except client.SlurmError as error:
        raise ValueError(f"cannot tell whether {request.out} has live jobs: {error}") from None
    overlap = [case for case in remaining_cases(request) if case.id in live_ids]
    if overlap:
        raise ValueError(
            f"{len(overlap)} of these cases are in jobs; wait for them, or run: cpbench cancel "
            f"{shlex.quote(str(request.out))}"
        )


@commands.command()
def status(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Show the progress of a run and the state of its jobs."""
    from cpbench.tools import status

    with user_input():
        progress = status.read_status(run_dir)
    if as_json:
        print(json.dumps(progress, indent=1))
    else:
        status.print_status(progress)


@commands.command()
def cancel(run_dir: RunFolder) -> None:
    """Cancel a run: its Slurm jobs, or its processes on this machine.

    Recorded results are kept.
    """
    from cpbench.results import active
    from cpbench.slurm import client, submission

    with user_input():
        if not run_dir.is_dir():
            raise ValueError(f"{run_dir} is not a run directory")
        if submission.submitted_jobs(run_dir):
            try:
                job_ids = submission.cancel(run_dir)
            except client.SlurmError as error:
                raise ValueError(str(error)) from None
            print(f"cancelled jobs: {', '.join(job_ids)}" if job_ids else "no live jobs")
        processes = active.active_processes(run_dir)
        remote = []
        for process in processes:
            if not process.alive:
                process.path.unlink(missing_ok=True)
            elif process.is_local:
                process.terminate()
                _wait_for_exit(process)
                print(f"ended process {process.pid}")
            else:
                remote.append(f"{process.pid} on {process.host}")
        if remote:
            raise ValueError(f"cancel these on their own machines: {', '.join(remote)}")
        if not processes and not submission.submitted_jobs(run_dir):
            print("nothing is running")


def _wait_for_exit(process: ActiveProcess, timeout_s: float = 30.0) -> None:
    """Wait until a process has ended.

    Raises:
        ValueError: if it still runs after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while process.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.alive:
        raise ValueError(f"process {process.pid} does not end; run: kill -9 {process.pid}")


@commands.command()
def join(
    run_dir: RunFolder,
    interface: Interface = "",
    patience: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="Exit after this long without work."),
    ] = 600.0,
) -> int:
    """Join a multi-node run as an additional node.

    Start the run on the first machine with: cpbench run SWEEP --launcher torchrun --nodes N, or
    cpbench links likewise. Then join on each of the others, with the same run directory on a
    shared file system. The command ends with the run.
    """
    from cpbench.launchers import join
    from cpbench.worker.rendezvous import require_interface

    with user_input():
        require_interface(interface)
        return join.join_run(run_dir, interface, patience)
