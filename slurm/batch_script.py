"""The text of the batch scripts: pure functions, so that a dry run needs no Slurm."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cpbench.slurm.site_profile import Profile, size


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch script.

    Attributes:
        name: of the job, also of its files below ``OUT/slurm``.
        nodes: asked for; ``ranks`` how many of the largest gang they hold.
        tasks: of an array; 0 for a plain job.
        command: what is run.
        after: whether it waits for other jobs to end; their ids are known when it is submitted.
        minutes: limit in place of the profile's, for small work.
    """

    name: str
    nodes: int
    ranks: int
    command: tuple[str, ...]
    tasks: int = 0
    after: bool = False
    minutes: int = 0


def render(
    batch: Batch, profile: Profile, out: Path, exclude: Sequence[str] = (), after: str = "@JOBS@"
) -> str:
    """The script.

    Args:
        out: run directory, absolute.
        exclude: nodes, beside the profile's.
        after: ids of the jobs to wait for, with colons between.
    """
    template = resources.files("cpbench.slurm").joinpath("job.sbatch").read_text()
    values = {
        "DIRECTIVES": "\n".join(
            f"#SBATCH {_directive(word)}" for word in options(batch, profile, out, exclude, after)
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
                break  # what was put in is not looked through again
        if line:
            lines.append(line)
    return "\n".join(lines) + "\n"


def options(
    batch: Batch, profile: Profile, out: Path, exclude: Sequence[str], after: str
) -> list[str]:
    """sbatch's options, one word each."""
    log = f"{_patterned(out / 'slurm' / batch.name)}-{'%A_%a' if batch.tasks else '%j'}.log"
    found = {
        "job-name": batch.name, "output": log, "open-mode": "append",
        "partition": profile.partition, "account": profile.account, "qos": profile.qos,
        "constraint": profile.constraint, "reservation": profile.reservation,
        "nodelist": profile.nodelist if batch.ranks else "",
        "exclude": ",".join((*profile.exclude, *exclude)),
        "nodes": str(batch.nodes), "time": str(batch.minutes or profile.time),
        "mem": _megabytes(profile.memory),
    }  # fmt: skip
    if batch.ranks:
        each = -(-batch.ranks // max(1, batch.nodes - profile.spare_nodes))
        found["ntasks-per-node"] = str(each)
        found["cpus-per-task"] = str(profile.cpus_per_rank)
        gpus = min(each, profile.gpus_per_node)
        if gpus and profile.gpu_gres:
            found["gres"] = ",".join(filter(None, (f"gpu:{gpus}", profile.gres)))
        else:
            found["gres"] = profile.gres
            found["gpus-per-node"] = str(gpus) if gpus else ""
        found["signal"] = f"B:USR1@{profile.signal_s}" if profile.signal_s else ""
    if batch.tasks:
        throttle = f"%{profile.throttle}" if profile.throttle else ""
        found["array"] = f"0-{batch.tasks - 1}{throttle}"
    if batch.after:
        found["dependency"] = f"afterany:{after}"
        found["kill-on-invalid-dep"] = "yes"
    if profile.mail and not batch.ranks:
        found |= {"mail-user": profile.mail, "mail-type": "END,FAIL"}
    words = [f"--{key}={value}" for key, value in found.items() if value]
    words.append("--requeue" if profile.requeue else "--no-requeue")
    if profile.exclusive and batch.ranks:
        words.append("--exclusive")
    return [*words, *profile.sbatch]


def _megabytes(memory: str) -> str:
    """As sbatch takes it; 0 is all of a node's."""
    return memory if memory in ("", "0") else f"{size(memory, 'memory') >> 20}M"


def _directive(word: str) -> str:
    """An option as a directive has it: sbatch takes quotes apart as a shell does, but knows no
    words before a comment sign."""
    name, equals, value = word.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else shlex.quote(word)


def _patterned(path: Path) -> str:
    """A path in which sbatch replaces nothing."""
    return str(path).replace("%", "%%")


def step_command(spec: Path, python: Iterable[str] = (sys.executable,)) -> tuple[str, ...]:
    """What a job runs: the cases of a file, under a supervisor on its first node."""
    return (*python, "-m", "cpbench.slurm.job_step", str(spec))


def collect_command(out: Path) -> tuple[str, ...]:
    """What the last job runs."""
    report = str(out / "report.md")
    return (
        sys.executable,
        "-m",
        "cpbench",
        "report",
        str(out),
        "--format",
        "md",
        "-o",
        report,
    )
