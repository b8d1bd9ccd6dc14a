"""What an environment records of the software."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from git_repository import git
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
    assert git.stdout.startswith(recorded.partition("+")[0])


def test_changed_and_untracked_source_is_another_commit(tmp_path: Path) -> None:
    """Documents are not source; ignored Python files are, for they may be imported."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def commit() -> str:
        code = "from cpbench.core import environment; print(environment.commit())"
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    for name in ("cpbench", "kernels", "launchers", "reports", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("__pycache__\n/kernels/private.py\n")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    found = [commit()]
    (tmp_path / "README.md").write_text("words\n")
    found.append(commit())
    assert found == [head, head]
    for file in ("kernels/reference.py", "kernels/new.py", "kernels/private.py"):
        with open(tmp_path / file, "a", encoding="utf-8") as lines:
            lines.write("# changed\n")
        found.append(commit())
    assert all(name.startswith(f"{head}+") for name in found[2:])
    assert len(set(found)) == 4


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
