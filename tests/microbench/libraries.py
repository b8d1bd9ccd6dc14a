"""Speed of our strategies compared with those of libraries, over the same kernel.

    python tests/microbench/libraries.py [--dtype float32,bfloat16] [--mask causal,full]
        [--tokens 4096] [--heads 8] [--rounds 7] [--only "ring,ring_flash_attn"]

Two ranks, one torch thread each, Gloo; forward and backward of one attention.  Every round runs all
methods once, in random order, so that other load affects all of them.  *wall* is the time of the
slower rank; *cpu* the maximum CPU time per rank, which other load hardly changes, but which does
not include waiting.  Ratios are medians over rounds of a library's time over that of our strategy
in the same round: above 1, ours is faster.

Before each round a contention probe runs: the same work on one rank alone, then on both at once.
If both together take much longer than one alone, or than their CPU time, other processes use the
cores: the table is marked *contended*, and only its *cpu* columns are meaningful.  Results are
checked against one process that computes everything; wrong ones are marked.  A library that is not
installed, or refuses, is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import QKV, BackwardInputs, Unsupported
from cpbench.core.problem import Problem
from cpbench.parallel import layout as layouts
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import Control
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.world import World

RANKS = 2
KERNEL = "sdpa.cpu_flash"
CONTENDED = 1.25  # ratio of the probe; two ranks on an idle machine stay below 1.1
ERROR_LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


class Method(NamedTuple):
    """A method, and the label of our strategy that it is compared with."""

    strategy: str
    layout: str
    operator: str = KERNEL
    baseline: str = ""

    @property
    def label(self) -> str:
        tail = "" if self.operator == KERNEL else f" ({self.operator})"
        return f"{self.strategy}/{self.layout}{tail}"


OURS = (
    Method("ring", "contiguous"),
    Method("ring", "zigzag"),
    Method("ring", "striped"),
    Method("ulysses", "contiguous"),
    Method("usp:ulysses=2", "contiguous"),
    Method("ring_allgather", "contiguous"),
)
WITH_BANDS = tuple(method._replace(operator="bands") for method in OURS)
LIBRARIES = (
    Method("ring_flash_attn.ring", "contiguous", baseline="ring/contiguous"),
    Method("ring_flash_attn.zigzag", "zigzag", baseline="ring/zigzag"),
    Method("ring_flash_attn.stripe", "striped", baseline="ring/striped"),
    Method("ring_flash_attn.llama3", "contiguous", baseline="ring_allgather/contiguous"),
    Method("torch.context_parallel", "contiguous", baseline="ring/contiguous"),
    Method("torch.context_parallel", "zigzag", baseline="ring/zigzag"),
    Method("torch.context_parallel:rotate=alltoall", "zigzag", baseline="ring/zigzag"),
    Method("yunchang.usp:ulysses=1", "contiguous", baseline="ring/contiguous"),
    Method("yunchang.usp:ulysses=1", "zigzag", baseline="ring/zigzag"),
    Method("yunchang.usp:ulysses=2", "contiguous", baseline="usp:ulysses=2/contiguous"),
    Method("deepspeed.ulysses", "contiguous", baseline="ulysses/contiguous"),
)


class Runner:
    """One method on this rank, prepared to run."""

    def __init__(self, method: Method, problem: Problem, mask: Any, inputs: Any, rank: int) -> None:
        self.layout = layouts.build(method.layout, mask.seq_k, RANKS, mask)
        world = World.of(problem, mask, self.layout)
        self.work = Attention(method.operator, method.strategy, world, rank, "cpu")
        self.inputs = [self.layout.shard(x, rank) for x in inputs]

    def run(self, comm: TorchComm) -> list[torch.Tensor]:
        q, k, v, dout = self.inputs
        out, _, saved = self.work.forward(QKV(q, k, v), comm, need_lse=False)
        return [out, *self.work.backward(dout, saved, comm)]


def seconds(call: Any, control: Control) -> tuple[float, float]:
    """The maximum wall time (from a barrier) and the maximum CPU time over ranks."""
    control.barrier()
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    call()
    wall_s, cpu_s = time.perf_counter() - wall_start, time.process_time() - cpu_start
    return control.max(wall_s), control.max(cpu_s)


def measure(options: argparse.Namespace, dtype: str, kind: str, rank: int) -> dict[str, Any]:
    """Timings by method and round, contention by round, errors of wrong methods, refusals."""
    control, comm = Control(), TorchComm()
    tokens, heads, dim = options.tokens, options.heads, 64
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=heads, heads_kv=heads, head_dim=dim,
        dtype=dtype,
    )  # fmt: skip
    mask = masks.build(kind, tokens)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, tokens, heads, dim, generator=generator).to(getattr(torch, dtype))
        for _ in range(4)
    ]
    operator = BoundOperator.load(KERNEL, "cpu")
    world = World.of(problem, mask, layouts.build("contiguous", tokens, 1))
    plan = operator.prepare(world.subproblem([0], [0]))
    out, lse = operator.forward(QKV(*inputs[:3]), plan)
    expected = [out, *operator.backward(BackwardInputs(inputs[3], *inputs[:3], out, lse), plan)]

    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, float] = {}
    sent: dict[str, int] = {}
    selected = options.only.split(",") if options.only else []
    for method in (*OURS, *WITH_BANDS, *LIBRARIES):
        if selected and not any(method.label.startswith(name) for name in selected):
            continue
        try:
            runner = Runner(method, problem, mask, inputs, rank)
        except Unsupported as reason:
            refused[method.label] = str(reason)
            continue
        comm.traffic.clear()
        results = runner.run(comm)
        sent[method.label] = comm.traffic.bytes_sent
        worst = max(
            float((x - y).norm() / y.norm())
            for x, y in zip(results, [runner.layout.shard(x, rank) for x in expected], strict=True)
        )
        worst = max(control.all_gather(worst))
        if worst > ERROR_LIMITS[dtype]:
            wrong[method.label] = worst
        runners[method.label] = runner

    probe_inputs = [x[:, : tokens // 2] for x in inputs]
    probe_world = World.of(
        Problem(
            batch=1, seq_q=tokens // 2, seq_k=tokens // 2, heads_q=heads, heads_kv=heads,
            head_dim=dim, dtype=dtype,
        ),
        masks.build("causal", tokens // 2), layouts.build("contiguous", tokens // 2, 1),
    )  # fmt: skip
    probe_plan = operator.prepare(probe_world.subproblem([0], [0]))
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in runners}
    contention: list[float] = []
    order, shuffler = list(runners), random.Random(0)
    for _ in range(options.rounds):
        probe = lambda: operator.forward(QKV(*probe_inputs[:3]), probe_plan)  # noqa: E731
        one_rank_s, _ = seconds(probe if rank == 0 else lambda: None, control)
        all_ranks_s, cpu_s = seconds(probe, control)
        contention.append(max(all_ranks_s / one_rank_s, all_ranks_s / cpu_s))
        shuffler.shuffle(order)
        for label in order:
            times[label].append(seconds(lambda: runners[label].run(comm), control))  # noqa: B023
    return {
        "times": times, "contention": contention, "wrong": wrong, "refused": refused, "sent": sent
    }  # fmt: skip


def format_table(
    results: dict[str, Any], dtype: str, kind: str, options: argparse.Namespace
) -> str:
    """The table of one dtype and mask."""
    contention = statistics.median(results["contention"])
    mark = "  CONTENDED: see cpu only" if contention > CONTENDED else ""
    lines = [
        f"\n{dtype}, {kind}, {options.tokens} tokens, {options.heads} heads, {RANKS} ranks, "
        f"{options.rounds} rounds; contention {contention:.2f}{mark}",
        f"{'':<46}{'wall ms':>8}{'cpu ms':>8}{'MB':>6}   x ours: wall (range), cpu; over bands",
    ]
    baselines = {method.label: method.baseline for method in LIBRARIES}
    for label, times in results["times"].items():
        wall, cpu = (statistics.median(x) * 1e3 for x in zip(*times, strict=True))
        line = f"{label:<46}{wall:>8.0f}{cpu:>8.0f}{results['sent'][label] / 1e6:>6.1f}"
        for tail in ("", " (bands)"):
            base = results["times"].get(baselines.get(label, "") + tail)
            if base:
                line += f"   {_ratios(times, base)}"
        if label in baselines:
            line += f"   vs {baselines[label]}"
        if label in results["wrong"]:
            line += f"  WRONG by {results['wrong'][label]:.1g}"
        lines.append(line)
    lines += [f"{label:<46}refused: {reason}" for label, reason in results["refused"].items()]
    return "\n".join(lines)


def _ratios(times: list[Any], base: list[Any]) -> str:
    wall, cpu = (
        [a / b for a, b in zip(x, y, strict=True)]
        for x, y in zip(zip(*times, strict=True), zip(*base, strict=True), strict=True)
    )
    median = statistics.median
    return f"{median(wall):.2f} ({min(wall):.2f} … {max(wall):.2f}), {median(cpu):.2f}"


def rank_main(options: argparse.Namespace) -> None:
    """Measure everything on one rank; rank 0 prints."""
    rank = options.rank
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries use deprecated names of torch
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(options.store, RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=20)
    )
    for dtype in options.dtype.split(","):
        for kind in options.mask.split(","):
            results = measure(options, dtype, kind, rank)
            if rank == 0:
                print(format_table(results, dtype, kind, options), flush=True)
                if options.json:
                    with open(options.json, "a") as file:
                        file.write(json.dumps({"dtype": dtype, "mask": kind, **results}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--mask", default="causal,full")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="prefixes of labels, separated by commas")
    parser.add_argument("--json", default="", help="file to append every sample to")
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank >= 0:
        rank_main(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--store", f"{folder}/store"]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(RANKS)]
        codes = [rank.wait() for rank in ranks]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
