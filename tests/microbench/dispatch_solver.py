"""Layouts for packed documents: load imbalance, traffic, and the time to plan.

    python tests/microbench/dispatch_solver.py [--seeds 8] [--json FILE]

One row per layout: load imbalance (max/mean area) and keys received per rank, medians over mask
seeds of three corpora, with the lower bound (``cpbench.parallel.kv_requirements.min_keys_sent``, at
a load imbalance of 1.02).  ``greedy`` assigns chunks of 512 tokens, the largest area first, to the
rank with the least area that has room (a heap), as planners do that only balance the load.  A ring
sends the keys of all other ranks for any layout.  Planning is CPU time on one core: the assignment
alone, and all that one rank recomputes when the batch changes (masks, assignment, transfers).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench import masks
from cpbench.core.problem import Problem
from cpbench.core.registry import implementation, operator_info, strategy_info
from cpbench.core.spec import Spec
from cpbench.masks.attn_mask import AttnMask
from cpbench.parallel.kv_requirements import min_keys_sent, required_transfers
from cpbench.parallel.layout import Layout, area_matrix, build
from cpbench.parallel.trace import TracedOperator
from cpbench.parallel.world import World

CORPORA = ("pile", "prolong64k", "prolong512k")
SIZES = ((1 << 17, 8), (1 << 19, 64), (1 << 20, 96), (1 << 22, 512), (1 << 20, 1024))
LAYOUTS = ("contiguous", "zigzag", "zigzag_document", "striped", "greedy", "dispatch")
CHUNK = 512
MAX_IMBALANCE = 1.02


def greedy(mask: AttnMask, ranks: int) -> Layout:
    """Assign chunks to the rank with the least area that has room, largest first."""
    chunk = min(CHUNK, mask.seq_q // ranks // 8)
    count = -(-mask.seq_q // (chunk * ranks)) * ranks
    row_areas = np.zeros(count * chunk, np.int64)
    row_areas[: mask.seq_q] = mask.row_counts()
    areas = row_areas.reshape(count, chunk).sum(1)
    heap = [(0, rank) for rank in range(ranks)]
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    for i in np.argsort(-areas, kind="stable").tolist():
        area, rank = heapq.heappop(heap)
        assigned[rank].append(i)
        if len(assigned[rank]) < count // ranks:
            heapq.heappush(heap, (area + int(areas[i]), rank))
    rows = [(rank, i * chunk, chunk) for rank in range(ranks) for i in sorted(assigned[rank])]
    return Layout("greedy", mask.seq_q, ranks, 1, np.array(rows))


def build_layout(name: str, mask: AttnMask, ranks: int) -> Layout:
    """A registered layout, or ``greedy``."""
    return greedy(mask, ranks) if name == "greedy" else build(name, mask.seq_k, ranks, mask)


def keys_per_rank(mask: AttnMask, layout: Layout) -> np.ndarray:
    """The keys that each rank receives; for a striped layout the mean, for causal documents: a key
    is sent to as many ranks as own its queries, of which the first is its owner."""
    if layout.step == 1:
        transfers = required_transfers(mask, layout, layout)
        return np.bincount(
            transfers.receiver, weights=transfers.length, minlength=layout.world_size
        )
    queries = mask.transpose().row_counts()
    copies = np.minimum(queries, layout.world_size).sum() - mask.seq_k
    return np.full(layout.world_size, copies / layout.world_size)


def cpu_seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """The median CPU time."""
    timings = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        timings.append(time.process_time() - start)
    return statistics.median(timings)


def planning_seconds(text: str, seq_len: int, ranks: int) -> tuple[float, float]:
    """Seconds to assign tokens, and for one rank to plan a new batch from document lengths."""
    mask = masks.build(Spec.parse(text), seq_len)
    problem = Problem(batch=1, seq_q=seq_len, seq_k=seq_len, heads_q=32, heads_kv=8, head_dim=128,
                      dtype="bfloat16")  # fmt: skip
    strategy = implementation(strategy_info("dispatch"), {})
    operator = TracedOperator(operator_info("bands"))

    def step() -> None:
        new_mask = AttnMask.from_slices(seq_len, seq_len, mask.slices)  # nothing cached
        world = World.of(problem, new_mask, build("dispatch", seq_len, ranks, new_mask))
        strategy.prepare(operator, world, ranks // 2)

    return cpu_seconds(lambda: build("dispatch", seq_len, ranks, mask)), cpu_seconds(step)


def measure(corpus: str, seq_len: int, ranks: int, mask_seeds: int) -> list[dict[str, Any]]:
    """One row per layout, and the row of the lower bound."""
    samples: dict[str, list[tuple[float, float, float, float]]] = {}
    bounds, text = [], ""
    for seed in range(mask_seeds):
        text = f"causal_document:corpus={corpus},seed={seed}"
        mask = masks.build(Spec.parse(text), seq_len)
        bounds.append(min_keys_sent(mask, ranks, MAX_IMBALANCE) / ranks)
        for name in LAYOUTS:
            try:
                layout = build_layout(name, mask, ranks)
            except ValueError:
                continue  # more segments than zigzag_document takes
            areas, keys = area_matrix(mask, layout, layout).sum(1), keys_per_rank(mask, layout)
            imbalance = areas.max() / areas.mean()
            bounded = imbalance <= MAX_IMBALANCE and bounds[-1]  # the bound is for balanced layouts
            ratio = keys.mean() / bounds[-1] if bounded else math.nan
            samples.setdefault(name, []).append((imbalance, keys.mean(), keys.max(), ratio))
    assign_s, planning_s = planning_seconds(text, seq_len, ranks)
    rows = []
    for name, layout_samples in samples.items():
        columns = zip(*layout_samples, strict=True)
        imbalance, mean, maximum, ratio = (statistics.median(column) for column in columns)
        rows.append({
            "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": name,
            "seeds": len(layout_samples), "max/mean area": imbalance,
            "worst": max(sample[0] for sample in layout_samples), "keys": mean,
            "max keys": maximum,
            "ring/keys": seq_len * (ranks - 1) / ranks / mean if mean else None,
            "keys/bound": None if math.isnan(ratio) else ratio,
        })  # fmt: skip
    rows.append({
        "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": "(lower bound)",
        "seeds": mask_seeds, "max/mean area": MAX_IMBALANCE, "keys": statistics.median(bounds),
        "assign_s": assign_s, "planning_s": planning_s,
    })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="mask seeds per corpus")
    parser.add_argument("--json", type=Path, help="also write the rows to FILE")
    options = parser.parse_args()
    rows = []
    for seq_len, ranks in SIZES:
        for corpus in CORPORA:
            corpus_rows = measure(corpus, seq_len, ranks, options.seeds)
            rows += corpus_rows
            bound = corpus_rows[-1]
            print(f"\n{corpus}, {seq_len // 1024}K tokens, {ranks} ranks, {options.seeds} mask "
                  f"seeds: assigned in {bound['assign_s'] * 1e3:.0f} ms, a new batch planned in "
                  f"{bound['planning_s'] * 1e3:.0f} ms")  # fmt: skip
            print("| layout | max/mean area | worst seed | keys per rank | max | ring / keys | "
                  "keys / bound |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
            for row in corpus_rows:
                cells = [
                    f"{row[key]:{form}}" if row.get(key) is not None else "–"
                    for key, form in (("max/mean area", ".3f"), ("worst", ".3f"), ("keys", ",.0f"),
                                      ("max keys", ",.0f"), ("ring/keys", ".1f"),
                                      ("keys/bound", ".2f"))
                ]  # fmt: skip
                print(f"| {row['layout']} | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
