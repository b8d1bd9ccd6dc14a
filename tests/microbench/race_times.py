"""How long `cpbench race` takes to decide on operators that are slower by a known share.

    python tests/microbench/race_times.py [--slower 0,0.1,0.26,0.44] [--max-launches 40]

An operator (`bands`, behind a wrapper) in a repository of its own is made slower by a share of its
processor time and raced against its commit, on two masks.  Beside it, what `cpbench gate` says of
the first 1, 3, 6 and 9 launches of each side.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

from false_alarms import KERNEL
from git_repository import git

from cpbench.reports.compare.gate import evaluate_gate
from cpbench.results.store import Run, read_run

SWEEP = """
[sweep]
operator = "./kernel.py:OP"
mask = ["causal", "sliding_window_causal:window=128"]
seq_len = 1024
num_heads_q = 2
head_dim = 64

[measure]
clock = "cpu"
precision = 0.01
max_seconds = 0.7
max_iterations = 40
memory = false
"""


def first_launches(run: Run, count: int) -> Run:
    """A run with the first launches of each case."""
    launches = {key: all_of[:count] for key, all_of in run.launches.items()}
    return replace(run, launches=launches, records={k: of[-1] for k, of in launches.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slower", default="0,0.1,0.26,0.44")
    parser.add_argument("--max-launches", default="40")
    given = parser.parse_args()
    for share in map(float, given.slower.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="cpbench-race-"))
        (folder / "kernel.py").write_text(KERNEL.format(share=0.0))
        (folder / "sweep.toml").write_text(SWEEP)
        git(folder, "init", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "first")
        (folder / "kernel.py").write_text(KERNEL.format(share=share))
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "cpbench", "race", "--against", "HEAD", "sweep.toml",
             "--max-launches", given.max_launches],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - begun
        base, new = (read_run(folder / "race" / name) for name in ("base", "new"))
        launches = [len(of) for of in new.launches.values()]
        print(f"{share:.0%} slower: {done.stdout.splitlines()[-1]}; {seconds:.0f} s, "
              f"{max(launches)} launches a side", flush=True)  # fmt: skip
        for count in (1, 3, 6, 9):
            if count <= min(launches):
                sides = first_launches(base, count), first_launches(new, count)
                outcome = evaluate_gate(*sides, 0.05, 0.02)
                print(f"  gate after {count}: {outcome.outcome} {dict(outcome.counts)}", flush=True)


if __name__ == "__main__":
    main()
