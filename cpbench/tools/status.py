"""Progress of a run, for ``cpbench status``."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpbench.core.problem import Case
from cpbench.launchers.failure_cause import RankState
from cpbench.reports.tables.terminal import print_rows
from cpbench.results import active
from cpbench.results.damage import damaged_files
from cpbench.results.record import UNFINISHED
from cpbench.results.recorded_command import resuming_command
from cpbench.results.sealed import DamagedError
from cpbench.results.store import read_document, read_run
from cpbench.slurm import submission
from cpbench.slurm.client import SlurmError

MAX_JOURNAL_AGE_S = 24 * 3600.0  # older journals are not of a running case


def read_status(out: Path) -> dict[str, Any]:
    """The progress of a run: what ``cpbench status --json`` prints.

    Raises:
        ValueError: if ``out`` is not a run directory.
    """
    path = out / "sweep.json"
    try:
        request = read_document(path)
        cases = {table["id"]: Case.from_json(table) for table in request["cases"]}
    except OSError:
        raise ValueError(f"{out} is not a run directory: it has no sweep.json") from None
    except (KeyError, TypeError, ValueError) as error:
        damage = error if isinstance(error, DamagedError) else f"{path} is damaged: {error!r}"
        raise ValueError(f"{damage}; repeat the command that started the run") from None
    run = read_run(out)
    run.warnings += damaged_files(out)
    records = {
        key: record
        for key, record in run.records.items()
        if key in cases and UNFINISHED not in record.flags
    }
    processes = active.active_processes(out)
    jobs: list[dict[str, Any]] = []
    states = {}
    if submission.submitted_jobs(out):
        tracker = submission.JobTracker(out)
        try:
            states = tracker.query()
        except SlurmError as error:  # show the states that are known without Slurm
            run.warnings.append(f"job states may be outdated: {error}")
            states = tracker.final_states
        jobs = submission.job_rows(out, states, set(records))
    alive = any(process.alive for process in processes) or any(
        state.alive for state in states.values()
    )
    return {
        "out": str(out),
        "sweep": request.get("name"),
        "launcher": request.get("launcher"),
        "cases": len(cases),
        "recorded": len(records),
        "statuses": dict(Counter(record.status for record in records.values())),
        "jobs": jobs,
        "bad_nodes": submission.bad_nodes(out),
        "processes": [{"host": p.host, "pid": p.pid, "alive": p.alive} for p in processes],
        "alive": alive,
        "under_way": _running_cases(out, cases, set(records)) if alive else [],
        "warnings": run.warnings,
    }


def _running_cases(out: Path, cases: dict[str, Case], recorded: set[str]) -> list[dict[str, Any]]:
    """The case and phase of rank 0 of each gang, and for how many seconds."""
    running = []
    for journal in sorted((out / "jobs").glob("*/rank0.jsonl")):
        with suppress(OSError):
            if time.time() - journal.stat().st_mtime > MAX_JOURNAL_AGE_S:
                continue
        rank = RankState(0, journal)
        rank.read_journal()
        if rank.finished or rank.failure or rank.case is None or rank.case in recorded:
            continue
        if (journal.parent / "over").exists() or rank.case not in cases:
            continue
        case = cases[rank.case]
        running.append(
            {"case": case.label, "phase": rank.phase, "seconds": time.time() - rank.case_started}
        )
    return running


def print_status(status: dict[str, Any]) -> None:
    """Print the progress of a run, as :func:`read_status` returns it."""
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status["statuses"].items()))
    print(f"{status['recorded']} of {status['cases']} cases are recorded in {status['out']}"
          f"{': ' if counts else ''}{counts}")  # fmt: skip
    for node, reason in status["bad_nodes"].items():
        print(f"node {node} is excluded: {reason}")
    if status["jobs"]:
        print()
        print_rows(
            [{key: job[key] for key in job if key != "message"} for job in status["jobs"]], False
        )
        for job in status["jobs"]:
            if job["message"]:
                print(f"job {job['job']}: {job['message']}")
    for process in status["processes"]:
        state = "is running" if process["alive"] else "has ended unexpectedly"
        print(f"process {process['pid']} on {process['host']} {state}")
    for case in status["under_way"]:
        print(f"running for {case['seconds']:.0f} s ({case['phase']}): {case['case']}")
    unknown = any(not job["state"] for job in status["jobs"])
    if not status["alive"] and not unknown and status["recorded"] < status["cases"]:
        command = resuming_command(Path(status["out"]))
        where = "in the folder where it was started, run: " if command else "rerun the same command"
        print(f"not running; to resume, {where}{command}")
    for warning in status["warnings"]:
        print(f"warning: {warning}")
