"""The sampled check: single rows and columns recomputed in float64 at the measured size.

This finds errors that only appear at size (index overflow, stale buffers, a last partial tile).  A
line is one row or column of one batch and key/value head, which is called a pair here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cpbench.core.problem import Problem
from cpbench.inputs import Recipe
from cpbench.masks.attn_mask import AttnMask
from cpbench.masks.dilated_mask import DilatedMask
from cpbench.masks.head_masks import Mask, distinct_masks
from cpbench.masks.slices import IntArray
from cpbench.verify.check import RankContext, Tensors, as_index
from cpbench.verify.errors import Errors, ErrorSums, Floats, TensorErrorSums, combined_errors
from cpbench.verify.fit import chunks, row_products

if TYPE_CHECKING:
    import torch

    from cpbench.api import Attention

SAMPLED_LINES = 64
TILES = (64, 128, 256)  # tile sizes whose last, partial tile is always sampled
QUERY_CHUNK = 1 << 14  # queries of a column that are recomputed at a time, at most


Statistics = tuple[Floats, Floats]  # lse and delta


class LineErrors(NamedTuple):
    """Errors of sampled lines, and how many were compared, over all ranks."""

    errors: Errors
    rows: int
    columns: int


def check_sampled(
    work: Attention,
    inputs: Tensors,
    results: Tensors,
    recipe: Recipe,
    seed: int,
    context: RankContext,
    statistics: Statistics | None = None,
) -> LineErrors:
    """Errors of sampled rows and columns at the measured size.

    Every rank recomputes rows and columns of its own tokens from regenerated global inputs.  All
    ranks together look at every pair.  Columns need the lse and delta of every query: the
    operator's own are gathered, which the rows check.

    Args:
        inputs: of this rank, from ``check.rank_inputs``.
        results: what ``check.run_pass`` returned for them.
        seed: of the choice of lines, the same on all ranks.
        statistics: of :func:`query_statistics`; None to gather them here.
    """
    statistics = statistics or query_statistics(work, inputs, results, context)
    compare = functools.partial(_compare_lines, work, results, recipe, seed, work.home, statistics)
    ranks = context.gather(context.compute(compare))
    errors = combined_errors([sums for sums, *_ in ranks])
    return LineErrors(errors, sum(n for _, n, _ in ranks), sum(n for *_, n in ranks))


def _compare_lines(
    work: Attention,
    results: Tensors,
    recipe: Recipe,
    seed: int,
    device: str,
    statistics: Statistics | None,
) -> tuple[ErrorSums, int, int]:
    """Error sums of the lines of a rank, and the numbers of its rows and columns."""
    import torch

    problem, world = work.problem, work.world
    reference = _ReferenceLines(problem, work.mask, recipe, device)
    queries, keys = (x.positions(work.rank) for x in (world.queries, world.keys))
    pairs = [(b, g) for b in range(problem.batch) for g in range(problem.heads_kv)]
    rows = sample_lines(work.mask, queries, seed)
    columns = sample_lines(work.mask.transpose(), keys, seed)
    rows_of_pair, columns_of_pair = (
        _assign_to_pairs(lines, len(pairs), work, seed) for lines in (rows, columns)
    )
    actual: dict[str, list[torch.Tensor]] = {}
    expected: dict[str, list[torch.Tensor]] = {}

    def append(name: str, value: torch.Tensor, reference_value: torch.Tensor) -> None:
        actual.setdefault(name, []).append(value)
        expected.setdefault(name, []).append(reference_value)

    for number, (b, g) in enumerate(pairs):
        reference.clear_cache()
        heads = slice(g * problem.group, (g + 1) * problem.group)
        for line in rows_of_pair[number]:
            row = reference.row(b, g, int(queries[line]))
            for name in [name for name in row if name in results]:
                value = results[name][b]
                value = value[:, line] if name == "lse" else value[line]
                append(name, value[heads], row[name])
        if statistics is None:
            continue
        lse_HS, delta_HS = (x[b] for x in statistics)
        for line in columns_of_pair[number]:
            column = reference.column(b, g, int(keys[line]), lse_HS, delta_HS)
            for name in column:
                append(name, results[name][b][line, g][None], column[name][None])
    sums = {
        name: TensorErrorSums.between(torch.cat(actual[name]), torch.cat(expected[name]))
        for name in actual
    }
    num_rows, num_columns = (
        sum(map(len, lines)) for lines in (rows_of_pair, columns_of_pair if statistics else [])
    )
    return sums, num_rows, num_columns


def _assign_to_pairs(
    lines: IntArray, num_pairs: int, work: Attention, seed: int
) -> list[list[int]]:
    """The lines of this rank by pair: lines and ranks take pairs in turn, until every line and,
    over all ranks, every pair has been taken.  The last pair, where an index overflows first,
    always gets the last line too."""
    by_pair: list[list[int]] = [[] for _ in range(num_pairs)]
    if len(lines):
        order = np.random.default_rng([seed, work.rank]).permutation(lines)
        for i in range(max(len(lines), -(-num_pairs // work.world.size))):
            pair = (i * work.world.size + work.rank + seed) % num_pairs
            by_pair[pair].append(int(order[i % len(lines)]))
        if lines[-1] not in by_pair[-1]:
            by_pair[-1].append(int(lines[-1]))
    return by_pair


def sample_lines(mask: Mask, positions: IntArray, seed: int) -> IntArray:
    """Sorted local indices of the sampled queries of a rank: those at edges, and others at
    random."""
    n = mask.seq_q
    columns = [0, 1, 2, 3] if mask.seq_q == mask.seq_k else [0, 1]
    corners = mask.slices[:, columns].reshape(-1)
    corners = np.concatenate([corners, corners - 1])
    corners = corners[np.linspace(0, len(corners) - 1, min(8, len(corners))).astype(int)]
    edges = np.concatenate([[0, n - 1], corners, *([n // t * t, n // t * t - 1] for t in TILES)])
    real = np.flatnonzero(positions < n)
    at_edges = real[np.isin(positions[real], edges)]
    ends = real[[0, -1]] if len(real) else real
    count = min(len(real), max(8, SAMPLED_LINES * len(positions) // max(n, 1)))
    rng = np.random.default_rng([seed, int(positions[0])])
    at_random = rng.choice(real, size=count, replace=False)
    return np.unique(np.concatenate([at_edges, ends, at_random])).astype(np.int64)


def query_statistics(
    work: Attention, inputs: Tensors, results: Tensors, context: RankContext
) -> Statistics | None:
    """lse and delta of all queries, ``[B, H, S]`` each, in global order, by which columns are
    checked; None without a backward pass or an lse.  Collective."""
    if not {"dq", "lse"} <= results.keys():
        return None
    import torch

    problem, layout = work.problem, work.world.queries

    def own(heads: slice) -> Statistics:
        dout, out = inputs["dout"][:, :, heads], results["out"][:, :, heads]
        delta = row_products(dout, out, torch.float64)
        return results["lse"][:, heads].double().cpu().numpy(), delta.cpu().numpy()

    lse, delta = np.empty((2, problem.batch, problem.heads_q, layout.padded_len))
    for heads in chunks(problem.heads_q, problem.batch * layout.padded_len):
        for rank, shards in enumerate(
            context.gather(context.compute(functools.partial(own, heads)))
        ):
            for gathered, shard in zip((lse, delta), shards, strict=True):
                gathered[:, heads, layout.positions(rank)] = shard
    return lse, delta


class _ReferenceLines:
    """Single rows and columns of the problem in float64, from regenerated inputs.

    Legend: R query heads of a group, T visible keys (or queries, for a column), D head dim.
    """

    def __init__(self, problem: Problem, mask: Mask, recipe: Recipe, device: str) -> None:
        self._problem, self._recipe, self._device = problem, recipe, device
        self._mask, self._transposed = mask, mask.transpose()
        # Adjacent query heads that share a mask.
        self._heads_per_mask = problem.group if isinstance(mask, AttnMask) else 1
        self._kv_cache: dict[str, torch.Tensor] = {}

    def clear_cache(self) -> None:
        """Drop the keys and values of the last batch and head; call before another one."""
        self._kv_cache.clear()

    def row(self, b: int, g: int, line: int) -> Tensors:
        """out and dq ``[R, D]`` and lse ``[R]`` of one query."""
        import torch

        rows = [self._row_of_heads(b, heads, line) for heads in self._head_ranges(g)]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _head_ranges(self, g: int) -> list[range]:
        """The query heads of a group, in ranges that share a mask."""
        first, end = g * self._problem.group, (g + 1) * self._problem.group
        step = self._heads_per_mask
        return [range(h, h + step) for h in range(first, end, step)]

    def _row_of_heads(self, b: int, heads: range, line: int) -> Tensors:
        import torch

        g = heads[0] // self._problem.group
        visible = self._visible(self._mask, heads, line)
        for name in ("k", "v"):
            if name not in self._kv_cache:
                tokens = np.arange(self._mask.seq_k)
                self._kv_cache[name] = self._make_input(name, b, [g], tokens)[:, 0]

        parts = list(chunks(len(visible), self._problem.head_dim))

        def load(name: str, number: int) -> torch.Tensor:
            return self._kv_cache[name][visible[parts[number]]].double()

        load_k = functools.lru_cache(maxsize=1)(functools.partial(load, "k"))  # often the only one
        q_RD = self._query_input("q", b, heads, np.array([line]))[:, 0]
        scale, backward = self._problem.softmax_scale, self._problem.backward
        scores_RT = torch.cat([q_RD @ load_k(n).T for n in range(len(parts))], -1) * scale
        lse_R = torch.logsumexp(scores_RT, -1)
        probs_RT = torch.exp(scores_RT - lse_R[:, None])
        out_RD = q_RD.new_zeros((len(q_RD), self._problem.value_dim))
        dq_RD, dprobs = torch.zeros_like(q_RD), []
        dout_RD = self._query_input("dout", b, heads, np.array([line]))[:, 0] if backward else None
        for n, part in enumerate(parts):
            v_TD = load("v", n)
            out_RD += probs_RT[:, part] @ v_TD
            if dout_RD is not None:
                dprobs.append(dout_RD @ v_TD.T)
        row = {"out": out_RD, "lse": lse_R}
        if dout_RD is not None:
            delta_R1 = (dout_RD * out_RD).sum(-1, keepdim=True)
            for n, part in enumerate(parts):
                dscores_RT = probs_RT[:, part] * (dprobs[n] - delta_R1) * scale
                dq_RD += dscores_RT @ load_k(n)
            row["dq"] = dq_RD
        return row

    def column(
        self,
        b: int,
        g: int,
        line: int,
        lse_HS: Floats,
        delta_HS: Floats,
    ) -> Tensors:
        """dk and dv ``[D]`` of one key, given the lse and delta of all queries."""
        import torch

        k_D, v_D = (self._kv_cache[name][line].double() for name in ("k", "v"))
        dk_D, dv_D = torch.zeros_like(k_D), torch.zeros_like(v_D)
        for heads, queries in self._visible_queries(g, line):
            q_RTD, dout_RTD = (self._query_input(name, b, heads, queries) for name in ("q", "dout"))
            head_slice = slice(heads.start, heads.stop)
            lse_RT, delta_RT = (
                torch.as_tensor(x[head_slice, queries], device=self._device)
                for x in (lse_HS, delta_HS)
            )
            scale = self._problem.softmax_scale
            probs_RT = torch.exp((q_RTD @ k_D) * scale - lse_RT)
            dscores_RT = probs_RT * (dout_RTD @ v_D - delta_RT) * scale
            dv_D += torch.einsum("rt,rtd->d", probs_RT, dout_RTD)
            dk_D += torch.einsum("rt,rtd->d", dscores_RT, q_RTD)
        return {"dk": dk_D, "dv": dv_D}

    def _visible_queries(self, g: int, line: int) -> Iterator[tuple[range, IntArray]]:
        """The queries that see one key, by heads that share a mask, in chunks."""
        for heads in self._head_ranges(g):
            queries = self._visible(self._transposed, heads, line).cpu().numpy()
            elements = len(heads) * self._problem.head_dim
            for part in chunks(len(queries), elements, QUERY_CHUNK):
                yield heads, queries[part]

    def _query_input(self, name: str, b: int, heads: range, tokens: IntArray) -> torch.Tensor:
        """q or dout of some query heads, ``[R, tokens, D]`` float64."""
        return self._make_input(name, b, heads, tokens).double().transpose(0, 1)

    def _make_input(
        self, name: str, b: int, heads: list[int] | range, tokens: IntArray
    ) -> torch.Tensor:
        return self._recipe.make(
            name, self._problem, tokens, batches=[b], heads=heads, device=self._device
        )[0]

    def _visible(self, mask: Mask, heads: range, line: int) -> torch.Tensor:
        """Indices of the keys that one query sees in heads that share a mask; a key that is
        visible several times is repeated."""
        if isinstance(mask, DilatedMask):
            return as_index(mask.visible_keys(heads[0], line), self._device)
        masks = distinct_masks(mask)
        return as_index(visible_keys(masks[heads[0] % len(masks)], line), self._device)


def visible_keys(mask: AttnMask, line: int) -> IntArray:
    """Indices of the keys that one query sees; a key that is visible several times is repeated."""
    slices = mask.slices[(mask.slices[:, 0] <= line) & (line < mask.slices[:, 1])]
    _, _, k0, k1, lo, hi = slices.T
    start, end = np.maximum(k0, line + lo), np.minimum(k1, line + hi + 1)
    ranges = [np.arange(a, b) for a, b in zip(start, end, strict=True)]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)
