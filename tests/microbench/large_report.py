"""How long a report of very many records takes, and how large its page is.

    python tests/microbench/large_report.py [--records 100000] [--folder FOLDER]

The records are made up (their times follow a formula); only the reading and reporting is measured.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.core.problem import Case
from cpbench.core.spec import Spec
from cpbench.results.record import Record
from cpbench.results.store import JsonLinesWriter

OPERATORS = ("bands", "sdpa.cpu_flash", "sdpa.efficient", "sdpa.flash", "flex")
STRATEGIES = ("ring", "ring_allgather", "ulysses", "usp", "loongtrain", "hierarchical", "burst")
MASKS = (
    "full", "causal", "sliding_window_causal:window=512", "streaming:window=512",
    *(f"causal_document:corpus=pile,seed={seed}" for seed in range(20)),
    *(f"full_document:corpus=prolong64k,seed={seed}" for seed in range(20)),
)  # fmt: skip
LENGTHS = tuple(1024 * n for n in (1, 2, 4, 8, 16, 32, 64, 128))


def cases() -> Iterator[Case]:
    """Operators on one rank, then strategies on several, over everything else."""
    for seed, dtype, direction, heads, mask, tokens in itertools.product(
        range(1000), ("bfloat16", "float32"), ("fwd", "fwd_bwd"), (8, 32), MASKS, LENGTHS
    ):
        base = {
            "mask": Spec.parse(mask), "seq_len": tokens, "dtype": dtype, "direction": direction,
            "num_heads_q": heads, "num_heads_kv": 8, "head_dim": 128, "seed": seed,
        }  # fmt: skip
        for operator in OPERATORS:
            yield Case(operator=Spec(operator), **base)
        for strategy, ranks in itertools.product(STRATEGIES, (2, 4, 8)):
            yield Case(strategy=Spec(strategy), layout=Spec("zigzag"), world_size=ranks, **base)


def fill(folder: Path, count: int) -> None:
    """A run directory of so many records."""
    draw = random.Random(0)
    environment = {"kind": "environment", "id": "e0", "host": "made-up", "processor": "none",
                   "cores": 2, "memory_bytes": 1 << 35, "packages": {"torch": "0"},
                   "peaks": {"float32": 0.1, "bfloat16": 0.2, "copy_gb_s": 20.0}}  # fmt: skip
    with JsonLinesWriter(folder / "records" / "made-up.jsonl", sync=False) as lines:
        lines.append(environment)
        for number, case in enumerate(itertools.islice(cases(), count)):
            record = Record(case=case, status="ok", environment="e0", writer="made-up")
            record.started, record.seconds = 1.7e9 + number, 1.0
            record.conditions = {"device": "cpu", "threads": 1, "checked": True, "clock": "wall"}
            if draw.random() < 0.03:
                record.status, record.reason = "oom", "rank 1: out of memory"
            else:
                phases = case.direction.split("_")
                flops = case.problem.flops(case.seq_len**2 / 2)
                record.flops = {phase: flops[phase] for phase in phases}
                for phase in phases:
                    us = flops[phase] / case.world_size / 5e4 * draw.uniform(1, 3)
                    record.times_us[phase] = [
                        [round(us * draw.gauss(1, 0.02), 3) for _ in range(12)]
                        for _ in range(case.world_size)
                    ]
                record.memory_bytes = {"inputs": [10**6] * case.world_size,
                                       "peak": [10**7] * case.world_size}  # fmt: skip
                record.area = case.seq_len**2 / 2
                record.bytes_sent = {phase: [10**6] * case.world_size for phase in phases}
                record.errors = {"small": {"out": {"rel_l2": 1e-7, "max_rms": 1e-6}}}
            lines.append(record.to_json())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="cpbench-large-"))
    if not (folder / "records").exists():
        fill(folder, given.records)
    size = sum(file.stat().st_size for file in (folder / "records").iterdir())
    print(f"{given.records} records, {size / 1e6:.0f} MB in {folder}")
    for words in ((), ("-o", str(folder / "report.html")), ("-o", str(folder / "report.parquet"))):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "cpbench", "report", str(folder), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"  report {' '.join(words):60} {time.perf_counter() - begun:6.1f} s, {most:.1f} GB")
    print(f"  page: {(folder / 'report.html').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
