"""A run directory: job files, journals, records.

::

    sweep.json                    what was asked for
    records/WRITER.jsonl          one file per writer, environments and cases, one JSON a line
    jobs/WRITER/job.json          what a gang was told to do
    jobs/WRITER/rankN.jsonl       what each of its ranks noted while at it
    jobs/WRITER/rankN.log         what it printed
    traces/CASE.json              what ranks did when, where a run was traced

Files are only ever appended to, each by one process; records of all files are merged on reading,
the newest of a case wins, and earlier ones that went as well are further launches of it.  A torn
last line (a full disk, a killed writer) is skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

from cpbench.core.problem import Case
from cpbench.results.record import Record, SchemaError
from cpbench.core.settings import MeasureSettings

EXIT_STORE = 74  # of a rank that could not write
PROBE_BYTES = 64 << 10


class StoreError(OSError):
    """Results could not be written; what was written before is intact."""


class Lines:
    """Appends JSON lines to one file; a line is there whole or not at all.

    Args:
        path: created with its folders.
        sync: whether a line must survive a power failure.

    Raises:
        StoreError: when the disk is full or gone.
    """

    def __init__(self, path: Path, sync: bool) -> None:
        self._path, self._sync = path, sync
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, table: dict[str, Any]) -> None:
        """Write one line.

        Raises:
            StoreError: when that fails; the file is as it was before.
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
            raise self._failure(error) from error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _failure(self, error: OSError) -> StoreError:
        return StoreError(f"cannot write results to {self._path}: {error.strerror}")


class RecordWriter(Lines):
    """Records of one writer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync=True)


class Journal(Lines):
    """What one rank notes for its parent: small lines, never synced."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync=False)

    def note(self, event: str, **details: Any) -> None:
        self.append({"event": event, "time": time.time(), **details})


class Tail:
    """Reads a file that another process is appending lines to, each line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The objects of the lines that have been finished since the last call.

        A line without its end is left for later; one that is no JSON object is passed over.
        """
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                fresh = file.read()
        except FileNotFoundError:
            return []
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [table for line in whole.splitlines() if (table := _object(line)) is not None]


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
    """All that a run directory holds.

    Attributes:
        records: the newest of each case, by its id.
        launches: of a case whose newest record is ok and timed, that one and all like it under the
            same conditions, oldest first: a process (or gang) each.
        environments: by id.
        warnings: what is damaged and left out.
    """

    records: dict[str, Record] = field(default_factory=dict)
    launches: dict[str, list[Record]] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_run(out: Path) -> Run:
    """Every record of a run directory, damage reported as warnings."""
    run, found = Run(), dict[str, list[Record]]()
    for path in sorted((out / "records").glob("*.jsonl")):
        for number, table in read_lines(path, run.warnings):
            if table.get("kind") == "environment" and isinstance(table.get("id"), str):
                run.environments[table["id"]] = table
                continue
            try:
                record = Record.from_json(table)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                why = str(error) if isinstance(error, SchemaError) else (
                    f"not a record ({type(error).__name__}: {error})"
                )  # fmt: skip
                run.warnings.append(f"{path.name}:{number}: {why}")
                continue
            found.setdefault(record.case.id, []).append(record)
    for key, records in found.items():
        records.sort(key=lambda record: record.started)
        run.records[key], run.launches[key] = records[-1], _launches(records)
    return run


def _launches(records: list[Record]) -> list[Record]:
    """Those that were timed under the conditions of the last one, one of each writer; none if that
    one failed."""
    last = records[-1]
    fine = {
        record.writer: record
        for record in records
        if record.status == last.status == "ok"
        and record.times_us
        and record.conditions == last.conditions
    }
    return list(fine.values())


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step; when that fails the old one stays, and nothing else.  A pipe or
    device is written to."""
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
    """Where the timeline of a case lies."""
    return out / "traces" / f"{case}.json"


def write_trace(out: Path, case: str, trace: dict[str, Any]) -> None:
    """Write the timeline of a case.

    Raises:
        StoreError: when that fails.
    """
    path = trace_path(out, case)
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(trace, separators=(",", ":"), allow_nan=False))
    except OSError as error:
        raise StoreError(f"cannot write results to {path}: {error.strerror}") from error


def check_writable(folder: Path) -> None:
    """Prove that there is room for a record or two.

    Raises:
        StoreError: when there is not.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        raise StoreError(f"cannot write results to {folder}: {error.strerror}") from error
    finally:
        probe.unlink(missing_ok=True)


def read_lines(path: Path, warnings: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered JSON objects of a file; lines that are none are left out with a warning."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                table = _object(line)
                if table is None:
                    warnings.append(f"{path.name}:{number}: torn or damaged line left out")
                else:
                    yield number, table
    except OSError as error:
        warnings.append(f"{path.name}: cannot be read ({error.strerror})")


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, if it is one."""
    try:
        table = orjson.loads(line)
    except ValueError:
        return None
    return table if isinstance(table, dict) else None
