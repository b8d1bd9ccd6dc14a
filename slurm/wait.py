"""Waiting for a sweep's jobs, from the shell that submitted them or another."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from cpbench.results.store import Tail, read_run
from cpbench.slurm import client, submission
from cpbench.slurm.job_states import JobState
from cpbench.slurm.site_profile import Profile
from cpbench.slurm.submission import Board
from cpbench.sweep import progress, runs

RECORDS_S = 1.0  # between looks at the records, which cost the controller nothing
FIRST_POLL_S = 2.0
SLOWER = 1.5


@dataclass
class Follower:
    """Follows until every job of a request has ended.

    Args:
        request: whose cases are waited for.
        profile: for resubmission.
        resubmit: how often cases that are left by jobs which were stopped are submitted again.
        quiet: print nothing.
    """

    request: runs.Request
    profile: Profile
    resubmit: int = 0
    quiet: bool = False
    _told: dict[str, tuple[str, str]] = field(default_factory=dict)

    def wait(self) -> None:
        """Return when nothing is to be waited for any more.

        Raises:
            SlurmError: when a resubmission is refused.
        """
        left = {case.id for case in runs.remaining(self.request)}
        with progress.progress(len(left), self.quiet) as lines:
            tails: dict[str, Tail] = {}
            poll_s, next_poll = FIRST_POLL_S, 0.0
            while True:
                self._records(left, tails, lines)
                if time.monotonic() >= next_poll:
                    try:
                        states = Board(self.request.out).look()
                    except client.Busy as error:
                        self._say(str(error))
                        states = None
                    if states is not None and not self._goes_on(states):
                        self._records(left, tails, lines)
                        return
                    next_poll = time.monotonic() + poll_s
                    poll_s = min(poll_s * SLOWER, max(self.profile.poll_s, FIRST_POLL_S))
                time.sleep(RECORDS_S)

    def _records(self, left: set[str], tails: dict[str, Tail], lines: progress.Lines) -> None:
        """Tell of the cases that have ended since the last look."""
        fresh = False
        for path in sorted((self.request.out / "records").glob("*.jsonl")):
            tail = tails.setdefault(path.name, Tail(path))
            fresh |= bool(tail.read())
        if fresh:
            found = read_run(self.request.out).records
            for key in sorted(left & set(found), key=lambda key: found[key].started):
                if key not in {case.id for case in runs.remaining(self.request)}:
                    left.discard(key)
                    lines.finished(found[key])

    def _goes_on(self, states: dict[str, JobState]) -> bool:
        """Tell what has changed; whether some job may still bring something."""
        for one in submission.submissions(self.request.out):
            state = submission.of_job(one, states)
            if state is not None and self._told.get(one.job) != (state.state, state.words):
                self._told[one.job] = (state.state, state.words)
                ranks = f" ({one.ranks} ranks)" if one.ranks else " (report)"
                on = f" on {state.nodes}" if state.nodes and state.alive else ""
                self._say(f"job {one.job}{ranks}: {state.words}{on}")
        waiting = [s for s in states.values() if s.alive and not s.stuck]
        if waiting:
            return True
        todo = runs.remaining(self.request)
        mine = {case.id for case in todo}
        stopped = [
            one
            for one in submission.submissions(self.request.out)
            if mine & set(one.cases)
            and any(state.may_go_on for state in submission.of_tasks(one, states))
        ]
        if todo and stopped and self.resubmit:
            self.resubmit -= 1
            again = set().union(*(one.cases for one in stopped))
            cases = [case for case in todo if case.id in again]
            self._say(f"{len(cases)} cases are left: submitted again")
            submission.submit(self.request, cases, self.profile)
            return True
        return False

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
