"""One or several run directories as one collection, the subject of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.core.subprocess_call import collection_paused
from cpbench.reports.frame import tidy_table
from cpbench.reports.labels import pluralize
from cpbench.reports.predicted.columns import split_predicted
from cpbench.reports.where import filter_rows, filter_run
from cpbench.results.prediction import STATUS
from cpbench.results.store import Run, read_run

if TYPE_CHECKING:
    import pandas as pd

_MAX_WARNINGS = 20  # per directory


@dataclass(frozen=True)
class Collection:
    """Runs merged into one table.

    Attributes:
        table: one row per measured case and machine, see ``COLUMNS``; index from 0.
        predicted: rows of the cases that were predicted, measured or not.
        runs: by the name of their directory.
        warnings: damaged, skipped or duplicate records; launches that are not pooled.
    """

    table: pd.DataFrame
    predicted: pd.DataFrame
    runs: Mapping[str, Run]
    warnings: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return " + ".join(Path(name).name or name for name in self.runs)

    @property
    def whole(self) -> pd.DataFrame:
        """``table``, and below it the cases that were predicted only."""
        import pandas as pd

        unmeasured = self.predicted[self.predicted["status"] == STATUS]
        if self.table.empty or unmeasured.empty:
            return self.table if unmeasured.empty else unmeasured
        return pd.concat([self.table, unmeasured], ignore_index=True)

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        return {key: facts for run in self.runs.values() for key, facts in run.environments.items()}


def collect(folders: Sequence[Path], where: Sequence[str] = ()) -> Collection:
    """Read run directories.

    Args:
        where: conditions ``key=value[,value]``, see ``cpbench.reports.where``; other cases are left
            out.

    Raises:
        ValueError: for a folder that is not a run directory, when no case is finished, or when none
            meets the conditions.
    """
    for folder in folders:
        if not (folder / "records").is_dir():
            raise ValueError(f"{folder} is not a run directory: it has no records folder")
    with collection_paused():  # it would scan millions of live objects
        runs = {str(folder): read_run(folder) for folder in folders}
    if not any(run.records or run.predictions for run in runs.values()):
        names = ", ".join(runs)
        hint = [warning for run in runs.values() for warning in run.warnings[:1]]
        hold = "hold" if len(runs) > 1 else "holds"
        raise ValueError("; ".join([f"{names} {hold} no finished case yet", *hint[:1]]))
    collection = merge_runs(runs)
    if not where:
        return collection
    whole = filter_rows(collection.whole, where).reset_index(drop=True)
    table, predicted = split_predicted(whole)
    ids = {name: set(rows["id"]) for name, rows in table.groupby("run")}
    filtered = {name: filter_run(run, ids.get(name, set())) for name, run in runs.items()}
    return replace(collection, table=table, predicted=predicted, runs=filtered)


def merge_runs(runs: Mapping[str, Run]) -> Collection:
    """Merge runs; of a case measured several times on one machine, keep the newest row."""
    import pandas as pd

    whole = pd.concat([tidy_table(run, name) for name, run in runs.items()], ignore_index=True)
    whole, predicted = split_predicted(whole)
    table = whole.sort_values("started", kind="stable").drop_duplicates(
        ["id", "machine"], keep="last"
    )
    table = table.sort_index().reset_index(drop=True)
    warnings = []
    for name, run in runs.items():
        prefix = f"{name}: " if len(runs) > 1 else ""
        warnings += [f"{prefix}{warning}" for warning in run.warnings[:_MAX_WARNINGS]]
        if len(run.warnings) > _MAX_WARNINGS:
            more = len(run.warnings) - _MAX_WARNINGS
            warnings.append(f"{prefix}and {more} more warnings: cpbench status {name}")
        missing = {record.environment for record in run.records.values()} - {
            None,
            *run.environments,
        }
        if missing:
            warnings.append(
                f"{prefix}{pluralize(len(missing), 'environment')} named in records "
                f"{'is' if len(missing) == 1 else 'are'} missing: their machine is unknown"
            )
    if duplicates := len(whole) - len(table):
        warnings.append(
            f"{pluralize(duplicates, 'case')} measured on the same machine in several directories: "
            "the newest are shown (cpbench compare compares the runs)"
        )
    return Collection(table, predicted, dict(runs), warnings)
