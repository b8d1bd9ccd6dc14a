"""``cpbench race``: launches of two versions in turn, until every case is decided.

After each launch of both, cases that have failed or are missing are decided; times are looked at
after ``looks`` numbers of launches only, each time with an equal share of the level of the test
(Bonferroni), so that looking often does not make an identical version fail more often.  Cases that
are decided are not run again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpbench.core.subprocess_call import MODULE
from cpbench.reports.compare.gate import UNDECIDED, Decision, GateResult, evaluate_gate
from cpbench.reports.compare.statistics import ALPHA
from cpbench.reports.compare.verdicts import case_key
from cpbench.results.contest import MIN_LAUNCHES
from cpbench.results.store import Run, read_run
from cpbench.tools.race.side import Side

_GROWTH = 1.4  # from one look to the next
_NO_IDS = "no key 'id'"  # of a version that cannot select cases by their ids


class RaceError(ValueError):
    """A version cannot run the sweep; the message is one line."""


@dataclass
class Race:
    """A race between two versions.

    Attributes:
        sides: base and new.
        max_slowdown, max_memory: see :func:`evaluate_gate`.
        max_launches: of each case and version.
        options: further options of ``cpbench run``.
        show: prints a line of progress.
        decisions: of the decided cases, by id.
    """

    sides: tuple[Side, Side]
    max_slowdown: float
    max_memory: float
    max_launches: int
    options: tuple[str, ...] = ()
    show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    decisions: dict[str, Decision] = field(default_factory=dict)
    _selects: dict[str, bool] = field(default_factory=dict)

    def run(self) -> GateResult:
        """Run the race; the decision on every case.

        Raises:
            RaceError: when a version cannot run the sweep.
            ValueError: see :func:`evaluate_gate`.
        """
        begun, undecided = time.monotonic(), None
        share = ALPHA / len(looks(self.max_launches))
        for launch in range(1, self.max_launches + 1):
            order = self.sides if launch % 2 else self.sides[::-1]
            for side in order:
                self._launch(side, launch, undecided)
            if launch == 1:
                self._check_versions()
            if launch > MIN_LAUNCHES and launch not in looks(self.max_launches):
                continue
            result = self._evaluate(share)
            undecided = {key for key in result.decisions if key not in self.decisions}
            minutes, seconds = divmod(round(time.monotonic() - begun), 60)
            self.show(
                f"launch {launch} of at most {self.max_launches}: "
                f"{len(self.decisions)} of {len(result.decisions)} cases decided, "
                f"{minutes} min {seconds} s"
            )
            more_may_decide = any(result.decisions[key].launches for key in undecided)
            if not undecided or (launch >= MIN_LAUNCHES and not more_may_decide):
                break
        return replace(result, decisions={**result.decisions, **self.decisions})

    def _check_versions(self) -> None:
        """Say so if both versions are the same.

        Raises:
            RaceError: if the folder holds launches of another version than the new one.
        """
        versions = []
        for side, run in zip(self.sides, self._runs(), strict=True):
            keys = Counter(case_key(record.case) for record in run.records.values())
            if run.other_launches or max(keys.values(), default=1) > 1:
                raise RaceError(
                    f"{side.out} holds launches of another version: give another --out, for "
                    "launches of both versions must alternate"
                )
            versions.append(
                {
                    (
                        *record.case.content,
                        run.environments.get(record.environment or "", {}).get("commit"),
                    )
                    for record in run.records.values()
                }
            )
        if versions[0] == versions[1]:
            self.show("warning: both versions are the same code: only noise can tell them apart")

    def _evaluate(self, alpha: float) -> GateResult:
        """Evaluate the gate, and keep what it decides."""
        base, new = self._runs()
        result = evaluate_gate(base, new, self.max_slowdown, self.max_memory, alpha)
        for key, decision in result.decisions.items():
            if decision.outcome != UNDECIDED:
                self.decisions.setdefault(key, decision)
        return result

    def _runs(self) -> tuple[Run, Run]:
        return read_run(self.sides[0].out), read_run(self.sides[1].out)

    def _launch(self, side: Side, launch: int, undecided: Collection[str] | None) -> None:
        """Have one version measure the undecided cases once more."""
        words = [str(side.python), *MODULE, "cpbench", "run", side.sweep, "--out", str(side.out),
                 "--launches", str(launch), "--json", *self.options]  # fmt: skip
        if undecided is not None and self._selects.get(side.name, True):
            records = read_run(side.out).records.values()
            ids = [record.case.id for record in records if case_key(record.case) in undecided]
            code, error = _run([*words, "--where", f"id={','.join(ids)}"], side)
            if code != 2 or _NO_IDS not in error:
                _check(side, code, error)
                return
            self._selects[side.name] = False  # an older version: it runs all cases
        _check(side, *_run(words, side))


def looks(max_launches: int) -> list[int]:
    """Numbers of launches after which times are looked at: 5, 7, 10, 14, 20, 28, …"""
    numbers, number = list[int](), MIN_LAUNCHES
    while number < max_launches:
        numbers.append(number)
        number = round(number * _GROWTH)
    return [*numbers, max_launches]


def _run(words: list[str], side: Side) -> tuple[int, str]:
    """Exit code and last line of standard error of a command."""
    side.out.mkdir(parents=True, exist_ok=True)
    with open(side.out / "race.log", "a+", encoding="utf-8") as log:
        start = log.tell()
        code = subprocess.run(
            words, cwd=side.cwd, env={**os.environ, **side.env}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=log, check=False,
        ).returncode  # fmt: skip
        log.seek(start)
        lines = log.read().split("\n")
    return code, next((line for line in reversed(lines) if line.strip()), "")


def _check(side: Side, code: int, error: str) -> None:
    if code not in (0, 1):  # 1: some case failed, which is decided on later
        log = Path(os.path.relpath(side.out / "race.log"))
        raise RaceError(
            f"{side.name}: {error.removeprefix('cpbench: ') or f'exit code {code}'} ({log})"
        )
