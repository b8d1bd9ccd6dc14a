"""The longest sequence that fits in device memory, with and without ``offload=host``.

Measured: forward and backward passes on the CPU with real tensors, where what counts as device
memory has a hard limit (inputs included, unless they are in host memory).  Predicted: the memory
trace of one rank, for a device and a host of given sizes; without temporaries of the operator.

Run: python tests/microbench/longest_sequence.py [--limit-mib 64] [--most 32768]
         [--device-gb 80] [--host-gb 200] [--ranks 8]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

import naive

from cpbench import masks
from cpbench.api import Attention
from cpbench.core.operator import QKV
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec, format_size
from cpbench.parallel import layout as layouts
from cpbench.parallel.host_memory.account import MemoryAccount, PeakBytes
from cpbench.parallel.tracing.memory_trace import peak_bytes
from cpbench.parallel.world import World

MEASURED = ("single", "single:offload=host,chunk=512", "single:offload=host,chunk=2048")
PREDICTED = ("single", "ulysses", "ring_allgather", "tile")
CHUNK = 1 << 18  # of predictions


def world_of(tokens: int, ranks: int, heads_q: int, heads_kv: int, head_dim: int) -> World:
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=heads_q, heads_kv=heads_kv,
        head_dim=head_dim, dtype="bfloat16",
    )  # fmt: skip
    mask = masks.build("causal", tokens)
    return World.of(problem, mask, layouts.build("contiguous", tokens, ranks))


def measured_peak(strategy: str, tokens: int, limit: int | None = None) -> PeakBytes:
    """Of a forward and a backward pass on one rank.

    Raises:
        torch.OutOfMemoryError: if the device side exceeds ``limit``.
    """
    work = Attention("bands", strategy, world_of(tokens, 1, 8, 2, 64), 0, "cpu")
    inputs = naive.random_inputs(1, tokens, 8, 2, 64, torch.bfloat16)
    with MemoryAccount(inputs if work.offloaded else (), limit) as account:
        q, k, v, dout = inputs if work.offloaded else [x.clone() for x in inputs]
        _, _, saved = work.forward(QKV(q, k, v), None)
        work.backward(dout, saved, None)
    return account.peak


def traced_bytes(strategy: str, world: World) -> tuple[int, int]:
    """Bytes of the last rank, with its inputs, on the device and on the host."""
    spec = Spec.parse(strategy)
    info, problem = strategy_info(spec.name), world.problem
    method = implementation(info, spec.kwargs)
    peak = peak_bytes(method, operator_info("bands"), world, world.size - 1)
    tokens = world.keys.local_len
    inputs = problem.q_bytes(tokens) + problem.out_bytes(tokens) + problem.kv_bytes(tokens)
    offloaded = info.is_offloaded(spec.kwargs)
    return (peak.device, peak.host + inputs) if offloaded else (peak.device + inputs, 0)


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones do; 0 if none does."""
    high = 1
    while high <= most and fits(high):
        high *= 2
    low, high = high // 2, min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure(limit: int, most: int) -> None:
    print(f"measured: {limit >> 20} MiB, causal, 8:2 heads, head_dim 64, bfloat16, both passes\n")
    print("| strategy | longest sequence | peak of device, MiB | of host | seconds |")
    print("| --- | --- | --- | --- | --- |")
    step = 512

    for strategy in MEASURED:

        def fits(steps: int, strategy: str = strategy) -> bool:
            try:
                measured_peak(strategy, steps * step, limit)
            except torch.OutOfMemoryError:
                return False
            return True

        offloaded = "offload" in strategy
        steps = most // step if offloaded else longest(fits, most // step)
        start = time.perf_counter()
        peak = measured_peak(strategy, steps * step, limit)
        seconds = time.perf_counter() - start
        at_least = "at least " * offloaded
        print(
            f"| `{strategy}` | {at_least}{steps * step} | {peak.device / 2**20:.1f} | "
            f"{peak.host / 2**20:.1f} | {seconds:.1f} |",
            flush=True,
        )


def predict(device_bytes: float, host_bytes: float, ranks: int) -> None:
    print(
        f"\npredicted: {device_bytes / 1e9:.0f} GB a device, {host_bytes / 1e9:.0f} GB of host "
        "memory a rank, causal, 32:8 heads, head_dim 128, bfloat16, both passes\n"
    )
    print("| strategy, ranks | without offload | `offload=host` | peak of device | of host |")
    print("| --- | --- | --- | --- | --- |")
    for strategy in PREDICTED:
        size = 1 if strategy == "single" else ranks
        offloaded = f"{strategy}:offload=host,chunk={CHUNK}"

        def fits(method: str, tokens: int, size: int = size) -> bool:
            device, host = traced_bytes(method, world_of(tokens, size, 32, 8, 128))
            return device <= device_bytes and host <= host_bytes

        step = (CHUNK // 8) * size
        alone = step * longest(lambda n, s=strategy, t=step: fits(s, n * t), 1 << 16)
        step = CHUNK * size
        chunked = step * longest(lambda n, s=offloaded, t=step: fits(s, n * t), 1 << 16)
        device, host = traced_bytes(offloaded, world_of(chunked, size, 32, 8, 128))
        print(
            f"| `{strategy}`, {size} | {format_size(alone)} | {format_size(chunked)} | "
            f"{device / 1e9:.1f} GB | {host / 1e9:.0f} GB |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-mib", type=int, default=64)
    parser.add_argument("--most", type=int, default=32768, help="tokens to try at most")
    parser.add_argument("--device-gb", type=float, default=80)
    parser.add_argument("--host-gb", type=float, default=200)
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(options.limit_mib << 20, options.most)
    predict(options.device_gb * 1e9, options.host_gb * 1e9, options.ranks)


if __name__ == "__main__":
    main()
