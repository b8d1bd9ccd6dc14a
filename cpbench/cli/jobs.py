"""The part of the command line that deals with sweeps which run elsewhere, or for long."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpbench.cli.options import AsJson, UserError, user_input
from cpbench.reports.tables.terminal import print_rows

if TYPE_CHECKING:
    from cpbench.cli.options import DeviceName, ProfilerName, Transport
    from cpbench.core.problem import Case
    from cpbench.core.settings import MeasureSettings
    from cpbench.launchers.protocol import Place
    from cpbench.slurm.site_profile import Profile
    from cpbench.sweep.runs import Request

commands = typer.Typer()
RunFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A run directory.")]


def site(
    launcher: str, path: Path | None, wait: bool, resubmit: int, profiler: str
) -> Profile | None:
    """The profile of a Slurm site, for the Slurm launcher only.

    Raises:
        ValueError: for options that do not go together, or a bad profile.
    """
    from cpbench.slurm import site_profile

    if launcher != "slurm":
        for name, given in (("--profile", path), ("--wait", wait), ("--resubmit", resubmit)):
            if given:
                raise ValueError(f"{name} is for --launcher slurm")
        return None
    if profiler:
        raise ValueError(f"--profiler {profiler} is for the launchers of this machine, not slurm")
    if resubmit and not wait:
        raise ValueError("--resubmit needs --wait; without it, give the same command again")
    if path is None:
        raise ValueError("--launcher slurm needs --profile SITE.toml; see docs/launchers.md")
    return site_profile.load(path)


def folder_of(out: Path, profiler: ProfilerName | None) -> Path:
    """The run directory; of a profiled case one of its own inside it."""
    if profiler is None:
        return out
    return out / "profiles" / f"{profiler.value}-{time.strftime('%Y%m%dT%H%M%S')}"


def device_of(profile: Profile, wanted: DeviceName | None) -> str:
    """The device of a site's ranks.

    Raises:
        ValueError: when something else was asked for.
    """
    if wanted is not None and wanted.value != profile.on:
        raise ValueError(f"--device {wanted.value}: the profile has ranks on {profile.on}")
    return profile.on


def settings(
    given: MeasureSettings, launcher: str, transport: Transport | None, interleave: int | None,
    launches: int | None, trace: bool, profiler: ProfilerName | None, profile: Profile | None,
) -> MeasureSettings:  # fmt: skip
    """A sweep's settings with what the command line changes.

    Raises:
        ValueError: for MPI's transport where MPI does not start the ranks.
    """
    if transport is not None:
        given = replace(given, transport=transport.value)
    if interleave is not None:
        given = replace(given, interleave=interleave)
    if launches is not None:
        given = replace(given, launches=launches)
    if trace or profiler is not None:
        given = replace(given, trace=True)
    if profiler is not None:  # what is wanted is the watched pass
        given = replace(given, exposure=False, memory=False, launches=1)
    mpi = launcher == "mpi" or (profile is not None and profile.ranks in ("mpi", "mpiexec"))
    if given.transport == "mpi" and not mpi:
        raise ValueError(
            "transport mpi needs ranks that MPI has started: --launcher mpi, or a Slurm profile "
            'with ranks = "mpi" or "mpiexec"'
        )
    return given


def place(
    launcher: str, nodes: int, hosts: str, interface: str, cases: Sequence[Case]
) -> Callable[[int], Place]:
    """Where the ranks of a world size run, for launchers on machines that are there already.

    Raises:
        ValueError: when ranks do not divide over nodes, or the launcher reaches only one.
    """
    from cpbench.launchers import mpi
    from cpbench.launchers.gang import free_port
    from cpbench.launchers.protocol import Place
    from cpbench.worker.rendezvous import own_address

    names = tuple(filter(None, (name.strip() for name in hosts.split(","))))
    if launcher == "slurm":
        if nodes > 1 or names:
            raise ValueError("--nodes and --hosts are the profile's to say under Slurm")
    elif launcher == "mpi":
        mpi.mpiexec()
        if names and nodes not in (1, len(names)):
            raise ValueError(f"--nodes {nodes}, but --hosts names {len(names)}")
        nodes = len(names) or nodes
        if nodes > 1 and not names:
            raise ValueError("--launcher mpi on several nodes needs --hosts")
    elif names:
        raise ValueError("--hosts is for --launcher mpi; with torchrun, other nodes join by hand")
    elif nodes > 1 and launcher != "torchrun":
        raise ValueError(
            f"--launcher {launcher} is for one machine; torchrun, mpi or slurm for more"
        )

    def of(world_size: int) -> Place:
        several = launcher == "torchrun" and nodes > 1
        address = f"{own_address(interface)}:{free_port()}" if several else "127.0.0.1"
        return Place(nodes=nodes, hosts=names, address=address, interface=interface)

    for world_size in sorted({case.world_size for case in cases}):
        of(world_size).per_node(world_size)
    return of


def show_scripts(request: Request, profile: Profile, as_json: bool) -> int:
    """Print what would be submitted."""
    from cpbench.slurm import batch_script, submission
    from cpbench.slurm.site_profile import seconds
    from cpbench.sweep import runs

    todo, out = runs.remaining(request), request.out.resolve()
    costs = runs.estimator(request)
    made: list[dict[str, Any]] = []
    unit = "gpu_hours" if request.device == "cuda" else "rank_hours"
    for one in submission.plan(request.name, todo, request.settings, profile, out, "STAMP"):
        wall = max(sum(map(costs.seconds, chunk)) for chunk in one.chunks) / 3600
        hours = sum(costs.seconds(case) * case.world_size for case in one.cases) / 3600
        text = batch_script.render(one.batch, profile, out, tuple(submission.bad_nodes(out)))
        made.append(
            {
                "job": one.batch.name, "ranks": one.batch.ranks, "nodes": one.batch.nodes,
                "tasks": one.batch.tasks or 1, "cases": len(one.cases), "hours": wall,
                "limit_hours": seconds(profile.time) / 3600, unit: hours, "script": text,
            }
        )  # fmt: skip
    last = submission.collector(request.name, out, "STAMP")
    scripts = {one["job"]: one["script"] for one in made}
    if made:
        scripts[last.name] = batch_script.render(last, profile, out)
    if as_json:
        told = {"sweep": request.name, "out": str(out), "jobs": made, "scripts": scripts}
        print(json.dumps(told, indent=1))
        return 0
    for name, text in scripts.items():
        print(f"# ==> {out}/slurm/{name}.sbatch\n{text}")
    rows = [{k: v for k, v in one.items() if k != "script"} for one in made]
    figures = ("hours", "limit_hours", unit)
    print_rows([{**row, **{key: f"{row[key]:.2f}" for key in figures}} for row in rows], False)
    total = sum(row[unit] for row in rows)
    print(f"\n{len(todo)} of {len(request.cases)} cases, about {total:.2f} {unit}; "
          f"{costs.words(todo)}")  # fmt: skip
    if any(row["hours"] > row["limit_hours"] for row in rows):
        print("jobs of more hours than their limit stop there; the same command goes on with them")
    return 0


def submit(
    request: Request, profile: Profile, wait: bool, resubmit: int, as_json: bool
) -> int | None:
    """Submit what is left and not in a living job; follow where that is asked for.

    Returns:
        The exit code, or None where there are results to be shown.
    """
    from cpbench.results.store import StoreError
    from cpbench.slurm import client, submission
    from cpbench.slurm.wait import Follower
    from cpbench.sweep import runs

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    out, count, named = request.out, len(request.cases), shlex.quote(str(request.out))
    try:
        todo = runs.remaining(request)
        with submission.locked(out):
            busy = submission.living_cases(out, submission.Board(out).look())
            fresh = runs.feasible(request, [case for case in todo if case.id not in busy])
            made = submission.submit(request, fresh, profile) if fresh else []
        for one in made:
            on = f"ranks: {one.ranks}, nodes: {one.nodes}, cases: {len(one.cases)}"
            say(f"job {one.job}: {one.name}; {on}")
        under_way = sum(case.id in busy for case in todo)
        kept = f"{count - len(todo)} of {count} cases are recorded in {out}"
        say(f"{kept}, {under_way} were in jobs already")
        if not wait:
            say(f"follow with: cpbench status {named}; end with: cpbench cancel {named}")
            if as_json:
                print(json.dumps({"jobs": [one.job for one in made], "out": str(out)}))
            return 0
        Follower(request, profile, resubmit, quiet=as_json).wait()
    except client.SlurmError as error:
        raise UserError(str(error)) from None
    except StoreError as error:
        say(f"cpbench: {error}")
        return 1
    except KeyboardInterrupt:
        say(f"cpbench: the jobs go on; cpbench status {named}, cpbench cancel {named}")
        return 130
    left = len(runs.remaining(request))
    if left:
        say(f"cpbench: {left} of {count} cases have no result; cpbench status {named} says why, "
            "and the same command goes on with them")  # fmt: skip
    return None


def refuse_living(request: Request) -> None:
    """Raise ``ValueError`` where a job of Slurm's is going to do some of the same cases."""
    from cpbench.slurm import client, submission
    from cpbench.sweep import runs

    if not submission.submissions(request.out):
        return
    try:
        living = submission.living_cases(request.out, submission.Board(request.out).look())
    except client.SlurmError as error:
        raise ValueError(
            f"whether jobs are at work on {request.out} is not known: {error}"
        ) from None
    both = [case for case in runs.remaining(request) if case.id in living]
    if both:
        raise ValueError(
            f"{len(both)} of these cases are in jobs; wait for them, or: cpbench cancel "
            f"{shlex.quote(str(request.out))}"
        )


@commands.command()
def status(run_dir: RunFolder, as_json: AsJson = False) -> None:
    """Show how far a run is, and what its jobs wait for."""
    from cpbench.tools import status

    with user_input():
        found = status.of(run_dir)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        status.show(found)


@commands.command()
def cancel(run_dir: RunFolder) -> None:
    """End a run: its jobs, or its processes here.

    What is recorded is kept.
    """
    from cpbench.results import active
    from cpbench.slurm import client, submission

    with user_input():
        if not run_dir.is_dir():
            raise ValueError(f"{run_dir} is no run directory")
        if submission.submissions(run_dir):
            try:
                ended = submission.cancel(run_dir)
            except client.SlurmError as error:
                raise ValueError(str(error)) from None
            print(f"cancelled: {', '.join(ended)}" if ended else "no job is alive")
        there = active.at_work(run_dir)
        for who in there:
            if who.alive:
                who.end()
                _until_gone(who)
                print(f"ended: process {who.pid}")
        far = [f"{who.pid} on {who.host}" for who in there if not who.local]
        if far:
            raise ValueError(f"cancel these where they are: {', '.join(far)}")
        if not there and not submission.submissions(run_dir):
            print("nothing is at work there")


def _until_gone(who: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while who.alive and time.monotonic() < deadline:
        time.sleep(0.1)
    if who.alive:
        raise ValueError(f"process {who.pid} does not end; kill -9 {who.pid}")


@commands.command()
def join(
    run_dir: RunFolder,
    interface: Annotated[
        str, typer.Option(metavar="NAME", help="Network interface of this machine.")
    ] = "",
    patience: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=1, help="Leave after so long without anything to do."),
    ] = 600.0,
) -> int:
    """Lend this machine to a run on several machines.

    Those are started with: cpbench run SWEEP --launcher torchrun --nodes N. Join on every other
    machine, with the same run directory on a shared file system; it leaves with the run.
    """
    from cpbench.launchers import join

    with user_input():
        return join.follow(run_dir, interface, patience)
