"""What a run directory says about how to go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpbench.results.recorded_command import resuming_command
from cpbench.tools.status import print_status


@pytest.mark.parametrize(
    ("words", "resumed"),
    [
        (["run", "my sweep.toml", "--out", "o"], "cpbench run 'my sweep.toml' --out o"),
        (["run", "sweep.toml", "--out=o"], "cpbench run sweep.toml --out=o"),
        (["bench", "--seq-len", "1k"], "cpbench bench --seq-len 1k --out FOLDER"),
        (["verify", "--quick"], "cpbench verify --quick --out FOLDER"),
        (["run", "quick"], "cpbench run quick --out FOLDER"),
        ([], ""), (["serve"], ""), ("run", ""), (["run", 1], ""), (None, ""),
    ],
)  # fmt: skip
def test_status_says_how_to_resume(
    words: object, resumed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"command": words}))
    resumed = resumed.replace("FOLDER", str(tmp_path))
    assert resuming_command(tmp_path) == resumed
    status = {
        "out": str(tmp_path), "recorded": 1, "cases": 2, "statuses": {"ok": 1}, "bad_nodes": {},
        "jobs": [], "processes": [], "under_way": [], "alive": False, "warnings": [],
    }  # fmt: skip
    print_status(status)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(resumed or "rerun the same command")


def test_a_folder_without_a_command_says_none(tmp_path: Path) -> None:
    assert resuming_command(tmp_path) == ""
    (tmp_path / "sweep.json").write_text("{")
    assert resuming_command(tmp_path) == ""
