"""How fast our strategies are next to those of libraries, over the same inner kernel.

    python tests/microbench/libraries.py [--dtype float32,bfloat16] [--mask causal,full]
        [--tokens 4096] [--heads 8] [--rounds 7] [--only "ring,ring_flash_attn"]

Two ranks, one torch thread each, Gloo; forward and backward of one attention.  Every round runs
every contestant once, in an order drawn anew, so that a busy neighbour hits all alike.  *wall* is
the time of the slower rank; *cpu* the processor time of the rank that used most, which neighbours
hardly change, but which does not see waiting either.  Ratios are medians over rounds of a library's
figure over that of our strategy in the same round: above 1, ours is faster.

Before each round a canary runs: the same piece of work on one rank alone, then on both at once.
Where both take much longer than one, or than the processor time that they use, somebody else has
the cores: the table is marked *contended*, and only its *cpu* columns mean anything.
Results are held against one process that computes everything; wrong ones are marked.  A library
that is not installed, or refuses, is left out with its reason.
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

from cpbench.core.operator import QKV, BackwardInputs

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.parallel import layout as layouts
from cpbench.parallel.bound_operator import BoundOperator
from cpbench.parallel.comm import Control, TorchComm
from cpbench.parallel.world import World

RANKS = 2
KERNEL = "sdpa.cpu_flash"
CONTENDED = 1.25  # of the canary; two ranks on an idle machine stay below 1.1
WRONG = {"float32": 1e-4, "bfloat16": 5e-2}


class Contestant(NamedTuple):
    """Who runs, and the one of ours that does the same."""

    strategy: str
    layout: str
    operator: str = KERNEL
    rival_of: str = ""

    @property
    def label(self) -> str:
        tail = "" if self.operator == KERNEL else f" ({self.operator})"
        return f"{self.strategy}/{self.layout}{tail}"


OURS = (
    Contestant("ring", "contiguous"),
    Contestant("ring", "zigzag"),
    Contestant("ring", "striped"),
    Contestant("ulysses", "contiguous"),
    Contestant("usp:ulysses=2", "contiguous"),
    Contestant("ring_allgather", "contiguous"),
)
WITH_BANDS = tuple(one._replace(operator="bands") for one in OURS)
LIBRARIES = (
    Contestant("ring_flash_attn.ring", "contiguous", rival_of="ring/contiguous"),
    Contestant("ring_flash_attn.zigzag", "zigzag", rival_of="ring/zigzag"),
    Contestant("ring_flash_attn.stripe", "striped", rival_of="ring/striped"),
    Contestant("ring_flash_attn.llama3", "contiguous", rival_of="ring_allgather/contiguous"),
    Contestant("torch.context_parallel", "contiguous", rival_of="ring/contiguous"),
    Contestant("torch.context_parallel", "zigzag", rival_of="ring/zigzag"),
    Contestant("torch.context_parallel:rotate=alltoall", "zigzag", rival_of="ring/zigzag"),
    Contestant("yunchang.usp:ulysses=1", "contiguous", rival_of="ring/contiguous"),
    Contestant("yunchang.usp:ulysses=1", "zigzag", rival_of="ring/zigzag"),
    Contestant("yunchang.usp:ulysses=2", "contiguous", rival_of="usp:ulysses=2/contiguous"),
    Contestant("deepspeed.ulysses", "contiguous", rival_of="ulysses/contiguous"),
)


class Runner:
    """One contestant, ready to run."""

    def __init__(self, who: Contestant, problem: Problem, mask: Any, whole: Any, rank: int) -> None:
        self.dealt = layouts.build(who.layout, mask.seq_k, RANKS, mask)
        world = World.of(problem, mask, self.dealt)
        self.work = Attention(who.operator, who.strategy, world, rank, "cpu")
        self.inputs = [self.dealt.shard(x, rank) for x in whole]

    def run(self, comm: TorchComm) -> list[torch.Tensor]:
        q, k, v, dout = self.inputs
        out, _, saved = self.work.forward(QKV(q, k, v), comm, need_lse=False)
        return [out, *self.work.backward(dout, saved, comm)]


def seconds(call: Any, control: Control) -> tuple[float, float]:
    """Wall time of the slower rank, from a barrier, and processor time of the busier one."""
    control.barrier()
    begin, used = time.perf_counter(), time.process_time()
    call()
    took, used = time.perf_counter() - begin, time.process_time() - used
    return control.max(took), control.max(used)


def measure(options: argparse.Namespace, dtype: str, kind: str, rank: int) -> dict[str, Any]:
    """Times by contestant and round, the canary by round, who was wrong and who refused."""
    control, comm = Control(), TorchComm()
    tokens, heads, dim = options.tokens, options.heads, 64
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=heads, heads_kv=heads, head_dim=dim,
        dtype=dtype,
    )  # fmt: skip
    mask = masks.build(kind, tokens)
    seed = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(1, tokens, heads, dim, generator=seed).to(getattr(torch, dtype))
        for _ in range(4)
    ]
    alone = BoundOperator.load(KERNEL, "cpu")
    one_rank = World.of(problem, mask, layouts.build("contiguous", tokens, 1))
    plan = alone.prepare(one_rank.subproblem([0], [0]))
    out, lse = alone.forward(QKV(*whole[:3]), plan)
    want = [out, *alone.backward(BackwardInputs(whole[3], *whole[:3], out, lse), plan)]

    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    wrong: dict[str, float] = {}
    sent: dict[str, int] = {}
    chosen = options.only.split(",") if options.only else []
    for who in (*OURS, *WITH_BANDS, *LIBRARIES):
        if chosen and not any(who.label.startswith(name) for name in chosen):
            continue
        try:
            runner = Runner(who, problem, mask, whole, rank)
        except Unsupported as reason:
            refused[who.label] = str(reason)
            continue
        comm.traffic.clear()
        found = runner.run(comm)
        sent[who.label] = comm.traffic.bytes_sent
        worst = max(
            float((x - y).norm() / y.norm())
            for x, y in zip(found, [runner.dealt.shard(x, rank) for x in want], strict=True)
        )
        worst = max(control.all_gather(worst))
        if worst > WRONG[dtype]:
            wrong[who.label] = worst
        runners[who.label] = runner

    short = [x[:, : tokens // 2] for x in whole]
    small = World.of(
        Problem(
            batch=1, seq_q=tokens // 2, seq_k=tokens // 2, heads_q=heads, heads_kv=heads,
            head_dim=dim, dtype=dtype,
        ),
        masks.build("causal", tokens // 2), layouts.build("contiguous", tokens // 2, 1),
    )  # fmt: skip
    canary_plan = alone.prepare(small.subproblem([0], [0]))
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in runners}
    canary: list[float] = []
    order, draw = list(runners), random.Random(0)
    for _ in range(options.rounds):
        sing = lambda: alone.forward(QKV(*short[:3]), canary_plan)  # noqa: E731
        lonely, _ = seconds(sing if rank == 0 else lambda: None, control)
        together, used = seconds(sing, control)
        canary.append(max(together / lonely, together / used))
        draw.shuffle(order)
        for label in order:
            times[label].append(seconds(lambda: runners[label].run(comm), control))  # noqa: B023
    return {
        "times": times, "canary": canary, "wrong": wrong, "refused": refused, "sent": sent
    }  # fmt: skip


def told(found: dict[str, Any], dtype: str, kind: str, options: argparse.Namespace) -> str:
    """The table of one dtype and mask."""
    canary = statistics.median(found["canary"])
    mark = "  CONTENDED: see cpu only" if canary > CONTENDED else ""
    lines = [
        f"\n{dtype}, {kind}, {options.tokens} tokens, {options.heads} heads, {RANKS} ranks, "
        f"{options.rounds} rounds; canary {canary:.2f}{mark}",
        f"{'':<46}{'wall ms':>8}{'cpu ms':>8}{'MB':>6}   x ours: wall (range), cpu; over bands",
    ]
    rivals = {who.label: who.rival_of for who in LIBRARIES}
    for label, times in found["times"].items():
        wall, cpu = (statistics.median(x) * 1e3 for x in zip(*times, strict=True))
        line = f"{label:<46}{wall:>8.0f}{cpu:>8.0f}{found['sent'][label] / 1e6:>6.1f}"
        for tail in ("", " (bands)"):
            base = found["times"].get(rivals.get(label, "") + tail)
            if base:
                line += f"   {_ratios(times, base)}"
        if label in rivals:
            line += f"   vs {rivals[label]}"
        if label in found["wrong"]:
            line += f"  WRONG by {found['wrong'][label]:.1g}"
        lines.append(line)
    lines += [f"{label:<46}refused: {reason}" for label, reason in found["refused"].items()]
    return "\n".join(lines)


def _ratios(times: list[Any], base: list[Any]) -> str:
    wall, cpu = (
        [a / b for a, b in zip(x, y, strict=True)]
        for x, y in zip(zip(*times, strict=True), zip(*base, strict=True), strict=True)
    )
    median = statistics.median
    return f"{median(wall):.2f} ({min(wall):.2f} … {max(wall):.2f}), {median(cpu):.2f}"


def rank_main(options: argparse.Namespace) -> None:
    """One rank: everything, in step with the other; rank 0 prints."""
    rank = options.rank
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries call what torch has renamed
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(options.store, RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=20)
    )
    for dtype in options.dtype.split(","):
        for kind in options.mask.split(","):
            found = measure(options, dtype, kind, rank)
            if rank == 0:
                print(told(found, dtype, kind, options), flush=True)
                if options.json:
                    with open(options.json, "a") as file:
                        file.write(json.dumps({"dtype": dtype, "mask": kind, **found}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--mask", default="causal,full")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="beginnings of labels, separated by commas")
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
