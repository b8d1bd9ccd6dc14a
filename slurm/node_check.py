"""The check of every node of an allocation before it is used, each by a step of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpbench.slurm.node_probe import MARK

PATIENCE_S = 180.0  # importing torch on a cold network file system
SLOW = 3.0  # times the median of the nodes


def of_nodes(
    hosts: Sequence[str], options: Sequence[str], python: Sequence[str], out: Path, device: str,
    ranks: int,
) -> dict[str, str]:  # fmt: skip
    """The nodes not to be used, and why.

    Args:
        options: of srun.
        python: words that start Python on a node.
        out: run directory.
        ranks: that each node is to take.
    """
    program = (*python, "-m", "cpbench.slurm.node_probe", str(out), device, str(ranks))
    steps = {
        host: subprocess.Popen(
            (
                "srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap",
                "--export=ALL", "--input=none", *options, *program,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host in hosts
    }  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S
    answers: dict[str, dict[str, Any]] = {}
    try:
        for host, step in steps.items():
            answers[host] = _answer(step, max(0.1, deadline - time.monotonic()))
    finally:
        for step in steps.values():
            if step.poll() is None:
                step.terminate()
    return judged(answers)


def judged(answers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What is wrong with each bad node; one much slower than the others is bad, where three or more
    can be compared."""
    found = {host: str(answer["why"]) for host, answer in answers.items() if answer["why"]}
    times = {host: a["seconds"] for host, a in answers.items() if host not in found}
    if len(times) >= 3:
        middle = statistics.median(times.values())
        for host, took in times.items():
            if took > SLOW * middle and took - middle > 0.05:
                found[host] = f"{took / middle:.1f} times slower than the nodes' median"
    return found


def _answer(step: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
    try:
        text, _ = step.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        step.terminate()
        with suppress(subprocess.TimeoutExpired):
            step.communicate(timeout=10)
        return {"why": f"no answer within {PATIENCE_S:.0f} s"}
    for line in text.splitlines():
        if MARK in line:
            answer: dict[str, Any] = json.loads(line.partition(MARK)[2])
            return answer
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("srun: ")] or lines or ["it said nothing"]
    return {"why": f"the check ended with code {step.returncode}: {said[-1]}"}
