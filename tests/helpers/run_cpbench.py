"""Running the command line, sweeps of faulty operators, and their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from limits import LIMIT_S
from paths import HELPERS

FAULTY_OPERATORS = HELPERS / "planted" / "faulty_operators.py"

# One iteration, and one round of the exposure of communication.
MEASURE = """
[measure]
min_iterations = 1
max_iterations = 1
max_seconds = 0.0
warmup = 1
timeout_s = 20.0
check_sampled = false
memory = false
interleave = 1
"""

# flex without its compiler, Triton kernels refused: minutes less, where what they compute is not
# what a test is about.
NOTHING_COMPILED = {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "0"}


def faulty_operator(how: str, rank: int = 0) -> str:
    """The spec of an operator that fails on a rank."""
    return f"{FAULTY_OPERATORS}:faulty:how={how},rank={rank}"


def write_sweep(path: Path, operators: dict[int, list[str]]) -> Path:
    """Write a sweep of operators by world size; its path."""
    text = ""
    for world_size, names in operators.items():
        strategy = "single" if world_size == 1 else "ring"
        text += (
            f"[[include]]\nnum_heads_q = 1\nhead_dim = 16\nseq_len = 64\n"
            f'world_size = {world_size}\nstrategy = "{strategy}"\noperator = {json.dumps(names)}\n'
        )
    path.write_text(text + MEASURE)
    return path


def start_cpbench(
    *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command of ``cpbench``."""
    return subprocess.Popen(
        [sys.executable, "-m", "cpbench", *map(str, arguments)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells make their background jobs ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def cpbench(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command of ``cpbench``; its exit code and standard error."""
    process = start_cpbench(*arguments, env=env)
    _, stderr = process.communicate(timeout=LIMIT_S)
    return process.returncode, stderr


def leftover_processes(out: Path) -> list[str]:
    """Other processes that have the run directory in their command line or environment."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if f"{out}/jobs/".encode() in text:
                    processes.append(f"{entry.name} {text[:200]!r}")
    return processes


def waits_at_gate(out: Path, ranks: int | str = "*") -> bool:
    """Whether the faulty operator ``gate`` waits in a job on ``ranks`` ranks."""
    return any(out.glob(f"jobs/*-p{ranks}-*/at-gate"))


def wait_until(condition: Callable[[], object], timeout_s: float = LIMIT_S) -> None:
    """Wait until a condition holds; fail after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {timeout_s:g} s"
        time.sleep(0.02)


def record_counts(out: Path) -> Counter[str]:
    """Number of records per case, without unfinished ones."""
    return Counter(
        table["id"]
        for path in (out / "records").glob("*.jsonl")
        for table in map(json.loads, path.read_text().splitlines())
        if table["kind"] == "case" and "unfinished" not in table["flags"]
    )
