"""Progress of a run, told case by case."""

from __future__ import annotations

import sys

from cpbench.core.problem import Case
from cpbench.results.record import Record


def outcome(record: Record) -> str:
    """What became of a case, in a few words."""
    if record.median_us is None:
        if record.status != "ok":
            return f"{record.status}: {record.reason}"
        return f"ok, largest error {record.worst_error:.1e}" if record.worst_error else "ok"
    noise = f" ±{record.noise:.1%}" if record.noise is not None else ""
    flags = f" [{' '.join(record.flags)}]" if record.flags else ""
    return f"{record.median_us / 1e3:.3g} ms{noise}{flags}"


class Lines:
    """Progress as plain lines, for logs."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet, self._done = total, quiet, 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def starting(self, case: Case) -> None:
        pass

    def finished(self, record: Record) -> None:
        self._done += 1
        if not self._quiet:
            print(
                f"[{self._done}/{self._total}] {record.case.label}: {outcome(record)}",
                file=sys.stderr,
                flush=True,
            )


class _Bar(Lines):
    """Progress as a bar with the time left, for terminals."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        super().__init__(total, False)
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True), transient=True,
            refresh_per_second=2,  # ten would take 2 % of a core that is being measured
        )  # fmt: skip
        self._task = self._bar.add_task("starting workers", total=total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def starting(self, case: Case) -> None:
        self._bar.update(self._task, description=case.label)

    def finished(self, record: Record) -> None:
        self._bar.console.print(
            f"{record.case.label}: {outcome(record)}", markup=False, highlight=False, soft_wrap=True
        )
        self._bar.advance(self._task)


def progress(total: int, quiet: bool) -> Lines:
    return _Bar(total) if sys.stderr.isatty() and not quiet else Lines(total, quiet)
