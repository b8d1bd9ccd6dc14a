"""Error against the number of ranks, for gradients sent in float32 and in bfloat16.

Ranks are threads of this process, so 64 of them fit on any machine.  Errors are relative L2 norms
of the difference to float64, over all ranks.

Run: python tests/microbench/error_growth.py [--tokens 2048] [--ranks 1,2,4,8,16,32,64]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

import naive
from threads import ThreadComm, run_threads

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import QKV
from cpbench.core.problem import Problem
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World

STRATEGIES = ("ring", "ring:grad_dtype=bfloat16", "burst", "tile", "ring_allgather")
TENSORS = ("out", "dq", "dk", "dv")


def errors(
    strategy: str, size: int, tokens: int, dtype: str, heads_q: int = 4, heads_kv: int = 2
) -> dict[str, float]:
    """The error of every tensor, over all ranks, for a causal mask with layout zigzag."""
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=heads_q, heads_kv=heads_kv, head_dim=32,
        dtype=dtype,
    )  # fmt: skip
    mask = masks.build("causal", tokens)
    layout = layouts.build("zigzag", tokens, size)
    world = World.of(problem, mask, layout)
    inputs = naive.random_inputs(1, tokens, heads_q, heads_kv, 32, getattr(torch, dtype))

    def run_rank(comm: ThreadComm) -> dict[str, torch.Tensor]:
        work = Attention("bands", strategy, world, comm.rank, "cpu")
        q, k, v, dout = (layout.shard(x, comm.rank) for x in inputs)
        out, _, saved = work.forward(QKV(q, k, v), comm)
        return dict(zip(TENSORS, (out, *work.backward(dout, saved, comm)), strict=True))

    results = run_threads(size, run_rank)
    expected = _reference(tokens, dtype, heads_q, heads_kv)
    return {
        name: naive.error(layout.unshard([result[name] for result in results]), expected[name])
        for name in TENSORS
    }


_REFERENCES: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}


def _reference(tokens: int, dtype: str, heads_q: int, heads_kv: int) -> dict[str, torch.Tensor]:
    key = (tokens, dtype, heads_q, heads_kv)
    if key not in _REFERENCES:
        inputs = naive.random_inputs(1, tokens, heads_q, heads_kv, 32, getattr(torch, dtype))
        _REFERENCES[key] = naive.attention(*inputs, masks.build("causal", tokens))
    return _REFERENCES[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):
        print(f"\ncausal, zigzag, {options.tokens} tokens, 4:2 heads, D 32, {dtype}")
        print(f"{'strategy':26} {'ranks':>5}  " + "  ".join(f"{name:>8}" for name in TENSORS))
        for strategy in STRATEGIES:
            if "grad_dtype" in strategy and dtype == "float32":
                continue  # refused
            for size in map(int, options.ranks.split(",")):
                by_tensor = errors(strategy, size, options.tokens, dtype)
                row = "  ".join(f"{by_tensor[name]:8.1e}" for name in TENSORS)
                print(f"{strategy:26} {size:5}  {row}", flush=True)


if __name__ == "__main__":
    main()
