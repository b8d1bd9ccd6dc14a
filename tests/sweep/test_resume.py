"""A run goes on where it stopped: nothing twice, nothing lost, whatever the disk did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from paths import HELPERS

from cpbench.results.store import read_run

OPERATORS = HELPERS / "faulty_operators.py"
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
"""


def write_sweep(path: Path, *operators: str) -> Path:
    path.write_text(SWEEP.format(operators=json.dumps(operators)))
    return path


def start(file: Path, out: Path, *words: str, calm: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cpbench", "run", str(file), "--out", str(out), *words],
        env={**os.environ, **({"CPBENCH_TEST_CALM": "1"} if calm else {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and lines on standard error."""
    _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr.splitlines()


def run(file: Path, out: Path, *words: str, calm: bool = False) -> tuple[int, list[str]]:
    return finish(start(file, out, *words, calm=calm))


def measured(out: Path) -> list[int]:
    """How many records there are for each length, in order of length."""
    found: Counter[int] = Counter()
    for path in (out / "records").glob("*.jsonl"):
        for line in path.read_bytes().splitlines():
            table = json.loads(line)
            if table["kind"] == "case":
                found[table["case"]["seq_len"]] += 1
    return [found[length] for length in sorted(found)]


def gangs(out: Path) -> int:
    return len(list((out / "jobs").iterdir()))


@pytest.mark.timeout(120)
def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    file, out = write_sweep(tmp_path / "sweep.toml", "reference"), tmp_path / "run"

    # Two runs at the same time into one directory, each with a case of its own.
    both = [start(file, out, "--where", f"seq_len={length}") for length in (64, 128)]
    for process in both:
        assert finish(process)[0] == 0
    assert measured(out) == [1, 1]
    assert not read_run(out).warnings

    code, told = run(file, out)
    assert code == 0
    assert f"2 of 3 cases are recorded in {out} already" in told
    assert measured(out) == [1, 1, 1]

    assert run(file, out) == (0, [f"3 of 3 cases are recorded in {out} already"])
    assert measured(out) == [1, 1, 1]
    assert gangs(out) == 3

    # A killed writer, a bad block, a newer version, an empty file: the torn case alone runs again.
    records = out / "records"
    torn = max(records.glob("*.jsonl"), key=lambda path: path.name.split("-")[-3:])
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-40])
    (records / "empty.jsonl").touch()
    (records / "newer.jsonl").write_text('{"kind": "case", "schema": 99}\n')
    (records / "damaged.jsonl").write_bytes(b"{\xff\x00 not json\n")
    code, told = run(file, out)
    assert code == 0
    assert {line for line in told if "records/" in line} == {
        f"cpbench: {records}/damaged.jsonl:1: torn or damaged line left out",
        f"cpbench: {records}/newer.jsonl:1: schema 99 is not known here (1 to 2 are)",
        f"cpbench: {records}/{torn.name}:2: torn or damaged line left out",
    }
    assert f"2 of 3 cases are recorded in {out} already" in told
    assert gangs(out) == 4
    assert len(read_run(out).records) == 3


@pytest.mark.timeout(120)
def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    names = ("reference", f"{OPERATORS}:faulty:how=fill")
    file, out = write_sweep(tmp_path / "sweep.toml", *names), small_disk
    # Records of more than a page: a file's last page has room on the fullest disk.
    file.write_text(file.read_text().replace("_iterations = 1\n", "_iterations = 80\n"))
    words = ("--where", "seq_len=64")

    complaint = f"cpbench: cannot write results to {out}: No space left on device"
    code, told = run(file, out, *words)
    assert (code, told[1:]) == (1, [complaint])  # the first line is the good case
    assert not read_run(out).warnings
    assert measured(out) == [1]

    before = gangs(out)
    assert run(file, out, *words) == (1, [complaint])  # still full: nothing is started
    assert gangs(out) == before

    (out / "ballast").unlink()
    code, told = run(file, out, *words, calm=True)
    assert code == 0, told
    assert measured(out) == [2]  # the two operators, once each
