"""All registered strategies, with variants and layouts, on one gang of ranks: errors against
float64, fingerprints of the ranks, bytes traced and bytes counted.

Strategies are descriptions through the registry: a new one needs no change here.
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
from cpbench.api import Attention, find_disagreement
from cpbench.core import registry
from cpbench.core.operator import QKV, Unsupported
from cpbench.core.problem import Problem
from cpbench.parallel.comm import Comm
from cpbench.parallel.comm_torch import TorchComm
from cpbench.parallel.layout import build as build_layout
from cpbench.parallel.world import World

TOKENS = 41  # prime, so every layout pads
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
HEAD_DIM = 8
# query heads, key/value heads, dtype, head_dim of values: MHA, GQA, and fewer key/value heads than
# ranks
SHAPES = (
    (12, 12, "float32", 0),
    (24, 4, "bfloat16", 0),
    (24, 2, "float32", 0),
    (24, 4, "float32", 5),
    (24, 2, "bfloat16", 12),
)

EXPECTED_REFUSALS = ("divi", "too coarse")  # words in legitimate refusals


@dataclass(frozen=True)
class Combination:
    """One computation; ``nodes`` is ranks per node."""

    strategy: str
    layout: str
    mask: str
    heads_q: int
    heads_kv: int
    dtype: str
    head_dim_v: int = 0
    placement: str = ""
    nodes: int = 0
    queries: int = TOKENS  # the last tokens

    @property
    def problem(self) -> Problem:
        return Problem(
            batch=2, seq_q=self.queries, seq_k=TOKENS, heads_q=self.heads_q, heads_kv=self.heads_kv,
            head_dim=HEAD_DIM, head_dim_v=self.head_dim_v, dtype=self.dtype,
        )  # fmt: skip


@dataclass
class Outcome:
    """The outcome on one rank: a refusal, or errors by tensor and bytes by phase."""

    refused: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    fingerprint: tuple[str, int] = ("", 0)
    traced: dict[str, list[int]] = field(default_factory=dict)
    counted: dict[str, list[int]] = field(default_factory=dict)


def names() -> list[tuple[str, str, str]]:
    """(strategy with parameters, layout, placement) of all traced strategies of several ranks:
    defaults on every layout; variants and placements on two."""
    methods = []
    for name, info in registry.strategies_for("attention").items():
        if not info.traced or name == "single":
            continue
        methods += [(name, layout, "") for layout in info.layouts]
        layouts = info.layouts[:: max(len(info.layouts) - 1, 1)]
        methods += [(f"{name}:{text}", layout, "") for text in info.variants for layout in layouts]
        variants = [f"{name}:{text}" for text in info.variants[-1:]] or [name]
        methods += [(variants[0], layouts[0], axis) for axis in info.axes[:-1]]
    return methods


def combinations(size: int, stride: int = 4) -> Iterator[Combination]:
    """The combinations of one gang, cycling through shapes: every name with one mask of ``stride``;
    with 2, one of four for variants, and every mask for every strategy, on one layout at least
    (``cpbench verify`` has all layouts)."""
    nodes = next(n for n in range(max(size // 2, 1), 0, -1) if size % n == 0)
    turn = itertools.count()
    for number, (strategy, layout, placement) in enumerate(names()):
        step, first = stride, number
        if stride == 2:
            layouts = registry.strategies()[strategy.partition(":")[0]].layouts
            step, first = min(len(layouts), 2), layouts.index(layout)
            if ":" in strategy or placement:
                step, first = 4, number
        for mask in MASKS[first % step :: step]:
            shape = SHAPES[next(turn) % len(SHAPES)]
            yield Combination(strategy, layout, mask, *shape, placement, nodes)
        queries = (next(turn) % 3) * 3 + 1  # 1, 4 or 7
        yield Combination(strategy, layout, "causal", *SHAPES[2], placement, nodes, queries)


def run(rank: int, size: int, cases: list[Combination]) -> list[Outcome]:
    """The outcome of each case on this rank."""
    comm = TorchComm()
    return [outcome(case, comm) for case in cases]


def world_of(case: Combination, size: int) -> World:
    """The world of one case."""
    mask = masks.build(case.mask, TOKENS)
    keys = build_layout(case.layout, TOKENS, size, mask)
    mask = mask.crop(TOKENS - case.queries, TOKENS, 0, TOKENS)
    return World.of(case.problem, mask, keys, case.nodes, case.placement)


def outcome(case: Combination, comm: Comm) -> Outcome:
    """The outcome of one case on this rank."""
    world = world_of(case, comm.size)
    queries, keys = world.queries, world.keys
    try:
        work = Attention("bands", case.strategy, world, comm.rank, "cpu")
    except Unsupported as refusal:
        return Outcome(refused=str(refusal))
    assert work.trace is not None
    inputs, expected = _inputs_and_reference(
        case.heads_q, case.heads_kv, case.dtype, case.head_dim_v, case.mask, case.queries
    )
    layouts = (queries, keys, keys, queries)
    q, k, v, dout = (layout.shard(x, comm.rank) for layout, x in zip(layouts, inputs, strict=True))
    comm.traffic.clear()
    out, _, saved = work.forward(QKV(q, k, v), comm, need_lse=False)
    counted = {"fwd": _bytes(comm.traffic)}
    comm.traffic.clear()
    dq, dk, dv = work.backward(dout, saved, comm)
    counted["bwd"] = _bytes(comm.traffic)
    repeated_out, lse, _ = work.forward(QKV(q, k, v), comm)
    assert torch.equal(repeated_out, out)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    errors = {}
    for name in naive.TENSORS:
        axis, layout = 2 if name == "lse" else 1, keys if name in ("dk", "dv") else queries
        real = torch.as_tensor(layout.positions(comm.rank) < layout.seq_len).nonzero().flatten()
        reference = layout.shard(expected[name], comm.rank, dim=axis).index_select(axis, real)
        errors[name] = naive.error(results[name].index_select(axis, real), reference)
    traced = {phase: _bytes(trace) for phase, trace in work.trace.phases.items()}
    return Outcome("", errors, work.fingerprint, traced, counted)


def _bytes(traffic: Any) -> list[int]:
    """To every rank, to the device and to host memory."""
    return [*traffic.bytes_to, traffic.to_device, traffic.to_host]


@functools.cache
def _inputs_and_reference(
    heads_q: int, heads_kv: int, dtype: str, value_dim: int, mask: str, queries: int
) -> Any:
    first = TOKENS - queries
    q, k, v, dout = naive.random_inputs(
        2, TOKENS, heads_q, heads_kv, HEAD_DIM, getattr(torch, dtype), value_dim=value_dim
    )
    inputs = (q[:, first:], k, v, dout[:, first:])
    cropped = masks.build(mask, TOKENS).crop(first, TOKENS, 0, TOKENS)
    return inputs, naive.attention(*inputs, cropped)


def faults(case: Combination, ranks: list[Outcome], limit: dict[str, float]) -> list[str]:
    """Descriptions of all faults in the outcomes of the ranks; none for a legitimate refusal."""
    refusals = {outcome.refused for outcome in ranks}
    if refusals != {""}:
        refusal = min(refusals)
        if len(refusals) == 1 and any(words in refusal for words in EXPECTED_REFUSALS):
            return []
        return [f"{case}: refused: {ranks[0].refused}"]
    descriptions = []
    for rank, outcome in enumerate(ranks):
        for tensor, error in outcome.errors.items():
            if not error < limit[case.dtype]:
                descriptions.append(f"{case}, rank {rank}: {tensor} is off by {error:.2g}")
        if outcome.traced != outcome.counted:
            descriptions.append(
                f"{case}, rank {rank}: traced {outcome.traced}, sent {outcome.counted}"
            )
    disagreement = find_disagreement([outcome.fingerprint for outcome in ranks])
    return descriptions + ([f"{case}: {disagreement}"] if disagreement else [])
