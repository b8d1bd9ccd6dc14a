"""Odds of finding planted faults, by check: the table of docs/method.md.

``python -m tests.microbench.planted_faults [--tries 40] [--tokens 1k,16k,64k]``

Results of a right pass are spoilt in one place, another one in every try, and each check is asked
about them.  The check of tiles is complete here; when it has time for a share of the lines only, it
finds about that share.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cpbench import masks
from cpbench.api import Attention
from cpbench.core import tolerance
from cpbench.core.problem import Problem
from cpbench.core.spec import parse_size
from cpbench.inputs import Recipe
from cpbench.parallel.layout import build
from cpbench.parallel.world import World
from cpbench.verify import check
from cpbench.verify.at_size import check_sampled, query_statistics
from cpbench.verify.fingerprint import Fingerprinter, describe_difference
from cpbench.verify.tiles import check_tiles

HEADS, HEAD_DIM, WINDOW = 8, 32, 512
Results = dict[str, torch.Tensor]
Fault = Callable[[Results, np.random.Generator], None]


def _bad_tile(x: torch.Tensor, rng: np.random.Generator) -> None:
    """128 rows of one head in the wrong order."""
    start, head = rng.integers(x.shape[1] // 128) * 128, rng.integers(x.shape[2])
    x[0, start : start + 128, head] = x[0, start : start + 128, head].flip(0)


def _zero_row(x: torch.Tensor, rng: np.random.Generator) -> None:
    x[0, rng.integers(x.shape[1]), rng.integers(x.shape[2])] = 0


def _scaled_head(x: torch.Tensor, rng: np.random.Generator) -> None:
    x[0, :, rng.integers(x.shape[2])] *= 1.02


def _last_pair(x: torch.Tensor, rng: np.random.Generator) -> None:
    x[0, x.shape[1] // 2 :, -1] = 1.0


def _in(name: str, spoil: Callable[[torch.Tensor, np.random.Generator], None]) -> Fault:
    return lambda results, rng: spoil(results[name], rng)


FAULTS: dict[str, Fault] = {
    **{f"128 rows of {name} in one head reversed": _in(name, _bad_tile) for name in ("out", "dk")},
    **{f"one row of {name} in one head zero": _in(name, _zero_row) for name in ("out", "dq")},
    "out of one head 2 % too large": _in("out", _scaled_head),
    "out of the last head wrong in the second half": _in("out", _last_pair),
}


def odds(tokens: int, dtype: str, tries: int, seed: int = 0) -> list[dict[str, Any]]:
    """For each fault, how many of the tries each check found."""
    mask = masks.build("sliding_window_causal", tokens, window=min(WINDOW, tokens // 2))
    problem = Problem(
        batch=1, seq_q=tokens, seq_k=tokens, heads_q=HEADS, heads_kv=HEADS, head_dim=HEAD_DIM,
        dtype=dtype,
    )  # fmt: skip
    work = Attention(
        "bands", "single", World.of(problem, mask, build("contiguous", tokens, 1)), 0, "cpu"
    )
    context, recipe, rng = check.RankContext("cpu"), Recipe(seed), np.random.default_rng(seed)
    inputs = check.rank_inputs(work, recipe, "cpu")
    right = check.run_pass(work, inputs, None)
    fingerprinter = Fingerprinter(work)
    expected = fingerprinter.take(right)
    rows = []
    for name, fault in FAULTS.items():
        found = dict.fromkeys(("sampled", "tiles", "timed"), 0)
        for number in range(tries):
            results = {key: x.clone() for key, x in right.items()}
            fault(results, rng)
            arguments = (work, inputs, results, recipe, seed + number)
            statistics = query_statistics(work, inputs, results, context)
            lines = check_sampled(*arguments, context, statistics)
            tiles = check_tiles(*arguments, 1e9, context, statistics)
            for kind, errors in (("sampled", lines.errors), ("tiles", tiles.errors)):
                found[kind] += tolerance.violation(errors, dtype, work.op.info) is not None
            taken = fingerprinter.take(results)
            found["timed"] += describe_difference(expected, taken, 0.0) is not None
        rows.append({"fault": name, "tokens": tokens, "tries": tries, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=40)
    parser.add_argument("--tokens", default="1k,16k,64k")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| fault | tokens | sampled | tiles | timed, in any call |\n| --- " * 1 + "| --- " * 4 + "|"
    )
    for text in arguments.tokens.split(","):
        for row in odds(parse_size(text), arguments.dtype, arguments.tries):
            counts = " | ".join(
                f"{row[kind]} of {row['tries']}" for kind in ("sampled", "tiles", "timed")
            )
            print(f"| {row['fault']} | {text} | {counts} |", flush=True)


if __name__ == "__main__":
    main()
