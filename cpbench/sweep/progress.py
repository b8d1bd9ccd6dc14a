"""Display of the progress of a run, case by case."""

from __future__ import annotations

import sys
import time
from collections import Counter

from cpbench.core.problem import Case
from cpbench.core.spec import three_digits
from cpbench.results.record import Record


def describe_result(record: Record) -> str:
    """The result of a case in a few words."""
    if record.median_us is None:
        if record.status != "ok":
            return f"{record.status}: {record.reason}"
        return f"ok, max error {record.worst_error:.1e}" if record.worst_error else "ok"
    noise = f" ±{record.noise:.1%}" if record.noise is not None else ""
    flags = f" [{' '.join(record.flags)}]" if record.flags else ""
    return f"{three_digits(record.median_us / 1e3)} ms{noise}{flags}"


def format_duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class ProgressLines:
    """Progress as plain lines, for logs."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet, self._done = total, quiet, 0
        self._begun = time.monotonic()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def case_started(self, case: Case) -> None:
        """Show a case that starts."""

    def case_finished(self, record: Record) -> None:
        """Show the result of a case."""
        self._done += 1
        if not self._quiet:
            result = f"{record.case.label}: {describe_result(record)}"
            print(
                f"[{self._done}/{self._total}{self._left()}] {result}", file=sys.stderr, flush=True
            )

    def _left(self) -> str:
        """The time that the cases left would take at the pace so far; "" for the last one."""
        remaining = self._total - self._done
        if not remaining:
            return ""
        seconds = (time.monotonic() - self._begun) / self._done * remaining
        return f", {format_duration(seconds)} left"


class _ProgressBar(ProgressLines):
    """Progress as a bar with the remaining time, for terminals."""

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
            refresh_per_second=2,  # the default, 10, takes 2 % of a core
        )  # fmt: skip
        self._task = self._bar.add_task("starting workers", total=total)
        self._turns = Counter[str]()

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def case_started(self, case: Case) -> None:
        self._turns[case.id] += 1
        turn = self._turns[case.id]
        description = case.label + (f", turn {turn}" if turn > 1 else "")
        self._bar.update(self._task, description=description)

    def case_finished(self, record: Record) -> None:
        self._bar.console.print(
            f"{record.case.label}: {describe_result(record)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        self._bar.advance(self._task)


def progress_display(total: int, quiet: bool) -> ProgressLines:
    """A display for ``total`` cases: a bar on terminals, else lines."""
    if sys.stderr.isatty() and not quiet:
        return _ProgressBar(total)
    return ProgressLines(total, quiet)
