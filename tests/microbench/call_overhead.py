"""Time that the public functions add to a call: host time per call of tiny problems, and of the
agreement of ranks.

    python tests/microbench/call_overhead.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.extend(map(str, Path(__file__).parents[1].glob("helpers/**/")))

from ranks import run_ranks

import cpbench
from cpbench import masks
from cpbench.layout import build as build_layout
from cpbench.parallel.comm import Control

CALLS = 300


def median_us(call: Callable[[], Any]) -> float:
    """Median time of a call."""
    times = []
    for _ in range(CALLS + 20):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[20:])


def _on_ranks(rank: int, size: int) -> tuple[float, float]:
    layout = build_layout("zigzag", 16 * size, size)
    mask = masks.build("causal", 16 * size)
    q = layout.shard(torch.randn(1, 16 * size, 2, 16), rank)
    control = Control(None)
    call = median_us(lambda: cpbench.distributed_attention(q, q, q, mask))
    return call, median_us(lambda: control.agree(5, ready=True))


def main() -> None:
    torch.set_num_threads(1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for tokens in (16, 256, 1024):
        q = torch.randn(1, tokens, 4, 64)
        mask = masks.build("causal", tokens)
        by_head = q.transpose(1, 2)
        plain = median_us(lambda: sdpa(by_head, by_head, by_head, is_causal=True))  # noqa: B023
        ours = median_us(lambda: cpbench.attention(q, q, q, mask))  # noqa: B023
        print(f"{tokens:5} tokens: sdpa {plain:8.0f} us, cpbench.attention {ours:8.0f} us")
    for size in (2, 4):
        ranks = run_ranks(size, _on_ranks)
        call, agreement = (max(times) for times in zip(*ranks, strict=True))
        print(f"{size} ranks: distributed_attention {call:.0f} us, of it agreement {agreement:.0f}")


if __name__ == "__main__":
    main()
