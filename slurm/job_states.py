"""What the states of Slurm's jobs mean for a sweep.

Source: the "JOB STATE CODES" and "JOB REASON CODES" of squeue(1).
"""

from __future__ import annotations

from dataclasses import dataclass

FORGOTTEN = "FORGOTTEN"  # not a state of Slurm's: neither queue nor accounting knows the job
ALIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED",
    "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT",
}  # fmt: skip
# Ends that say nothing against the cases that were left: another job may go on with them.
EXTERNAL = {"TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED", FORGOTTEN}
# Reasons for waiting that waiting does not cure.
STUCK = {
    "DependencyNeverSatisfied", "BadConstraints", "PartitionNodeLimit", "PartitionTimeLimit",
    "PartitionConfig",
    "AccountNotAllowed", "InvalidAccount", "InvalidQOS", "QOSNotAllowed", "JobHeldUser",
    "JobHeldAdmin", "JobHoldMaxRequeue", "AssocMaxWallDurationPerJobLimit",
    "QOSMaxWallDurationPerJobLimit", "QOSMaxNodePerJobLimit", "AssocMaxNodePerJobLimit",
}  # fmt: skip
WORDS = {
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
EXITS = {
    EXIT_TIME: "stopped before its time limit; cases are left",
    EXIT_NODES: "too few good nodes; see status",
    EXIT_STORE: "results could not be written",
}


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array.

    Attributes:
        job: id, such as ``12`` or ``12_3``.
        state: as Slurm says it, or ``FORGOTTEN``.
        reason: why it waits, or failed.
        nodes: that it has.
        elapsed: so far, as Slurm writes it; ``limit`` likewise.
        code: exit code of its script; None where it is not known.
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
        return self.state in ALIVE

    @property
    def stuck(self) -> bool:
        """Whether it waits for something that does not come by itself."""
        return self.state in ("PENDING", "REQUEUE_HOLD") and (
            self.reason in STUCK or self.state == "REQUEUE_HOLD"
        )

    @property
    def may_go_on(self) -> bool:
        """Whether cases that it has left are worth another job."""
        return self.state in EXTERNAL or self.code in (EXIT_TIME, EXIT_NODES)

    @property
    def words(self) -> str:
        """For people."""
        if self.stuck:
            return f"will not start: {self.reason or self.state}"
        if self.state == "PENDING":
            return f"waits: {self.reason}" if self.reason not in ("", "None") else "waits"
        if self.alive:
            return self.state.lower()
        if self.code in EXITS:
            return EXITS[self.code]
        words = WORDS.get(self.state, self.state.lower())
        return f"{words} with exit code {self.code}" if self.code else words
