"""What an environment records of the software."""

from __future__ import annotations

import subprocess

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
