"""What an environment records of the software."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import ROOT

from cpbench.core import environment


def test_the_commit_of_a_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    recorded = environment.commit()
    assert recorded
    assert git.stdout.startswith(recorded.removesuffix("+"))


def test_the_affinity_is_recorded_as_ranges() -> None:
    assert environment.format_ranges({8, 3, 1, 0, 2, 10}) == "0-3,8,10"
    assert environment.format_ranges([5]) == "5"
    assert environment.format_ranges([]) == ""
    code = "from cpbench.core.environment import *; print(collect_environment()['affinity'])"
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(core)
