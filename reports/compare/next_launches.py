"""The commands that add launches to two runs, so that undecided cases are decided."""

from __future__ import annotations

import shlex
from pathlib import Path

from cpbench.results.recorded_command import into_folder, recorded_words
from cpbench.results.store import Run


def commands(base: Path, new: Path, launches: int, fewest: int, against: str) -> list[str]:
    """Lines for people: what to run for so many launches per side.

    Args:
        fewest: launches that each undecided case has.
        against: commit of the base, if the new run differs from it by its commit alone.
    """
    lines = [
        f"More launches of both, in turn: repeat these with {fewest + 1}, … {launches}, each with "
        "its own version:",
        *(f"    {_run_command(folder, launches)}" for folder in dict.fromkeys((base, new))),
    ]
    if {_command_name(base), _command_name(new)} == {"bench"}:  # race takes a sweep
        return lines
    sweep = _sweep_argument(new) or _sweep_argument(base) or "SWEEP"
    versions = f"--against {against}" if against else "OLD_ENV NEW_ENV"
    return [
        *lines,
        "or let one command measure both anew, and stop once all is decided:",
        f"    cpbench race {versions} {sweep} --max-launches {launches}",
    ]


def commit_of_base(base: Run, new: Run) -> str:
    """The commit of the base, where that of the new run is another one of the same repository: of
    the files that the sweep names, or else of cpbench; "" if there is none."""
    for key in ("files_commit", "commit"):
        values = [
            {str(facts.get(key) or "") for facts in run.environments.values()}
            for run in (base, new)
        ]
        if all(len(of_run) == 1 for of_run in values) and values[0] != values[1]:
            (commit,) = values[0]
            return "" if "+" in commit else commit
    return ""


def _run_command(folder: Path, launches: int) -> str:
    """The command that made a run directory, with another number of launches."""
    words = _measuring_words(folder)
    if not words:
        words = ["run", "SWEEP", "--out", str(folder)]
    kept, skip = list[str](), False
    for i, word in enumerate(words):
        ids = word == "--where" and words[i + 1 : i + 2] and words[i + 1].startswith("id=")
        dropped = word in ("--launches", "--json") or word.startswith("--launches=") or ids
        if not skip and not dropped:
            kept.append(word)
        skip = not skip and (word == "--launches" or bool(ids))
    if kept[0] == "bench":  # else it would be a new one
        kept = into_folder(kept, folder)
    return shlex.join(["cpbench", *kept, "--launches", str(launches)])


def _sweep_argument(folder: Path) -> str | None:
    words = _measuring_words(folder)
    named = words[:1] == ["run"] and len(words) > 1 and not words[1].startswith("-")
    return shlex.quote(words[1]) if named else None


def _command_name(folder: Path) -> str:
    return (_measuring_words(folder) or ["run"])[0]


def _measuring_words(folder: Path) -> list[str]:
    """The words of the command that measured a run; none if they are unknown."""
    words = recorded_words(folder)
    return words if words[:1] in (["run"], ["bench"]) else []
