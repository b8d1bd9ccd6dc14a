"""Every registered strategy, with its variants and layouts, on one gang of ranks: errors against
float64, what ranks agree on, bytes traced and bytes counted.

A new strategy is found through the registry: nothing here names one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import naive
import torch

from cpbench import masks
from cpbench.api import Attention, disagreement
from cpbench.core import registry
from cpbench.core.operator import Unsupported
from cpbench.core.problem import Problem
from cpbench.parallel.comm import Comm, TorchComm
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World

TOKENS = 41  # divides by nothing, so every layout pads
DOCS = "doc_lens=[1,9,13,2,16]"
MASKS = (
    "full",
    "causal",
    f"causal_document:{DOCS}",
    "sliding_window_causal:window=7",
    f"share_question:{DOCS}",
    f"prefix_lm_document:prefix_len=4,{DOCS}",
    "streaming:num_sinks=2,window=5",
    "global_sliding_window:num_global=3,window=4",
    f"block_causal_document:block_size=4,{DOCS}",
)
# query heads, key/value heads, dtype: MHA, GQA, and fewer key/value heads than ranks
SHAPES = ((12, 12, "float32"), (24, 4, "bfloat16"), (24, 2, "float32"))

SOUND = ("divi", "too coarse")  # words of a refusal that is right


@dataclass(frozen=True)
class Combination:
    """One computation; ``nodes`` is ranks per node."""

    strategy: str
    layout: str
    mask: str
    heads_q: int
    heads_kv: int
    dtype: str
    placement: str = ""
    nodes: int = 0
    queries: int = TOKENS  # the last ones

    @property
    def problem(self) -> Problem:
        return Problem(
            batch=2, seq_q=self.queries, seq_k=TOKENS, heads_q=self.heads_q, heads_kv=self.heads_kv,
            head_dim=8, dtype=self.dtype,
        )  # fmt: skip


@dataclass
class Outcome:
    """What one rank found: a refusal, or errors by tensor, and bytes by phase."""

    refused: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    digest: tuple[str, int] = ("", 0)
    traced: dict[str, list[int]] = field(default_factory=dict)
    counted: dict[str, list[int]] = field(default_factory=dict)


def names() -> list[tuple[str, str, str]]:
    """(strategy with parameters, layout, placement) of all that is traced and has several ranks:
    defaults on every layout; variants and placements on two."""
    found = []
    for name, info in sorted(registry.strategies().items()):
        if not info.traced or name == "single":
            continue
        found += [(name, layout, "") for layout in info.layouts]
        some = info.layouts[:: max(len(info.layouts) - 1, 1)]
        found += [(f"{name}:{text}", layout, "") for text in info.variants for layout in some]
        variants = [f"{name}:{text}" for text in info.variants[-1:]] or [name]
        found += [(variants[0], some[0], axis) for axis in info.axes[:-1]]
    return found


def combinations(size: int, reduced: bool) -> Iterator[Combination]:
    """What one gang computes: every name with every mask, shapes in turn; or (reduced) every name
    with a few masks."""
    nodes = next(n for n in range(max(size // 2, 1), 0, -1) if size % n == 0)
    turn = itertools.count()
    for strategy, layout, placement in names():
        chosen = MASKS[next(turn) % 2 :: 4] if reduced or ":" in strategy or placement else MASKS
        for mask in chosen:
            shape = SHAPES[next(turn) % len(SHAPES)]
            yield Combination(strategy, layout, mask, *shape, placement, nodes)
        few = (next(turn) % 3) * 3 + 1  # of queries: 1, 4 or 7
        yield Combination(strategy, layout, "causal", *SHAPES[2], placement, nodes, few)


def run(rank: int, size: int, wanted: list[Combination]) -> list[Outcome]:
    """The outcome of each on this rank."""
    comm = TorchComm()
    return [outcome(one, comm) for one in wanted]


def outcome(one: Combination, comm: Comm) -> Outcome:
    """Of one combination on this rank."""
    mask = masks.build(one.mask, TOKENS)
    keys = build_layout(one.layout, TOKENS, comm.size, mask)
    mask = mask.crop(TOKENS - one.queries, TOKENS, 0, TOKENS)
    world = World.of(one.problem, mask, keys, one.nodes, one.placement)
    queries = world.queries
    try:
        work = Attention("bands", one.strategy, world, comm.rank, "cpu")
    except Unsupported as refusal:
        return Outcome(refused=str(refusal))
    assert work.trace is not None
    whole, want = _problem_and_answer(one.heads_q, one.heads_kv, one.dtype, one.mask, one.queries)
    owners = (queries, keys, keys, queries)
    q, k, v, dout = (o.shard(x, comm.rank) for o, x in zip(owners, whole, strict=True))
    comm.traffic.clear()
    out, _, saved = work.forward(q, k, v, comm, need_lse=False)
    counted = {"fwd": comm.traffic.bytes_to}
    comm.traffic.clear()
    dq, dk, dv = work.backward(dout, saved, comm)
    counted["bwd"] = list(comm.traffic.bytes_to)
    again, lse, _ = work.forward(q, k, v, comm)
    assert torch.equal(again, out)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    errors = {}
    for name in naive.TENSORS:
        axis, dealt = 2 if name == "lse" else 1, keys if name in ("dk", "dv") else queries
        real = torch.as_tensor(dealt.positions(comm.rank) < dealt.seq_len).nonzero().flatten()
        mine = dealt.shard(want[name], comm.rank, dim=axis).index_select(axis, real)
        errors[name] = naive.error(found[name].index_select(axis, real), mine)
    traced = {phase: seen.bytes_to for phase, seen in work.trace.phases.items()}
    return Outcome("", errors, work.digest, traced, counted)


@functools.cache
def _problem_and_answer(heads_q: int, heads_kv: int, dtype: str, mask: str, queries: int) -> Any:
    first = TOKENS - queries
    q, k, v, dout = naive.random_inputs(2, TOKENS, heads_q, heads_kv, 8, getattr(torch, dtype))
    whole = (q[:, first:], k, v, dout[:, first:])
    seen = masks.build(mask, TOKENS).crop(first, TOKENS, 0, TOKENS)
    return whole, naive.attention(*whole, seen)


def faults(one: Combination, ranks: list[Outcome], limit: dict[str, float]) -> list[str]:
    """What is wrong with the outcomes of all ranks, in words; nothing for a sound refusal."""
    refusals = {outcome.refused for outcome in ranks}
    if refusals != {""}:
        sound = len(refusals) == 1 and any(word in min(refusals) for word in SOUND)
        return [] if sound else [f"{one}: refused: {ranks[0].refused}"]
    found = []
    for rank, outcome in enumerate(ranks):
        for tensor, error in outcome.errors.items():
            if not error < limit[one.dtype]:
                found.append(f"{one}, rank {rank}: {tensor} is off by {error:.2g}")
        if outcome.traced != outcome.counted:
            found.append(f"{one}, rank {rank}: traced {outcome.traced}, sent {outcome.counted}")
    words = disagreement([outcome.digest for outcome in ranks])
    return found + ([f"{one}: {words}"] if words else [])
