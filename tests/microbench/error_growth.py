"""Error against the number of ranks, for gradients that travel in float32 and in bfloat16.

Ranks are threads of this process, so 64 of them fit on any machine; the strategies are those that
are measured.  Errors are relative L2 norms of the difference to float64, over all ranks.

Run: python tests/microbench/error_growth.py [--tokens 2048] [--ranks 1,2,4,8,16,32,64]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cpbench.core.operator import QKV

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import naive
from threads import ThreadComm, run_threads

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.problem import Problem
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

STRATEGIES = ("ring", "ring:grad_dtype=bfloat16", "burst", "tile", "ring_allgather")
TENSORS = ("out", "dq", "dk", "dv")


def errors(
    strategy: str, size: int, tokens: int, dtype: str, heads_q: int = 4, heads_kv: int = 2
) -> dict[str, float]:
    """Of every tensor, over all ranks, for causal under zigzag."""
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=heads_q, heads_kv=heads_kv, head_dim=32,
        dtype=dtype,
    )  # fmt: skip
    mask = masks.build("causal", tokens)
    dealt = layouts.build("zigzag", tokens, size)
    world = World.of(problem, mask, dealt)
    whole = naive.random_inputs(1, tokens, heads_q, heads_kv, 32, getattr(torch, dtype))

    def rank(comm: ThreadComm) -> dict[str, torch.Tensor]:
        work = Attention("bands", strategy, world, comm.rank, "cpu")
        q, k, v, dout = (dealt.shard(x, comm.rank) for x in whole)
        out, _, saved = work.forward(QKV(q, k, v), comm)
        return dict(zip(TENSORS, (out, *work.backward(dout, saved, comm)), strict=True))

    ranks = run_threads(size, rank)
    want = _answer(tokens, dtype, heads_q, heads_kv)
    return {
        name: naive.error(dealt.unshard([found[name] for found in ranks]), want[name])
        for name in TENSORS
    }


_ANSWERS: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}


def _answer(tokens: int, dtype: str, heads_q: int, heads_kv: int) -> dict[str, torch.Tensor]:
    key = (tokens, dtype, heads_q, heads_kv)
    if key not in _ANSWERS:
        whole = naive.random_inputs(1, tokens, heads_q, heads_kv, 32, getattr(torch, dtype))
        _ANSWERS[key] = naive.attention(*whole, masks.build("causal", tokens))
    return _ANSWERS[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        print(f"\ncausal, zigzag, {given.tokens} tokens, 4:2 heads, D 32, {dtype}")
        print(f"{'strategy':26} {'ranks':>5}  " + "  ".join(f"{name:>8}" for name in TENSORS))
        for strategy in STRATEGIES:
            for size in map(int, given.ranks.split(",")):
                found = errors(strategy, size, given.tokens, dtype)
                row = "  ".join(f"{found[name]:8.1e}" for name in TENSORS)
                print(f"{strategy:26} {size:5}  {row}", flush=True)


if __name__ == "__main__":
    main()
