"""Time and memory to plan a mask for a blocked kernel, compared with FlexAttention.

    python tests/microbench/plans.py [--tokens 131072] [--eager-tokens 8192] [--rounds 5]

Causal documents of random lengths, in blocks of 128.  Planners of cpbench are the tile lists of
`triton_band` (forward and transposed) and the BlockMask that `flex` builds from the same tiles.
They are compared with torch's ``create_block_mask``, compiled (compilation timed separately) and
eager (at fewer tokens, since it materialises the mask).  All plans must have the same number of
partial and of full tiles.  Peak memory is the increase of the maximum resident size, in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from cpbench.masks import build
from cpbench.masks.attn_mask import AttnMask

BLOCK = 128


def mask_of(tokens: int) -> tuple[AttnMask, np.ndarray]:
    """Causal documents of 500 tokens on average, and the document of each token."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, tokens), tokens // 500, replace=False))
    lens = np.diff([0, *cuts, tokens])
    return build("causal_document", tokens, doc_lens=lens.tolist()), np.repeat(
        np.arange(len(lens)), lens
    )


def triton_lists(tokens: int) -> Any:
    from cpbench.kernels.triton.plan import plan_tiles

    mask, _ = mask_of(tokens)
    return lambda: (plan_tiles([mask], BLOCK, BLOCK), plan_tiles([mask.transpose()], BLOCK, BLOCK))


def flex_block_mask(tokens: int) -> Any:
    from cpbench.kernels.flex import to_block_mask

    mask, _ = mask_of(tokens)
    return lambda: to_block_mask(mask, "cpu")


def torch_block_mask(tokens: int, compiled: bool) -> Any:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    _, document_of_token = mask_of(tokens)
    document = torch.as_tensor(document_of_token)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (document[q] == document[k])

    build_mask = torch.compile(create_block_mask) if compiled else create_block_mask
    return lambda: build_mask(visible, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)


def tile_counts(plan: Any) -> list[int]:
    """Partial and full tiles of a plan of any planner."""
    if isinstance(plan, tuple):
        items = plan[0].lists.items[0]
        runs = plan[0].lists.runs
        length = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
        partial = items[:, 4] - items[:, 3]
        full = length[items[:, 2]] - length[items[:, 1]]
    else:
        partial, full = plan.kv_num_blocks.flatten(), plan.full_kv_num_blocks.flatten()
    return [int(partial.sum()), int(full.sum())]


def measure(planner: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Times and memory of one planner, in this process."""
    planners = {
        "triton_band's lists, both ways": lambda: triton_lists(tokens),
        "flex's BlockMask from tiles": lambda: flex_block_mask(tokens),
        "create_block_mask, compiled": lambda: torch_block_mask(tokens, True),
        "create_block_mask, eager": lambda: torch_block_mask(tokens, False),
    }
    call = planners[planner]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    plan = call()
    first = time.perf_counter() - start
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "planner": planner, "tokens": tokens, "first_s": first,
        "median_s": statistics.median(times), "peak_mb": peak / 1024, "tiles": tile_counts(plan),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--eager-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--planner", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.planner:
        print(json.dumps(measure(options.planner, options.tokens, options.rounds)))
        return
    rows = []
    for planner, tokens, rounds in (
        ("triton_band's lists, both ways", options.tokens, options.rounds),
        ("flex's BlockMask from tiles", options.tokens, options.rounds),
        ("create_block_mask, compiled", options.tokens, 1),
        ("triton_band's lists, both ways", options.eager_tokens, options.rounds),
        ("create_block_mask, eager", options.eager_tokens, 1),
        ("triton_band's lists, both ways", 1 << 20, options.rounds),
        ("flex's BlockMask from tiles", 1 << 20, options.rounds),
    ):
        command = [sys.executable, __file__, "--planner", planner, "--tokens", str(tokens)]
        result = subprocess.run(
            [*command, "--rounds", str(rounds)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            print(f"{planner}, {tokens:,} tokens: {result.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(result.stdout.splitlines()[-1])
        rows.append(row)
        base = next(r for r in rows if r["tokens"] == tokens)
        assert row["tiles"] == base["tiles"], "not the same mask"
        print(
            f"{planner:<32}{tokens:>9,} tokens: first {row['first_s']:8.3f} s, then "
            f"{row['median_s'] * 1e3:10.1f} ms ({row['median_s'] / base['median_s']:7.1f}x), "
            f"{row['peak_mb']:7.0f} MB, tiles {row['tiles']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
