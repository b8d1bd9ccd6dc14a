"""Predictions held against strategies that ran over slow links, on one machine.

    python tests/microbench/shaped_links.py --rate 250mbit --paced 7.5 --seconds 1.5 --links \
        --folder FOLDER
    python tests/microbench/predicted_links.py FOLDER --paced 7.5

Constants are not fitted to the run: attention sleeps for a known time, ``cpbench links`` has
measured the links before, as for any cluster, and the rates of copies inside the machine are
measured here, by as many processes at once as there are ranks, which share its cores.  Prints
predicted and measured times of each case, the errors, and how many pairs of strategies are in the
right order.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from cpbench.reports import frame
from cpbench.reports.predicted.rows import ordered_pairs
from cpbench.simulator.calibration.cluster_file import to_toml
from cpbench.simulator.calibration.links import fit_links, read_measured
from cpbench.simulator.cluster import load

HEAD_DIM = 64
CLUSTER = """
name = "shaped"
gpus_per_node = {per_node}

[calibrated]
source = "not fitted: known rates"
ranks = 4
tokens = 2048
median_error = 0.05
percentile_90_error = 0.1

[gpu]
source = "copies by four processes at once"
sms = 1
memory_gib = 8
stream_gb_per_s = {stream}
gather_gb_per_s = {gather}
scatter_gb_per_s = {scatter}
launch_us = 20

[[kernels]]
source = "sleeps for a known time"
operators = ["./paced.py:OP"]
dtype = "float32"
head_dim = 64
grid = "mask"
fwd = {{ tile = [16, 16], tflops = {tflops}, tile_us = 0, empty_us = 0, tail = 0, call_us = 150 }}
bwd = {{ tile = [16, 16], tflops = {tflops}, tile_us = 0, empty_us = 0, tail = 0, call_us = 150 }}

"""


def median_gb_per_s(nbytes: int, run: object) -> float:
    """Bytes that are read and written, per second, in GB/s."""
    times: list[float] = []
    while len(times) < 15 or sum(times) < 1.0:
        start = time.perf_counter()
        run()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times) / 1e9


def copy_rates() -> dict[str, float]:
    """Rates of stream, gather and scatter in GB/s."""
    torch.set_num_threads(1)
    x, y = torch.ones(1 << 22), torch.ones(1 << 22)
    rows, index = torch.ones(1 << 14, 256), torch.randperm(1 << 14)
    out, nbytes = torch.empty_like(rows), 2 * x.nbytes
    return {
        "stream": median_gb_per_s(nbytes, lambda: y.copy_(x)),
        "gather": median_gb_per_s(nbytes, lambda: rows.index_select(0, index)),
        "scatter": median_gb_per_s(nbytes, lambda: out.index_copy_(0, index, rows)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that of shaped_links.py")
    parser.add_argument("--paced", type=float, required=True, metavar="NS")
    options = parser.parse_args()
    command = [sys.executable, __file__, "rates"]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    replies = [json.loads(rank.communicate()[0]) for rank in ranks]
    rates = {kind: statistics.median(reply[kind] for reply in replies) for kind in replies[0]}
    print("GB/s of each of 4 processes:", {kind: round(rate, 2) for kind, rate in rates.items()})
    file = options.folder / "shaped.toml"
    tflops = 4 * HEAD_DIM / options.paced / 1e3
    links = read_measured(options.folder / "links.json")
    file.write_text(
        CLUSTER.format(**rates, tflops=tflops, per_node=links.ranks_per_node), encoding="utf-8"
    )
    fit = fit_links(links, "cpbench links")
    cluster = replace(load(str(file)), links=fit.links, collectives=fit.collectives)
    file.write_text(to_toml(cluster, {}), encoding="utf-8")
    run = ("run", "sweep.toml", "--out", "run", "--predict", "shaped.toml", "--json")
    subprocess.run(
        [sys.executable, "-m", "cpbench", *run], cwd=options.folder, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    compare(options.folder / "run")


def compare(run: Path) -> None:
    """Print predicted and measured times (sleeping results cannot be checked, so that reports do
    not compare them), by mask, the fastest first."""
    table = frame.load(run)
    both = table[table["predicted_ms"].notna() & table["time_ms"].notna()].copy()
    both["error"] = both["predicted_ms"] / both["time_ms"] - 1
    both["method"] = both["strategy"] + "/" + both["layout"] + " " + both["placement"].fillna("")
    for mask, rows in both.groupby("mask"):
        print(
            f"\n{mask}\n| method | predicted ms | measured ms | error |\n| --- | --- | --- | --- |"
        )
        for _, row in rows.sort_values("time_ms").iterrows():
            cells = f"{row['predicted_ms']:,.0f} | {row['time_ms']:,.0f} | {row['error']:+.1%}"
            print(f"| {row['method'].strip()} | {cells} |")
    errors = both["error"].abs()
    right, pairs = ordered_pairs(both)
    print(f"\n{len(both)} cases: median error {errors.median():.1%}, 90th percentile "
          f"{errors.quantile(0.9):.1%}; {right} of {pairs} pairs in order")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["rates"]:
        print(json.dumps(copy_rates()))
    else:
        main()
