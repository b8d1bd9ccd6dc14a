"""Run directories taken together: what a report is about."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.reports.frame import frame
from cpbench.reports.labels import counted
from cpbench.results.store import Run, read_run

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 20  # warnings about one directory


@dataclass(frozen=True)
class Collection:
    """Some runs as one.

    Attributes:
        table: a row a case and machine, see ``COLUMNS``; index from 0.
        runs: by the name of their directory.
        warnings: what is damaged, left out or overlaps.
    """

    table: pd.DataFrame
    runs: Mapping[str, Run]
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return " + ".join(Path(name).name or name for name in self.runs)

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        return {key: told for run in self.runs.values() for key, told in run.environments.items()}


def collect(folders: Sequence[Path]) -> Collection:
    """What is in some run directories.

    Raises:
        ValueError: for a folder that is no run directory, or when there is no finished case.
    """
    for folder in folders:
        if not (folder / "records").is_dir():
            raise ValueError(f"{folder} is not a run directory: it has no records folder")
    with _no_garbage():
        runs = {str(folder): read_run(folder) for folder in folders}
    if not any(run.records for run in runs.values()):
        where = ", ".join(runs)
        hint = [warning for run in runs.values() for warning in run.warnings[:1]]
        hold = "hold" if len(runs) > 1 else "holds"
        raise ValueError("; ".join([f"{where} {hold} no finished case yet", *hint[:1]]))
    return together(runs)


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Millions of objects come, and stay: looking through them for garbage would take most of the
    time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def together(runs: Mapping[str, Run]) -> Collection:
    """Runs as one: of a case that several measured on the same machine, the newest row."""
    import pandas as pd

    whole = pd.concat([frame(run, name) for name, run in runs.items()], ignore_index=True)
    table = whole.sort_values("started", kind="stable").drop_duplicates(
        ["id", "machine"], keep="last"
    )
    table = table.sort_index().reset_index(drop=True)
    warnings = []
    for name, run in runs.items():
        before = f"{name}: " if len(runs) > 1 else ""
        warnings += [f"{before}{warning}" for warning in run.warnings[:_SHOWN]]
        if len(run.warnings) > _SHOWN:
            warnings.append(f"{before}and {len(run.warnings) - _SHOWN} more lines left out")
        missing = {record.environment for record in run.records.values()} - {
            None,
            *run.environments,
        }
        if missing:
            warnings.append(
                f"{before}{counted(len(missing), 'environment')} that records name "
                f"{'is' if len(missing) == 1 else 'are'} missing: their machine is unknown"
            )
    if twice := len(whole) - len(table):
        warnings.append(
            f"{counted(twice, 'case')} measured on the same machine in several directories: "
            "the newest are shown (cpbench compare tells them apart)"
        )
    return Collection(table, dict(runs), warnings)
