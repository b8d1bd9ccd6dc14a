"""Files of a run directory: atomic writes, reading while writing, damaged files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cpbench.core.problem import Case
from cpbench.results.record import Record
from cpbench.results.store import (  # fmt: skip
    Journal,
    JsonLinesWriter,
    RecordWriter,
    StoreError,
    Tail,
    check_writable,
    read_run,
    write_atomically,
)


def make_record(status: str = "ok", started: float = 1.0, seq_len: int = 64) -> Record:
    return Record(case=Case(seq_len=seq_len), status=status, started=started)


def write_records(path: Path, *records: Record) -> None:
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record.to_json())


def test_the_newest_record_of_a_case_wins_whatever_the_file_order(tmp_path: Path) -> None:
    write_records(tmp_path / "records/a.jsonl", make_record("ok", started=3.0))
    write_records(
        tmp_path / "records/b.jsonl",
        make_record("oom", started=2.0),
        make_record("crash", started=1.0),
    )
    run = read_run(tmp_path)
    assert [record.status for record in run.records.values()] == ["ok"]
    assert not run.warnings


def test_record_round_trip(tmp_path: Path) -> None:
    record = make_record()
    record.times_us = {"fwd": [[1.5, 2.5], [3.0, 4.0]]}
    write_records(tmp_path / "records/a.jsonl", record)
    assert read_run(tmp_path).records == {record.case.id: record}


GOOD = json.dumps(make_record().to_json())


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        (GOOD[:-20], "torn or damaged"),
        ("", "torn or damaged"),
        ("[1, 2]", "torn or damaged"),
        ("\x00\x00\x00", "torn or damaged"),
        ("[" * 100_000, "torn or damaged"),
        ('{"kind": "case"}', "schema None"),
        ('{"kind": "environment"}', "schema None"),
        ('{"kind": "case", "schema": 99}', "schema 99"),
        ('{"kind": "case", "schema": 1}', "not a record (KeyError"),
        (GOOD.replace('"ok"', '"fine"'), "not a record (ValueError"),
        (GOOD.replace('"started": 1.0', '"started": "x"'), "not a record (ValueError"),
        (GOOD.replace('"started": 1.0', '"started": null'), "not a record (TypeError"),
        ('{"kind": "case", "schema": 1, "status": "ok", "case": "x"}', "not a record (Attribute"),
    ],
    ids=["torn", "blank", "list", "zeros", "deep", "bare", "no id", "newer", "empty", "status",
         "time", "no time", "case"],
)  # fmt: skip
def test_only_the_damaged_line_is_left_out(tmp_path: Path, line: str, warning: str) -> None:
    good = [json.dumps(make_record(seq_len=n).to_json()) for n in (1, 2)]
    path = tmp_path / "records/a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    run = read_run(tmp_path)
    assert len(run.records) == 2
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("a.jsonl:2: ")
    assert warning in run.warnings[0]


def test_unreadable_files_are_warnings(tmp_path: Path) -> None:
    (tmp_path / "records/folder.jsonl").mkdir(parents=True)
    (tmp_path / "records/empty.jsonl").touch()
    (tmp_path / "records/dangling.jsonl").symlink_to(tmp_path / "nowhere")
    run = read_run(tmp_path)
    assert not run.records
    assert sorted(run.warnings) == [
        "dangling.jsonl: cannot be read (No such file or directory)",
        "folder.jsonl: cannot be read (Is a directory)",
    ]
    assert not read_run(tmp_path / "nowhere").warnings


def test_a_line_that_does_not_fit_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records/a.jsonl"
    writer, write_bytes = RecordWriter(path), os.write
    writer.append(make_record(seq_len=1).to_json())
    whole = path.read_bytes()

    def half(file: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StoreError, match=r"a\.jsonl: No space left on device"):
        writer.append(make_record(seq_len=2).to_json())
    assert path.read_bytes() == whole
    monkeypatch.undo()
    writer.append(make_record(seq_len=3).to_json())
    writer.close()
    run = read_run(tmp_path)
    assert (len(run.records), run.warnings) == (2, [])


def test_nan_is_not_written(tmp_path: Path) -> None:
    with JsonLinesWriter(tmp_path / "a", sync=False) as writer:
        with pytest.raises(ValueError, match="JSON"):
            writer.append({"x": float("nan")})
    assert (tmp_path / "a").read_bytes() == b""


def test_a_tail_reads_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    tail = Tail(path)
    assert tail.read() == []  # not there yet
    journal = Journal(path)
    for event in ("boot", "start"):
        journal.note(event)
    assert [event["event"] for event in tail.read()] == ["boot", "start"]
    assert tail.read() == []
    with open(path, "ab") as file:
        for chunk in (b'{"event": "ch', b'eck"}', b'\nnot json\n{"event": "do'):
            file.write(chunk)
            file.flush()
            events = [event["event"] for event in tail.read()]
            assert events == (["check"] if b"\n" in chunk else [])
        file.write(b'ne"}\n')
    assert [event["event"] for event in tail.read()] == ["done"]
    journal.close()


def test_a_tail_reads_only_appended_bytes(tmp_path: Path) -> None:
    """Otherwise following a long sweep would take quadratic time."""
    path = tmp_path / "journal"
    tail = Tail(path)
    path.write_text('{"event": "old"}\n' * 1000)
    assert len(tail.read()) == 1000
    path.write_bytes(b"\xff" * path.stat().st_size + b'{"event": "new"}\n')  # would not parse
    assert tail.read() == [{"event": "new"}]


def test_atomic_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.json"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="No such file or directory"):
        check_writable(tmp_path / "nowhere")
