"""``--retry`` and the newest record do not depend on clocks."""

from __future__ import annotations

import time
from pathlib import Path

from cpbench.core.problem import Case
from cpbench.core.settings import MeasureSettings
from cpbench.results.record import Record
from cpbench.results.store import RecordWriter, last_sequence
from cpbench.sweep import runs
from cpbench.sweep.remaining import remaining_cases
from cpbench.sweep.request import Request

CASE = Case(seq_len=64)
YEAR_S = 365 * 86400.0


def write(out: Path, name: str, status: str, ahead_s: float) -> None:
    """A record by a machine whose clock is ahead."""
    with RecordWriter(out / "records" / f"{name}.jsonl") as writer:
        conditions = MeasureSettings().conditions("cpu")
        record = Record(case=CASE, status=status, conditions=conditions, writer=name)
        record.started = time.time() + ahead_s
        writer.append(record.to_json())


def request(out: Path, since: float) -> Request:
    return Request(
        name="x", cases=[CASE], out=out, launcher="local", device="cpu", since=since,
        settings=MeasureSettings(), retry=frozenset({"crash"}),
    )  # fmt: skip


def test_a_record_ahead_of_the_clock_is_retried_once(tmp_path: Path) -> None:
    write(tmp_path, "z", "crash", ahead_s=YEAR_S)
    since = last_sequence(tmp_path)
    assert remaining_cases(request(tmp_path, since)) == [CASE]
    write(tmp_path, "a", "crash", ahead_s=0.0)  # by the retry, which is not repeated
    assert remaining_cases(request(tmp_path, since)) == []
    assert remaining_cases(request(tmp_path, last_sequence(tmp_path))) == [CASE]


def test_a_record_ahead_of_the_clock_hides_no_later_one(tmp_path: Path) -> None:
    write(tmp_path, "z", "ok", ahead_s=YEAR_S)
    assert runs.exit_code(request(tmp_path, 0)) == 0
    write(tmp_path, "a", "wrong", ahead_s=-YEAR_S)
    assert runs.exit_code(request(tmp_path, 0)) == 1
