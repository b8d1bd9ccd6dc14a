"""Speed of `cpbench.mix` on this CPU, compared with causal attention and other mixers in torch.

    python tests/microbench/mixers.py [--tokens 1k,4k,16k] [--only kda,ssd] [--dtype bfloat16]
        [--heads 2] [--dim 64] [--rounds 5] [--slowest 60]

One torch thread; medians of CPU time (``time.process_time``) of interleaved runs, so that other
load matters little; compare ratios within one run only.  *attention* is torch's fused causal
kernel.  *fla* is the torch function of flash-linear-attention of the same mixer ("naive"), and
*transformers* the one that Qwen3-Next falls back to; what is not installed is left out, with the
reason.  The outputs of peers are compared with ours before anything is timed.  A peer that takes
more than ``--slowest`` seconds is called once.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import naive
import naive_mixers

import cpbench
from cpbench.core.spec import format_size, parse_size

Named = dict[str, torch.Tensor]
Mixed = Callable[[Named], torch.Tensor]

MOST_TOKENS = {"retention": 4096, "gla": 4096}  # of fla: quadratic, and one token at a time


def load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def fla(mixer: str) -> Mixed:
    """The torch function of flash-linear-attention for a mixer, on inputs by name."""
    where, name = {
        "linear": ("linear_attn", "naive_chunk_linear_attn"),
        "retention": ("retention", "naive_retention"),
        "ssd": ("simple_gla", "naive_chunk_simple_gla"),
        "gla": ("gla", "naive_recurrent_gla"),
        "deltanet": ("delta_rule", "delta_rule_chunkwise"),
        "gated_deltanet": ("gated_delta_rule", "naive_chunk_gated_delta_rule"),
        "kda": ("kda", "naive_chunk_kda"),
    }[mixer]
    function = load(f"fla.ops.{where}.naive", name)
    names = {"linear": "qkv", "retention": "qkv", "deltanet": ("q", "k", "v", "beta")}
    heads_first = mixer in ("retention", "deltanet")

    def call(x: Named) -> torch.Tensor:
        given = [x[name] for name in names.get(mixer, x)]
        if heads_first:
            given = [y.transpose(1, 2) for y in given]
        out = function(*given)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2) if heads_first else out

    return call


def transformers(mixer: str) -> Mixed:
    """The torch function of transformers for a mixer."""
    assert mixer == "gated_deltanet"
    module = "transformers.models.qwen3_next.modeling_qwen3_next"
    function = load(module, "torch_chunk_gated_delta_rule")
    function = getattr(function, "__wrapped__", function)  # not fla's kernels, if they are there
    return lambda x: function(*x.values())[0]


def ours(mixer: str) -> Mixed:
    return lambda x: cpbench.mix(**x, mixer=mixer)[0]


def attention(x: Named) -> torch.Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def timed(mixed: Mixed, x: Named, backward: bool) -> Callable[[], float]:
    """A call that returns its CPU milliseconds."""
    random = torch.Generator().manual_seed(1)
    dout = torch.randn(x["v"].shape, generator=random).to(x["v"])

    def call() -> float:
        leaves = {name: y.detach().requires_grad_(backward) for name, y in x.items()}
        begin = time.process_time()
        out = mixed(leaves)
        if backward:
            torch.autograd.grad(
                out, tuple(leaves.values()), dout.view(out.shape), allow_unused=True
            )
        return (time.process_time() - begin) * 1e3

    return call


def peers(mixer: str, tokens: int, x: Named) -> dict[str, Mixed]:
    """The peers of a mixer that can be called, after a comparison of their outputs with ours."""
    found = {}
    expected = cpbench.mix(**x, mixer=mixer)[0]
    tolerance = 1e-4 if x["v"].dtype == torch.float32 else 2e-2
    for name, make in (("fla", fla), ("transformers", transformers)):
        if (name == "transformers") != (mixer == "gated_deltanet") and name == "transformers":
            continue
        if mixer == "ttt" or (name == "fla" and tokens > MOST_TOKENS.get(mixer, tokens)):
            continue
        try:
            found[name] = make(mixer)
        except ImportError as error:
            print(f"# {name} is left out: {error}")
            continue
        with torch.no_grad():
            error = naive.error(found[name](x), expected)
        if not error < tolerance:
            print(f"# {name} of {mixer} differs from ours by {error:.1e}")
    return found


def medians(calls: dict[str, Callable[[], float]], rounds: int, slowest: float) -> dict[str, float]:
    """Median milliseconds of each call, after one to warm up."""
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        samples[name] = [call()]
    for _ in range(rounds):
        for name, call in calls.items():
            if samples[name][0] < slowest * 1e3:
                samples[name].append(call())
    return {name: statistics.median(s[1:] or s) for name, s in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1k,2k,4k,8k,16k")
    parser.add_argument("--only", default=",".join(naive_mixers.NAMES), help="names of mixers")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slowest", type=float, default=20, help="seconds of a call, to repeat it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.dtype}, {options.heads} heads of {options.dim}; one thread, median CPU ms;")
    print("ratios are times over that of cpbench.mix: above 1, ours is faster")
    columns = ("attention", "fla", "transformers")
    head = "".join(f"{name:>19}" for name in columns)
    print(f"{'mixer':<16}{'tokens':>7} {'pass':<8}{'ours':>9}{head}")
    for tokens in map(parse_size, options.tokens.split(",")):
        for mixer in options.only.split(","):
            x = naive_mixers.make_inputs(
                mixer, 1, tokens, options.heads, options.dim, options.dim,
                getattr(torch, options.dtype),
            )  # fmt: skip
            del x["initial_state"]
            if mixer == "retention":
                del x["g"]
            others = peers(mixer, tokens, x)
            for backward in (False, True):
                methods = {"ours": ours(mixer), "attention": attention} | others
                calls = {name: timed(method, x, backward) for name, method in methods.items()}
                ms = medians(calls, options.rounds, options.slowest)
                line = f"{mixer:<16}{format_size(tokens):>7} {'fwd+bwd' if backward else 'fwd':<8}"
                line += f"{ms['ours']:>9.1f}"
                for name in columns:
                    ratio = f"{ms[name]:.1f} ({ms[name] / ms['ours']:.2f}x)" if name in ms else ""
                    line += f"{ratio:>19}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
