"""The command that started a run, as its directory records it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cpbench.results.store import read_document


def recorded_words(folder: Path) -> list[str]:
    """The words of the newest ``cpbench run``, ``bench`` or ``verify`` of a run directory; none if
    it does not have them."""
    try:
        document: dict[str, Any] = read_document(folder / "sweep.json")
    except (OSError, ValueError):
        return []
    words = document.get("command")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return []
    return words if words[:1] in (["run"], ["bench"], ["verify"]) else []


def into_folder(words: list[str], folder: Path) -> list[str]:
    """The words of a command that goes on in a run directory, whose default may be another one."""
    if any(word.partition("=")[0] == "--out" for word in words):
        return words
    return [*words, "--out", str(folder)]


def resuming_command(folder: Path) -> str:
    """What a user types to resume a run, in the folder where it was started; "" if unknown."""
    words = recorded_words(folder)
    return shlex.join(["cpbench", *into_folder(words, folder.absolute())]) if words else ""
