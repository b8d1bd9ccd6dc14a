"""A run directory of real records, all that is read from it, and damage to single bits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paths import DATA

from cpbench.core.settings import MeasureSettings
from cpbench.reports.frame import tidy_table
from cpbench.results.active import active_processes
from cpbench.results.record import Record
from cpbench.results.store import (
    Job,
    JsonLinesWriter,
    RecordWriter,
    read_lines,
    read_run,
    write_document,
    write_trace,
)
from cpbench.slurm import submission
from cpbench.sweep import runs
from cpbench.sweep.remaining import remaining_cases
from cpbench.sweep.request import Request
from cpbench.tools.status import read_status


def make_run(out: Path) -> Request:
    """A run directory of an old version, as this one would have written it, with a file of every
    kind; the request that it is of."""
    shutil.copytree(DATA / "run_before_wings", out)
    for path in out.glob("*/**/*.jsonl"):
        tables = [table for _, table in read_lines(path, [])]
        path.unlink()
        kind = RecordWriter(path) if path.parent.name == "records" else None
        with kind or JsonLinesWriter(path, sync=False) as writer:
            for table in tables:
                is_case = table.get("kind") == "case"
                writer.append(Record.from_json(table).to_json() if is_case else table)
    for path in (out / "sweep.json", *out.glob("jobs/*/job.json")):
        write_document(path, json.loads(path.read_text()))
    case = min(read_run(out).records)
    write_trace(out, case, {"traceEvents": [], "otherData": {"stragglers": ["rank 1 is slow"]}})
    claim = {"host": "elsewhere", "pid": 7, "born": "1", "namespace": "", "cases": [case]}
    (out / "running").mkdir()
    write_document(out / "running" / "elsewhere-7-abc.json", claim)
    with JsonLinesWriter(out / "slurm" / "submissions.jsonl", sync=False) as lines:
        lines.append({"job": "1", "name": "x", "cases": [case], "ranks": 1, "nodes": 1})
    with JsonLinesWriter(out / "slurm" / "ends.jsonl", sync=False) as lines:
        lines.append({"job": "1", "state": "COMPLETED"})
    with JsonLinesWriter(out / "slurm" / "bad_nodes.jsonl", sync=False) as lines:
        lines.append({"node": "n1", "why": "no such luck"})
    (job,) = out.glob("jobs/local-p1-*/job.json")
    (job.parent / "rank0.log").write_text("some output\n")
    (job.parent / "over").unlink()  # as if its run had been killed
    cases = Job.load(job).cases
    settings = MeasureSettings(trace=True)
    return Request(
        name="x", cases=cases, out=out, launcher="local", device="cpu", settings=settings
    )


@dataclass
class Contents:
    """What is read from a run directory, by name, and what is said of damage."""

    values: dict[str, Any]
    warnings: list[str]


def read_everything(request: Request) -> Contents:
    """Read a run directory as all commands together do.

    Raises:
        Exception: what a user would see as a traceback.
    """
    contents, out = Contents({}, []), request.out

    def read(name: str, function: Callable[[], Any]) -> None:
        try:
            contents.values[name] = function()
        except ValueError as error:  # one line for the user
            contents.warnings.append(str(error))

    run = read_run(out)
    contents.warnings += run.warnings
    contents.values["run"] = (run.records, run.launches, run.other_launches, run.environments)
    contents.values["table"] = tidy_table(run, "x").to_csv()

    def status() -> dict[str, Any]:
        state = read_status(out)
        contents.warnings.extend(state.pop("warnings"))
        return {**state, "under_way": [case["case"] for case in state["under_way"]]}

    read("status", status)
    read("remaining", lambda: remaining_cases(request))
    read("killed", lambda: runs.count_killed_runs(out))
    read("timelines", lambda: runs.describe_timelines(request))
    read("jobs", lambda: [Job.load(path) for path in sorted(out.glob("jobs/*/job.json"))])
    read("claims", lambda: active_processes(out))
    read("submitted", lambda: submission.submitted_jobs(out))
    contents.warnings += [line for line in contents.values["timelines"] if "damaged" in line]
    return contents


def flips(out: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Files of a run directory, and bytes and bits in them: half by file, half by byte."""
    draw = random.Random(seed)
    files = sorted(path for path in out.glob("**/*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        path = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        yield path, draw.randrange(path.stat().st_size), draw.randrange(8)


def silent_damage(request: Request, count: int, seed: int = 0) -> tuple[list[str], int]:
    """Flip single bits, one at a time.

    Returns:
        The flips that changed something without being named, and how many were named.
    """
    silent, named, original = [], 0, read_everything(request)
    assert not original.warnings, original.warnings
    for path, position, bit in flips(request.out, count, seed):
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        contents = read_everything(request)
        path.write_bytes(data)
        line = data[:position].count(b"\n") + 1
        name = f"{path.name}:{line}:" if path.suffix == ".jsonl" else path.name
        if any(name in warning for warning in contents.warnings):
            named += 1
        elif contents.warnings or contents.values != original.values:
            silent.append(f"{path.relative_to(request.out)}:{line}, byte {position}, bit {bit}")
    return silent, named
