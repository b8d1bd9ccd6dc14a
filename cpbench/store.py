"""A run directory: job files, journals, records.

::

    sweep.json                    what was asked for
    records/WRITER.jsonl          one file per writer, environments and cases, one JSON a line
    jobs/WRITER/job.json          what a gang was told to do
    jobs/WRITER/rankN.jsonl       what each of its ranks noted while at it
    jobs/WRITER/rankN.log         what it printed

Files are only ever appended to, each by one process; records of all files are merged on reading,
the newest of a case wins.  A torn last line (a full disk, a killed writer) is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpbench.problem import Case
from cpbench.record import SCHEMA, Record
from cpbench.settings import MeasureSettings


class StoreError(OSError):
    """Results could not be written; what was written before is intact."""


class RecordWriter:
    """Appends JSON lines to one file; a line is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, table: dict[str, Any]) -> None:
        """Write and sync one line.

        Raises:
            OSError: when the disk is full or gone; the file is as it was before.
        """
        line = (json.dumps(table, separators=(",", ":"), allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        os.close(self._file)


class Journal:
    """What one rank notes for its parent: small lines, never synced."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the process

    def note(self, event: str, **details: Any) -> None:
        self._file.write(json.dumps({"event": event, "time": time.time(), **details}) + "\n")


@dataclass(frozen=True)
class Job:
    """What one gang is told: its cases, how to measure them, where to write."""

    cases: list[Case]
    settings: MeasureSettings
    device: str
    out: Path
    writer: str

    @property
    def folder(self) -> Path:
        return self.out / "jobs" / self.writer

    @property
    def record_path(self) -> Path:
        return self.out / "records" / f"{self.writer}.jsonl"

    def journal_path(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.jsonl"

    def save(self) -> Path:
        """Write ``job.json``, for :meth:`load` in a worker."""
        table = {
            "cases": [case.to_json() for case in self.cases],
            "settings": asdict(self.settings),
            "device": self.device,
            "out": str(self.out.resolve()),
            "writer": self.writer,
        }
        path = self.folder / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(table))
        return path

    @classmethod
    def load(cls, path: Path) -> Job:
        table = json.loads(path.read_text())
        return cls(
            [Case.from_json(case) for case in table["cases"]],
            MeasureSettings(**table["settings"]),
            table["device"],
            Path(table["out"]),
            table["writer"],
        )


@dataclass
class Run:
    """All that a run directory holds."""

    records: dict[str, Record]
    environments: dict[str, dict[str, Any]]
    warnings: list[str]


def read_run(out: Path) -> Run:
    """Every record of a run directory, the newest of each case, damage reported as warnings."""
    run = Run({}, {}, [])
    for path in sorted((out / "records").glob("*.jsonl")):
        for number, table in read_lines(path, run.warnings):
            where = f"{path.name}:{number}"
            if table.get("kind") == "environment":
                run.environments[table["id"]] = table
                continue
            if table.get("schema") != SCHEMA:
                run.warnings.append(f"{where}: schema {table.get('schema')!r} is not known here")
                continue
            try:
                record = Record.from_json(table)
            except (KeyError, TypeError, ValueError) as error:
                run.warnings.append(f"{where}: not a record ({type(error).__name__}: {error})")
                continue
            known = run.records.get(record.case.id)
            if known is None or known.started <= record.started:
                run.records[record.case.id] = record
    return run


def last_notes(path: Path) -> list[dict[str, Any]]:
    """What a rank has noted so far; an unreadable journal is an empty one."""
    return [table for _, table in read_lines(path)] if path.exists() else []


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_lines(
    path: Path, warnings: list[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a file; lines that are none are left out with a warning."""
    warnings = [] if warnings is None else warnings
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                table = json.loads(line)
            except ValueError:
                table = None
            if isinstance(table, dict):
                yield number, table
            else:
                warnings.append(f"{path.name}:{number}: torn or damaged line left out")
