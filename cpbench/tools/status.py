"""How far a run is: what ``cpbench status`` says."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpbench.core.problem import Case
from cpbench.launchers.failure_cause import Rank
from cpbench.reports.tables.terminal import print_rows
from cpbench.results import active
from cpbench.results.store import read_run
from cpbench.slurm import submission
from cpbench.slurm.client import SlurmError

FRESH_S = 24 * 3600.0  # a journal that has been silent for longer tells of nothing under way


def of(out: Path) -> dict[str, Any]:
    """Plain values.

    Raises:
        ValueError: when there is no run.
    """
    try:
        asked = json.loads((out / "sweep.json").read_text())
        cases = {one["id"]: Case.from_json(one) for one in asked["cases"]}
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{out} is not a run directory: it has no sweep.json") from None
    run = read_run(out)
    records = {key: record for key, record in run.records.items() if key in cases}
    there = active.at_work(out)
    jobs: list[dict[str, Any]] = []
    states = {}
    if submission.submissions(out):
        board = submission.Board(out)
        try:
            states = board.look()
        except SlurmError as error:  # what is known without asking is worth telling
            run.warnings.append(f"jobs are as last seen: {error}")
            states = board.ends
        jobs = submission.table(out, states, set(records))
    alive = any(who.alive is not False for who in there) or any(s.alive for s in states.values())
    return {
        "out": str(out),
        "sweep": asked.get("name"),
        "launcher": asked.get("launcher"),
        "cases": len(cases),
        "recorded": len(records),
        "statuses": dict(Counter(record.status for record in records.values())),
        "jobs": jobs,
        "bad_nodes": submission.bad_nodes(out),
        "processes": [{"host": w.host, "pid": w.pid, "alive": w.alive} for w in there],
        "alive": alive,
        "under_way": _under_way(out, cases, set(records)) if alive else [],
        "warnings": run.warnings,
    }


def _under_way(out: Path, cases: dict[str, Case], recorded: set[str]) -> list[dict[str, Any]]:
    """What rank 0 of each gang is at, and since when."""
    found = []
    for journal in sorted((out / "jobs").glob("*/rank0.jsonl")):
        with suppress(OSError):
            if time.time() - journal.stat().st_mtime > FRESH_S:
                continue
        rank = Rank(0, journal)
        rank.catch_up()
        if rank.ended or rank.words or rank.case is None or rank.case in recorded:
            continue
        if (journal.parent / "over").exists() or rank.case not in cases:
            continue
        case = cases[rank.case]
        found.append({"case": case.label, "phase": rank.phase, "seconds": time.time() - rank.since})
    return found


def show(found: dict[str, Any]) -> None:
    """For people."""
    told = ", ".join(f"{count} {status}" for status, count in sorted(found["statuses"].items()))
    print(f"{found['recorded']} of {found['cases']} cases are recorded in {found['out']}"
          f"{': ' if told else ''}{told}")  # fmt: skip
    for node, why in found["bad_nodes"].items():
        print(f"node {node} is left out: {why}")
    if found["jobs"]:
        print()
        print_rows(found["jobs"], False)
    for who in found["processes"]:
        state = {True: "is at work", False: "was at work and is gone", None: "may be at work"}
        print(f"process {who['pid']} on {who['host']} {state[who['alive']]}")
    for one in found["under_way"]:
        print(f"under way for {one['seconds']:.0f} s ({one['phase']}): {one['case']}")
    unknown = any(not job["state"] for job in found["jobs"])
    if not found["alive"] and not unknown and found["recorded"] < found["cases"]:
        print("nothing is at work; the command that began this goes on from here")
    for warning in found["warnings"]:
        print(f"warning: {warning}")
