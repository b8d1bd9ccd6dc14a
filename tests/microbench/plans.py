"""How long it takes to plan a mask for a blocked kernel: ours against FlexAttention's.

    python tests/microbench/plans.py [--tokens 131072] [--eager-tokens 8192] [--rounds 5]

Causal documents of random lengths.  Ours are the lists of `triton_band` (forward and transposed)
and the BlockMask that `flex` builds from the same tiles; theirs is ``create_block_mask``, compiled
(its compilation apart) and eager (which holds the whole mask: at fewer tokens).  All in blocks of
128.  Every plan is held against the others: same tiles, same full tiles.  Peak memory is the
largest resident size over what there was before, in a process of its own.
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
    """Causal documents, 500 tokens long on average, and the document of each token."""
    chance = np.random.default_rng(0)
    cuts = np.sort(chance.choice(np.arange(1, tokens), tokens // 500, replace=False))
    lens = np.diff([0, *cuts, tokens])
    return build("causal_document", tokens, doc_lens=lens.tolist()), np.repeat(
        np.arange(len(lens)), lens
    )


def ours(tokens: int) -> Any:
    from cpbench.kernels.triton.plan import plan_tiles

    mask, _ = mask_of(tokens)
    return lambda: (plan_tiles([mask], BLOCK, BLOCK), plan_tiles([mask.transpose()], BLOCK, BLOCK))


def our_flex(tokens: int) -> Any:
    from cpbench.kernels.flex import to_block_mask

    mask, _ = mask_of(tokens)
    return lambda: to_block_mask(mask, "cpu")


def theirs(tokens: int, compiled: bool) -> Any:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    _, of_token = mask_of(tokens)
    document = torch.as_tensor(of_token)

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (document[q] == document[k])

    make = torch.compile(create_block_mask) if compiled else create_block_mask
    return lambda: make(visible, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)


def tiles_of(found: Any) -> list[int]:
    """Partial and full tiles of each row, whoever planned."""
    if isinstance(found, tuple):
        items = found[0].lists.items[0]
        runs = found[0].lists.runs
        length = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
        partial = items[:, 4] - items[:, 3]
        full = length[items[:, 2]] - length[items[:, 1]]
    else:
        partial, full = found.kv_num_blocks.flatten(), found.full_kv_num_blocks.flatten()
    return [int(partial.sum()), int(full.sum())]


def one(who: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Times and memory of one planner, in this process."""
    planners = {
        "triton_band's lists, both ways": lambda: ours(tokens),
        "flex's BlockMask from tiles": lambda: our_flex(tokens),
        "create_block_mask, compiled": lambda: theirs(tokens, True),
        "create_block_mask, eager": lambda: theirs(tokens, False),
    }
    call = planners[who]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    found = call()
    first = time.perf_counter() - begun
    times = []
    for _ in range(rounds):
        begun = time.process_time()
        call()
        times.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "who": who, "tokens": tokens, "first_s": first, "median_s": statistics.median(times),
        "peak_mb": peak / 1024, "tiles": tiles_of(found),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--eager-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--who", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        print(json.dumps(one(options.who, options.tokens, options.rounds)))
        return
    rows = []
    for who, tokens, rounds in (
        ("triton_band's lists, both ways", options.tokens, options.rounds),
        ("flex's BlockMask from tiles", options.tokens, options.rounds),
        ("create_block_mask, compiled", options.tokens, 1),
        ("triton_band's lists, both ways", options.eager_tokens, options.rounds),
        ("create_block_mask, eager", options.eager_tokens, 1),
        ("triton_band's lists, both ways", 1 << 20, options.rounds),
        ("flex's BlockMask from tiles", 1 << 20, options.rounds),
    ):
        command = [sys.executable, __file__, "--who", who, "--tokens", str(tokens)]
        done = subprocess.run(
            [*command, "--rounds", str(rounds)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{who}, {tokens:,} tokens: {done.stderr.strip().splitlines()[-1]}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        base = next(r for r in rows if r["tokens"] == tokens)
        assert row["tiles"] == base["tiles"], "not the same mask"
        print(
            f"{who:<32}{tokens:>9,} tokens: first {row['first_s']:8.3f} s, then "
            f"{row['median_s'] * 1e3:10.1f} ms ({row['median_s'] / base['median_s']:7.1f}x), "
            f"{row['peak_mb']:7.0f} MB, tiles {row['tiles']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
