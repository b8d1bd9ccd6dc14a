"""Files of a run directory: atomic writes, reading while writing, damaged files."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from cpbench.core.problem import Case
from cpbench.results.record import Record
from cpbench.results.sealed import seal
from cpbench.results.store import (  # fmt: skip
    Journal,
    JsonLinesWriter,
    RecordWriter,
    StoreError,
    Tail,
    check_writable,
    last_sequence,
    read_run,
    write_atomically,
)


def make_record(status: str = "ok", started: float = 1.0, seq_len: int = 64) -> Record:
    return Record(case=Case(seq_len=seq_len), status=status, started=started)


def write_records(path: Path, *records: Record) -> None:
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record.to_json())


def test_the_last_record_of_a_case_wins_whatever_the_clocks_and_names_of_files(
    tmp_path: Path,
) -> None:
    """By sequence numbers; those of versions without numbers come first, by time."""
    records = tmp_path / "records"
    write_records(records / "b.jsonl", make_record("oom", started=2.0))
    write_records(records / "a.jsonl", make_record("ok", started=1.0))
    assert [record.status for record in read_run(tmp_path).records.values()] == ["ok"]
    write_records(records / "c.jsonl", make_record("wrong", started=0.5))
    old = {**make_record("timeout", started=3.0).to_json(), "schema": 2}
    (records / "d.jsonl").write_text(json.dumps(old) + "\n")
    (record,) = read_run(tmp_path).records.values()
    assert (record.status, record.sequence) == ("wrong", 3)
    assert last_sequence(tmp_path) == 3
    for path in records.glob("[abc].jsonl"):
        path.unlink()
    write_records(records / "e.jsonl", make_record("crash", started=0.0))
    assert [record.status for record in read_run(tmp_path).records.values()] == ["crash"]


def test_records_ahead_of_the_clock_are_warned_of(tmp_path: Path) -> None:
    write_records(tmp_path / "records/a.jsonl", make_record(started=time.time() + 86400))
    (warning,) = read_run(tmp_path).warnings
    assert warning.startswith("1 record starts ahead of the clock of this machine, up to ")


def test_record_round_trip(tmp_path: Path) -> None:
    record = make_record()
    record.times_us = {"fwd": [[1.5, 2.5]], "bwd": [[3.0, 4.0]]}
    write_records(tmp_path / "records/a.jsonl", record)
    assert read_run(tmp_path).records == {record.case.id: record}


GOOD = seal(json.dumps(make_record().to_json())).decode()


def changed(**values: object) -> str:
    """A line of a record with other values, and the right checksum."""
    return seal(json.dumps({**make_record().to_json(), **values})).decode()


def changed_case(**values: object) -> str:
    return changed(case={**make_record().case.to_json(), **values})


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        (GOOD[:-20], "torn or damaged"),
        ("", "torn or damaged"),
        ("[1, 2]", "torn or damaged"),
        ("\x00\x00\x00", "torn or damaged"),
        ("[" * 100_000, "torn or damaged"),
        ('{"kind": "case"}', "unknown schema None"),
        ('{"kind": "environment"}', "unknown schema None"),
        ('{"kind": "case", "schema": 99}', "unknown schema 99"),
        ('{"kind": "case", "schema": true}', "unknown schema True"),
        ('{"kind": "case", "schema": 1}', "no case"),
        ('{"kind": "case", "schema": 1, "status": "ok", "case": "x", "id": "y"}', "'x' is no case"),
        (GOOD.replace('"ok"', '"oom"'), "its checksum does not match"),
        (GOOD.replace("crc32", "crc33"), "its checksum is missing or damaged"),
        (json.dumps(make_record().to_json()), "its checksum is missing or damaged"),
        (GOOD.replace('"crc32":"', '"crc32": "'), "its checksum is missing or damaged"),
        (json.dumps({**make_record().to_json(), "schema": 2, "id": "x"}), "the id of its case is"),
        (changed(status="fine"), "unknown status 'fine'"),
        (changed(started="x"), "started = 'x' is not a number"),
        (changed(started=None), "started = None is not a number"),
        (changed(started=1e300), "started = 1e+300 is no time"),
        (changed(times_us={"fwd": [["x"]]}), "times_us.fwd[0][0] = 'x' is not a number"),
        (changed(times_us={"fwd": [[1.0, True]]}), "times_us.fwd[0][1] = True is not a number"),
        (changed(times_us={"fwd": [[1.0, -2.0]]}), "times_us.fwd[0][1] = -2.0 is negative"),
        (changed(times_us={"fwd": [[]]}), "times_us has 0 iterations"),
        (changed(times_us={"fwd": [[1.0]], "bwd": [[1.0, 2.0]]}), "times_us has 1 and 2 iterat"),
        (changed(times_us={"fwd": [[1.0], [1.0]]}), "times_us has 2 ranks, the case 1"),
        (changed(times_us={"fwd": 3}), "times_us.fwd = 3 is no list"),
        (changed(times_us={"sideways": [[1.0]]}), "times_us has sideways, not bwd, fwd"),
        (changed(times_us=[]), "times_us = [] is no table"),
        (changed(pace_us=[[1.0]], times_us={"fwd": [[1.0, 2.0]]}), "pace_us has 1 iterations"),
        (changed(parts_us={"select": [[1.0]]}), "parts_us has select, not kernel, plan, select"),
        (changed(exposure_us={"whole": {}}), "exposure_us has whole, not compute, transfer"),
        (changed(memory_bytes={"peak": [1.5]}), "memory_bytes.peak[0] = 1.5 is not a whole number"),
        (changed(bytes_sent={"fwd": [1, 2]}), "bytes_sent has 2 ranks, the case 1"),
        (changed(balance=[1, 2]), "balance has 2 ranks, the case 1"),
        (changed(flops={"fxd": 1}), "flops has fxd"),
        (changed(errors={"small": {"out": {}}}), "errors.small.out has no rel_l2"),
        (changed(errors={"small": {"out": {"rel_l2": "x"}}}), "errors.small.out.rel_l2 = 'x'"),
        (changed(telemetry=[{"power_w": {"median": "x"}}]), "power_w.median = 'x'"),
        (changed(flags="contended"), "flags = 'contended' is no list"),
        (changed(conditions=[1]), "conditions = [1] is no table"),
        (changed(log=3), "log = 3 is no str"),
        (changed_case(seq_len="x"), "no case has these sizes"),
        (changed_case(batch=True), "no case has these sizes"),
        (changed_case(dtype=["float32"]), "no case has dtype"),
        (changed_case(content=[["a"]]), "content = [['a']] is no list of pairs"),
        (changed_case(mask=3), "3 is neither a name nor a table"),
        ('{"kind": "environment", "id": "e", "device": 3}', "device = 3 is no table"),
        ('{"kind": "environment", "id": "e", "memory_bytes": "x"}', "memory_bytes = 'x'"),
        ('{"kind": "environment", "id": 3}', "id = 3 is no str"),
    ],
)
def test_only_the_damaged_line_is_left_out(tmp_path: Path, line: str, warning: str) -> None:
    good = [seal(json.dumps(make_record(seq_len=n).to_json())).decode() for n in (1, 2)]
    path = tmp_path / "records/a.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    run = read_run(tmp_path)
    assert len(run.records) == 2
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("a.jsonl:2: left out: ")
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
