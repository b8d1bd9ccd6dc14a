"""The training loop of docs/context_parallel.py: the loss of several ranks is that of one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import LIMIT_S
from paths import ROOT


@pytest.mark.parametrize(
    "options",
    [
        ("--strategy", "ring", "--steps", "20"),
        ("--strategy", "ulysses", "--layout", "contiguous", "--steps", "4", "--compile"),
        ("--strategy", "tree", "--ranks", "3", "--layout", "striped", "--steps", "3"),
    ],
    ids=["ring", "ulysses-compiled", "three-ranks"],
)
def test_losses_are_those_of_one_rank(options: tuple[str, ...], tmp_path: Path) -> None:
    plot = tmp_path / "losses.png"
    command = [sys.executable, str(ROOT / "docs/context_parallel.py"), *options]
    result = subprocess.run(
        [*command, "--plot", str(plot)], capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = re.search(r"largest difference over (\d+) steps: (\S+)", result.stdout)
    assert found
    assert found[1] == options[options.index("--steps") + 1]
    assert 0 <= float(found[2]) < 1e-5
    losses = [float(line.split()[1]) for line in result.stdout.splitlines()[1:-1]]
    assert losses[-1] < losses[0]
    assert plot.stat().st_size > 5000
