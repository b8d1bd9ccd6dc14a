"""A folder with some files, and what every refusal of invalid input has in common."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cpbench.cli import main

GOOD = """
from cpbench.core.registry import OperatorInfo
number = 5
my_op = OperatorInfo(name="my_op", summary="mine", source="me", load=dict)
"""


def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with some files."""
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "good.txt").write_text("5\n")
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "exits.py").write_text("print('hello')\nraise SystemExit(0)\n")
    (tmp_path / "binary.py").write_bytes(bytes(range(256)))
    (tmp_path / "binary.py.toml").write_bytes(bytes(range(256)))
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "started" / "records").mkdir(parents=True)
    (tmp_path / "damaged" / "records").mkdir(parents=True)
    (tmp_path / "damaged" / "records" / "a.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)
    # Temporary files of a command would be created in this folder, and noticed.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_refused(code: int, out: str, err: str, parts: list[str]) -> None:
    assert (code, out) == (2, "")
    assert err.startswith("cpbench: ")
    assert err.endswith("\n")
    lines = [line for line in err.splitlines() if line != "hello"]  # printed by the user's file
    assert len(lines) == 1, err
    assert len(err) < 1200
    for part in parts:
        assert part in err


def check_command(
    argv: list[str], parts: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    code = main.invoke(argv)
    printed = capfd.readouterr()
    err = printed.err.removeprefix("hello\n")
    check_refused(code, printed.out, err, parts)
    assert files(folder) == before
