"""Files of a run directory: records, jobs and journals.

::

    sweep.json                    the sweep that was requested
    records/WRITER.jsonl          environments and records of cases, one JSON object per line
    jobs/WRITER/job.json          the job of a gang of workers
    jobs/WRITER/rankN.jsonl       journal of a rank: events while it works
    jobs/WRITER/rankN.log         output of a rank
    traces/CASE.json              timeline of a traced case

Record files and journals are only appended to, each by one process.  Reading merges the records of
all files: the newest of a case wins, and earlier ones that also succeeded are further launches of
it.  A torn line (a full disk, a killed writer) is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.results.record import UNFINISHED, Record, SchemaError

EXIT_STORE = 74  # exit code of a rank that could not write
PROBE_BYTES = 64 << 10


class StoreError(OSError):
    """Results could not be written; earlier ones are intact."""


class JsonLinesWriter:
    """Appends JSON lines to one file; each line is written whole or not at all.

    Args:
        path: of the file; it and its folders are created.
        sync: whether to fsync after every line, so that it survives a power failure.

    Raises:
        StoreError: when the file cannot be created.
    """

    def __init__(self, path: Path, sync: bool) -> None:
        self._path, self._sync = path, sync
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._store_error(error) from error

    def append(self, table: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            StoreError: when that fails; the file is then unchanged.
        """
        line = (json.dumps(table, separators=(",", ":"), allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            if self._sync:
                os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise self._store_error(error) from error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _store_error(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write results to {self._path}: {error.strerror}")


class RecordWriter(JsonLinesWriter):
    """Appends the records of one writer, each synced to disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync=True)


class Journal(JsonLinesWriter):
    """Appends the events of one rank, which its parent reads; not synced."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync=False)

    def note(self, event: str, **details: Any) -> None:
        """Append an event with the current time."""
        self.append({"event": event, "time": time.time(), **details})


class Tail:
    """Reads JSON lines that another process appends to a file, each line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The objects of the lines completed since the last call.

        An incomplete line is left for a later call; one that is not a JSON object is skipped.
        """
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        complete = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [
            table for line in complete.splitlines() if (table := _parse_object(line)) is not None
        ]


@dataclass(frozen=True)
class Job:
    """The job of one gang: its cases, how to measure them and where to write the records.

    Attributes:
        turns: by the id of a case, in how many turns it is measured, where that is several; the
            adjacent cases of one problem take them in turn.
    """

    cases: list[Case]
    settings: MeasureSettings
    device: str
    out: Path
    writer: str
    turns: Mapping[str, int] = field(default_factory=dict)

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
            "turns": {case.id: self.turns[case.id] for case in self.cases if case.id in self.turns},
        }
        path = self.folder / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(table))
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
            table["turns"],
        )


@dataclass
class Run:
    """The contents of a run directory.

    Attributes:
        records: the newest record of each case, by the id of the case.
        launches: by the id of the case, where its newest record is ok and timed: that record and
            the earlier ones like it, under the same conditions, oldest first.  Each is of another
            process (or gang).
        environments: by their ids.
        warnings: damaged lines and files, which are left out.
    """

    records: dict[str, Record] = field(default_factory=dict)
    launches: dict[str, list[Record]] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_run(out: Path) -> Run:
    """Read a run directory; damaged lines become warnings."""
    run, records_by_case = Run(), dict[str, list[Record]]()
    for path in sorted((out / "records").glob("*.jsonl")):
        for number, table in read_lines(path, run.warnings):
            if table.get("kind") == "environment" and isinstance(table.get("id"), str):
                run.environments[table["id"]] = table
                continue
            try:
                record = Record.from_json(table)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = str(error) if isinstance(error, SchemaError) else (
                    f"not a record ({type(error).__name__}: {error})"
                )  # fmt: skip
                run.warnings.append(f"{path.name}:{number}: {reason}")
                continue
            records_by_case.setdefault(record.case.id, []).append(record)
    for case_id, records in records_by_case.items():
        records.sort(key=lambda record: record.started)
        run.records[case_id], run.launches[case_id] = records[-1], _launches(records)
    return run


def _launches(records: list[Record]) -> list[Record]:
    """The records timed under the conditions of the newest, one per writer; none if that one
    failed.  Of others, those that were interrupted between turns are left out."""
    newest = records[-1]
    launches = {
        record.writer: record
        for record in records
        if record.status == newest.status == "ok"
        and record.times_us
        and record.conditions == newest.conditions
        and (record is newest or UNFINISHED not in record.flags)
    }
    return list(launches.values())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file and rename it into place; when that fails, the old file is kept.

    A pipe or device is written to directly.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def trace_path(out: Path, case: str) -> Path:
    """File with the timeline of a case (its id)."""
    return out / "traces" / f"{case}.json"


def write_trace(out: Path, case: str, trace: dict[str, Any]) -> None:
    """Write the timeline of a case (its id).

    Raises:
        StoreError: when that fails.
    """
    path = trace_path(out, case)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(trace, separators=(",", ":"), allow_nan=False))
    except OSError as error:
        raise StoreError(f"cannot write results to {path}: {error.strerror}") from error


def check_writable(folder: Path) -> None:
    """Check that a folder can be written to, by writing ``PROBE_BYTES`` to it.

    Raises:
        StoreError: when it cannot.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        raise StoreError(f"cannot write results to {folder}: {error.strerror}") from error
    finally:
        probe.unlink(missing_ok=True)


def read_lines(path: Path, warnings: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """JSON objects of a file with their line numbers; other lines are left out with a warning."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                table = _parse_object(line)
                if table is None:
                    warnings.append(f"{path.name}:{number}: torn or damaged line left out")
                else:
                    yield number, table
    except OSError as error:
        warnings.append(f"{path.name}: cannot be read ({error.strerror})")


def _parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None for anything else."""
    try:
        table = orjson.loads(line)
    except ValueError:
        return None
    return table if isinstance(table, dict) else None
