"""Repositories that tests make."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git(folder: Path, *words: str, date: str = "") -> str:
    """The output of a git command that must succeed.

    Args:
        date: of a commit that it makes.
    """
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    env = {**os.environ, **({"GIT_COMMITTER_DATE": date} if date else {})}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()
