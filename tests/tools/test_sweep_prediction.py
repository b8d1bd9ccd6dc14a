"""``cpbench run SWEEP --predict``: predictions first, then the run itself, in one directory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import LIMIT_S

from cpbench.results.store import read_run
from cpbench.simulator.cluster import PACKAGED

SWEEP = """
[sweep]
operator = "bands"
strategy = ["ring", "ulysses", "ring_flash_attn.zigzag"]
layout = "zigzag"
mask = "causal"
seq_len = 256
world_size = 2
num_heads_q = 2
head_dim = 16
dtype = "bfloat16"

[measure]
max_seconds = 0.2
min_iterations = 3
max_iterations = 5
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep, and a cluster with a kernel for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    constants = (PACKAGED / "h100-ib.toml").read_text(encoding="utf-8")
    for old, new in (("flash_attn.3", "bands"), ("= 128\n", "= 16\n")):
        constants = constants.replace(old, new)
    (tmp_path / "own.toml").write_text(constants, encoding="utf-8")
    (tmp_path / "sweep.toml").write_text(SWEEP, encoding="utf-8")
    return tmp_path


def cpbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cpbench", *arguments], cwd=folder, capture_output=True, text=True,
        timeout=LIMIT_S,
    )  # fmt: skip


def test_a_predicted_sweep_is_still_to_be_run(folder: Path) -> None:
    predicted = cpbench(folder, "run", "sweep.toml", "--predict", "own.toml", "--out", "here")
    assert predicted.returncode == 0, predicted.stderr
    assert "# here: 2 cases predicted" in predicted.stdout
    assert "1 of 3 not predicted: ring_flash_attn.zigzag sends through a" in predicted.stderr
    measured = cpbench(folder, "run", "sweep.toml", "--out", "here", "--json")
    assert measured.returncode == 0, measured.stderr
    rows = {row["strategy"]: row for row in json.loads(measured.stdout)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for strategy, row in rows.items():
        assert row["time_ms"] > 0
        assert (row["predicted_ms"] is None) == (strategy == "ring_flash_attn.zigzag")
    report = cpbench(folder, "report", "here")
    assert "Predictions of 2 measured cases: off by" in " ".join(report.stdout.split())


def test_an_interrupted_prediction_keeps_what_is_known(folder: Path) -> None:
    lengths = "seq_len = [256, 320, 384, 448, 512, 576, 640, 704]"
    (folder / "sweep.toml").write_text(SWEEP.replace("seq_len = 256", lengths), encoding="utf-8")
    command = ("run", "sweep.toml", "--predict", "own.toml", "--out", "here")
    process = subprocess.Popen(
        [sys.executable, "-m", "cpbench", *command], cwd=folder, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while process.poll() is None and not read_run(folder / "here").predictions:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=LIMIT_S)
    kept = len(read_run(folder / "here").predictions)
    assert process.returncode == 130
    assert 1 <= kept < 24
    assert f"interrupted: {kept} of 24 predictions are kept in here; repeat" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--predict", "own.toml", "--dry-run"), "--predict runs nothing: leave out --launcher"),
        (("--predict", "own.toml", "--launcher", "mpi"), "--predict runs nothing"),
        (("--predict", "nowhere"), "nowhere"),
        (("--predict", "h100-ib"), "no case can be predicted: "),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    folder: Path, arguments: tuple[str, ...], line: str
) -> None:
    done = cpbench(folder, "run", "sweep.toml", "--out", "here", *arguments)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not done.stdout
