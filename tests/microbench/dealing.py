"""How tokens of packed documents may be dealt to ranks: balance, traffic, and the time to plan.

    python tests/microbench/dealing.py [--draws 8] [--json FILE]

One row for each way: the largest area of a rank over the mean, and the keys that a rank is sent,
medians over draws of three corpora, beside the lower bounds
(``cpbench.parallel.kv_requirements.least_keys``, at a balance of 1.02).  ``greedy`` deals chunks of
512 tokens, the largest area first, to the rank with the least so far that has room (a heap), as
planners that look at balance alone do.  A ring moves the keys of all others whatever the layout.
Planning is processor time on one core: dealing alone, and all that one rank must do anew when the
batch changes (masks, dealing, who sends what).
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
from cpbench.parallel.kv_requirements import least_keys, needed
from cpbench.parallel.layout import Layout, area_matrix, build
from cpbench.parallel.trace import TracedOperator
from cpbench.parallel.world import World

CORPORA = ("pile", "prolong64k", "prolong512k")
SIZES = ((1 << 17, 8), (1 << 19, 64), (1 << 20, 96), (1 << 22, 512), (1 << 20, 1024))
LAYOUTS = ("contiguous", "zigzag", "zigzag_document", "striped", "greedy", "dispatch")
CHUNK = 512
BALANCE = 1.02


def greedy(mask: AttnMask, ranks: int) -> Layout:
    """Chunks to the rank with the least area that has room, largest first."""
    chunk = min(CHUNK, mask.seq_q // ranks // 8)
    count = -(-mask.seq_q // (chunk * ranks)) * ranks
    seen = np.zeros(count * chunk, np.int64)
    seen[: mask.seq_q] = mask.row_counts()
    areas = seen.reshape(count, chunk).sum(1)
    heap = [(0, rank) for rank in range(ranks)]
    given: list[list[int]] = [[] for _ in range(ranks)]
    for i in np.argsort(-areas, kind="stable").tolist():
        area, rank = heapq.heappop(heap)
        given[rank].append(i)
        if len(given[rank]) < count // ranks:
            heapq.heappush(heap, (area + int(areas[i]), rank))
    rows = [(rank, i * chunk, chunk) for rank in range(ranks) for i in sorted(given[rank])]
    return Layout("greedy", mask.seq_q, ranks, 1, np.array(rows))


def of_name(name: str, mask: AttnMask, ranks: int) -> Layout:
    return greedy(mask, ranks) if name == "greedy" else build(name, mask.seq_k, ranks, mask)


def keys_of_ranks(mask: AttnMask, layout: Layout) -> np.ndarray:
    """Keys that each rank must be sent; of a striped layout the mean, for causal documents: a key
    goes to as many ranks as there are among its queries, of which the first is its owner's."""
    if layout.step == 1:
        parcels = needed(mask, layout, layout)
        return np.bincount(parcels.receiver, weights=parcels.length, minlength=layout.world_size)
    queries = mask.transpose().row_counts()
    copies = np.minimum(queries, layout.world_size).sum() - mask.seq_k
    return np.full(layout.world_size, copies / layout.world_size)


def cpu_seconds(work: Callable[[], Any], rounds: int = 3) -> float:
    """Median processor time."""
    took = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        took.append(time.process_time() - begun)
    return statistics.median(took)


def planning(text: str, seq_len: int, ranks: int) -> tuple[float, float]:
    """Seconds to deal, and for one rank to plan a changed batch from its document lengths."""
    mask = masks.build(Spec.parse(text), seq_len)
    problem = Problem(batch=1, seq_q=seq_len, seq_k=seq_len, heads_q=32, heads_kv=8, head_dim=128,
                      dtype="bfloat16")  # fmt: skip
    strategy = implementation(strategy_info("dispatch"), {})
    operator = TracedOperator(operator_info("bands"))

    def step() -> None:
        fresh = AttnMask.from_slices(seq_len, seq_len, mask.slices)
        world = World.of(problem, fresh, build("dispatch", seq_len, ranks, fresh))
        strategy.prepare(operator, world, ranks // 2)

    return cpu_seconds(lambda: build("dispatch", seq_len, ranks, mask)), cpu_seconds(step)


def measure(corpus: str, seq_len: int, ranks: int, draws: int) -> list[dict[str, Any]]:
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    least, text = [], ""
    for seed in range(draws):
        text = f"causal_document:corpus={corpus},seed={seed}"
        mask = masks.build(Spec.parse(text), seq_len)
        least.append(least_keys(mask, ranks, BALANCE) / ranks)
        for name in LAYOUTS:
            try:
                layout = (
                    greedy(mask, ranks) if name == "greedy" else build(name, seq_len, ranks, mask)
                )
            except ValueError:
                continue  # more pieces than zigzag_document cuts
            areas, keys = area_matrix(mask, layout, layout).sum(1), keys_of_ranks(mask, layout)
            balance = areas.max() / areas.mean()
            held = balance <= BALANCE and least[-1]  # the bound is one for deals that balance
            over = keys.mean() / least[-1] if held else math.nan
            found.setdefault(name, []).append((balance, keys.mean(), keys.max(), over))
    dealing_s, planning_s = planning(text, seq_len, ranks)
    rows = []
    for name, seen in found.items():
        columns = zip(*seen, strict=True)
        balance, mean, most, over = (statistics.median(column) for column in columns)
        rows.append({
            "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": name,
            "draws": len(seen), "max/mean area": balance,
            "worst": max(row[0] for row in seen), "keys": mean, "most keys": most,
            "ring/keys": seq_len * (ranks - 1) / ranks / mean if mean else None,
            "keys/bound": None if math.isnan(over) else over,
        })  # fmt: skip
    rows.append({
        "tokens": seq_len, "ranks": ranks, "corpus": corpus, "layout": "(lower bound)",
        "draws": draws, "max/mean area": BALANCE, "keys": statistics.median(least),
        "dealing_s": dealing_s, "planning_s": planning_s,
    })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    given = parser.parse_args()
    rows = []
    for seq_len, ranks in SIZES:
        for corpus in CORPORA:
            some = measure(corpus, seq_len, ranks, given.draws)
            rows += some
            bound = some[-1]
            print(f"\n{corpus}, {seq_len // 1024}K tokens on {ranks} ranks, {given.draws} draws: "
                  f"dealt in {bound['dealing_s'] * 1e3:.0f} ms, a changed batch planned in "
                  f"{bound['planning_s'] * 1e3:.0f} ms")  # fmt: skip
            print("| layout | max/mean area | worst draw | keys a rank | most | ring / keys | "
                  "keys / bound |\n| --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
            for row in some:
                cells = [
                    f"{row[key]:{form}}" if row.get(key) is not None else "–"
                    for key, form in (("max/mean area", ".3f"), ("worst", ".3f"), ("keys", ",.0f"),
                                      ("most keys", ",.0f"), ("ring/keys", ".1f"),
                                      ("keys/bound", ".2f"))
                ]  # fmt: skip
                print(f"| {row['layout']} | {' | '.join(cells)} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
