"""Questions and orders to Slurm, through its commands: few, and gently.

Jobs in the queue come from one squeue for all; of those that it does not know any more, sacct tells
where there is accounting, else the completion log (``sacct --completion``), else nobody.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpbench.slurm.job_states import FORGOTTEN, JobState

PATIENCE_S = 60.0  # a controller that is busy is asked again later
_SEPARATOR = "\x1f"
_FIELDS = ("%i", "%T", "%r", "%N", "%M", "%l")


class SlurmError(RuntimeError):
    """A command of Slurm's failed, or is not there; the message is one line."""


class Busy(SlurmError):
    """The controller did not answer: ask later."""


def _ask(*words: str) -> str:
    if shutil.which(words[0]) is None:
        raise SlurmError(f"no {words[0]} here: run this where Slurm's commands are")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise Busy(f"{words[0]} did not answer within {PATIENCE_S:.0f} s") from None
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())
        kind = (
            Busy if re.search(r"timed out|Unable to contact|refused|temporar", text) else SlurmError
        )
        raise kind(f"{words[0]}: {text or f'exit code {done.returncode}'}")
    return done.stdout


def submit(script: Path) -> str:
    """Submit a script; the id of the job.

    Raises:
        SlurmError: when Slurm refuses it, in its words.
    """
    return _ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are passed over."""
    if jobs:
        _ask("scancel", "--quiet", *jobs)


def hosts(nodelist: str) -> list[str]:
    """``"n[1-3]"`` as names."""
    return _ask("scontrol", "show", "hostnames", nodelist).split()


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """Every job, tasks of arrays one by one (``12_0``), in as few calls as there are.

    Raises:
        Busy: when the controller does not answer.
    """
    wanted = list(jobs)
    if not wanted:
        return {}
    found = _from_queue(wanted)
    gone = [job for job in wanted if not any(_belongs(key, job) for key in found)]
    for source in (("sacct",), ("sacct", "--completion")):
        if gone:
            found |= _from_accounting(source, gone)
            gone = [job for job in gone if not any(_belongs(key, job) for key in found)]
    return found | {job: JobState(job, FORGOTTEN) for job in gone}


def _belongs(key: str, job: str) -> bool:
    """Whether an id is of a job: itself, or a task of its array."""
    return key == job or key.partition("_")[0] == job


def _from_queue(jobs: Sequence[str]) -> dict[str, JobState]:
    words = _SEPARATOR.join(_FIELDS)
    try:
        text = _ask(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}",
            f"--format={words}",
        )  # fmt: skip
    except Busy:
        raise
    except SlurmError as error:
        if "Invalid job id" in str(error):  # the only one asked for is gone
            return {}
        raise
    found = {}
    for line in text.splitlines():
        job, state, reason, nodes, elapsed, limit = line.split(_SEPARATOR)
        code = None
        known = JobState(job, state, reason, nodes, elapsed, limit)
        if not known.alive:
            code = _exit_code(job)
        found[job] = JobState(job, state, reason, nodes, elapsed, limit, code)
    return found


def _exit_code(job: str) -> int | None:
    try:
        text = _ask("scontrol", "show", "job", "--oneliner", job)
    except SlurmError:
        return None
    code = re.search(r"\bExitCode=(\d+):(\d+)", text)
    return int(code[1]) if code else None


def _from_accounting(source: Sequence[str], jobs: Sequence[str]) -> dict[str, JobState]:
    """What is on record of jobs that have left the queue; nothing where nothing is kept."""
    completion = len(source) > 1
    columns = "JobID,State,NodeList" if completion else "JobID,State,NodeList,Elapsed,ExitCode"
    try:
        text = _ask(
            *source, "--noheader", "--parsable2", f"--jobs={','.join(jobs)}",
            f"--format={columns}", *(() if completion else ("--allocations",)),
        )  # fmt: skip
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        job, state, nodes, *rest = line.split("|")
        if not any(_belongs(job, wanted) for wanted in jobs):
            continue  # a step, or another cluster's
        elapsed = rest[0] if rest else ""
        code = int(rest[1].partition(":")[0]) if len(rest) > 1 else None
        found[job] = JobState(job, state.split()[0], "", nodes, elapsed, "", code)
    return found
