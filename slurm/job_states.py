"""States of Slurm jobs and their meaning for a sweep.

Source: the "JOB STATE CODES" and "JOB REASON CODES" of squeue(1).
"""

from __future__ import annotations

from dataclasses import dataclass

FORGOTTEN = "FORGOTTEN"  # not a Slurm state: neither queue nor accounting knows the job
ALIVE_STATES = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED",
    "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT",
}  # fmt: skip
# Jobs ended by the cluster: their remaining cases are worth another job.
INTERRUPTED_STATES = {
    "TIMEOUT",
    "DEADLINE",
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "REVOKED",
    FORGOTTEN,
}
# Reasons of pending jobs that will not start without intervention.
STUCK_REASONS = {
    "DependencyNeverSatisfied", "BadConstraints", "PartitionNodeLimit", "PartitionTimeLimit",
    "PartitionConfig",
    "AccountNotAllowed", "InvalidAccount", "InvalidQOS", "QOSNotAllowed", "JobHeldUser",
    "JobHeldAdmin", "JobHoldMaxRequeue", "AssocMaxWallDurationPerJobLimit",
    "QOSMaxWallDurationPerJobLimit", "QOSMaxNodePerJobLimit", "AssocMaxNodePerJobLimit",
}  # fmt: skip
DESCRIPTIONS = {
    "COMPLETED": "ended",
    "FAILED": "failed",
    "TIMEOUT": "stopped at its time limit",
    "DEADLINE": "stopped at its deadline",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "lost a node that did not boot",
    "OUT_OF_MEMORY": "ran out of memory",
    "CANCELLED": "cancelled",
    "REVOKED": "moved to another cluster",
    FORGOTTEN: "no longer known to Slurm",
}
# Exit codes of cpbench.slurm.job_step.
EXIT_TIME, EXIT_NODES, EXIT_STORE = 75, 76, 74
EXIT_DESCRIPTIONS = {
    EXIT_TIME: "stopped before its time limit; cases remain",
    EXIT_NODES: "too few good nodes; see status",
    EXIT_STORE: "results could not be written",
}


@dataclass(frozen=True)
class JobState:
    """State of one job, or of one task of an array.

    Attributes:
        job: id, such as ``12`` or ``12_3``.
        state: Slurm's state, or ``FORGOTTEN``.
        reason: why it is pending, or has failed.
        nodes: its node list.
        elapsed: run time so far, as Slurm prints it.
        limit: time limit, as Slurm prints it.
        code: exit code of its script; None if unknown.
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    code: int | None = None

    @property
    def alive(self) -> bool:
        """Whether it may still finish cases."""
        return self.state in ALIVE_STATES

    @property
    def failed(self) -> bool:
        """Whether its script has ended with an error."""
        return not self.alive and bool(self.code)

    @property
    def stuck(self) -> bool:
        """Whether it is pending for a reason that does not go away by itself."""
        return self.state in ("PENDING", "REQUEUE_HOLD") and (
            self.reason in STUCK_REASONS or self.state == "REQUEUE_HOLD"
        )

    @property
    def interrupted(self) -> bool:
        """Whether the cluster or a time limit stopped it: its other cases are worth another job."""
        return self.state in INTERRUPTED_STATES or self.code in (EXIT_TIME, EXIT_NODES)

    @property
    def description(self) -> str:
        """The state in words."""
        if self.stuck:
            return f"will not start: {self.reason or self.state}"
        if self.state == "PENDING":
            return f"pending: {self.reason}" if self.reason not in ("", "None") else "pending"
        if self.alive:
            return self.state.lower()
        if self.code in EXIT_DESCRIPTIONS:
            return EXIT_DESCRIPTIONS[self.code]
        text = DESCRIPTIONS.get(self.state, self.state.lower())
        return f"{text} with exit code {self.code}" if self.code else text
