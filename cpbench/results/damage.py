"""Damaged files of a run directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from cpbench.results.sealed import DamagedError, unseal
from cpbench.results.store import read_lines


def damaged_files(out: Path) -> list[str]:
    """A line for every damaged line or file of a run directory beside its records and timelines,
    which say so where they are read."""
    warnings: list[str] = []
    for path in _find(out, "jobs/*/rank*.jsonl", "slurm/*.jsonl"):
        in_file: list[str] = []
        for _ in read_lines(path, in_file):
            pass
        warnings += [f"{path.parent.relative_to(out)}/{warning}" for warning in in_file]
    for path in _find(out, "sweep.json", "jobs/*/*.json", "running/*.json", "slurm/*.json"):
        with suppress(FileNotFoundError):  # its process has ended meanwhile
            try:
                unseal(path.read_bytes())
            except DamagedError as error:
                warnings.append(f"{path.relative_to(out)}: {error}")
    return warnings


def _find(out: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in out.glob(pattern))
