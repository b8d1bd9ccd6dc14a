"""Resuming a run: no case is measured twice, and no record is lost to a full or damaged disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from limits import LIMIT_S
from paths import HELPERS
from small_disk import small_disk  # noqa: F401

from cpbench.results.sealed import seal
from cpbench.results.store import read_run

OPERATORS = HELPERS / "planted" / "faulty_operators.py"
SWEEP = """
[sweep]
operator = {operators}
seq_len = [64, 96, 128]
num_heads_q = 1
head_dim = 16

[measure]
min_iterations = 1
max_iterations = 1
warmup = 1
check_sampled = false
memory = false
interleave = 1
"""


def write_sweep(path: Path, *operators: str) -> Path:
    path.write_text(SWEEP.format(operators=json.dumps(operators)))
    return path


def start_run(
    file: Path, out: Path, *options: str, no_faults: bool = False
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cpbench", "run", str(file), "--out", str(out), *options],
        env={**os.environ, **({"CPBENCH_TEST_CALM": "1"} if no_faults else {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and lines on standard error."""
    _, stderr = process.communicate(timeout=LIMIT_S)
    return process.returncode, stderr.splitlines()


def run_sweep(
    file: Path, out: Path, *options: str, no_faults: bool = False
) -> tuple[int, list[str]]:
    return finish(start_run(file, out, *options, no_faults=no_faults))


def record_counts(out: Path) -> list[int]:
    """Number of records per sequence length, in order of length."""
    counts: Counter[int] = Counter()
    for path in (out / "records").glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            table = json.loads(line)
            if table["kind"] == "case" and "unfinished" not in table["flags"]:
                counts[table["case"]["seq_len"]] += 1
    return [counts[seq_len] for seq_len in sorted(counts)]


def gang_count(out: Path) -> int:
    return len(list((out / "jobs").iterdir()))


def test_recorded_cases_are_not_measured_again(tmp_path: Path) -> None:
    file, out = write_sweep(tmp_path / "sweep.toml", "reference"), tmp_path / "run"

    # Two runs at the same time in one directory, each with its own case.
    both = [start_run(file, out, "--where", f"seq_len={length}") for length in (64, 128)]
    for process in both:
        assert finish(process)[0] == 0
    assert record_counts(out) == [1, 1]
    assert not read_run(out).warnings

    code, stderr_lines = run_sweep(file, out)
    assert code == 0
    assert f"2 of 3 cases are recorded in {out} already" in stderr_lines
    assert record_counts(out) == [1, 1, 1]

    assert run_sweep(file, out) == (0, [f"3 of 3 cases are recorded in {out} already"])
    assert record_counts(out) == [1, 1, 1]
    assert gang_count(out) == 3

    # A killed writer, a bad block, a newer version, an empty file: only the torn case runs again.
    records = out / "records"
    torn = max(records.glob("*.jsonl"), key=lambda path: path.name.split("-")[-3:])
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-40])
    (records / "empty.jsonl").touch()
    (records / "newer.jsonl").write_bytes(seal('{"kind": "case", "schema": 99}') + b"\n")
    (records / "damaged.jsonl").write_bytes(b"{\xff\x00 not json\n")
    code, stderr_lines = run_sweep(file, out)
    assert code == 0
    assert {line for line in stderr_lines if "left out" in line} == {
        f"cpbench: {out}: damaged.jsonl:1: left out: torn or damaged",
        f"cpbench: {out}: newer.jsonl:1: left out: unknown schema 99; this cpbench reads 1 to 3",
        f"cpbench: {out}: {torn.name}:2: left out: torn or damaged",
    }
    assert f"2 of 3 cases are recorded in {out} already" in stderr_lines
    assert gang_count(out) == 4
    assert len(read_run(out).records) == 3


def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    names = ("reference", f"{OPERATORS}:faulty:how=fill")
    file, out = write_sweep(tmp_path / "sweep.toml", *names), small_disk
    # Records of more than a page: a file's last page has room on the fullest disk.
    file.write_text(file.read_text().replace("_iterations = 1\n", "_iterations = 80\n"))
    options = ("--where", "seq_len=64")

    message = f"cpbench: cannot write results to {out}: No space left on device"
    code, stderr_lines = run_sweep(file, out, *options)
    assert (code, stderr_lines[1:]) == (1, [message])  # the first line is of the good case
    assert not read_run(out).warnings
    assert record_counts(out) == [1]

    before = gang_count(out)
    assert run_sweep(file, out, *options) == (1, [message])  # still full: nothing is started
    assert gang_count(out) == before

    (out / "ballast").unlink()
    code, stderr_lines = run_sweep(file, out, *options, no_faults=True)
    assert code == 0, stderr_lines
    assert record_counts(out) == [2]  # the two operators, once each


def test_changed_settings_are_said_and_can_be_remeasured(tmp_path: Path) -> None:
    file, out = write_sweep(tmp_path / "s.toml", "reference"), tmp_path / "run"
    assert run_sweep(file, out)[0] == 0
    text = file.read_text()
    file.write_text(text.replace("max_iterations = 1", "max_iterations = 3\nprecision = 0.5"))
    for _ in range(2):  # it is said each time, also once sweep.json has the new settings
        code, lines = run_sweep(file, out)
        assert code == 0
        (line,) = (line for line in lines if "kept" in line)
        assert line == (
            f"cpbench: {out}: 3 recorded cases measured with precision 0.03, now 0.5; "
            "max_iterations 1, now 3: kept; --remeasure measures them again"
        )
        assert record_counts(out) == [1, 1, 1]
    for _ in range(2):
        code, lines = run_sweep(file, out, "--remeasure")
        assert (code, record_counts(out)) == (0, [2, 2, 2])
    assert not any("kept" in line for line in lines)
    # Times of other settings are no launches of the same measurement.
    run = read_run(out)
    assert [len(launches) for launches in run.launches.values()] == [1, 1, 1]
    assert any("had precision 0.03 instead of 0.5, max_iterations 1" in w for w in run.warnings)
    assert run_sweep(file, out, "--launches", "2")[0] == 0
    assert record_counts(out) == [3, 3, 3]
