"""Slurm's commands: submit and cancel jobs, query their states with few requests.

One squeue gives the states of all jobs in the queue; those that have left it are looked up with
sacct, then in the completion log (``sacct --completion``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cpbench.slurm.job_states import FORGOTTEN, JobState

COMMAND_TIMEOUT_S = 60.0  # then the controller is busy, and the command is tried again later
_SEPARATOR = "\x1f"
_FIELDS = ("%i", "%T", "%r", "%N", "%M", "%l")


class SlurmError(RuntimeError):
    """A Slurm command failed or is not installed; the message is one line."""


class ControllerBusy(SlurmError):
    """The controller did not respond; try again later."""


def _run(command: str, *arguments: str) -> str:
    """Run a Slurm command; its standard output."""
    if shutil.which(command) is None:
        raise SlurmError(f"{command} not found: run this on a host with Slurm's commands")
    try:
        result = subprocess.run(
            (command, *arguments),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ControllerBusy(
            f"{command} did not respond within {COMMAND_TIMEOUT_S:.0f} s"
        ) from None
    if result.returncode:
        message = " ".join((result.stderr or result.stdout).split())
        busy = re.search(r"timed out|Unable to contact|refused|temporar", message)
        error_type = ControllerBusy if busy else SlurmError
        raise error_type(f"{command}: {message or f'exit code {result.returncode}'}")
    return result.stdout


def submit(script: Path) -> str:
    """Submit a script; the id of the job.

    Raises:
        SlurmError: when Slurm refuses it, with Slurm's message.
    """
    return _run("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are ignored."""
    if jobs:
        _run("scancel", "--quiet", *jobs)


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a node list such as ``"n[1-3]"``."""
    return _run("scontrol", "show", "hostnames", nodelist).split()


def max_array_tasks() -> int | None:
    """The largest number of tasks of an array that the site allows (MaxArraySize), if it says."""
    try:
        text = _run("scontrol", "show", "config")
    except SlurmError:
        return None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found and int(found[1]) > 0 else None


def query_states(jobs: Iterable[str]) -> dict[str, JobState]:
    """The states of jobs by id; those of an array are the states of its tasks (``12_0``).

    Raises:
        ControllerBusy: when the controller does not respond.
    """
    requested = list(jobs)
    if not requested:
        return {}
    states = _from_queue(requested)
    missing = _without_state(requested, states)
    for source in (("sacct",), ("sacct", "--completion")):
        if missing:
            states |= _from_accounting(source, missing)
            missing = _without_state(missing, states)
    return states | {job: JobState(job, FORGOTTEN) for job in missing}


def _without_state(jobs: Sequence[str], states: Iterable[str]) -> list[str]:
    """Jobs without a state, of their own or of a task."""
    return [job for job in jobs if not any(is_task_of(job_id, job) for job_id in states)]


def is_task_of(job_id: str, job: str) -> bool:
    """Whether an id is that of a job, or of a task of its array."""
    return job_id == job or job_id.partition("_")[0] == job


def _from_queue(jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of jobs in the queue, and of those that left it recently."""
    try:
        output = _run(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}",
            f"--format={_SEPARATOR.join(_FIELDS)}",
        )  # fmt: skip
    except ControllerBusy:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):  # a single job that has left the queue
            return {}
        raise
    states = {}
    for line in output.splitlines():
        job, name, reason, nodes, elapsed, limit = line.split(_SEPARATOR)
        state = JobState(job, name, reason, nodes, elapsed, limit)
        states[job] = state if state.alive else replace(state, code=_exit_code(job))
    return states


def _exit_code(job: str) -> int | None:
    """The exit code of a job that has ended; None if unknown."""
    try:
        output = _run("scontrol", "show", "job", "--oneliner", job)
    except SlurmError:
        return None
    match = re.search(r"\bExitCode=(\d+):(\d+)", output)
    return int(match[1]) if match else None


def _from_accounting(source: Sequence[str], jobs: Sequence[str]) -> dict[str, JobState]:
    """The states of jobs that have left the queue, as far as the cluster records them.

    Args:
        source: ``("sacct",)`` or ``("sacct", "--completion")``.
    """
    completion = len(source) > 1
    columns = "JobID,State,NodeList" if completion else "JobID,State,NodeList,Elapsed,ExitCode"
    try:
        output = _run(
            *source, "--noheader", "--parsable2", f"--jobs={','.join(jobs)}",
            f"--format={columns}", *(() if completion else ("--allocations",)),
        )  # fmt: skip
    except SlurmError:
        return {}
    states = {}
    for line in output.splitlines():
        job_id, state, nodes, *rest = line.split("|")
        if not any(is_task_of(job_id, job) for job in jobs):
            continue  # a job step, or a job of another cluster
        elapsed = rest[0] if rest else ""
        code = int(rest[1].partition(":")[0]) if len(rest) > 1 else None
        states[job_id] = JobState(job_id, state.split()[0], "", nodes, elapsed, "", code)
    return states
