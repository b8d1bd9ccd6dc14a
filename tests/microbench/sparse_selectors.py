"""Selectors on this CPU, compared with dense causal attention, forward and backward.

    python tests/microbench/sparse_selectors.py [--tokens 8192,32768] [--rounds 9]
        [--inputs needles:length=1] [--only xattention]

One torch thread, float32, 2 query heads and 1 key/value head of head_dim 64; medians of CPU time
(``time.process_time``) of interleaved runs; compare ratios within one run only.  *dense* is torch's
causal flash kernel.  A ratio is the median over rounds of its time over that of selecting, planning
and computing, without and with the backward pass: above 1, the selector is faster.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpbench import inputs
from cpbench.core.operator import QKV, BackwardInputs

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info
from cpbench.core.spec import Spec
from cpbench.masks import build

SPECS = (
    "minference.vertical_slash:vertical=256,slash=256",
    "minference.vertical_slash:vertical=256,slash=256,kernel=bands",
    "xattention",
    "xattention:block_size=64",
    "minference.block_sparse:keep=0.125",
    "dsa:top_k=512",
)
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
STEPS = ("select", "plan", "kernel", "backward")


def timed(samples: list[float], call: Callable[[], Any]) -> Any:
    """The result of a call, whose milliseconds are added to the samples."""
    begin = time.process_time()
    result = call()
    samples.append((time.process_time() - begin) * 1e3)
    return result


def compare(spec: Spec, qkv: QKV, problem: Problem, rounds: int) -> str:
    """A line of the table."""
    q, k, v = qkv
    selector: Any = implementation(operator_info(spec.name), dict(spec.params))
    plan = selector.prepare(build("causal", problem.seq_q), problem, "cpu")
    group = problem.heads_q // problem.heads_kv
    dense = [
        x.repeat_interleave(h, 2).transpose(1, 2).contiguous()
        for x, h in ((q, 1), (k, group), (v, group))
    ]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    dense_dout = dout.transpose(1, 2).contiguous()
    times: dict[str, list[float]] = {name: [] for name in ("dense", "dense backward", *STEPS)}
    for _ in range(rounds):
        out, lse = timed(times["dense"], lambda: FLASH(*dense, 0.0, True))
        given = dense_dout, *dense, out, lse.contiguous()
        timed(times["dense backward"], lambda y=given: FLASH_BACKWARD(*y, 0.0, True))
        branches = timed(times["select"], lambda: selector.select(q, k, plan))
        prepared = timed(times["plan"], lambda b=branches: selector.prepare_branches(b, plan))
        _, _, (result,) = timed(times["kernel"], lambda p=prepared: selector.compute(qkv, p))
        ((_, kernel, kernel_plan, _),) = prepared
        x = BackwardInputs(dout, *result)
        timed(times["backward"], lambda x=x, k=kernel, p=kernel_plan: k.backward(x, p))
    kept = branches[0].mask.area / (problem.seq_q * (problem.seq_q + 1) / 2)
    samples = {name: np.array(values) for name, values in times.items()}
    forward = samples["select"] + samples["plan"] + samples["kernel"]
    both = (samples["dense"] + samples["dense backward"]) / (forward + samples["backward"])
    ms = "".join(f"{np.median(values):9.0f}" for values in samples.values())
    return f"{kept:6.1%}{ms}{np.median(samples['dense'] / forward):8.2f}{np.median(both):8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--inputs", default="needles:length=1")
    parser.add_argument("--only", action="append", default=[], help="a selector; may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = inputs.Recipe(0, inputs.parse(options.inputs))
    print("milliseconds; in the last columns above 1 the selector is faster than dense attention")
    columns = ("dense", "backward", *STEPS)
    head = "".join(f"{name:>9}" for name in columns)
    print(f"{'':<62}{'tokens':>7}  kept{head}     fwd fwd+bwd")
    for n in map(int, options.tokens.split(",")):
        problem = Problem(
            batch=1, seq_q=n, seq_k=n, heads_q=2, heads_kv=1, head_dim=64, dtype="float32"
        )
        qkv = QKV(
            *(
                recipe.make(
                    name, problem, np.arange(n), batches=[0], heads=range(heads), device="cpu"
                )
                for name, heads in (("q", 2), ("k", 1), ("v", 1))
            )
        )
        for spec in options.only or SPECS:
            line = compare(Spec.parse(spec), qkv, problem, options.rounds)
            print(f"{spec:<62}{n:>7}{line}", flush=True)


if __name__ == "__main__":
    main()
