"""Files of a run directory: whole lines or none, read while they are written, damage survived."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cpbench.core.problem import Case
from cpbench.results.record import Record
from cpbench.results.store import (Journal, Lines, RecordWriter, StoreError, Tail, check_writable, read_run, write_whole,)  # fmt: skip


def record(status: str = "ok", started: float = 1.0, seq_len: int = 64) -> Record:
    return Record(case=Case(seq_len=seq_len), status=status, started=started)


def write(path: Path, *records: Record) -> None:
    with RecordWriter(path) as writer:
        for one in records:
            writer.append(one.to_json())


def test_the_newest_record_of_a_case_wins_whatever_the_file_order(tmp_path: Path) -> None:
    write(tmp_path / "records/a.jsonl", record("ok", started=3.0))
    write(tmp_path / "records/b.jsonl", record("oom", started=2.0), record("crash", started=1.0))
    run = read_run(tmp_path)
    assert [found.status for found in run.records.values()] == ["ok"]
    assert not run.warnings


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    one = record()
    one.times_us = {"fwd": [[1.5, 2.5], [3.0, 4.0]]}
    write(tmp_path / "records/a.jsonl", one)
    assert read_run(tmp_path).records == {one.case.id: one}


GOOD = json.dumps(record().to_json())


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
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, line: str, warning: str) -> None:
    good = [json.dumps(record(seq_len=n).to_json()) for n in (1, 2)]
    path = tmp_path / "records/a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    run = read_run(tmp_path)
    assert len(run.records) == 2
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("a.jsonl:2: ")
    assert warning in run.warnings[0]


def test_files_that_are_none_are_survived(tmp_path: Path) -> None:
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


def test_a_line_that_does_not_fit_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records/a.jsonl"
    writer, write_bytes = RecordWriter(path), os.write
    writer.append(record(seq_len=1).to_json())
    whole = path.read_bytes()

    def half(file: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(StoreError, match=r"a\.jsonl: No space left on device"):
        writer.append(record(seq_len=2).to_json())
    assert path.read_bytes() == whole
    monkeypatch.undo()
    writer.append(record(seq_len=3).to_json())
    writer.close()
    run = read_run(tmp_path)
    assert (len(run.records), run.warnings) == (2, [])


def test_no_number_that_json_lacks_is_written(tmp_path: Path) -> None:
    with Lines(tmp_path / "a", sync=False) as writer:
        with pytest.raises(ValueError, match="JSON"):
            writer.append({"x": float("nan")})
    assert (tmp_path / "a").read_bytes() == b""


def test_a_tail_reads_each_line_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    tail = Tail(path)
    assert tail.read() == []  # not there yet
    journal = Journal(path)
    for event in ("boot", "start"):
        journal.note(event)
    assert [note["event"] for note in tail.read()] == ["boot", "start"]
    assert tail.read() == []
    with open(path, "ab") as file:
        for piece in (b'{"event": "ch', b'eck"}', b'\nnot json\n{"event": "do'):
            file.write(piece)
            file.flush()
            found = [note["event"] for note in tail.read()]
            assert found == (["check"] if b"\n" in piece else [])
        file.write(b'ne"}\n')
    assert [note["event"] for note in tail.read()] == ["done"]
    journal.close()


def test_a_tail_does_not_read_again_what_it_has_read(tmp_path: Path) -> None:
    """A sweep of thousands of cases is followed in time that grows with what is new."""
    path = tmp_path / "journal"
    tail = Tail(path)
    path.write_text('{"event": "old"}\n' * 1000)
    assert len(tail.read()) == 1000
    path.write_bytes(b"\xff" * path.stat().st_size + b'{"event": "new"}\n')  # would not parse
    assert tail.read() == [{"event": "new"}]


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.json"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_noticed(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(StoreError, match="No such file or directory"):
        check_writable(tmp_path / "nowhere")
