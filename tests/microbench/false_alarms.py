"""How often `cpbench compare` and `gate` cry wolf, and how often they miss one, on this machine.

    python tests/microbench/false_alarms.py [--launches 12] [--rounds 3] [--folder FOLDER]

In each round one sweep of an operator (`bands`, behind a wrapper) is run three times in turn,
launch by launch: as base, as the same again, and with 10 % of its processor time burnt on top, in
matrix products.  Times are processor time of one thread.  A round of 12 launches takes a quarter of
an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.reports.compare.gate import evaluate_gate
from cpbench.reports.compare.verdicts import compare
from cpbench.results.store import read_run

KERNEL = '''
"""The operator bands, slower by a share of its processor time."""
import time
import torch
from cpbench.kernels.bands.operator import OPERATORS, Bands
from cpbench.core.registry import OperatorInfo

SLOWER_BY = {share}
MORE = torch.ones(64, 64)


class Wrapped(Bands):
    def forward(self, *given):
        return self._burn(super().forward, given)

    def backward(self, *given):
        return self._burn(super().backward, given)

    def _burn(self, work, given):
        begun = time.process_time()
        found = work(*given)
        until = begun + (1 + SLOWER_BY) * (time.process_time() - begun)
        while time.process_time() < until:
            MORE.mm(MORE)
        return found


OP = OperatorInfo(name="wrapped", summary="bands, wrapped", source="bands", load=Wrapped,
                  masks=OPERATORS[0].masks, dtypes=OPERATORS[0].dtypes)
'''
SWEEP = """
[sweep]
operator = "./kernel.py:OP"
mask = ["causal", "full", "sliding_window_causal:window=128", "streaming:window=128",
        "causal_document:doc_lens=[300,200,524]"]
seq_len = [1024]
num_heads_q = 2
head_dim = [32, 64]
direction = ["fwd", "fwd_bwd"]

[measure]
clock = "cpu"
precision = 0.01
max_seconds = 0.7
max_iterations = 40
memory = false
"""
SIDES = {"base": 0.0, "same": 0.0, "slowed": 0.1}


def measure(folder: Path, launches: int) -> None:
    """Fill FOLDER/base, same and slowed, launch by launch, in an order that goes round."""
    names = list(SIDES)
    for name, share in SIDES.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "kernel.py").write_text(KERNEL.format(share=share))
        (folder / name / "sweep.toml").write_text(SWEEP)
    for launch in range(launches):
        for name in names[launch % 3 :] + names[: launch % 3]:
            words = ("run", "sweep.toml", "--out", "run", "--launches", str(launch + 1))
            done = subprocess.run(
                [sys.executable, "-m", "cpbench", *words, "--json"],
                cwd=folder / name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stderr)
        print(f"  launch {launch + 1} of {launches}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the runs here; those there are not rerun")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="cpbench-alarms-"))
    alarms, found, total, outcomes = Counter[str](), Counter[str](), 0, list[tuple[str, ...]]()
    for number in range(given.rounds):
        here = folder / f"round{number}"
        if not here.exists():
            measure(here, given.launches)
        base, same, slowed = (read_run(here / name / "run") for name in SIDES)
        for which, other in ((alarms, same), (found, slowed)):
            which.update(compare(base, other)["verdict"])
        total += len(base.records)
        outcomes.append(tuple(evaluate_gate(base, side, 0.05, 0.02).outcome
                              for side in (same, slowed)))  # fmt: skip
        wrong = alarms["SLOWER"] + alarms["FASTER"]
        print(f"after round {number + 1}: {total} cases a side")
        print(
            f"  same again: {wrong} called SLOWER or FASTER ({wrong / total:.1%}); {dict(alarms)}"
        )
        print(
            f"  10 % slower: {found['SLOWER']} found ({found['SLOWER'] / total:.1%}); {dict(found)}"
        )
        for name, side in zip(("identical", "slowed"), zip(*outcomes, strict=True), strict=True):
            print(f"  gate at 5 %, {name}: {', '.join(side)}", flush=True)


if __name__ == "__main__":
    main()
