"""Files of a run directory: records, jobs and journals.

::

    sweep.json                    the sweep that was requested
    records/WRITER.jsonl          environments, records and predictions of cases, a JSON
                                  object per line
    jobs/WRITER/job.json          the job of a gang of workers
    jobs/WRITER/rankN.jsonl       journal of a rank: events while it works
    jobs/WRITER/rankN.log         output of a rank
    traces/CASE.json              timeline of a traced case
    running/HOST-PID-….json       a process that works on the directory

Record files and journals are only appended to, each by one process.  Lines and files end with a
checksum (``cpbench.results.sealed``).  Reading merges the records of all files: the newest of a
case wins, by sequence number, and earlier ones that also succeeded are further launches of it where
machine, software and conditions are the same.  A torn or damaged line is left out with a warning.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.core.user_files import counted_from
from cpbench.results import worlds
from cpbench.results.launches import flag_differing_results, split_launches
from cpbench.results.prediction import KIND as PREDICTION
from cpbench.results.prediction import Prediction
from cpbench.results.record import SCHEMA, Record
from cpbench.results.sealed import DamagedError, seal, unseal
from cpbench.results.validation import check_environment

EXIT_STORE = 74  # exit code of a rank that could not write
PROBE_BYTES = 64 << 10
TAIL_BYTES = 64 << 10
MAX_CLOCK_ERROR_S = 300.0  # between machines


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
        line = seal(json.dumps(table, separators=(",", ":"), allow_nan=False)) + b"\n"
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
    """Appends the records of one writer, each synced to disk, with sequence numbers that are larger
    than all that the run directory has when it is opened."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sync=True)
        self._sequence = last_sequence(path.parent.parent)

    def append(self, table: dict[str, Any]) -> None:
        self._sequence += 1
        super().append({"schema": SCHEMA, **table, "sequence": self._sequence})


def last_sequence(out: Path) -> int:
    """The largest sequence number in a run directory; 0 if there is none."""
    return max(map(_last_sequence, (out / "records").glob("*.jsonl")), default=0)


def _last_sequence(path: Path) -> int:
    """The sequence number of the last intact line of a file that has one; 0 if there is none."""
    with suppress(OSError), open(path, "rb") as file:
        size, length = file.seek(0, os.SEEK_END), TAIL_BYTES
        while True:
            file.seek(max(0, size - length))
            for line in reversed(file.read().splitlines()):
                with suppress(DamagedError):
                    if type(sequence := unseal(line).get("sequence")) is int:
                        return sequence
            if length >= size:
                break
            length *= 4
    return 0


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

        An incomplete line is left for a later call; a damaged one is skipped.
        """
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return []
        complete = appended[: appended.rfind(b"\n") + 1]
        self._offset += len(complete)
        tables = []
        for line in complete.splitlines():
            with suppress(DamagedError):
                tables.append(unseal(line))
        return tables


@dataclass(frozen=True)
class Job:
    """The job of one gang: its cases, how to measure them and where to write the records.

    Attributes:
        turns: by the id of a case, in how many turns it is measured, where that is several; the
            adjacent cases of one problem take them in turn.
        files_from: folder from which relative paths in cases count.
    """

    cases: list[Case]
    settings: MeasureSettings
    device: str
    out: Path
    writer: str
    turns: Mapping[str, int] = field(default_factory=dict)
    files_from: Path = field(default_factory=counted_from)

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
            "files_from": str(self.files_from.absolute()),
            "turns": {case.id: self.turns[case.id] for case in self.cases if case.id in self.turns},
        }
        path = self.folder / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_document(path, table)
        return path

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read back :meth:`save`.

        Raises:
            OSError, DamagedError: as :func:`read_document`.
        """
        table = read_document(path)
        return cls(
            [Case.from_json(case) for case in table["cases"]],
            MeasureSettings(**table["settings"]),
            table["device"],
            Path(table["out"]),
            table["writer"],
            table.get("turns", {}),
            Path(table.get("files_from", "")),
        )


@dataclass
class Run:
    """The contents of a run directory.

    Attributes:
        records: the newest record of each case, by the id of the case.
        launches: by the id of the case, where its newest record is ok and timed: that record and
            the earlier ones like it, of the same world (see ``cpbench.results.worlds``), oldest
            first.  Each is of another process (or gang).
        environments: by their ids.
        warnings: damaged lines and files, which are left out; launches of other worlds; times ahead
            of the clock.
        other_launches: as ``launches``, those of other worlds.
        predictions: the newest prediction of each case, by the id of the case.
    """

    records: dict[str, Record] = field(default_factory=dict)
    launches: dict[str, list[Record]] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    other_launches: dict[str, list[Record]] = field(default_factory=dict)
    predictions: dict[str, Prediction] = field(default_factory=dict)


def read_run(out: Path) -> Run:
    """Read a run directory; damaged lines become warnings."""
    run, records_by_case = Run(), dict[str, list[Record]]()
    for path in sorted((out / "records").glob("*.jsonl")):
        for number, table in read_lines(path, run.warnings):
            try:
                if table.get("kind") == "environment" and "id" in table:
                    check_environment(table)
                    run.environments[table["id"]] = table
                elif table.get("kind") == PREDICTION:
                    prediction = Prediction.from_json(table)
                    known = run.predictions.setdefault(prediction.case.id, prediction)
                    if prediction.sequence > known.sequence:
                        run.predictions[prediction.case.id] = prediction
                else:
                    record = Record.from_json(table)
                    records_by_case.setdefault(record.case.id, []).append(record)
            except ValueError as error:
                run.warnings.append(f"{path.name}:{number}: left out: {error}")
    for case_id, records in records_by_case.items():
        if len(records) > 1:
            records.sort(key=lambda record: record.order)
        run.records[case_id] = records[-1]
        run.launches[case_id], others = split_launches(records, run.environments)
        flag_differing_results(run.launches[case_id])
        if others:
            run.other_launches[case_id] = others
    run.warnings += worlds.mixture_warnings(run)
    run.warnings += _clock_warnings(records_by_case.values())
    return run


def _clock_warnings(records_by_case: Iterable[list[Record]]) -> list[str]:
    """A line on the records that start after now: some clock was wrong, or is."""
    latest = time.time() + MAX_CLOCK_ERROR_S
    ahead = [r.started for records in records_by_case for r in records if r.started > latest]
    if not ahead:
        return []
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(max(ahead)))
    count = f"{len(ahead)} record{'s start' if len(ahead) > 1 else ' starts'}"
    return [f"{count} ahead of the clock of this machine, up to {when} UTC: a clock was wrong"]


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
        write_document(path, trace)
    except OSError as error:
        raise StoreError(f"cannot write results to {path}: {error.strerror}") from error


def write_document(path: Path, table: dict[str, Any], indent: int | None = None) -> None:
    """Write a file that holds one object, with a checksum, and rename it into place."""
    separators = None if indent else (",", ":")
    text = json.dumps(table, indent=indent, separators=separators, allow_nan=False)
    write_atomically(path, seal(text) + b"\n")


def read_document(path: Path) -> dict[str, Any]:
    """The object of :func:`write_document`, or of an earlier version without a checksum.

    Raises:
        OSError: when the file cannot be read.
        DamagedError: when it is damaged, with its path.
    """
    try:
        return unseal(path.read_bytes())
    except DamagedError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None


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
                try:
                    yield number, unseal(line)
                except DamagedError as error:
                    warnings.append(f"{path.name}:{number}: left out: {error}")
    except OSError as error:
        warnings.append(f"{path.name}: cannot be read ({error.strerror})")
