"""The versions of a history, from run directories, in the order of their commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cpbench
from cpbench.core.git import git
from cpbench.results.store import Run
from cpbench.results.worlds import describe, differences, world_of

_NEVER_NAMED = ("affinity",)  # differs by itself


@dataclass(frozen=True)
class Version:
    """What was measured as one.

    Attributes:
        name: the commit that differs between versions, or the run directory.
        commit: of cpbench, or of the files that the sweep names; with a hash of changes after
            ``+``; "" if unknown.
        started: time of its first record.
        runs: its run directories, by name.
    """

    name: str
    commit: str
    started: float
    runs: Mapping[str, Run]

    def facts(self) -> dict[str, str]:
        """Facts of machine and software of its newest run."""
        environments = [e for run in self.runs.values() for e in run.environments.values()]
        found: dict[str, str] = world_of(environments[-1], {}) if environments else {}
        return {
            name: value
            for name, value in found.items()
            if name not in _NEVER_NAMED and value != self.commit
        }


def versions(runs: Mapping[str, Run]) -> tuple[list[Version], str]:
    """The versions of run directories, oldest first, and by what they are ordered, in words.

    What tells versions apart is the commit of the files that sweeps name, if that differs, or else
    the commit of cpbench; if neither does, or one is unknown, each directory is a version.  The
    order is that of the dates of commits where git knows all of them (in the working directory, or
    in the source tree of cpbench), else that of their first records.
    """
    for key in ("files_commit", "commit"):
        commits = {name: _commit(run, key) for name, run in runs.items()}
        if len(set(commits.values())) > 1 and all(commits.values()):
            break
    else:
        short = {name: Path(name).name for name in runs}
        unique = len(set(short.values())) == len(runs)
        named = [
            Version(short[name] if unique else name, "", _started({name: run}), {name: run})
            for name, run in runs.items()
        ]
        return sorted(named, key=lambda version: version.started), "the time of measurement"
    by_commit: dict[str, dict[str, Run]] = {}
    for name, commit in commits.items():
        by_commit.setdefault(commit, {})[name] = runs[name]
    found = [Version(commit, commit, _started(of), of) for commit, of in by_commit.items()]
    dates = {version.commit: _commit_date(version.commit) for version in found}
    if None in dates.values():
        return sorted(found, key=lambda version: version.started), "the time of measurement"
    found.sort(key=lambda v: (dates[v.commit], "+" in v.commit, v.started))
    return found, "the dates of commits"


def change_of_world(before: Version, after: Version) -> str:
    """What else changed between two versions: ``torch 2.10 instead of 2.9, …``; "" for nothing."""
    changed = differences(after.facts(), before.facts())
    return describe(changed) if changed else ""


def commits_between(before: Version, after: Version) -> int | None:
    """Number of commits from one version to another; None if git does not know."""
    ends = [version.commit.partition("+")[0] for version in (before, after)]
    count = _git("rev-list", "--count", f"{ends[0]}..{ends[1]}") if all(ends) else None
    return int(count) if count else None


def _commit(run: Run, key: str) -> str:
    """A commit of the environment of the newest record of a run; "" if unknown."""
    newest = max(run.records.values(), key=lambda record: record.order)
    return str(run.environments.get(newest.environment or "", {}).get(key) or "")


def _started(runs: Mapping[str, Run]) -> float:
    return min(record.started for run in runs.values() for record in run.records.values())


def _commit_date(commit: str) -> int | None:
    """Seconds since the epoch; None if git does not know the commit."""
    date = _git("show", "-s", "--format=%ct", f"{commit.partition('+')[0]}^{{commit}}")
    return int(date) if date and date.isdigit() else None


def _git(*words: str) -> str | None:
    """The output of git in the working directory, or else in the source tree of cpbench; None if
    both fail."""
    outputs = (
        git(folder, *words) for folder in (Path(), Path(cpbench.__file__).resolve().parents[1])
    )
    return next((output for output in outputs if output is not None), None)


def short_names(found: Sequence[Version]) -> list[str]:
    """Names, of commits cut to what tells them apart, at least seven characters."""
    names = [version.name for version in found]
    length = 7
    while len({name[:length] for name in names}) < len(set(names)):
        length += 1
    return [
        version.name[:length] if version.commit and "+" not in version.name else version.name
        for version in found
    ]
