"""How often a report calls one of two identical methods the fastest, and how often it misses a
method that is 10 % slower, on this machine.

    python tests/microbench/false_winners.py [--share 0.0 0.1] [--folder FOLDER] [--clock cpu]

One operator (`bands`, behind a wrapper) is registered under two names, of which the second burns a
share more processor time in matrix products, and both are run on 60 small problems in one launch:
in turn, as is the default.  A round takes some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from false_alarms import KERNEL

from cpbench.reports.frame import load
from cpbench.reports.tables.summary import rank_methods

SWEEP = """
[sweep]
operator = ["./one.py:OP", "./two.py:OP"]
mask = ["causal", "full", "sliding_window_causal:window=64", "streaming:window=64",
        "causal_document:doc_lens=[200,150,162]"]
seq_len = 512
num_heads_q = 2
head_dim = [32, 64]
direction = ["fwd", "fwd_bwd"]
seed = [0, 1, 2]

[measure]
clock = "CLOCK"
memory = false
"""


def measure(folder: Path, share: float, clock: str) -> None:
    """Run the sweep, the second operator slower by a share."""
    folder.mkdir(parents=True)
    for name, slower_by in (("one", 0.0), ("two", share)):  # equal files would be one case
        (folder / f"{name}.py").write_text(f"# {name}\n{KERNEL.format(share=slower_by)}")
    (folder / "sweep.toml").write_text(SWEEP.replace("CLOCK", clock))
    command = [sys.executable, "-m", "cpbench", "run", "sweep.toml", "--out", "run", "--json"]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those there are not rerun")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="cpbench-winners-"))
    for share in given.share:
        here = folder / f"{given.clock}-{share:g}"
        if not here.exists():
            measure(here, share, given.clock)
        rankings = rank_methods(load(here / "run"))
        verdicts = Counter(
            f"{ranking.rows['operator'].iloc[0][2:5]} is the fastest"
            if ranking.verdict == "won" else ranking.verdict
            for ranking in rankings
        )  # fmt: skip
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
        print(f"{share:.0%} slower, {len(rankings)} problems: {counts}", flush=True)


if __name__ == "__main__":
    main()
