"""Strategies on two nodes of two ranks with a slow link between them, on one machine.

    python tests/microbench/shaped_links.py [--rate 1gbit] [--tokens 8192] [--folder FOLDER]

The nodes are network namespaces whose link is held to a rate; ranks of one node speak over its
loopback.  A sweep runs over them as it would over machines (torchrun, one agent a node).  What is
told of each strategy: a run, the same without communication, communication alone, how much of it is
exposed and how much hidden, and the bytes that cross.  Four ranks share the cores of this machine,
so their computing is slow; only ratios mean something.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import namespaces

from cpbench.reports.frame import load

SWEEP = """
[sweep]
operator = "bands"
layout = "zigzag"
mask = {masks}
seq_len = {tokens}
num_heads_q = 8
num_heads_kv = {heads_kv}
head_dim = 64
world_size = 4
ranks_per_node = 2
strategy = ["ring", "hierarchical:local=2", "dispatch"]

[[include]]
strategy = "usp:ulysses=2"
placement = ["ulysses", "ring"]

[[include]]
strategy = "dispatch"
layout = "dispatch"

[measure]
min_iterations = 3
max_iterations = 5
max_seconds = {seconds}
check_sampled = false
memory = false
"""
MASKS = ("causal", "causal_document:corpus=prolong64k,seed=1")
COLUMNS = {
    "method": "", "fwd_ms": ".0f", "time_ms": ".0f", "compute_ms": ".0f", "transfer_ms": ".0f",
    "exposed_ms": ".0f", "exposed": ".0%", "hidden": ".0%", "across_mb": ".1f", "sent_mb": ".1f",
}  # fmt: skip


def measure(folder: Path, rate: str, text: str) -> None:
    """Run the sweep over two nodes, into ``folder / run``."""
    (folder / "sweep.toml").write_text(text)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    cpbench = (sys.executable, "-m", "cpbench.cli")
    with namespaces.namespaces(2, rate) as holders:
        first, second = (namespaces.inside(holder) for holder in holders)
        on = ("--interface", "eth0")
        joined = subprocess.Popen(
            [*second, *cpbench, "join", "run", *on, "--patience", "60"], cwd=folder, env=env,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            subprocess.run(
                [*first, *cpbench, "run", "sweep.toml", "--out", "run", "--launcher", "torchrun",
                 "--nodes", "2", *on, "--json"],
                cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            joined.terminate()
            joined.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each case")
    parser.add_argument("--masks", nargs="+", default=MASKS)
    parser.add_argument("--folder", type=Path, help="keep the run here; one there is not rerun")
    given = parser.parse_args()
    if namespaces.missing():
        raise SystemExit(namespaces.missing())
    folder = given.folder or Path(tempfile.mkdtemp(prefix="cpbench-shaped-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run").exists():
        masks = "[" + ", ".join(f'"{mask}"' for mask in given.masks) + "]"
        measure(folder, given.rate, SWEEP.format(
            masks=masks, tokens=given.tokens, heads_kv=given.heads_kv, seconds=given.seconds
        ))  # fmt: skip
    table = load(folder / "run")
    table["method"] = [
        " ".join(filter(None, (f"{row.strategy}/{row.layout}", row.placement)))
        for row in table.itertuples()
    ]
    for mask, rows in table.groupby("mask"):
        print(f"\n{mask}, {given.tokens} tokens, 2 nodes x 2 ranks, {given.rate} between nodes")
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for _, row in rows.sort_values("time_ms").iterrows():
            cells = [f"{row[c]:{form}}" if row[c] == row[c] else "–" for c, form in COLUMNS.items()]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
