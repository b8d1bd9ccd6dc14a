"""Damaged bits of a run directory never change results in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bit_flips import make_run, silent_damage
from made_records import record
from paths import DATA
from run_cpbench import cpbench

import cpbench as library
from cpbench.results.sealed import DamagedError, seal, unseal


def test_single_bits(tmp_path: Path) -> None:
    silent, named = silent_damage(make_run(tmp_path / "run"), 300)
    assert silent == []
    assert named > 200  # else this test could not fail


RECORD = {**record("bands", 1.0).to_json(), "sequence": 1}


@pytest.mark.parametrize("table", [RECORD, {"event": "done", "time": 1.5}], ids=["record", "event"])
def test_every_bit_of_a_line(table: dict[str, Any]) -> None:
    """Those of its keys and checksum too."""
    line = seal(json.dumps(table))
    assert unseal(line + b"\n") == table
    for position in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[position] ^= 1 << bit
            with pytest.raises(DamagedError):
                unseal(bytes(damaged) + b"\n")


def test_load_warns_of_damaged_lines_once_per_directory(tmp_path: Path) -> None:
    out = Path(shutil.copytree(DATA / "run_before_wings", tmp_path / "run"))
    path = max((out / "records").glob("*.jsonl"), key=lambda path: path.stat().st_size)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-2], lines[-2][:-30] + "\n", lines[-1].replace('"id', '"x')]))
    with pytest.warns(UserWarning, match="left out") as warned:
        table = library.load(out)
    assert len(table) == 8
    (warning,) = warned
    assert str(warning.message) == (
        f"{out}: {path.name}:{len(lines) - 1}: left out: torn or damaged (and 1 more)"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("name", ["sweep.json", "job.json"])
def test_commands_say_what_is_damaged_in_one_line(tmp_path: Path, name: str) -> None:
    out = make_run(tmp_path / "run").out
    (path, *_) = sorted(out.glob(f"**/{name}"))
    path.write_bytes(path.read_bytes().replace(b'"seq_len":512', b'"seq_len":513', 1))
    code, stderr = cpbench("status", out)
    if name == "sweep.json":
        assert code == 2
        assert stderr == (
            f"cpbench: {path} is damaged: its checksum does not match; "
            "repeat the command that started the run\n"
        )
    else:
        assert (code, stderr) == (0, "")
    path = next(iter(out.glob("records/*p1*.jsonl")))
    path.write_bytes(path.read_bytes().replace(b'"status":"ok"', b'"status":"on"'))
    code, stderr = cpbench("report", out)
    assert code == 0, stderr
