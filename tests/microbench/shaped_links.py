"""Strategies on two nodes of two ranks, or four of one, with slow links, on one machine.

    python tests/microbench/shaped_links.py [--rate 1gbit] [--nodes 2] [--every] [--folder FOLDER]

The nodes are network namespaces joined by a link of limited rate; ranks of one node use its
loopback.  A sweep runs on them as on real nodes (torchrun, one agent per node).  Reported per
strategy: time, time without communication, communication alone, the maximum waiting time per rank,
the fractions of communication that are exposed and hidden, and the bytes across nodes.  Four ranks
share the cores of this machine: compute is slow, and the CPU work of a transfer (copies, network
stack) cannot overlap with it; only waiting can.  With ``--mixers`` a sequence mixer is scanned in
every way, and exchanged by heads, beside attention's ring.  With ``--paced`` an operator sleeps
instead of computing, so that only the links count: this shows whether a strategy hides its
transfers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))
sys.path.insert(0, str(Path(__file__).parents[2]))

import namespaces

from cpbench.reports.frame import load
from cpbench.results.store import trace_path

SWEEP = """
[sweep]
operator = "{operator}"
layout = "zigzag"
mask = {masks}
seq_len = {tokens}
num_heads_q = {heads_q}
num_heads_kv = {heads_kv}
head_dim = 64
world_size = 4
ranks_per_node = {per_node}

{strategies}
[measure]
min_iterations = 3
max_iterations = 5
max_seconds = {seconds}
check_small = {checked}
check_sampled = false
memory = false
exposure = {exposure}
"""
CHOSEN = """
strategy = ["ring", "ring_reverse", "hierarchical:local=2", "dispatch", "dispatch:by=node"]

[[include]]
strategy = "usp:ulysses=2"
placement = ["ulysses", "ring"]

[[include]]
strategy = [
    "ulysses:pad=true", "ulysses:offload=host,chunk=1024", "usp:inner=allgather,ulysses=2"
]

[[include]]
strategy = ["dispatch", "dispatch:by=node"]
layout = "dispatch"
"""
EVERY = """
strategy = [
    "ring", "ring:window=2", "ring_reverse", "ring_allgather", "ring_allgather:stages=2", "ulysses",
    "ulysses:chunks=2", "usp:ulysses=2", "usp:inner=allgather,ulysses=2", "loongtrain:ulysses=2",
    "hierarchical:local=2", "burst", "tile:rows=2", "tree", "dispatch", "dispatch:by=node"
]

[[include]]
strategy = "distflash"
layout = "contiguous"
"""
MIXERS = """
strategy = ["scan", "scan:by=ring", "scan:by=ring,blocks=4", "scan:by=doubling", "ulysses"]
inputs = "gates"

[[include]]
layout = "contiguous"

[[include]]                        # attention on the same tokens
operator = "bands"
strategy = ["ring", "ulysses"]
"""
PACED = '''
"""An operator that sleeps instead of computing: no core is busy, as with a GPU."""
import time
from cpbench.core.registry import OperatorInfo

class Paced:
    def unsupported(self, problem, mask, device):
        return None

    def prepare(self, mask, problem, device):
        return {ns} * 1e-9 * mask.area

    def forward(self, qkv, plan):
        q = qkv.q
        b, s, h, _ = q.shape
        time.sleep(plan * h)
        return q.new_zeros(q.shape), q.new_zeros((b, h, s)).float()

    def backward(self, x, plan):
        time.sleep(2.5 * plan * x.q.shape[2])
        return tuple(y.new_zeros(y.shape) for y in (x.q, x.k, x.v))

OP = OperatorInfo(name="paced", summary="sleeps instead of computing", source="-", load=Paced)
'''
MASKS = ("causal", "causal_document:corpus=prolong64k,seed=1")
COLUMNS = {
    "method": "", "fwd_ms": ".0f", "time_ms": ".0f", "compute_ms": ".0f", "transfer_ms": ".0f",
    "max_wait_ms": ".0f", "exposed_ms": ".0f", "exposed": ".0%", "hidden": ".0%",
    "across_mb": ".1f", "sent_mb": ".1f",
}  # fmt: skip


def measure(folder: Path, rate: str, nodes: int, sweep: str, where: list[str], trace: bool) -> None:
    """Run the sweep on several nodes, into ``folder / run``."""
    (folder / "sweep.toml").write_text(sweep)
    conditions = [argument for condition in where for argument in ("--where", condition)]
    run = ("run", "sweep.toml", "--out", "run", *conditions, *["--trace"] * trace)
    on_nodes(folder, rate, nodes, run, "run")


def measure_links(folder: Path, rate: str, nodes: int) -> None:
    """Measure the links between four ranks, into ``folder / links.json``."""
    sizes = ("--sizes", "8,32k,512k,2m,8m", "--seconds", "1", "--device", "cpu")
    command = ("links", "--world-size", "4", *sizes, "--out", "links")
    (folder / "links.json").write_text(on_nodes(folder, rate, nodes, command, "links"))


def on_nodes(folder: Path, rate: str, nodes: int, command: tuple[str, ...], out: str) -> str:
    """Run a command of cpbench on several nodes, which join in ``out``; its output in JSON."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    cpbench = (sys.executable, "-m", "cpbench")
    on = ("--interface", "eth0")
    with namespaces.namespaces(nodes, rate) as holders:
        first, *others = (namespaces.enter_command(holder) for holder in holders)
        joined = [
            subprocess.Popen(
                [*other, *cpbench, "join", out, *on, "--patience", "60"], cwd=folder, env=env,
                stdout=subprocess.DEVNULL,
            )
            for other in others
        ]  # fmt: skip
        try:
            return subprocess.run(
                [*first, *cpbench, *command, "--launcher", "torchrun", "--nodes", str(nodes), *on,
                 "--json"],
                cwd=folder, env=env, check=True, stdout=subprocess.PIPE, text=True,
            ).stdout  # fmt: skip
        finally:
            for process in joined:
                process.terminate()
                process.wait()


def max_wait_ms(folder: Path, case: str) -> float:
    """The maximum waiting time per rank in the traced pass: for transfers, and for ranks that share
    its core; nan without a trace."""
    waits = [0.0] * 4
    if not trace_path(folder, case).exists():
        return math.nan
    for event in json.loads(trace_path(folder, case).read_text())["traceEvents"]:
        if event.get("cat") == "waiting":
            waits[event["pid"]] += event["dur"] / 1e3
    return max(waits)


def shown_operators(table: Any) -> list[str]:
    """The operator of each row, where there are several."""
    operators = [str(name) for name in table["operator"]]
    return operators if len(set(operators)) > 1 else [""] * len(operators)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads-q", type=int, default=8)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0, help="per case")
    parser.add_argument("--masks", nargs="+", default=MASKS)
    parser.add_argument("--paced", type=float, metavar="NS", help="instead of computing, sleep NS "
                        "nanoseconds per visible pair and head: no core is busy")  # fmt: skip
    parser.add_argument("--times-only", action="store_true", help="neither exposure nor a trace")
    parser.add_argument("--nodes", type=int, choices=(2, 4), default=2, help="of 4 ranks in all")
    parser.add_argument(
        "--every", action="store_true", help="every strategy whose time is predicted"
    )
    parser.add_argument(
        "--mixers", metavar="NAME", help="strategies of this sequence mixer, beside attention"
    )
    parser.add_argument("--links", action="store_true", help="measure the links first")
    parser.add_argument(
        "--where", nargs="+", default=[], help="only matching cases, e.g. strategy=ring"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to keep the run; an existing run is only reported"
    )
    options = parser.parse_args()
    if namespaces.missing_requirement():
        raise SystemExit(namespaces.missing_requirement())
    folder = options.folder or Path(tempfile.mkdtemp(prefix="cpbench-shaped-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "run").exists():
        masks = "[" + ", ".join(f'"{mask}"' for mask in options.masks) + "]"
        (folder / "paced.py").write_text(PACED.format(ns=options.paced))
        operator = "./paced.py:OP" if options.paced else options.mixers or "bands"
        strategies = MIXERS if options.mixers else EVERY if options.every else CHOSEN
        sweep = SWEEP.format(
            strategies=strategies, per_node=4 // options.nodes,
            operator=operator, checked="false" if options.paced else "true", masks=masks,
            tokens=options.tokens, heads_q=options.heads_q, heads_kv=options.heads_kv,
            seconds=options.seconds, exposure="false" if options.times_only else "true",
        )  # fmt: skip
        if options.links:
            measure_links(folder, options.rate, options.nodes)
        measure(folder, options.rate, options.nodes, sweep, options.where, not options.times_only)
    table = load(folder / "run")
    table["method"] = [
        " ".join(filter(None, (f"{row.strategy}/{row.layout}", row.placement, operator)))
        for row, operator in zip(table.itertuples(), shown_operators(table), strict=True)
    ]
    table["max_wait_ms"] = [max_wait_ms(folder / "run", case) for case in table["id"]]
    for mask, rows in table.groupby("mask"):
        print(
            f"\n{mask}, {options.tokens} tokens, {options.nodes} nodes, {options.rate} between them"
        )
        print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
        for _, row in rows.sort_values("time_ms").iterrows():
            cells = [f"{row[c]:{form}}" if row[c] == row[c] else "–" for c, form in COLUMNS.items()]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
