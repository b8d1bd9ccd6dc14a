"""Health check of the nodes of an allocation before they are used, one job step per node."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpbench.core.subprocess_call import MODULE
from cpbench.slurm.node_probe import LINE_PREFIX

CHECK_TIMEOUT_S = 180.0  # importing torch from a cold network file system takes long
SLOW_FACTOR = 3.0  # relative to the median of the nodes
MIN_DIFFERENCE_S = 0.05


def find_bad_nodes(
    hosts: Sequence[str], options: Sequence[str], python: Sequence[str], out: Path, device: str,
    ranks: int,
) -> dict[str, str]:  # fmt: skip
    """Check nodes; the reasons of the bad ones, by host name.

    Args:
        options: options of srun.
        python: command that starts Python on a node.
        out: run directory.
        ranks: number of ranks per node.
    """
    program = (*python, *MODULE, "cpbench.slurm.node_probe", str(out), device, str(ranks))
    steps = {
        host: subprocess.Popen(
            (
                "srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap",
                "--export=ALL", "--input=none", *options, *program,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )
        for host in hosts
    }  # fmt: skip
    deadline = time.monotonic() + CHECK_TIMEOUT_S
    results: dict[str, dict[str, Any]] = {}
    try:
        for host, step in steps.items():
            results[host] = _read_result(step, max(0.1, deadline - time.monotonic()))
    finally:
        for step in steps.values():
            if step.poll() is None:
                step.terminate()
    return bad_node_reasons(results)


def bad_node_reasons(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Why nodes are bad, by host name; of three or more good nodes, much slower ones are bad too.

    Args:
        results: of ``cpbench.slurm.node_probe``, by host name.
    """
    reasons = {host: str(result["why"]) for host, result in results.items() if result["why"]}
    times = {host: result["seconds"] for host, result in results.items() if host not in reasons}
    if len(times) >= 3:
        median = statistics.median(times.values())
        for host, seconds in times.items():
            if seconds > SLOW_FACTOR * median and seconds - median > MIN_DIFFERENCE_S:
                reasons[host] = f"{seconds / median:.1f} times slower than the median of the nodes"
    return reasons


def _read_result(step: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """The result of the check of one node."""
    try:
        output, _ = step.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        step.terminate()
        with suppress(subprocess.TimeoutExpired):
            step.communicate(timeout=10)
        return {"why": f"no result within {CHECK_TIMEOUT_S:.0f} s"}
    for line in output.splitlines():
        if LINE_PREFIX in line:
            result: dict[str, Any] = json.loads(line.partition(LINE_PREFIX)[2])
            return result
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith("srun: ")] or lines or ["no output"]
    return {"why": f"the check ended with exit code {step.returncode}: {messages[-1]}"}
