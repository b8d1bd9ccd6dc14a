"""Waiting for the jobs of a sweep, from any shell."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from cpbench.results.store import Tail, read_run
from cpbench.slurm import client, submission
from cpbench.slurm.job_states import JobState
from cpbench.slurm.site_profile import Profile
from cpbench.slurm.submission import JobTracker
from cpbench.sweep import progress
from cpbench.sweep.remaining import remaining_cases
from cpbench.sweep.request import Request

RECORD_POLL_S = 1.0  # interval of reading the records, which needs no controller
MIN_POLL_S = 2.0  # first interval of requests to the controller
POLL_BACKOFF = 1.5  # factor by which that interval grows


@dataclass
class JobWaiter:
    """Waits until all jobs of a request have ended, and shows their progress.

    Args:
        request: the request that the jobs are of.
        profile: for resubmission.
        resubmit: how many times to resubmit the remaining cases of interrupted jobs.
        quiet: whether to print nothing.
    """

    request: Request
    profile: Profile
    resubmit: int = 0
    quiet: bool = False
    _shown_states: dict[str, tuple[str, str]] = field(default_factory=dict)

    def wait(self) -> None:
        """Wait until no job can produce further results.

        Raises:
            SlurmError: when a resubmission is refused.
        """
        pending_ids = {case.id for case in remaining_cases(self.request)}
        with progress.progress_display(len(pending_ids), self.quiet) as display:
            tails: dict[str, Tail] = {}
            poll_s, next_poll = MIN_POLL_S, 0.0
            while True:
                self._show_new_records(pending_ids, tails, display)
                if time.monotonic() >= next_poll:
                    try:
                        states = JobTracker(self.request.out).query()
                    except client.ControllerBusy as error:
                        self._print(str(error))
                        states = None
                    if states is not None:
                        self._show_states(states)
                        live = any(state.alive and not state.stuck for state in states.values())
                        if not live and not self._resubmit_interrupted(states):
                            self._show_new_records(pending_ids, tails, display)
                            return
                    next_poll = time.monotonic() + poll_s
                    poll_s = min(poll_s * POLL_BACKOFF, max(self.profile.poll_s, MIN_POLL_S))
                time.sleep(RECORD_POLL_S)

    def _show_new_records(
        self, pending_ids: set[str], tails: dict[str, Tail], display: progress.ProgressLines
    ) -> None:
        """Show the cases that were recorded since the last call.

        Args:
            pending_ids: cases that have not been shown; those that are shown are removed.
            tails: readers of the record files, by name.
        """
        changed = False
        for path in sorted((self.request.out / "records").glob("*.jsonl")):
            tail = tails.setdefault(path.name, Tail(path))
            changed |= bool(tail.read())
        if changed:
            records = read_run(self.request.out).records
            finished = pending_ids & set(records) - {x.id for x in remaining_cases(self.request)}
            for key in sorted(finished, key=lambda key: records[key].order):
                pending_ids.discard(key)
                display.case_finished(records[key])

    def _show_states(self, states: dict[str, JobState]) -> None:
        """Print the states that have changed since the last call."""
        for job in submission.submitted_jobs(self.request.out):
            state = submission.job_state(job, states)
            if state is None:
                continue
            shown = (state.state, state.description)
            if self._shown_states.get(job.job) != shown:
                self._shown_states[job.job] = shown
                ranks = f" ({job.ranks} ranks)" if job.ranks else " (report)"
                nodes = f" on {state.nodes}" if state.nodes and state.alive else ""
                message = submission.last_message(self.request.out, job) if state.failed else ""
                why = f": {message}" if message else ""
                self._print(f"job {job.job}{ranks}: {state.description}{nodes}{why}")

    def _resubmit_interrupted(self, states: dict[str, JobState]) -> bool:
        """Resubmit the remaining cases of interrupted jobs, if allowed; whether it was done."""
        todo = remaining_cases(self.request)
        todo_ids = {case.id for case in todo}
        interrupted_ids: set[str] = set()
        for job in submission.submitted_jobs(self.request.out):
            if any(state.interrupted for state in submission.task_states(job, states)):
                interrupted_ids.update(job.cases)
        if not todo_ids & interrupted_ids or not self.resubmit:
            return False
        self.resubmit -= 1
        cases = [case for case in todo if case.id in interrupted_ids]
        self._print(f"{len(cases)} cases remain and are submitted again")
        submission.submit(self.request, cases, self.profile)
        return True

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
