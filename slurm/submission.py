"""A sweep as jobs of Slurm: planned, submitted, followed, from any shell and on any day.

What was submitted is kept in ``OUT/slurm/submissions.jsonl``; the rest is asked of Slurm and of the
records.  A case is in one living job at most.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers.supervisor import gangs
from cpbench.results.store import Lines, StoreError, Tail, read_lines, write_whole
from cpbench.slurm import batch_script, client
from cpbench.slurm.batch_script import Batch
from cpbench.slurm.job_states import JobState
from cpbench.slurm.job_step import Spec, profile_table
from cpbench.slurm.site_profile import Profile
from cpbench.sweep import estimate, runs

COLLECT_MINUTES = 15
NAME_CHARS = 40


@dataclass(frozen=True)
class Planned:
    """One job to be: its script's contents, and the cases of each task."""

    batch: Batch
    chunks: list[list[Case]]

    @property
    def cases(self) -> list[Case]:
        return [case for chunk in self.chunks for case in chunk]


@dataclass(frozen=True)
class Submitted:
    """One job that was: id, name, ids of its cases, ranks and nodes; no cases for the last step."""

    job: str
    name: str
    cases: tuple[str, ...]
    ranks: int
    nodes: int


def folder(out: Path) -> Path:
    return out / "slurm"


def plan(
    name: str, cases: Sequence[Case], settings: MeasureSettings, profile: Profile, out: Path,
    stamp: str,
) -> list[Planned]:  # fmt: skip
    """The jobs for some cases, the largest last.

    Args:
        name: of the sweep.
        out: run directory, absolute.
        stamp: goes into the names of files, so that no submission overwrites another's.
    """
    title = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:NAME_CHARS]
    made: list[Planned] = []
    estimates = estimate.Estimator(profile.on, settings, [out])
    cases = estimate.ordered(cases, estimates, settings.interleave > 1)
    for group in _packed(cases, profile):
        size = max(case.world_size for case in group)
        job = f"{title}-{'all' if profile.packing == 'one' else f'p{size}'}-{stamp}"
        chunks = [list(group)]
        if profile.packing == "array":
            chunks = _chunks(group, profile.chunk, together=settings.interleave > 1)
        nodes = max(profile.nodes_of(case.world_size) for case in group) + profile.spare_nodes
        command = batch_script.step_command(folder(out) / f"{job}.json")
        tasks = len(chunks) if profile.packing == "array" else 0
        made.append(
            Planned(
                Batch(
                    name=job, nodes=nodes, ranks=size, command=command, tasks=tasks,
                    after=profile.chain and bool(made),
                ),
                chunks,
            )
        )  # fmt: skip
    return made


def _chunks(cases: Sequence[Case], most: int, together: bool) -> list[list[Case]]:
    """Cases for the tasks of an array, ``most`` each; those that are measured in turn stay
    together, so that some have more."""
    if not together:
        return [list(cases[i : i + most]) for i in range(0, len(cases), most)]
    chunks: list[list[Case]] = []
    for _, group in itertools.groupby(cases, lambda case: case.problem_key):
        if not chunks or len(chunks[-1]) >= most:
            chunks.append([])
        chunks[-1] += group
    return chunks


def _packed(cases: Sequence[Case], profile: Profile) -> list[list[Case]]:
    by_size = gangs(cases)
    return [[c for group in by_size for c in group]] if profile.packing == "one" else by_size


def collector(name: str, out: Path, stamp: str) -> Batch:
    """The last step: the report, once every job has ended."""
    title = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:NAME_CHARS]
    return Batch(
        name=f"{title}-report-{stamp}", nodes=1, ranks=0, command=batch_script.collect_command(out),
        after=True, minutes=COLLECT_MINUTES,
    )  # fmt: skip


def submit(request: runs.Request, cases: Sequence[Case], profile: Profile) -> list[Submitted]:
    """Write the scripts of some cases and submit them.

    Raises:
        SlurmError: when Slurm refuses one; those before it are on record.
        StoreError: when the run directory cannot be written.
    """
    out = request.out.resolve()
    stamp = f"{time.strftime('%m%dT%H%M%S')}-{secrets.token_hex(2)}"
    runs.note_down(request)
    planned = plan(request.name, cases, request.settings, profile, out, stamp)
    done: list[Submitted] = []
    for one in planned:
        spec = Spec(
            out, request.name, one.chunks, request.settings, profile_table(profile),
            tuple(sorted(request.retry)), min(request.since, time.time()),
        )  # fmt: skip
        path = folder(out) / f"{one.batch.name}.json"
        _write(path, json.dumps(spec.to_json()))
        done.append(_submit(one.batch, one.cases, profile, out, done[-1:]))
    _submit(collector(request.name, out, stamp), [], profile, out, done)
    return done


def _submit(
    batch: Batch, cases: Sequence[Case], profile: Profile, out: Path, after: Sequence[Submitted]
) -> Submitted:
    text = batch_script.render(
        batch, profile, out, tuple(bad_nodes(out)), after=":".join(one.job for one in after)
    )
    path = folder(out) / f"{batch.name}.sbatch"
    _write(path, text)
    job = client.submit(path)
    made = Submitted(job, batch.name, tuple(c.id for c in cases), batch.ranks, batch.nodes)
    with Lines(folder(out) / "submissions.jsonl", sync=True) as lines:
        lines.append({**vars(made), "cases": list(made.cases), "time": time.time()})
    return made


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def submissions(out: Path) -> list[Submitted]:
    """All jobs that were ever submitted for a run directory, in order."""
    found = []
    for table in Tail(folder(out) / "submissions.jsonl").read():
        with suppress(KeyError, TypeError):
            found.append(
                Submitted(
                    str(table["job"]), table["name"], tuple(table["cases"]), table["ranks"],
                    table["nodes"],
                )
            )  # fmt: skip
    return found


def bad_nodes(out: Path) -> dict[str, str]:
    """Nodes that a check has found wanting, and why."""
    path = folder(out) / "bad_nodes.jsonl"
    if not path.exists():
        return {}
    return {table["node"]: table["why"] for _, table in read_lines(path, [])}


class Board:
    """The states of all jobs of a run directory, asked of Slurm when wanted, those that have ended
    only once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.ends: dict[str, JobState] = {}
        self._path = folder(out) / "ends.jsonl"
        for table in Tail(self._path).read():
            with suppress(TypeError):
                self.ends[table["job"]] = JobState(**table)

    def look(self) -> dict[str, JobState]:
        """By id of the job or of the array's task.

        Raises:
            Busy: when the controller does not answer.
        """
        jobs = [one.job for one in submissions(self.out)]
        over = {job for job in jobs if self._is_over(job)}
        fresh = client.states(job for job in jobs if job not in over)
        for key, state in fresh.items():
            if not state.alive:
                self._keep(key, state)
        return {**self.ends, **fresh}

    def _is_over(self, job: str) -> bool:
        """Whether nothing of a job can live: it has ended, or every task of its array has."""
        if job in self.ends:
            return True
        tasks = next(one for one in submissions(self.out) if one.job == job)
        ended = [key for key in self.ends if key.startswith(f"{job}_")]
        return bool(ended) and len(ended) >= self._tasks(tasks)

    def _tasks(self, one: Submitted) -> int:
        with suppress(OSError, ValueError, KeyError):
            return len(json.loads((folder(self.out) / f"{one.name}.json").read_text())["chunks"])
        return 1

    def _keep(self, key: str, state: JobState) -> None:
        self.ends[key] = state
        with suppress(StoreError), Lines(self._path, sync=False) as lines:
            lines.append(vars(state))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Held from looking at what lives until the rest is submitted, so that two shells at once do
    not submit the same.

    Raises:
        StoreError: when the run directory cannot be written.
    """
    try:
        folder(out).mkdir(parents=True, exist_ok=True)
        file = open(folder(out) / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"cannot write results to {out}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def of_tasks(one: Submitted, states: dict[str, JobState]) -> list[JobState]:
    """The states of a job, or of each task of its array."""
    return [s for key, s in states.items() if key == one.job or key.startswith(f"{one.job}_")]


def living_cases(out: Path, states: dict[str, JobState]) -> set[str]:
    """Cases that a job which has not ended may do: held ones too, since they may be released."""
    found: set[str] = set()
    for one in submissions(out):
        if any(state.alive for state in of_tasks(one, states)):
            found.update(one.cases)
    return found


def of_job(one: Submitted, states: dict[str, JobState]) -> JobState | None:
    """A job in one state: of an array, a task that runs, else one that lives, else a bad end."""
    mine = of_tasks(one, states)
    if not mine:
        return None
    alive = [state for state in mine if state.alive]
    running = [state for state in alive if state.state == "RUNNING"]
    worst = [state for state in mine if state.state != "COMPLETED"]
    chosen = (running or alive or worst or mine)[0]
    return replace(chosen, job=one.job) if len(mine) > 1 else chosen


def cancel(out: Path) -> list[str]:
    """Cancel every job that has not ended; their ids."""
    states = Board(out).look()
    alive = [one.job for one in submissions(out) if (state := of_job(one, states)) and state.alive]
    client.cancel(alive)
    return alive


def table(out: Path, states: dict[str, JobState], recorded: set[str]) -> list[dict[str, Any]]:
    """A row for each job."""
    rows = []
    for one in submissions(out):
        state = of_job(one, states)
        rows.append(
            {
                "job": one.job,
                "name": one.name,
                "ranks": one.ranks or "",
                "cases": f"{len(recorded & set(one.cases))}/{len(one.cases)}" if one.cases else "",
                "state": state.state if state else "",
                "nodes": state.nodes if state else "",
                "time": "/".join(filter(None, (state.elapsed, state.limit))) if state else "",
                "meaning": state.words if state else "",
            }
        )
    return rows
