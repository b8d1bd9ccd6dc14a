"""Slurm jobs of a sweep: planning, submission and states, from any shell at any time.

Submitted jobs are listed in ``OUT/slurm/submissions.jsonl``; their progress comes from Slurm and
the records.  A case is in at most one live job.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import re
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.launchers.supervisor import group_by_world_size
from cpbench.results.sealed import seal
from cpbench.results.store import (
    JsonLinesWriter,
    StoreError,
    Tail,
    last_sequence,
    read_document,
    read_lines,
    write_atomically,
)
from cpbench.slurm import batch_script, client
from cpbench.slurm.batch_script import BatchJob
from cpbench.slurm.job_states import JobState
from cpbench.slurm.job_step import LOG_PREFIX, JobSpec, profile_table
from cpbench.slurm.site_profile import Profile
from cpbench.sweep import estimate
from cpbench.sweep.request import Request, write_sweep_json

REPORT_MINUTES = 15
MAX_NAME_LENGTH = 40


@dataclass(frozen=True)
class PlannedJob:
    """A job to submit: the contents of its script, and the cases of each task."""

    batch: BatchJob
    chunks: list[list[Case]]

    @property
    def cases(self) -> list[Case]:
        return [case for chunk in self.chunks for case in chunk]


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job: its id, name, ids of its cases (none for the report), ranks and nodes."""

    job: str
    name: str
    cases: tuple[str, ...]
    ranks: int
    nodes: int


def slurm_folder(out: Path) -> Path:
    """Folder of the scripts, logs and job files in a run directory."""
    return out / "slurm"


def plan_jobs(
    name: str, cases: Sequence[Case], settings: MeasureSettings, profile: Profile, out: Path,
    stamp: str, max_tasks: int | None = None,
) -> list[PlannedJob]:  # fmt: skip
    """The jobs for cases, smallest world size first.

    Args:
        name: of the sweep.
        out: run directory, absolute.
        stamp: part of the file names, so that no submission overwrites the files of another.
        max_tasks: of an array; larger ones are split into several jobs.
    """
    title = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:MAX_NAME_LENGTH]
    jobs: list[PlannedJob] = []
    estimates = estimate.Estimator(profile.rank_device, settings, [out])
    turns = estimates.turns(cases)
    cases = estimate.order_cases(cases, estimates, turns)
    for group in _group_cases(cases, profile):
        max_ranks = max(case.world_size for case in group)
        job_name = f"{title}-{'all' if profile.packing == 'one' else f'p{max_ranks}'}-{stamp}"
        is_array = profile.packing == "array"
        chunks = _split_chunks(group, profile.chunk, turns) if is_array else [list(group)]
        nodes = max(profile.node_count(case.world_size) for case in group) + profile.spare_nodes
        parts = list(_parts(chunks, max_tasks or len(chunks)))
        for number, part in enumerate(parts, start=1):
            part_name = f"{job_name}-{number}of{len(parts)}" if len(parts) > 1 else job_name
            batch = BatchJob(
                name=part_name, nodes=nodes, ranks=max_ranks, tasks=len(part) if is_array else 0,
                command=batch_script.step_command(slurm_folder(out) / f"{part_name}.json"),
                after=profile.chain and bool(jobs),
            )  # fmt: skip
            jobs.append(PlannedJob(batch, part))
    return jobs


def _parts(chunks: list[list[Case]], most: int) -> Iterator[list[list[Case]]]:
    for start in range(0, len(chunks), most):
        yield chunks[start : start + most]


def _split_chunks(
    cases: Sequence[Case], chunk_size: int, turns: Collection[str]
) -> list[list[Case]]:
    """Cases of each task of an array, ``chunk_size`` per task; cases that are measured in turn
    (ids) stay in one task, so that some tasks have more."""

    def key(case: Case) -> object:
        return case.problem_key if case.id in turns else case.id

    chunks: list[list[Case]] = []
    for _, group in itertools.groupby(cases, key):
        if not chunks or len(chunks[-1]) >= chunk_size:
            chunks.append([])
        chunks[-1] += group
    return chunks


def _group_cases(cases: Sequence[Case], profile: Profile) -> list[list[Case]]:
    """Cases by job: those of each world size, or all of them in one job."""
    groups = group_by_world_size(cases)
    if profile.packing == "one":
        return [[case for group in groups for case in group]]
    return groups


def report_job(name: str, out: Path, stamp: str) -> BatchJob:
    """The last job, which writes the report once all other jobs have ended."""
    title = re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:MAX_NAME_LENGTH]
    return BatchJob(
        name=f"{title}-report-{stamp}", nodes=1, ranks=0, command=batch_script.report_command(out),
        after=True, minutes=REPORT_MINUTES,
    )  # fmt: skip


def submit(request: Request, cases: Sequence[Case], profile: Profile) -> list[SubmittedJob]:
    """Write the scripts of the jobs of cases, and submit them.

    Raises:
        SlurmError: when Slurm refuses a job; the jobs before it are submitted.
        StoreError: when the run directory cannot be written.
    """
    out = request.out.resolve()
    stamp = f"{time.strftime('%m%dT%H%M%S')}-{secrets.token_hex(2)}"
    write_sweep_json(request)
    submitted: list[SubmittedJob] = []
    limit = max_tasks(profile)
    for job in plan_jobs(request.name, cases, request.settings, profile, out, stamp, limit):
        spec = JobSpec(
            out, request.name, job.chunks, request.settings, profile_table(profile),
            tuple(sorted(request.retry)), min(request.since, last_sequence(out)),
            request.remeasure,
        )  # fmt: skip
        path = slurm_folder(out) / f"{job.batch.name}.json"
        _write(path, seal(json.dumps(spec.to_json())))
        submitted.append(_submit_job(job.batch, job.cases, profile, out, submitted[-1:]))
    _submit_job(report_job(request.name, out, stamp), [], profile, out, submitted)
    return submitted


def max_tasks(profile: Profile) -> int | None:
    """The limit of the site on tasks of an array, for a profile that has arrays."""
    return client.max_array_tasks() if profile.packing == "array" else None


def describe_split(names: Sequence[str], profile: Profile) -> str:
    """Why an array was split into several jobs, if one of these names says so; else empty."""
    if not any(re.search(r"-1of\d+$", name) for name in names):
        return ""
    return f"arrays are split at {max_tasks(profile)} tasks, the MaxArraySize of this site"


def _submit_job(
    batch: BatchJob,
    cases: Sequence[Case],
    profile: Profile,
    out: Path,
    after: Sequence[SubmittedJob],
) -> SubmittedJob:
    """Write one script and submit it, to run after other jobs if its batch says so."""
    dependencies = ":".join(job.job for job in after)
    script = batch_script.render_script(
        batch, profile, out, tuple(bad_nodes(out)), after=dependencies
    )
    path = slurm_folder(out) / f"{batch.name}.sbatch"
    _write(path, script)
    job_id = client.submit(path)
    case_ids = tuple(case.id for case in cases)
    job = SubmittedJob(job_id, batch.name, case_ids, batch.ranks, batch.nodes)
    with JsonLinesWriter(slurm_folder(out) / "submissions.jsonl", sync=True) as lines:
        lines.append({**vars(job), "cases": list(job.cases), "time": time.time()})
    return job


def _write(path: Path, content: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error


def submitted_jobs(out: Path) -> list[SubmittedJob]:
    """All jobs that were submitted for a run directory, in order."""
    jobs = []
    for table in Tail(slurm_folder(out) / "submissions.jsonl").read():
        with suppress(KeyError, TypeError):
            jobs.append(
                SubmittedJob(
                    str(table["job"]), table["name"], tuple(table["cases"]), table["ranks"],
                    table["nodes"],
                )
            )  # fmt: skip
    return jobs


def bad_nodes(out: Path) -> dict[str, str]:
    """Why nodes failed the check of a job, by host name."""
    path = slurm_folder(out) / "bad_nodes.jsonl"
    if not path.exists():
        return {}
    nodes = {}
    for _, table in read_lines(path, []):
        with suppress(KeyError):
            nodes[str(table["node"])] = str(table["why"])
    return nodes


class JobTracker:
    """States of all jobs of a run directory; Slurm is queried only for jobs that have not ended.

    Attributes:
        final_states: states of jobs and tasks that have ended, by id.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.final_states: dict[str, JobState] = {}
        self._path = slurm_folder(out) / "ends.jsonl"
        for table in Tail(self._path).read():
            with suppress(KeyError, TypeError):
                self.final_states[table["job"]] = JobState(**table)

    def query(self) -> dict[str, JobState]:
        """The current states by id of the job, or of the task of an array.

        Raises:
            ControllerBusy: when the controller does not respond.
        """
        jobs = submitted_jobs(self.out)
        states = client.query_states(job.job for job in jobs if not self._has_ended(job))
        for job_id, state in states.items():
            if not state.alive:
                self._store_final_state(job_id, state)
        return {**self.final_states, **states}

    def _has_ended(self, job: SubmittedJob) -> bool:
        """Whether a job has ended, or every task of its array has."""
        if job.job in self.final_states:
            return True
        ended = [job_id for job_id in self.final_states if job_id.startswith(f"{job.job}_")]
        return bool(ended) and len(ended) >= self._task_count(job)

    def _task_count(self, job: SubmittedJob) -> int:
        with suppress(OSError, ValueError, KeyError):
            path = slurm_folder(self.out) / f"{job.name}.json"
            return len(read_document(path)["chunks"])
        return 1

    def _store_final_state(self, job_id: str, state: JobState) -> None:
        self.final_states[job_id] = state
        with suppress(StoreError), JsonLinesWriter(self._path, sync=False) as lines:
            lines.append(vars(state))


@contextmanager
def submission_lock(out: Path) -> Iterator[None]:
    """A lock to hold while querying live jobs and submitting others, so that two shells at once do
    not submit the same cases.

    Raises:
        StoreError: when the run directory cannot be written.
    """
    try:
        slurm_folder(out).mkdir(parents=True, exist_ok=True)
        file = open(slurm_folder(out) / "lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"cannot write results to {out}: {error.strerror}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def task_states(job: SubmittedJob, states: dict[str, JobState]) -> list[JobState]:
    """The state of a job, or the states of the tasks of its array."""
    return [state for job_id, state in states.items() if client.is_task_of(job_id, job.job)]


def cases_in_live_jobs(out: Path, states: dict[str, JobState]) -> set[str]:
    """Ids of the cases of jobs that have not ended, held jobs included, which may be released."""
    case_ids: set[str] = set()
    for job in submitted_jobs(out):
        if any(state.alive for state in task_states(job, states)):
            case_ids.update(job.cases)
    return case_ids


def job_state(job: SubmittedJob, states: dict[str, JobState]) -> JobState | None:
    """One state of a job; of an array, that of a running task, else of a live one, else of one that
    has not completed."""
    tasks = task_states(job, states)
    if not tasks:
        return None
    alive = [state for state in tasks if state.alive]
    running = [state for state in alive if state.state == "RUNNING"]
    incomplete = [state for state in tasks if state.state != "COMPLETED"]
    state = (running or alive or incomplete or tasks)[0]
    return replace(state, job=job.job) if len(tasks) > 1 else state


def last_message(out: Path, job: SubmittedJob) -> str:
    """The last message of cpbench in the logs of a job, without its prefix; "" if there is none."""
    messages = []
    for log in sorted(slurm_folder(out).glob(f"{job.name}-{job.job}*.log")):
        lines = log.read_text("utf-8", errors="replace").splitlines()
        messages += [line for line in lines if line.startswith(LOG_PREFIX)]
    return messages[-1].removeprefix(LOG_PREFIX) if messages else ""


def cancel(out: Path) -> list[str]:
    """Cancel all jobs that have not ended; their ids."""
    states = JobTracker(out).query()
    job_ids = [
        job.job for job in submitted_jobs(out) if (state := job_state(job, states)) and state.alive
    ]
    client.cancel(job_ids)
    return job_ids


def job_rows(out: Path, states: dict[str, JobState], recorded: set[str]) -> list[dict[str, Any]]:
    """One row per job, for ``cpbench status``.

    Args:
        recorded: ids of the recorded cases.
    """
    rows = []
    for job in submitted_jobs(out):
        state = job_state(job, states)
        rows.append(
            {
                "job": job.job,
                "name": job.name,
                "ranks": job.ranks or "",
                "cases": f"{len(recorded & set(job.cases))}/{len(job.cases)}" if job.cases else "",
                "state": state.state if state else "",
                "nodes": state.nodes if state else "",
                "time": "/".join(filter(None, (state.elapsed, state.limit))) if state else "",
                "meaning": state.description if state else "",
                "message": last_message(out, job) if state and state.failed else "",
            }
        )
    return rows
