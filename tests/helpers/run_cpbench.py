"""The command line as a user runs it, sweeps of faulty operators, and what is left of a run."""

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

from paths import HELPERS

OPERATORS = HELPERS / "faulty_operators.py"


MEASURE = """
[measure]
min_iterations = 1
max_iterations = 1
warmup = 1
timeout_s = 5.0
check_sampled = false
memory = false
"""


def faulty(how: str, rank: int = 0) -> str:
    return f"{OPERATORS}:faulty:how={how},rank={rank}"


def sweep(path: Path, operators: dict[int, list[str]]) -> Path:
    """A sweep of some operators by world size."""
    text = ""
    for world_size, names in operators.items():
        strategy = "single" if world_size == 1 else "ring"
        text += (
            f"[[include]]\nnum_heads_q = 1\nhead_dim = 16\nseq_len = 64\n"
            f'world_size = {world_size}\nstrategy = "{strategy}"\noperator = {json.dumps(names)}\n'
        )
    path.write_text(text + MEASURE)
    return path


def start(*words: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """``cpbench`` as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "cpbench", *map(str, words)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells' & ignores it
    )


def cpbench(*words: str | Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    process = start(*words, env=env)
    _, stderr = process.communicate(timeout=200)
    return process.returncode, stderr


def survivors(out: Path) -> list[str]:
    """Processes that have the run directory in their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if f"{out}/jobs/".encode() in told:
                    found.append(f"{entry.name} {told[:200]!r}")
    return found


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def lines(out: Path) -> Counter[str]:
    """How many records each case has."""
    return Counter(
        table["id"]
        for path in (out / "records").glob("*.jsonl")
        for table in map(json.loads, path.read_text().splitlines())
        if table["kind"] == "case"
    )
