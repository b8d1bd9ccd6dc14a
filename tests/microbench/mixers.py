"""Speed of the mixers on this CPU, compared with causal attention and with the mixers of libraries.

    python tests/microbench/mixers.py [--tokens 1k,4k,16k,64k] [--only kda,ssd] [--dtype bfloat16]
        [--heads 2] [--dim 64] [--rounds 5] [--slowest 20]

Up to 16K tokens it takes some ten minutes, up to 64K half an hour.

All are registered operators, on the same inputs: *attention* is ``sdpa.cpu_flash``, torch's fused
causal kernel; *fla* the functions in torch of flash-linear-attention (``fla.naive_*``);
*transformers* ``transformers.gated_delta``, which Qwen3-Next falls back to.  What is not installed
or refuses is left out, with the reason.

One torch thread; medians of CPU time (``time.process_time``) of interleaved runs, so that other
load matters little; compare ratios within one run only.  The outputs of peers are compared with
ours before anything is timed.  What takes more than ``--slowest`` seconds is called once, and left
out at greater lengths.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

import naive

from cpbench import masks
from cpbench.api import Attention
from cpbench.core import registry
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.core.spec import Spec, format_size, parse_size
from cpbench.inputs import Recipe
from cpbench.parallel import layout as layouts
from cpbench.parallel.world import World
from cpbench.verify.check import Tensors, rank_inputs, run_pass

ATTENTION = "sdpa.cpu_flash"
MIXERS = sorted(name for name, info in registry.operators().items() if info.mixer == name)
COLUMNS = ("attention", "fla", "transformers")
MOST_TOKENS = {"fla.naive_gla": 1 << 14}  # one token at a time: autograd keeps every state


def operators_of(mixer: str) -> dict[str, str]:
    """The operators to compare a mixer with, by column."""
    peers = (
        name
        for name, info in registry.operators().items()
        if info.mixer == mixer and name != mixer and "cpu" in info.devices
    )
    return {"ours": mixer, "attention": ATTENTION} | {x.partition(".")[0]: x for x in peers}


def prepare(
    operator: str, shape: dict[str, int], dtype: str, direction: str
) -> Callable[[], Tensors]:
    """A call that computes one pass of an operator on one rank; raises ``Unsupported``."""
    tokens = shape["seq_q"]
    problem = Problem(batch=1, dtype=dtype, direction=direction, **shape)
    layout = layouts.build("contiguous", tokens, 1)
    world = World.of(problem, masks.build("causal", tokens), layout)
    work = Attention(operator, "single", world, 0, "cpu")
    inputs = rank_inputs(work, Recipe(0, Spec("gates")), "cpu")
    return lambda: run_pass(work, inputs, None)


def prepare_all(
    mixer: str, shape: dict[str, int], dtype: str, direction: str, left_out: set[str]
) -> dict[str, Callable[[], Tensors]]:
    """The calls by column; what refuses, or is too slow (``left_out``), is not among them."""
    calls, limit = {}, 1e-4 if dtype == "float32" else 2e-2
    for column, operator in operators_of(mixer).items():
        if operator in left_out or shape["seq_q"] > MOST_TOKENS.get(operator, shape["seq_q"]):
            continue
        try:
            calls[column] = call = prepare(operator, shape, dtype, direction)
        except Unsupported as refusal:
            print(f"# left out: {refusal}")
            left_out.add(operator)
            continue
        if direction == "fwd" and column not in ("ours", "attention"):
            error = naive.error(call()["out"], calls["ours"]()["out"])
            if not error < limit:
                print(f"# {operator} differs from {mixer} by {error:.1e}")
    return calls


def timed(call: Callable[[], Tensors]) -> float:
    """CPU milliseconds of a call."""
    begun = time.process_time()
    call()
    return (time.process_time() - begun) * 1e3


def medians(
    calls: dict[str, Callable[[], Tensors]], rounds: int, slowest: float
) -> dict[str, float]:
    """Median milliseconds of each call, after one to warm up."""
    samples = {name: [timed(call)] for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            if samples[name][0] < slowest * 1e3:
                samples[name].append(timed(call))
    return {name: statistics.median(s[1:] or s) for name, s in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1k,4k,16k")
    parser.add_argument("--only", default=",".join(MIXERS), help="names of mixers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slowest", type=float, default=20, help="seconds of a call, to repeat it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.dtype}, {options.heads} heads of {options.dim}; one thread, median CPU ms;")
    print("ratios are times over that of ours: above 1, ours is faster")
    head = "".join(f"{name:>19}" for name in COLUMNS)
    print(f"{'mixer':<16}{'tokens':>7} {'pass':<8}{'ours':>9}{head}")
    left_out: dict[tuple[str, str], set[str]] = {}
    fastest: dict[str, list[bool]] = {name: [] for name in COLUMNS}
    for tokens in map(parse_size, options.tokens.split(",")):
        shape = {
            "seq_q": tokens, "seq_k": tokens, "heads_q": options.heads, "heads_kv": options.heads,
            "head_dim": options.dim,
        }  # fmt: skip
        for mixer in options.only.split(","):
            for direction in ("fwd", "fwd_bwd"):
                slow = left_out.setdefault((mixer, direction), set())
                calls = prepare_all(mixer, shape, options.dtype, direction, slow)
                ms = medians(calls, options.rounds, options.slowest)
                line = f"{mixer:<16}{format_size(tokens):>7} {direction.replace('_', '+'):<8}"
                line += f"{ms['ours']:>9.1f}"
                for name in COLUMNS:
                    ratio = ""
                    if name in ms:
                        fastest[name].append(ms["ours"] <= ms[name])
                        ratio = f"{ms[name]:.1f} ({ms[name] / ms['ours']:.2f}x)"
                    line += f"{ratio:>19}"
                print(line, flush=True)
                too_slow = {name for name, x in ms.items() if x > options.slowest * 1e3}
                slow |= {operators_of(mixer)[name] for name in too_slow - {"ours"}}
    for name, won in fastest.items():
        print(f"ours is at least as fast as {name} in {sum(won)} of {len(won)} lines")


if __name__ == "__main__":
    main()
