"""Layouts for packed documents: load imbalance, traffic, and the time to plan.

    python tests/microbench/dispatch_solver.py [--seeds 8] [--only dispatch] [--json FILE]

One row per layout: load imbalance (max/mean area) and keys received per rank, medians over mask
seeds of three corpora, with the lower bound (``cpbench.parallel.kv_requirements.min_keys_sent``, at
a load imbalance of 1.02).  ``greedy`` assigns chunks of 512 tokens, the largest area first, to the
rank with the least area that has room (a heap), as planners do that only balance the load.  A ring
sends the keys of all other ranks for any layout.  Planning is CPU time on one core: the assignment
alone, and all that one rank recomputes when the batch changes (masks, assignment, transfers).

A second table has the keys that layout ``dispatch`` sends to other nodes of 8 ranks (of 4 for 8
ranks), per rank: to every rank that needs them (``by=rank``), once per node (``by=node``), and the
lower bound for nodes.  A third one has batches in which every document has room on a rank.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from cpbench.parallel.tracing.traced_operator import TracedOperator
from cpbench.parallel.world import World
from cpbench.strategies.dispatch.relays import plan_transfers

CORPORA = ("pile", "prolong64k", "prolong512k")
SIZES = ((1 << 17, 8), (1 << 19, 64), (1 << 20, 96), (1 << 22, 512), (1 << 20, 1024))
LAYOUTS = ("contiguous", "zigzag", "zigzag_document", "striped", "greedy", "dispatch")
CHUNK = 512
RANKS_PER_NODE = 8
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


def cpu_seconds(work: Callable[[], Any], rounds: int = 5) -> float:
    """The shortest CPU time, which other processes on the machine disturb least."""
    timings = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        timings.append(time.process_time() - start)
    return min(timings)


def world_of(mask: AttnMask, layout: Layout) -> World:
    """A computation on nodes of 8 ranks, of 4 if there are only 8."""
    problem = Problem(batch=1, seq_q=mask.seq_q, seq_k=mask.seq_k, heads_q=32, heads_kv=8,
                      head_dim=128, dtype="bfloat16")  # fmt: skip
    return World.of(problem, mask, layout, min(RANKS_PER_NODE, layout.world_size // 2))


def planning_seconds(seed_masks: Sequence[AttnMask], ranks: int) -> dict[str, float]:
    """Median seconds to assign tokens, and for one rank to plan a new batch (the last one), by rank
    and by node."""
    operator, mask = TracedOperator(operator_info("bands")), seed_masks[-1]
    assignments = [functools.partial(build, "dispatch", x.seq_k, ranks, x) for x in seed_masks]
    seconds = {"assign_s": statistics.median(cpu_seconds(assign) for assign in assignments)}
    for by in ("rank", "node"):
        strategy = implementation(strategy_info("dispatch"), {"by": by})

        def step(strategy: Any = strategy) -> None:
            new_mask = AttnMask.from_slices(mask.seq_q, mask.seq_k, mask.slices)  # nothing cached
            world = world_of(new_mask, build("dispatch", mask.seq_k, ranks, new_mask))
            strategy.prepare(operator, world, ranks // 2)

        seconds[f"by_{by}_s"] = cpu_seconds(step)
    return seconds


def keys_across(mask: AttnMask, layout: Layout) -> dict[str, float]:
    """The keys that a rank sends to other nodes, by rank and by node, and the bound for nodes."""
    world = world_of(mask, layout)
    per_node, ranks = world.ranks_per_node, world.size
    transfers = required_transfers(mask, layout, layout)
    crosses = transfers.receiver // per_node != transfers.owner // per_node
    cast = plan_transfers(world, 1, True)
    by_node = cast.across.length.sum() + cast.passing.length.sum()
    return {
        "by rank": float(transfers.length[crosses].sum()) / ranks,
        "by node": float(by_node) / ranks if crosses.any() else 0.0,
        "bound": min_keys_sent(mask, ranks, MAX_IMBALANCE, per_node) / ranks,
    }


def document_masks(corpus: str, seq_len: int, most_tokens: int = 0) -> Iterator[AttnMask]:
    """Causal documents of mask seeds 0, 1, …; only those without documents longer than that."""
    for seed in itertools.count():
        mask = masks.build(Spec.parse(f"causal_document:corpus={corpus},seed={seed}"), seq_len)
        if not most_tokens or np.diff(mask.diagonal_blocks(), append=seq_len).max() <= most_tokens:
            yield mask


def measure(
    corpus: str, ranks: int, seed_masks: list[AttnMask], layouts: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per layout, and the row of the lower bound."""
    samples: dict[str, list[tuple[float, float, float, float]]] = {}
    bounds, across, seq_len = [], [], seed_masks[0].seq_k
    for mask in seed_masks:
        bounds.append(min_keys_sent(mask, ranks, MAX_IMBALANCE) / ranks)
        for name in layouts:
            try:
                layout = build_layout(name, mask, ranks)
            except ValueError:
                continue  # more segments than zigzag_document takes
            areas, keys = area_matrix(mask, layout, layout).sum(1), keys_per_rank(mask, layout)
            imbalance = areas.max() / areas.mean()
            bounded = imbalance <= MAX_IMBALANCE and bounds[-1]  # the bound is for balanced layouts
            ratio = keys.mean() / bounds[-1] if bounded else math.nan
            samples.setdefault(name, []).append((imbalance, keys.mean(), keys.max(), ratio))
            if name == "dispatch":
                across.append(keys_across(mask, layout))
    rows = []
    for name, layout_samples in samples.items():
        columns = zip(*layout_samples, strict=True)
        imbalance, mean, maximum, _ = (statistics.median(column) for column in columns)
        ratios = [sample[3] for sample in layout_samples if not math.isnan(sample[3])]
        rows.append({
            "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": name,
            "seeds": len(layout_samples), "max/mean area": imbalance,
            "worst": max(sample[0] for sample in layout_samples), "keys": mean,
            "max keys": maximum,
            "ring/keys": seq_len * (ranks - 1) / ranks / mean if mean else None,
            "keys/bound": statistics.median(ratios) if ratios else None,
            "worst keys/bound": max(ratios, default=None),
            "below 2": f"{sum(ratio < 2 for ratio in ratios)} of {len(ratios)}",
        })  # fmt: skip
    rows.append({
        "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": "(lower bound)",
        "seeds": len(seed_masks), "max/mean area": MAX_IMBALANCE,
        "keys": statistics.median(bounds), **planning_seconds(seed_masks, ranks),
        "across": {kind: statistics.median(x[kind] for x in across) for kind in across[0]},
    })  # fmt: skip
    return rows


def table(columns: Sequence[str]) -> str:
    """The head of a table."""
    return f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"


def show_layouts(rows: list[dict[str, Any]]) -> None:
    """Print the table of the layouts of one setting."""
    bound = rows[-1]
    print(f"\n{bound['corpus']}, {bound['tokens'] // 1024}K tokens, {bound['ranks']} ranks, "
          f"{bound['seeds']} mask seeds: assigned in {bound['assign_s'] * 1e3:.0f} ms, a new batch "
          f"planned in {bound['by_rank_s'] * 1e3:.0f} ms")  # fmt: skip
    print(table(("layout", "max/mean area", "worst seed", "keys per rank", "max", "ring / keys",
                 "keys / bound")))  # fmt: skip
    for row in rows:
        cells = [
            f"{row[key]:{form}}" if row.get(key) is not None else "–"
            for key, form in (("max/mean area", ".3f"), ("worst", ".3f"), ("keys", ",.0f"),
                              ("max keys", ",.0f"), ("ring/keys", ".1f"), ("keys/bound", ".2f"))
        ]  # fmt: skip
        print(f"| {row['layout']} | {' | '.join(cells)} |", flush=True)


def show_across(bounds: list[dict[str, Any]]) -> None:
    """Print the table of keys that cross nodes."""
    print("\nKeys that a rank sends to other nodes under layout dispatch, medians")
    print(table(("tokens, ranks, corpus", "by rank", "by node", "bound", "planning by node")))
    for row in bounds:
        keys = " | ".join(f"{row['across'][kind]:,.0f}" for kind in ("by rank", "by node", "bound"))
        print(f"| {row['tokens'] // 1024}K, {row['ranks']}, {row['corpus']} | {keys} | "
              f"{row['by_node_s'] * 1e3:.0f} ms |")  # fmt: skip


def show_short(rows: list[dict[str, Any]], bounds: list[dict[str, Any]]) -> None:
    """Print the table of batches in which every document has room on a rank."""
    print("\nEvery document has room on a rank: layout dispatch, medians over mask seeds")
    print(table(("tokens, ranks, corpus, seeds", "max/mean area", "keys per rank", "bound",
                 "keys / bound", "worst", "below 2", "assignment")))  # fmt: skip
    for row, bound in zip(rows, bounds, strict=True):
        print(f"| {row['tokens'] // 1024}K, {row['ranks']}, {row['corpus']}, {row['seeds']} | "
              f"{row['max/mean area']:.3f} | {row['keys']:,.0f} | {bound['keys']:,.0f} | "
              f"{row['keys/bound']:.2f} | {row['worst keys/bound']:.2f} | {row['below 2']} | "
              f"{bound['assign_s'] * 1e3:.0f} ms |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="mask seeds per corpus")
    parser.add_argument("--short-seeds", type=int, default=32, help="of batches of short documents")
    parser.add_argument("--ranks", nargs="+", type=int, help="only settings with so many ranks")
    parser.add_argument("--only", nargs="+", default=LAYOUTS, choices=LAYOUTS, help="layouts")
    parser.add_argument("--json", type=Path, help="also write the rows to FILE")
    options = parser.parse_args()
    layouts = dict.fromkeys((*options.only, "dispatch"))
    rows, bounds = [], []
    for seq_len, ranks in SIZES:
        for corpus in CORPORA if ranks in (options.ranks or [ranks]) else ():
            seed_masks = list(itertools.islice(document_masks(corpus, seq_len), options.seeds))
            measured = measure(corpus, ranks, seed_masks, tuple(layouts))
            show_layouts(measured)
            rows += measured
            bounds.append(measured[-1])
    show_across(bounds)
    seq_len, ranks = SIZES[0]
    short = []
    for corpus in CORPORA:
        fitting = document_masks(corpus, seq_len, seq_len // ranks)
        seed_masks = list(itertools.islice(fitting, options.short_seeds))
        short.append(measure(corpus, ranks, seed_masks, ("dispatch",)))
    show_short(*([part[i] for part in short] for i in (0, -1)))
    if options.json:
        options.json.write_text(
            json.dumps(rows + [row for part in short for row in part], indent=1)
        )


if __name__ == "__main__":
    main()
