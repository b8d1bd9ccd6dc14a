"""Batch scripts as text: pure functions, so that a dry run needs no Slurm."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cpbench.core.subprocess_call import MODULE
from cpbench.slurm.site_profile import Profile, parse_bytes


@dataclass(frozen=True, kw_only=True)
class BatchJob:
    """Contents of one batch script.

    Attributes:
        name: of the job, and of its files below ``OUT/slurm``.
        nodes: number of nodes to request.
        ranks: world size of the largest gang; 0 for the report job.
        command: the command that it runs.
        tasks: number of tasks of an array; 0 for a plain job.
        after: whether it waits for other jobs to end, whose ids are given on submission.
        minutes: time limit instead of the profile's, for small jobs; 0 for the profile's.
    """

    name: str
    nodes: int
    ranks: int
    command: tuple[str, ...]
    tasks: int = 0
    after: bool = False
    minutes: int = 0


def render_script(
    batch: BatchJob, profile: Profile, out: Path, exclude: Sequence[str] = (), after: str = "@JOBS@"
) -> str:
    """The text of a batch script.

    Args:
        out: run directory, absolute.
        exclude: nodes to exclude, in addition to the profile's.
        after: ids of the jobs to wait for, separated by colons.
    """
    template = resources.files("cpbench.slurm").joinpath("job.sbatch").read_text("utf-8")
    values = {
        "DIRECTIVES": "\n".join(
            f"#SBATCH {_quote(option)}"
            for option in sbatch_options(batch, profile, out, exclude, after)
        ),
        "SCRATCH": shlex.quote(profile.scratch),
        "ENVIRONMENT": "\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()
        ),
        "MODULES": "\n".join(f"module load {shlex.quote(name)}" for name in profile.modules),
        "SETUP": "\n".join(profile.setup),
        "COMMAND": shlex.join(batch.command),
    }
    lines = []
    for line in template.splitlines():
        for key, value in values.items():
            if f"@{key}@" in line:
                line = line.replace(f"@{key}@", value)
                break  # substituted text is not searched for placeholders again
        if line:
            lines.append(line)
    return "\n".join(lines) + "\n"


def sbatch_options(
    batch: BatchJob, profile: Profile, out: Path, exclude: Sequence[str], after: str
) -> list[str]:
    """Options of sbatch, one argument each."""
    log = f"{_escape_percent(out / 'slurm' / batch.name)}-{'%A_%a' if batch.tasks else '%j'}.log"
    options = {
        "job-name": batch.name, "output": log, "open-mode": "append",
        "partition": profile.partition, "account": profile.account, "qos": profile.qos,
        "constraint": profile.constraint, "reservation": profile.reservation,
        "nodelist": profile.nodelist if batch.ranks else "",
        "exclude": ",".join((*profile.exclude, *exclude)),
        "nodes": str(batch.nodes), "time": str(batch.minutes or profile.time),
        "mem": _memory_option(profile.memory),
    }  # fmt: skip
    if batch.ranks:
        ranks_per_node = -(-batch.ranks // max(1, batch.nodes - profile.spare_nodes))
        options["ntasks-per-node"] = str(ranks_per_node)
        options["cpus-per-task"] = str(profile.cores_per_rank)
        gpus = min(ranks_per_node, profile.gpus_per_node)
        if gpus and profile.gpu_gres:
            options["gres"] = ",".join(filter(None, (f"gpu:{gpus}", profile.gres)))
        else:
            options["gres"] = profile.gres
            options["gpus-per-node"] = str(gpus) if gpus else ""
        options["signal"] = f"B:USR1@{profile.signal_s}" if profile.signal_s else ""
    if batch.tasks:
        throttle = f"%{profile.throttle}" if profile.throttle else ""
        options["array"] = f"0-{batch.tasks - 1}{throttle}"
    if batch.after:
        options["dependency"] = f"afterany:{after}"
        options["kill-on-invalid-dep"] = "yes"
    if profile.mail and not batch.ranks:
        options |= {"mail-user": profile.mail, "mail-type": "END,FAIL"}
    arguments = [f"--{key}={value}" for key, value in options.items() if value]
    arguments.append("--requeue" if profile.requeue else "--no-requeue")
    if profile.exclusive and batch.ranks:
        arguments.append("--exclusive")
    return [*arguments, *profile.sbatch]


def _memory_option(memory: str) -> str:
    """The value of ``--mem``; 0 is all memory of a node."""
    return memory if memory in ("", "0") else f"{parse_bytes(memory, 'memory') >> 20}M"


def _quote(option: str) -> str:
    """An option as a directive, where sbatch parses quotes as a shell does, but takes no words
    before a comment sign."""
    name, equals, value = option.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else shlex.quote(option)


def _escape_percent(path: Path) -> str:
    """A path in which sbatch substitutes nothing."""
    return str(path).replace("%", "%%")


def step_command(spec: Path, python: Iterable[str] = (sys.executable,)) -> tuple[str, ...]:
    """The command of a job: the supervisor of the cases of a job file, on the first node."""
    return (*python, *MODULE, "cpbench.slurm.job_step", str(spec))


def report_command(out: Path) -> tuple[str, ...]:
    """The command of the last job, which writes the report."""
    report = str(out / "report.md")
    return (
        sys.executable,
        *MODULE,
        "cpbench",
        "report",
        str(out),
        "--format",
        "md",
        "-o",
        report,
    )
