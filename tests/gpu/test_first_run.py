"""The script for the first minutes on a GPU: to its end, also without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from limits import LIMIT_S
from paths import ROOT

STEPS = ("doctor", "triton", "quick", "tune", "dense", "block_sparse", "documents", "flex", "small",
         "one_rank")  # fmt: skip


def test_it_runs_to_its_end(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(ROOT / "tests/gpu/first_run.sh"), "out"], cwd=tmp_path,
        env={**environ, "PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    for name in STEPS:
        assert f"- **{name}** (" in summary
        assert (tmp_path / "out" / f"{name}.log").exists()
    assert summary.rstrip().endswith("Please paste this file into an issue.")
    if not torch.cuda.is_available():
        assert "There is no NVIDIA GPU here" in summary
        assert "tune needs a GPU" in summary
