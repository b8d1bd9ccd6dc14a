"""The two versions of a race: an environment each, or the working tree and one of its commits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import cpbench
from cpbench.core.git import git


@dataclass(frozen=True)
class Side:
    """One version.

    Attributes:
        name: ``"base"`` or ``"new"``.
        python: its interpreter.
        sweep: path or name of the sweep, as that version reads it.
        out: run directory.
        cwd: folder from which relative paths on the command line count.
        env: variables to set.
    """

    name: str
    python: Path
    sweep: str
    out: Path
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)


def of_environments(old: Path, new: Path, sweep: str, out: Path) -> tuple[Side, Side]:
    """Two virtual environments (or interpreters), each with cpbench.

    Raises:
        ValueError: for one without an interpreter.
    """
    path = str(Path(sweep).absolute()) if Path(sweep).is_file() else sweep
    env = {"PYTHONPATH": ""}  # which would put one cpbench before those of both environments
    base, other = (
        Side(name, _interpreter(folder), path, out / name, Path.cwd(), env)
        for name, folder in (("base", old), ("new", new))
    )
    return base, other


def _interpreter(environment: Path) -> Path:
    python = environment / "bin" / "python" if environment.is_dir() else environment
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ValueError(
            f"{environment} is no virtual environment: there is no interpreter {python}"
        )
    return python.absolute()  # not resolved: a link would lead out of the environment


def of_revision(revision: str, sweep: str, out: Path) -> tuple[Side, Side]:
    """A commit, in a clone below ``out``, and the working tree.

    The repository is that of the sweep, or else of the working directory, or else of cpbench.
    Modules at its root come first in the search path of Python, so that a commit of cpbench itself
    runs with the installed versions of all other packages.

    Raises:
        ValueError: when there is no repository or no such commit.
    """
    if shutil.which("git") is None:
        raise ValueError("--against needs git, which is not installed")
    path = Path(sweep).absolute() if Path(sweep).is_file() else None
    places = (path.parent if path else None, Path.cwd(), Path(cpbench.__file__).resolve().parent)
    repository = next((top for place in places if place and (top := _repository(place))), None)
    if repository is None:
        raise ValueError("--against needs a git repository; give two environments instead")
    commit = git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"--against {revision}: there is no such commit in {repository}")
    clone = out / "base-source" / commit[:12]
    if not clone.is_dir():
        _clone(repository, commit, clone)
    sides = []
    for name, root in (("base", clone.absolute()), ("new", repository)):
        own_sweep = sweep if path is None else str(_below(root, path, repository))
        if path is not None and Path(own_sweep) != path:  # the same cases on both sides
            Path(own_sweep).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, own_sweep)
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        }
        cwd = _below(root, Path.cwd(), repository)
        sides.append(Side(name, Path(sys.executable), own_sweep, (out / name).absolute(),
                          cwd if cwd.is_dir() else root, env))  # fmt: skip
    return sides[0], sides[1]


def _below(root: Path, path: Path, repository: Path) -> Path:
    """The path in another copy of its repository; the path itself where it is outside."""
    resolved = path.resolve()
    inside = resolved.is_relative_to(repository)
    return root / resolved.relative_to(repository) if inside else path


def _repository(folder: Path) -> Path | None:
    """The root of the git repository of a folder, if any."""
    top = git(folder, "rev-parse", "--show-toplevel")
    return Path(top).resolve() if top else None


def _clone(repository: Path, commit: str, folder: Path) -> None:
    """Clone a repository at a commit; its objects are shared, and nothing is written to it."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    steps = (
        ("clone", "--quiet", "--shared", "--no-checkout", str(repository), str(unfinished)),
        ("-C", str(unfinished), "checkout", "--quiet", "--detach", commit),
    )
    for step in steps:
        done = subprocess.run(["git", *step], capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise ValueError(f"git {step[0]}: {' '.join(done.stderr.split())}")
    unfinished.rename(folder)
