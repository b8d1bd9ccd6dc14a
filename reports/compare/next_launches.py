"""The commands that add launches to two runs, so that undecided cases are decided."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cpbench.results.store import read_document


def commands(base: Path, new: Path, launches: int) -> list[str]:
    """Lines for people: what to run for so many launches per side."""
    sweep = _sweep_argument(new) or _sweep_argument(base) or "SWEEP"
    return [
        f"To decide, about {launches} launches of each run, in turn: repeat these with 1, 2, … "
        f"{launches}, each with its own version:",
        *(f"    {_run_command(folder, launches)}" for folder in (base, new)),
        "or let one command do both, and stop once all is decided:",
        f"    cpbench race OLD_VENV NEW_VENV {sweep} --max-launches {launches}",
    ]


def _run_command(folder: Path, launches: int) -> str:
    """The command that made a run directory, with another number of launches."""
    words = _recorded_command(folder)
    if not words:
        words = ["run", "SWEEP", "--out", str(folder)]
    kept, skip = list[str](), False
    for word in words:
        if not skip and word != "--launches" and not word.startswith("--launches="):
            kept.append(word)
        skip = word == "--launches"
    return shlex.join(["cpbench", *kept, "--launches", str(launches)])


def _sweep_argument(folder: Path) -> str | None:
    words = _recorded_command(folder)
    return shlex.quote(words[1]) if len(words) > 1 and not words[1].startswith("-") else None


def _recorded_command(folder: Path) -> list[str]:
    """The words of the newest ``cpbench run`` of a run directory; none if it does not have them."""
    try:
        document: dict[str, Any] = read_document(folder / "sweep.json")
    except (OSError, ValueError):
        return []
    words = document.get("command")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return []
    return words if words[:1] == ["run"] else []
